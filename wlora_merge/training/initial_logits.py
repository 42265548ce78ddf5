"""Where the logits of a fit start: numbers, a mixture folder, or a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import NEW_FOLDER
from ..errors import MixtureError
from ..fit_options import FitOptions, check_together
from ..mixture.groups import group_of
from ..mixture.mixture import Mixture

if TYPE_CHECKING:
    import torch

    from ..models.base_model import BaseModel


def like_start(options: FitOptions) -> FitOptions:
    """The options, with the granularity, normalize and delta_scale of the mixture folder to start from, where there is one.

    Raises:
        MixtureError: logits are to start from free weights, or free weights from logits; or options that exclude each other then.
    """
    given = options.initial_logits
    if not isinstance(given, str) or not Path(given).is_dir():
        return options
    start = Mixture.load(given)
    if not start.combination.is_linear:
        raise MixtureError(
            f"initial_logits {given}: its delta weights are combined by {start.combination.method}, which no fit trains: give a "
            "mixture that was made with method linear."
        )
    normalize = options.normalize or start.normalize
    if (normalize == "none") != (start.normalize == "none"):
        raise MixtureError(
            f"initial_logits {given}: it holds {'free weights' if start.normalize == 'none' else 'logits'} (normalize: "
            f"{start.normalize}), which cannot start normalize: {normalize}; leave --normalize out, or give another mixture."
        )
    scale = start.delta_scale if options.delta_scale is None else options.delta_scale
    granularity = options.granularity or start.granularity
    found = replace(options, normalize=normalize, granularity=granularity, delta_scale=scale)
    check_together(found)
    return found


def _scale(options: FitOptions) -> float:
    """Where a learned delta_scale starts: at 1, or at that of the mixture folder to start from."""
    given = options.initial_logits
    learned = options.delta_scale == "learned"  # else nobody asks, and the folder is not read again
    return Mixture.load(given).delta_scale if learned and isinstance(given, str) and Path(given).is_dir() else 1.0


@dataclass(frozen=True)
class Start:
    """Where a fit starts: the logits (free weights), and a learned delta_scale.

    Attributes:
        logits: (the model's groups, granularity) -> [G, N], or None for uniform composition.
    """

    logits: Callable[[dict[str, list[str]], str], torch.Tensor | None]
    scale: float


def find_start(options: FitOptions, names: list[str], base: BaseModel) -> Start:
    """Where the options say that a fit starts.

    Args:
        options: the options of the fit.
        names: of the adapters.
        base: the opened base model.
    """
    return Start(_logits(options, names, base), _scale(options))


def _logits(options: FitOptions, names: list[str], base: BaseModel) -> Any:
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
    table = _logit_table(Path(given), options.temperature)
    for name in {name: None for row in table.values() for name in row}:
        if name not in names:
            trained = Path(given) / NEW_FOLDER  # if the adapter is the one that the mixture's own fit trained
            raise MixtureError(
                f"{given}: has logits of {name!r}, and no adapter of that name is given (they are {', '.join(names)}): give "
                f"--adapter {name}={trained if trained.is_dir() else 'PATH'} too, or logits without it."
            )

    def read(groups: dict[str, list[str]], granularity: str) -> torch.Tensor:
        """The file's logits [G, N], one row for each of the model's groups."""
        stored = {
            key: group_of([*base.find_modules(modules[0]), key][0], granularity) for key, modules in groups.items()
        }
        keys = [key if key in table else stored[key] for key in groups]
        missing = [g for g in keys if g not in table] or [n for g in keys for n in names if n not in table[g]]
        if missing:
            raise MixtureError(
                f"{given}: has no logit of {missing[0]!r}; its groups are {', '.join(list(table)[:3])}, ...: give one with the same "
                "granularity and adapters."
            )
        return torch.tensor([[float(table[g][n]) for n in names] for g in keys])

    return read


def _logit_table(path: Path, temperature: float) -> dict[str, dict[str, float]]:
    import torch

    if path.is_dir():
        mixture = Mixture.load(path)
        values = mixture.wlora_weights
        if mixture.normalize != "none":  # its own temperature may have been another
            lowest = torch.finfo(torch.float32).min
            values = (temperature * mixture.mixture_weights.double().log()).clamp(min=lowest).float()
        rows = zip(mixture.groups, values.tolist(), strict=True)
        return {group: dict(zip(mixture.adapter_names, row, strict=True)) for group, row in rows}
    try:
        table = json.loads(path.read_bytes())
        return {str(g): {str(n): float(x) for n, x in row.items()} for g, row in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MixtureError(
            f"initial_logits {path}: expected numbers, a mixture folder, or a JSON file {{group: {{adapter: logit}}}} ({error})."
        ) from error
