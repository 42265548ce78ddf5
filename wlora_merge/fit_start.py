"""Where the logits of a fit start: numbers, a mixture folder, or a JSON file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MixtureError
from .fit_options import FitOptions
from .mixture import Mixture
from .names import group_of

if TYPE_CHECKING:
    import torch

    from .base_model import BaseModel


def like_start(options: FitOptions) -> FitOptions:
    """The options, with the granularity and normalize of the mixture folder to start from, where there is one.

    Raises:
        MixtureError: logits are to start from free weights, or free weights from logits.
    """
    given = options.initial_logits
    if not isinstance(given, str) or not Path(given).is_dir():
        return options
    start = Mixture.load(given)
    normalize = options.normalize or start.normalize
    if (normalize == "none") != (start.normalize == "none"):
        raise MixtureError(
            f"initial_logits {given}: it holds {'free weights' if start.normalize == 'none' else 'logits'} (normalize: "
            f"{start.normalize}), which cannot start normalize: {normalize}; leave --normalize out, or give another mixture."
        )
    return replace(options, normalize=normalize, granularity=options.granularity or start.granularity)


def initial_logits(options: FitOptions, names: list[str], base: BaseModel) -> Any:
    """(the model's groups, granularity) -> the [G, N] logits that the user gives, or None for uniform composition.

    A file calls its groups as the base's files call their modules, or as the model does.
    """
    import torch

    given = options.initial_logits
    if given is None:
        return lambda groups, granularity: None
    if not isinstance(given, str):
        row = torch.tensor([float(x) for x in given])
        return lambda groups, granularity: row.expand(len(groups), -1)
    table = _logit_table(Path(given))

    def read(groups: dict[str, list[str]], granularity: str) -> torch.Tensor:
        stored = {key: group_of(base.find_module(modules[0]) or key, granularity) for key, modules in groups.items()}
        keys = [key if key in table else stored[key] for key in groups]
        missing = [g for g in keys if g not in table] or [n for g in keys for n in names if n not in table[g]]
        if missing:
            raise MixtureError(
                f"{given}: has no logit of {missing[0]!r}; its groups are {', '.join(list(table)[:3])}, ...: give one with the same "
                "granularity and adapters."
            )
        return torch.tensor([[float(table[g][n]) for n in names] for g in keys])

    return read


def _logit_table(path: Path) -> dict[str, dict[str, float]]:
    if path.is_dir():
        mixture = Mixture.load(path)
        rows = zip(mixture.groups, mixture.wlora_weights.tolist(), strict=True)
        return {group: dict(zip(mixture.adapter_names, row, strict=True)) for group, row in rows}
    try:
        table = json.loads(path.read_bytes())
        return {str(g): {str(n): float(x) for n, x in row.items()} for g, row in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MixtureError(
            f"initial_logits {path}: expected numbers, a mixture folder, or a JSON file {{group: {{adapter: logit}}}} ({error})."
        ) from error
