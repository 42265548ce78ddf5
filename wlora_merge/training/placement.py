"""Candidates as they are put on a model: weights, delta_scale, new adapter, and the head back at its start.

It knows the attached model. It knows neither examples nor losses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import nn

from ..constants import SCALE_PARAMETER
from ..fit_options import FitOptions
from ..mixture.attach import regroup
from ..mixture.attachment import attachment_of
from ..mixture.new_lora import place_new
from ..mixture.weights import mixture_weights, uniform_start
from .candidates import Candidate
from .initial_logits import Start


class Placement:
    """Puts one candidate after another on an attached model.

    Args:
        model: with its adapters attached.
        options: of the fit.
        start: where the logits (free weights) and a learned delta_scale start.

    Attributes:
        names: of the columns of weights.
        given: of the adapters that have files; a combination of all is one more column.
        head_start: the head's parameters as they are when a candidate is placed, by name.
        everywhere: whether a new adapter lies on every linear layer of the blocks.
        scale_of: rows of a head -> how many times uniform composition free weights are, where nothing else is trained.
    """

    def __init__(self, model: nn.Module, options: FitOptions, start: Start) -> None:
        self.model, self.options, self.start = model, options, start
        attachment = attachment_of(model)
        self.names = [a.name for a in attachment.adapters]
        self.given = [a.name for a in attachment.given]
        self.head_start: dict[str, torch.Tensor] = {}
        self.everywhere = False
        self.scale_of: Callable[[Sequence[int]], float] = lambda rows: 1.0

    def remember_head(self) -> None:
        """Let the head start from what it is now."""
        names = attachment_of(self.model).head
        self.head_start = {name: self.model.get_parameter(name).detach().clone() for name in names}

    def place(self, candidate: Candidate, rows: Sequence[int] = ()) -> list[nn.Parameter]:
        """Put a candidate's weights on the model, and the head back to its start; the parameters that make it, the head's last.

        Args:
            candidate: the candidate.
            rows: of the head, which choose the weights where nothing is trained beside them; none: uniform composition.
        """
        alone = candidate.learned and not candidate.trained and candidate.normalize == "none" and len(rows) > 0
        own_start = self.start_row(rows) if alone else None
        with torch.no_grad():
            weights = regroup(self.model, candidate.granularity, candidate.normalize)
            groups = attachment_of(self.model).groups
            start = (
                self.start.logits(groups, candidate.granularity) if candidate.learned else torch.tensor(candidate.row)
            )
            if start is None and own_start is not None:
                start = torch.tensor(own_start)
            if start is not None:
                weights.copy_(start.to(weights).expand_as(weights))
            for name, value in self.head_start.items():
                self.model.get_parameter(name).copy_(value)
        made = [weights] if candidate.learned else []
        weights.requires_grad_(candidate.learned and candidate.trains_weights)
        made += self._place_scale(candidate)
        made += place_new(self.model, candidate.new_adapter, self.options.seed, everywhere=self.everywhere)
        return made + [self.model.get_parameter(name) for name in self.head_start]

    def start_row(self, rows: Sequence[int]) -> tuple[float, ...]:
        """The row of free weights where nothing is trained beside a head."""
        scale = self.scale_of(rows)
        return tuple(scale * weight for weight in self.even_row())

    def place_row(self, row: Sequence[float], normalize: str, scale: float | None = None) -> Hashable:
        """Put one row of weights for all modules on the model, without a new adapter; a name for this state of the model.

        Args:
            row: [N], logits or free weights.
            normalize: of the row.
            scale: the delta_scale; None: that of the options.
        """
        with torch.no_grad():
            weights = regroup(self.model, "global", normalize)
            weights.copy_(torch.tensor(row).to(weights).expand_as(weights))
        place_new(self.model, 0, 0)
        given = self.options.delta_scale
        fixed = 1.0 if given is None or isinstance(given, str) else float(given)
        attachment_of(self.model).delta_scale = fixed if scale is None else scale
        return self.state()

    def state(self) -> Hashable:
        """A name for the model's state as it is now; None where modules have weights of their own, or a new adapter is there."""
        attachment, weights = attachment_of(self.model), self._mixture_weights()
        if attachment.new or not bool((weights == weights[:1]).all()):
            return None
        row = (weights[0] * float(attachment.delta_scale)).tolist()
        return tuple(round(share, 7) for share in row), attachment.normalize == "present"

    def even_row(self) -> list[float]:
        """Free weights of uniform composition; where the model has the combination of all, that alone."""
        combines = len(self.names) - len(self.given)
        return [0.0] * len(self.given) + [1.0] if combines else uniform_start(len(self.names), "none")

    def place_uniform(self) -> Hashable:
        """Put uniform composition on the model, or the combination of all; a name for this state of it."""
        return self.place_row(self.even_row(), "none")

    def _place_scale(self, candidate: Candidate) -> list[nn.Parameter]:
        attachment, given = attachment_of(self.model), self.options.delta_scale
        if candidate.scale is not None or not isinstance(given, str):
            fixed = given if candidate.scale is None else candidate.scale
            attachment.delta_scale = 1.0 if fixed is None else float(fixed)
            return []
        scale = self.model.get_parameter(SCALE_PARAMETER)
        scale.data.fill_(self.start.scale if candidate.learned else 1.0)
        scale.requires_grad_(candidate.learned)
        attachment.delta_scale = scale
        return [scale] if candidate.learned else []

    def weights(self) -> dict[str, float]:
        """The mean mixture weight of each adapter over the groups, as they are now."""
        return dict(zip(self.names, self._mixture_weights().mean(0).tolist(), strict=True))

    def used(self) -> list[str]:
        """Names of the adapters that have a weight anywhere."""
        return [name for name, used in zip(self.names, self._mixture_weights().any(0).tolist(), strict=True) if used]

    def _mixture_weights(self) -> torch.Tensor:
        """[G, N], as they are now."""
        attachment = attachment_of(self.model)
        return mixture_weights(attachment.weights.detach(), attachment.normalize, attachment.temperature)
