"""The mix workflow: a mixture without fitting. Uniform composition, or the weights that the user gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, AdapterSpec, load_adapters
from ..adapters.added_tokens import resized
from ..adapters.modules_to_save import join_changes, stack_tensors
from ..adapters.stacking import Stack
from ..adapters.targets import modules_of, tensors_of
from ..adapters.tokenizers import warn_of_end
from ..data.tasks import TASKS, get_task
from ..errors import AdapterError, UnsupportedError
from ..io.staging import refuse_out
from ..mix_options import MixOptions, mix_options
from ..models.base_model import BaseModel, open_base, refuse_attached
from ..text import first_line
from .combination import Combination
from .groups import make_groups, prefixes
from .mixture import Mixture, adapter_ref, base_ref
from .told_task import told_task
from .weights import mixture_weights

if TYPE_CHECKING:
    import torch

    from .record import MadeFrom


def mix(
    base: str | Path,
    adapters: Iterable[AdapterSpec],
    out: str | Path | None = None,
    *,
    force: bool = False,
    **options: Any,
) -> Mixture:
    """Make a mixture with the same weights in every module; nothing is trained.

    Args:
        base: folder or hub id of the base model.
        adapters: one or more, as PATH_OR_ID, `NAME=PATH_OR_ID`, (name, PATH_OR_ID), or opened by `mixable`.
        out: folder to write the mixture to; None writes nothing.
        force: replace what is in `out`.
        options: fields of `MixOptions`: `weights` [N], used as they are (`normalize: none`), else uniform composition; `task`,
            `normalize`, `delta_scale`, `modules_to_save`, `resize_vocab` and `residual`; and how delta weights are combined:
            `method`, `density`, `majority_sign` and `seed`.

    Returns:
        The mixture, its adapters checked against the base.

    Raises:
        WloraMergeError: an input that is broken or does not fit, weights that are not one finite number per adapter.
    """
    asked = mix_options(options)
    opened, loaded = open_base(base), load_adapters(adapters, residual=asked.residual)
    if out is not None:
        refuse_out(Path(out), force=force, inputs=_folders(opened, loaded))
    refuse_attached(opened)
    opened, loaded = resized(opened, loaded, asked.resize_vocab)
    warn_of_end(opened)
    how = combination_of(asked)
    weights = _given_weights(asked.weights, how, len(loaded))
    stacked = Stack.of(loaded, modules_of(opened), tensors_of(opened), model_type=opened.model_type)
    tensors, head = stack_tensors(loaded, asked.modules_to_save, (), tensors_of(opened))
    deltas = stacked.deltas()
    changed = join_changes(deltas, tensors, head, tensors_of(opened))
    how.refuse_changes(loaded, tensors)
    stacked.check_numbers()
    if not changed:
        raise AdapterError(
            f"{', '.join(a.where for a in loaded)}: no module of the base is changed, by factors or by mixed tensors, so there is "
            "nothing to mix: give other adapters, or say --modules-to-save mix."
        )
    task = asked.task
    if task is None and _is_new(head, opened):
        task = told_task(opened, loaded, {}, _tasks_with(head, opened))
    groups = make_groups([d.module for d in changed], "global")
    normalize = asked.normalize or ("all" if weights is None else "none")
    logits = _start(weights, len(loaded))
    mixture = Mixture(
        base=base_ref(opened),
        adapters=[adapter_ref(a) for a in loaded],
        granularity="global",
        normalize=normalize,
        delta_scale=asked.delta_scale,
        groups=groups,
        mixture_weights=mixture_weights(logits, normalize),
        wlora_weights=logits,
        task=task,
        head=head,
        head_tensors=opened.stored_names(head),
        combination=how,
        modules_to_save=asked.modules_to_save,
        config=_config_of(head, opened, task) | (opened.vocabulary.config if opened.vocabulary is not None else {}),
        resize_vocab=asked.resize_vocab,
        prefixes=prefixes((d.module, d.name or d.module) for d in deltas),
        data=_made_from(weights, asked.residual),
    )
    if out is not None:
        mixture.save(out, force=force, inputs=_folders(opened, loaded))
    return mixture


def _folders(base: BaseModel, adapters: Iterable[Adapter]) -> list[Path]:
    return [base.folder, *(adapter.source.folder for adapter in adapters)]


def _start(weights: Sequence[float] | None, n: int) -> torch.Tensor:
    """The weights given, or logits of uniform composition, [1, n] float32."""
    import torch

    return torch.tensor([[0.0] * n if weights is None else weights], dtype=torch.float32)


def combination_of(asked: MixOptions) -> Combination:
    """How a mix combines delta weights."""
    given = {name: getattr(asked, name) for name in ("density", "majority_sign", "seed")}
    return Combination(asked.method, **{name: value for name, value in given.items() if value is not None})


def _config_of(head: Mapping[str, torch.Tensor], base: BaseModel, task: str | None) -> dict[str, Any]:
    """The config keys with which the base's files and a head taken from an adapter are one model: found by building it.

    Raises:
        UnsupportedError: no model of the task has such a head.
    """
    if task is None or not _is_new(head, base):
        return {}
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


def _is_new(head: Mapping[str, torch.Tensor], base: BaseModel) -> bool:
    """Whether a head taken from an adapter is none that the base has in that shape, so that the model's class matters."""
    find = tensors_of(base)
    own = {name: find(name) for name in head if name in base.entries or name in base.added or base.find_tied(name)}
    return not all((target := own.get(name)) is not None and target.shape == tuple(head[name].shape) for name in head)


def _tasks_with(head: Mapping[str, torch.Tensor], base: BaseModel) -> list[str]:
    """The tasks whose model of this base has such a head: found by building each."""
    sizes = sorted({len(tensor) for tensor in head.values() if tensor.ndim})
    wanted = {name: tuple(tensor.shape) for name, tensor in head.items()}
    found = []
    for task in TASKS.values():
        with suppress(UnsupportedError):
            if any(wanted.items() <= _shapes_of(base, task.name, n)[1].items() for n in sizes):
                found.append(task.name)
    return found


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


def _given_weights(weights: Sequence[float] | None, how: Combination, n: int) -> list[float] | None:
    """Weights that are used as they are; None: uniform composition. A method that averages what agrees takes 1 for each adapter."""
    if weights is None:
        return [1.0] * n if how.elects else None
    if len(weights) != n or not all(math.isfinite(w) for w in weights):
        raise AdapterError(
            f"got {len(weights)} weights {list(weights)} for {n} adapters, expected one finite number for each."
        )
    return [float(w) for w in weights]


def _made_from(weights: Sequence[float] | None, residual: str | None) -> MadeFrom:
    made: MadeFrom = {"method": "uniform" if weights is None else "given"}
    return {**made, "residual": residual} if residual else made
