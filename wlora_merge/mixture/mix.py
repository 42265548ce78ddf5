"""The mix workflow: a mixture without fitting. Uniform composition, or the weights that the user gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import load_adapters
from ..adapters.added_tokens import resized, resized_config, warn_of_end
from ..adapters.modules_to_save import join_changes, stack_tensors
from ..adapters.stacking import stack
from ..adapters.targets import modules_of, tensors_of
from ..constants import NORMALIZE
from ..data.tasks import TASKS, get_task
from ..errors import AdapterError, MixtureError, UnsupportedError
from ..models.base_model import BaseModel, open_base
from ..text import first_line, nearest
from .groups import make_groups, prefixes
from .mixture import Mixture, adapter_ref, base_ref
from .weights import mixture_weights, uniform

if TYPE_CHECKING:
    import torch

    from .record import MadeFrom


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
    resize_vocab: str | None = None,
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
        resize_vocab: name of the adapter whose added tokens, and whose tokenizer, the model gets.
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
    opened = resized(opened, loaded, resize_vocab)
    warn_of_end(opened)
    chosen = _normalize(normalize, weights)
    row = uniform(len(loaded)) if weights is None else _checked(weights, len(loaded))
    deltas = stack(loaded, modules_of(opened), tensors_of(opened), model_type=opened.model_type)
    tensors, head = stack_tensors(loaded, modules_to_save, (), tensors_of(opened))
    changed = join_changes(deltas, tensors, head, tensors_of(opened))
    if not changed:
        raise AdapterError(
            f"{', '.join(a.where for a in loaded)}: no module of the base is changed, by factors or by mixed tensors, so there is "
            "nothing to mix: give other adapters, or say --modules-to-save mix."
        )
    groups = make_groups([d.module for d in changed], "global")
    values = torch.tensor([row], dtype=torch.float32)
    logits = torch.zeros_like(values) if weights is None else values
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
        head_tensors=opened.stored_names(head),
        modules_to_save=modules_to_save,
        config=_config_of(head, opened, task) | resized_config(opened),
        resize_vocab=resize_vocab,
        prefixes=prefixes((d.module, d.name or d.module) for d in deltas),
        data=_made_from(weights, residual),
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


def _config_of(head: Mapping[str, torch.Tensor], base: BaseModel, task: str | None) -> dict[str, Any]:
    """The config keys with which the base's files and a head taken from an adapter are one model: found by building it.

    Raises:
        UnsupportedError: no model of the task has such a head.
    """
    find = tensors_of(base)
    own = {name: find(name) for name in head if name in base.entries or name in base.added}
    if all((target := own.get(name)) is not None and target.shape == tuple(head[name].shape) for name in head):
        return {}
    if task is None:
        raise UnsupportedError(
            f"{base.folder}: lacks tensor {min(head)!r} in the shape that the adapter has it, so the model's class matters: say "
            "--task TASK, or --modules-to-save drop."
        )
    for n in sorted({len(tensor) for tensor in head.values() if tensor.ndim}):
        architecture, shapes = _shapes_of(base, task, n)
        if all(shapes.get(name) == tuple(tensor.shape) for name, tensor in head.items()):
            labels = [f"LABEL_{i}" for i in range(n)]
            names = {
                "id2label": dict(zip(map(str, range(n)), labels, strict=True)),
                "label2id": {v: i for i, v in enumerate(labels)},
            }
            same = len(base.config.get("id2label") or {}) == n or not get_task(task).has_labels
            return {"architectures": [architecture], **({} if same else names)}
    shapes_text = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(head.items()))
    raise UnsupportedError(
        f"{base.folder}: its {task} model has no head with {shapes_text}: take another adapter's, or say --modules-to-save drop."
    )


def _shapes_of(base: BaseModel, task: str, n_labels: int) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The class of the base's model for a task, and the shapes of its tensors, built without memory."""
    from ..models.module_tree import empty_model

    try:
        model = empty_model(base.folder, get_task(task).auto_class().from_config, num_labels=n_labels)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(
            f"{base.folder}: there is no {task} model of this base ({first_line(error)}): say --modules-to-save drop."
        ) from error
    return type(model).__name__, {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _checked(weights: Sequence[float], n: int) -> list[float]:
    if len(weights) != n or not all(math.isfinite(w) for w in weights):
        raise AdapterError(
            f"got {len(weights)} weights {list(weights)} for {n} adapters, expected one finite number for each."
        )
    return [float(w) for w in weights]


def _made_from(weights: Sequence[float] | None, residual: str | None) -> MadeFrom:
    made: MadeFrom = {"method": "uniform" if weights is None else "given"}
    return {**made, "residual": residual} if residual else made
