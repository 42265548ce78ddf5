"""The mix workflow: a mixture without fitting. Uniform composition, or the weights that the user gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .adapters import load_adapters
from .base_model import open_base
from .errors import AdapterError, MixtureError
from .mixture import NORMALIZE, Mixture, adapter_ref, base_ref, make_groups, mixture_weights, prefixes, uniform
from .names import TASKS, nearest
from .stacking import modules_of, refuse_overlap, stack, stack_tensors, tensors_of


def mix(
    base: str | Path,
    adapters: Iterable[str | Path | tuple[str, str | Path]],
    out: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    task: str | None = None,
    normalize: str | None = None,
    delta_scale: float = 1.0,
    modules_to_save: str | None = None,
    residual: str | None = None,
    force: bool = False,
) -> Mixture:
    """Make a mixture with the same weights in every module; nothing is trained.

    Args:
        base: folder or hub id of the base model.
        adapters: one or more, as PATH_OR_ID, `NAME=PATH_OR_ID` or (name, PATH_OR_ID).
        out: folder to write the mixture to; None writes nothing.
        weights: [N] mixture weights, used as they are (`normalize: none`); None means uniform composition.
        task: what the exported model is for.
        normalize: `all` or `present`, for uniform composition; with weights only `none`.
        delta_scale: factor of the whole delta weight.
        modules_to_save: what becomes of whole tensors that adapters carry: an adapter's name, `drop` or `mix`.
        residual: name of the adapter whose residual the base is.
        force: replace what is in `out`.

    Returns:
        The mixture, its adapters checked against the base.

    Raises:
        WloraMergeError: an input that is broken or does not fit, weights that are not one finite number per adapter.
    """
    import torch

    _check_options(task, delta_scale)
    opened, loaded = open_base(base), load_adapters(adapters, residual=residual)
    chosen = _normalize(normalize, weights)
    row = uniform(len(loaded)) if weights is None else _checked(weights, len(loaded))
    deltas = stack(loaded, modules_of(opened), model_type=opened.model_type)
    tensors, head = stack_tensors(loaded, modules_to_save, (), tensors_of(opened))
    refuse_overlap(deltas, tensors, head, tensors_of(opened))
    groups = make_groups([*(d.module for d in deltas), *(t.module for t in tensors)], "global")
    values = torch.tensor([row], dtype=torch.float32)
    logits = torch.zeros_like(values) if weights is None else values
    first = next((name for name in loaded[0].modules), None)
    found = modules_of(opened)(first) if first else None
    mixture = Mixture(
        base=base_ref(opened),
        adapters=[adapter_ref(a) for a in loaded],
        granularity="global",
        normalize=chosen,
        delta_scale=delta_scale,
        groups=groups,
        mixture_weights=mixture_weights(logits, chosen),
        wlora_weights=logits,
        task=task,
        head=head,
        modules_to_save=modules_to_save,
        prefixes=prefixes(found.module, first) if found and first else ("", ""),
        data=_recorded(weights),
    )
    if out is not None:
        mixture.save(out, force=force, inputs=[opened.folder, *(a.source.folder for a in loaded)])
    return mixture


def _normalize(normalize: str | None, weights: Sequence[float] | None) -> str:
    if weights is not None:
        if normalize not in (None, "none"):
            raise MixtureError(
                f"normalize is {normalize!r}, but weights that are given are used as they are: leave it out."
            )
        return "none"
    if normalize not in (None, *NORMALIZE[:2]):
        raise MixtureError(f"normalize is {normalize!r}, expected all or present.")
    return normalize or "all"


def _check_options(task: str | None, delta_scale: float) -> None:
    if task not in (None, *TASKS):
        raise MixtureError(f"task is {task!r}, expected one of {', '.join(TASKS)}{nearest(str(task), TASKS)}.")
    if not math.isfinite(delta_scale):
        raise MixtureError(f"delta_scale is {delta_scale}, expected a finite number.")


def _checked(weights: Sequence[float], n: int) -> list[float]:
    if len(weights) != n or not all(math.isfinite(w) for w in weights):
        raise AdapterError(
            f"got {len(weights)} weights {list(weights)} for {n} adapters, expected one finite number for each."
        )
    return [float(w) for w in weights]


def _recorded(weights: Sequence[float] | None) -> dict[str, Any]:
    return {"method": "uniform" if weights is None else "given"}
