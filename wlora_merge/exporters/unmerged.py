"""Models as libraries load them: an export's own, and the base with the mixture attached and not merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tasks import get_task
from ..errors import VerifyError
from ..io.tensors import matrix_shape
from ..models.loading import class_for, library_errors, load
from ..progress import Meter

if TYPE_CHECKING:
    from torch import nn

    from ..adapters.adapter import Adapter
    from ..adapters.deltas import TensorDelta
    from ..mixture.mixture import Mixture
    from ..mixture.record import MixtureRecord
    from ..models.base_model import BaseModel

HEAD_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Keys of a mixture's config that make its head."""


def load_checked(
    folder: Path,
    task: str | None,
    *,
    cls: Any | None = None,
    head: Collection[str] = (),
    unused: Callable[[str], bool] = lambda _: False,
    **options: Any,
) -> nn.Module:
    """Load a model folder by its task, in float32, in evaluation mode.

    Without a task, and where the task's class does not know the model (a vision-language one as causal-lm), its class is the one
    that its config names.

    Args:
        folder: a model folder.
        task: what the model is for.
        cls: the class to load it as, whatever its task is.
        head: names of tensors that the caller puts into the model, so that the folder may lack them.
        unused: whether a tensor may be one that the model has no place for.
        options: handed to `from_pretrained` (num_labels, id2label, ...).

    Raises:
        VerifyError: it does not load; missing, unexpected or mismatched tensors.
    """
    import torch

    Meter("loading the model")
    cls = cls or class_for(folder, get_task(task).auto_class() if task else None, VerifyError, or_named=True)[0]
    model: nn.Module
    model, _ = load(cls, folder, torch.float32, error=VerifyError, replaced=head, unused=unused, **options)
    return model


def unused_by(mixture: Mixture | MixtureRecord) -> Callable[[str], bool]:
    """Which tensors of an export, or of its base, the task's model may have no place for: those that neither an adapter nor the head
    changes. A ViT has a pooler, for instance, and a classifier made of it has none; a causal-lm has an output embedding, and its
    features have none."""
    head = mixture.head
    if mixture.task is not None and get_task(mixture.task).is_body:
        return lambda name: name not in head  # no place for an output embedding, though an adapter changes it
    changed = {module for modules in mixture.groups.values() for module in modules}
    return lambda name: name not in head and name.rpartition(".")[0] not in changed


def head_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` must be told of a mixture's config, so that the model has its head."""
    return {key: config[key] for key in HEAD_KEYS if key in config}


def attach_mixture(
    model: nn.Module, mixture: Mixture, adapters: list[Adapter], base: BaseModel, tensors: Iterable[TensorDelta] = ()
) -> nn.Module:
    """The unmerged mixture: adapters attached with the mixture's own weights, its head, mixed whole tensors and pooling in place."""
    import torch

    from ..adapters.targets import tensors_of
    from ..mixture.attach import attach_loaded
    from ..mixture.attachment import attachment_of
    from ..mixture.fold import fold_saved
    from ..mixture.groups import rows_of
    from ..mixture.live_model import LiveNames, live_tensors, set_parameter
    from ..models.pooling import add_pooling_layer

    with torch.no_grad():
        _resize(model, base)
        attach_loaded(
            model, [replace(a, tensors={}) for a in adapters], base, granularity=mixture.granularity, normalize=mixture.normalize,
            delta_scale=mixture.delta_scale,
        )  # fmt: skip
        weights = mixture.mixture_weights
        logits = weights if mixture.normalize == "none" else weights.log()
        row = rows_of(mixture.groups)
        attachment = attachment_of(model)
        for g, modules in enumerate(attachment.groups.values()):
            module = attachment.stored[modules[0]][0]
            if module not in row:
                raise VerifyError(f"target module {module!r} belongs to no group of the manifest: export again.")
            attachment.weights[g] = logits[row[module]]
        for name, tensor in mixture.head.items():
            with library_errors(f"tensor {name!r} of the trained head does not fit the base", VerifyError):
                set_parameter(model, name, tensor)
        for delta in tensors:
            own, live = tensors_of(base)(delta.tensor), live_tensors(LiveNames(model, base))(delta.tensor)
            if own is None or own.read is None or live is None:
                raise VerifyError(
                    f"{base.folder}: its model has no tensor {delta.tensor!r}, which the mixture changes."
                )
            weight = own.read()
            block = weight.reshape(*(matrix_shape(own.shape) if own.shape else (1, 1)))
            total = fold_saved(block, delta, mixture.whole_gains_of(delta), block.double())
            set_parameter(model, live.module, total.reshape(own.shape))
            if (module := live.module.rpartition(".")[0]) in attachment.layers:
                attachment.gains.set_present(module, delta.present)  # a LoRA of it knows its own adapters alone
    if mixture.pooling is not None:
        add_pooling_layer(model, mixture.pooling)
    return model


def _resize(model: nn.Module, base: BaseModel) -> None:
    """Give a model the vocabulary that its base is exported with."""
    from ..adapters.targets import tensors_of
    from ..mixture.live_model import LiveNames, live_tensors, set_parameter

    if base.vocabulary is None:
        return
    model.resize_token_embeddings(base.vocabulary.rows, mean_resizing=False)  # type: ignore[operator]
    for name in base.added:
        own, live = tensors_of(base)(name), live_tensors(LiveNames(model, base))
        if own is None or own.read is None:
            continue
        target = live(name)
        if target is not None and name in base.entries:
            model.get_parameter(target.module).copy_(own.read())  # and what is tied to it
        elif target is not None:
            set_parameter(model, target.module, own.read())
