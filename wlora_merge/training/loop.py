"""One training: its optimizer, its batches, and the state with which it can be taken up again.

It knows parameters and steps. It does not know which candidates there are, nor what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..fit_options import FitOptions
from ..mixture.attachment import attachment_of
from ..mixture.new_lora import new_parameters
from ..mixture.weights import mixture_weights
from .candidates import Candidate
from .run import Split
from .scoring import Judged

if TYPE_CHECKING:
    from .learner import Learner


NEW_RATES = {False: 1e-3, True: 2e-3}
"""Learning rates of a new adapter: by the model's own loss, and by how each example is predicted from the others."""


def logit_rate(options: FitOptions, normalize: str) -> float:
    """The learning rate of the logits, or of free weights, whose steps are steps of the mixture weights themselves."""
    return options.learning_rate or (0.02 if normalize == "none" else 0.05)


@dataclass
class Trained:
    """What a training gave: its steps, the loss of the last, what was judged, whether it ran to its end.

    `judged` is by the step and the interpolation of the new adapter.
    `learned` says that it stopped before its last step, as the shots were learned.
    `candidate` is what was trained, with the weights that a search found; `evaluations` how many of the
    search were made, None where time allowed all.
    """

    steps: int = 0
    loss: float = math.nan
    judged: dict[tuple[int, float], Judged] = field(default_factory=dict)
    complete: bool = True
    tensors: list[torch.Tensor] = field(default_factory=list)
    history: list[tuple[int, float]] = field(default_factory=list)
    candidate: Candidate | None = None
    evaluations: int | None = None
    learned: bool = False


@dataclass(frozen=True)
class Best:
    """The lowest loss on held-out rows so far, the step at which it was, and what had been trained by then."""

    loss: float
    step: int
    tensors: list[torch.Tensor]


class Loop:
    """One training: its optimizer, its batches, and the state with which it can be taken up again.

    Args:
        parameters: what is trained, the head's last.
        uniform_head: the head's parameters trained on uniform composition, where the candidate ends between it and what it learns.
    """

    def __init__(
        self,
        learner: Learner,
        candidate: Candidate,
        split: Split,
        parameters: list[nn.Parameter],
        uniform_head: list[torch.Tensor],
    ) -> None:
        self.learner, self.candidate, self.parameters = learner, candidate, parameters
        self.left_out, self.steps = learner.situation.left_out, split.steps
        self.batches = learner.batches(split.rows, split.steps)
        self.done, self.best = 0, Best(math.inf, 0, [])
        self.uniform = [*self.tensors()[: len(parameters) - len(uniform_head)], *uniform_head]
        model, options = learner.model, learner.run.options
        head = [model.get_parameter(name) for name in learner.placement.head_start]
        factors = new_parameters(model)
        self.rising = {id(lora_B) for lora_B in factors[1::2]}
        others = {id(p) for p in (*head, *factors)}
        groups = [
            {
                "params": [p for p in parameters if id(p) not in others],
                "lr": logit_rate(options, candidate.normalize),
            },
            {"params": factors, "lr": options.new_adapter_learning_rate or NEW_RATES[self.left_out]},
            {"params": [p for p in head if id(p) in {id(q) for q in parameters}], "lr": options.head_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(learner.device.type, enabled=options.precision == "fp16")

    def step(self, step: int) -> float:
        """One optimizer step; the mean loss of its batches over all processes."""
        while self.done < step - 1:  # a training taken up again passes over the batches that it has had
            next(self.batches)
            self.done += 1
        self.done = step
        if self.left_out:  # rates fall to zero: the last steps no longer move what the head is solved on
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 - (step - 1) / self.steps)
        loss = self._backward(next(self.batches))
        self.scaler.step(self.optimizer)  # not where a gradient overflowed
        self.scaler.update()
        return loss

    def _backward(self, batches: list[list[int]]) -> float:
        learner = self.learner
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        loss_sum = self._predicted(batches) if self.left_out else self._shared(batches)
        self.scaler.unscale_(self.optimizer)  # after the sum: what overflowed on one process did so on all
        if self.candidate.learned and self.candidate.pull:
            (self.candidate.pull * _distance(learner.model)).backward()  # type: ignore[no-untyped-call]
        return float(loss_sum)

    def _predicted(self, batches: list[list[int]]) -> torch.Tensor:
        """Gradients of the loss by which each example is predicted from the others, of a whole batch: all processes do the same."""
        losses = []
        for batch in batches:
            loss = self.learner.left_out(batch) / len(batches)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _shared(self, batches: list[list[int]]) -> torch.Tensor:
        """Gradients of the model's own loss, of which each process computes a share."""
        learner = self.learner
        total = sum(map(learner.items, batches))
        loss_sum = torch.zeros(1, device=learner.device)
        for batch in batches:
            mine = batch[learner.run.team.rank :: learner.run.team.size]
            share = learner.items(mine) / max(total, 1)
            # a rank without rows runs along for nothing: where layers are sharded, all must meet
            loss = learner.loss(mine or batch[:1]) * share
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        learner.run.team.sum([loss_sum, *(p.grad for p in self.parameters if p.grad is not None)])
        return loss_sum

    def tensors(self) -> list[torch.Tensor]:
        """Copies of what is trained."""
        return [p.detach().clone() for p in self.parameters]

    def interpolate(self, new: float) -> None:
        """Leave what is trained as far from uniform composition as the candidate says, and the new adapter's change `new` times that.

        That is WiSE-FT, https://arxiv.org/abs/2109.01903. lora_B starts at zero, where the new adapter changes nothing.
        """
        share = self.candidate.interpolation
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.uniform, strict=True):
                far = share * new if id(parameter) in self.rising else share
                if far != 1:
                    parameter.copy_(torch.lerp(value, parameter, far))

    def is_past_its_best(self, result: Trained, patience: int) -> bool:
        """Whether so many judgements since the best had no lower loss; the last one counts as the best where it has."""
        judged = result.judged[result.steps, self.candidate.new_interpolation]
        if judged.loss < self.best.loss:
            self.best = Best(judged.loss, result.steps, self.tensors())
            return False
        return len({step for step, _ in result.judged if step > self.best.step}) >= patience

    def saved(self, result: Trained) -> dict[str, Any]:
        """All that `restore` needs, as plain containers and tensors."""
        return {
            "steps": result.steps,
            "loss": result.loss,
            "history": list(result.history),
            "judged": {point: vars(judged) for point, judged in result.judged.items()},
            "tensors": self.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "best": [self.best.loss, self.best.step, self.best.tensors],
        }

    def restore(self, saved: dict[str, Any]) -> Trained:
        """Go on where a killed run saved."""
        restore(self.parameters, saved["tensors"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        judged = {point: Judged(**row) for point, row in saved["judged"].items()}
        self.best = Best(*saved["best"])
        return Trained(saved["steps"], saved["loss"], judged, history=saved["history"])


def restore(parameters: Sequence[nn.Parameter], tensors: Sequence[torch.Tensor]) -> None:
    """Put what a training gave back in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, tensors, strict=True):
            parameter.copy_(value)


def _distance(model: nn.Module) -> torch.Tensor:
    """N · mean over groups of Σ_n (v̂_n - 1/N)²: 0 for uniform composition, N - 1 for one adapter alone."""
    attachment = attachment_of(model)
    weights = mixture_weights(attachment.weights, attachment.normalize, attachment.temperature)
    n = weights.shape[-1]
    return n * (weights - 1 / n).square().sum(-1).mean()
