"""Which adapters a command or a recipe takes: those named one by one, and those of a folder or a list that can be mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.find import find_adapters
from ..constants import LINEAR, PRUNING
from ..data.tasks import get_task

if TYPE_CHECKING:
    from ..adapters.adapter import AdapterSpec


def given_adapters(adapters: Iterable[AdapterSpec], lists: Sequence[str | Path]) -> list[AdapterSpec]:
    """The adapters named, and behind them those of each folder or list.

    Raises:
        AdapterError: as `find_adapters`.
    """
    return [*adapters, *(found for path in lists for found in find_adapters(path))]


def mixable_adapters(base: str | Path, given: Sequence[AdapterSpec], options: Mapping[str, Any]) -> list[AdapterSpec]:
    """Those of the adapters that a mix, or a fit, with these options can mix on the base; of weights that are given each has one, so
    all stay.

    Raises:
        AdapterError: as `mixable`.
    """
    from ..mixture.compatibility import mixable

    if options.get("weights") is not None:
        return list(given)
    asked: dict[str, Any] = {name: options.get(name) for name in ("modules_to_save", "resize_vocab", "residual")}
    asked["method"] = options["method"] if options.get("method") in PRUNING else LINEAR
    if "data" in options and get_task(options["task"]).has_head:  # which the fit trains in the place of theirs
        asked["modules_to_save"] = asked["modules_to_save"] or "drop"
    return [*mixable(base, given, **asked)]
