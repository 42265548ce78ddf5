"""attach and detach: adapters on a model in memory, and the Mixture that a loop has trained on it.

Nothing of the model is replaced. Each target module gets a child `wlora` that holds the stacked factors as buffers, and a
forward hook that adds its output. The model gets one parameter, `wlora_weights` [G, N], and everything else is frozen. So
names, state dict and saving stay the model's own, and `detach` leaves no trace. What was put where is in `model.wlora`, the
`Attachment`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.adapter import Adapter, load_adapters
from ..adapters.modules_to_save import join_changes, stack_tensors
from ..adapters.stacking import stack
from ..adapters.targets import target_of
from ..adapters.trainable_tokens import with_token_rows
from ..constants import PARAMETER, SCALE_PARAMETER
from ..errors import AdapterError, MixtureError, UnsupportedError, WloraMergeWarning
from ..mix_options import AdapterOptions
from ..option_fields import checked
from .attachment import Attachment, attachment_of, check_normalize, uniform_weights, whole_model
from .groups import make_groups
from .live_base import base_of, refuse_wrapped
from .live_model import LiveNames, check_bias, live_modules, live_tensors, set_parameter
from .whole_tensors import with_whole_tensors

if TYPE_CHECKING:
    from ..adapters.deltas import ModuleDelta, TensorDelta
    from ..models.base_model import BaseModel

LEARNED = "learned"


def attach(
    model: nn.Module,
    adapters: Iterable[str | Path | tuple[str, str | Path] | Adapter],
    *,
    granularity: str = "module",
    normalize: str = "all",
    delta_scale: float | str = 1.0,
    temperature: float = 1.0,
    head: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Attach adapters to a model, in place: only `wlora_weights`, and the head if asked, require gradients afterwards.

    The logits start at zero (free weights at 1/N), so the model starts from uniform composition. A model that was loaded from a
    checkpoint of an attached one starts from the `wlora_weights` there.

    Args:
        model: a transformers model, or any model with the adapters' module names.
        adapters: one or more, as PATH_OR_ID, `NAME=PATH_OR_ID`, (name, PATH_OR_ID), or loaded ones.
        granularity: `module`, `layer` or `global`: which modules share a row of weights.
        normalize: `all` (softmax over all N), `present` (renormalized at each module over those that target it), or `none`
            (free signed weights).
        delta_scale: factor of the whole delta weight; `learned` makes it a parameter too, `wlora_delta_scale`, from 1.
        temperature: of the softmax, v̂ = softmax(v / temperature); without effect on free weights.
        head: names of modules or parameters to train along (`classifier`).
        options: fields of `AdapterOptions`. `modules_to_save` says what becomes of whole tensors that the adapters carry: a name,
            `drop`, `mix`, or None to refuse those that the head does not replace. `residual` is the adapter whose residual the
            base is (PiSSA and its kind).

    Returns:
        The model itself.

    Raises:
        AdapterError, UnsupportedError: an adapter that does not fit the model, or a feature that is not supported.
        MixtureError: the model has other weights than its base's files, a head that they lack and `head` does not name, or an adapter
            of PEFT's in it. Or a checkpoint's `wlora_weights` are those of other adapters or groups.
    """
    base = base_of(model)
    _check_model(model)
    with _all_or_nothing(model):
        attach_loaded(
            model, adapters, base, granularity=granularity, normalize=normalize, delta_scale=delta_scale, temperature=temperature,
            head=head, **options,
        )  # fmt: skip
        attachment = attachment_of(model)
        if base is not None:
            attachment.refuse_other_weights(model, base)
            attachment.take_up(base)
    return model


def attach_loaded(
    model: nn.Module,
    adapters: Iterable[str | Path | tuple[str, str | Path] | Adapter],
    base: BaseModel | None,
    *,
    granularity: str = "module",
    normalize: str = "all",
    delta_scale: float | str = 1.0,
    temperature: float = 1.0,
    head: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """As `attach`, to a model that is known to have the weights of its base's files; it starts from uniform composition.

    Args:
        model: as of `attach`, and so the others.
        adapters: one or more.
        base: whose files it was loaded from, where they are on this machine.
        granularity: of the groups.
        normalize: of the weights.
        delta_scale: factor of the whole delta weight.
        temperature: of the softmax.
        head: what is trained along.
        options: fields of `AdapterOptions`.

    Returns:
        The model itself.

    Raises:
        AdapterError, UnsupportedError, MixtureError: an adapter that does not fit the model, or a feature that is not supported.
    """
    asked: AdapterOptions = checked(AdapterOptions, options, "attach", MixtureError)
    given = list(adapters)
    read = iter(load_adapters([a for a in given if not isinstance(a, Adapter)], residual=asked.residual))
    loaded = [a if isinstance(a, Adapter) else next(read) for a in given]
    _check_model(model)
    _check_options(loaded, normalize, delta_scale, temperature)
    trained = _head_parameters(model, head)
    with _all_or_nothing(model):
        names = LiveNames(model, base)
        deltas, taken = _changes(names, loaded, trained, asked.modules_to_save)
        changed = [d.module for d in deltas]
        stored = names.stored_modules(changed) if base else {}  # refuses what no mixture could name
        groups = make_groups(changed, granularity, stored)
        device = next(model.parameters()).device
        model.requires_grad_(False)
        weights = uniform_weights(len(groups), len(loaded), normalize, device)
        model.register_parameter(PARAMETER, weights)
        if isinstance(delta_scale, str):
            model.register_parameter(SCALE_PARAMETER, nn.Parameter(torch.ones((), device=device)))
        scale = delta_scale if isinstance(delta_scale, float | int) else model.get_parameter(SCALE_PARAMETER)
        for name in trained:
            model.get_parameter(name).requires_grad_(True)
        attachment = Attachment(
            loaded, granularity, normalize, temperature, scale, weights, groups, trained, taken, asked.modules_to_save,
            base.folder if base else None, stored,
        )  # fmt: skip
        model.wlora = attachment  # type: ignore[assignment]
        attachment.hang(model, deltas)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]  # else Trainer refuses it: it knows PEFT's adapters alone
    return model


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was where the block fails (out of memory and Ctrl-C too): nothing attached, its own parameters in their
    places, those that required gradients requiring them."""
    before = [(name, p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    try:
        yield
    except BaseException:
        detach(model)
        for name, parameter, trained in before:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
            parameter.requires_grad_(trained)
        raise


def _check_model(model: nn.Module) -> None:
    """Refuse a model to which nothing can be attached."""
    if whole_model(model) is not model:
        raise MixtureError(
            "the model is compiled, and would not see what is attached: attach first, then call torch.compile."
        )
    if any(p.is_meta for p in model.parameters()):
        raise MixtureError(
            "the model has weights on the meta device (a device_map that offloads, or init_empty_weights): load it whole, then "
            "attach."
        )
    if hasattr(model, "wlora"):
        raise MixtureError("the model has adapters attached already: call wlora_merge.detach(model) first.")
    refuse_wrapped(model)


def _check_options(adapters: Sequence[Adapter], normalize: str, delta_scale: float | str, temperature: float) -> None:
    if not adapters:
        raise AdapterError("a mixture needs an adapter or more, got none.")
    check_normalize(normalize)
    if delta_scale != LEARNED and (isinstance(delta_scale, str) or not math.isfinite(delta_scale)):
        raise MixtureError(f"delta_scale is {delta_scale!r}, expected a number or {LEARNED}.")
    if not temperature > 0:
        raise MixtureError(f"temperature is {temperature}, expected a number above 0.")
    for adapter in adapters:
        if adapter.config.get("target_parameters"):
            raise UnsupportedError(
                f"{adapter.where}: it changes fused expert weights (target_parameters), which a fit does not train through yet: "
                "`wlora-merge mix` and an export fold it."
            )


def _changes(
    names: LiveNames,
    adapters: list[Adapter],
    trained: Sequence[str],
    modules_to_save: str | None,
) -> tuple[list[ModuleDelta], list[str]]:
    """What the adapters change, stacked module by module; the parameters that became one adapter's, as the user chose."""
    model, find, find_module = names.model, live_tensors(names), live_modules(names)
    layers = dict(model.named_modules())
    for name in trained:
        if (target := find(name)) is not None and target.tied:
            raise UnsupportedError(
                f"head: {name!r} is an embedding that this model uses in several places (tie_word_embeddings), and it computes "
                "otherwise when an export has them apart: leave it out of the head."
            )
        if model.get_parameter(name).dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"head: {name!r} is trained in 16 bits, in which small steps are lost: load the model with dtype=torch.float32.",
                WloraMergeWarning,
                stacklevel=3,
            )
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    deltas = stack(adapters, find_module, find, model_type=model_type)
    tensors, saved = stack_tensors(adapters, modules_to_save, trained, find)
    join_changes(deltas, tensors, trained, find)
    if tensors:
        _refuse_new(names.base, tensors)
        rows = [with_token_rows(adapter, partial(target_of, adapter, find=find_module)) for adapter in adapters]
        changed = with_whole_tensors(rows, tensors, layers, find)
        deltas = stack(changed, find_module, find, model_type=model_type)
    for delta in deltas:
        if delta.biases:
            check_bias(delta.module, layers[delta.module])
    return deltas, _take(model, saved, modules_to_save)


def regroup(model: nn.Module, granularity: str, normalize: str) -> nn.Parameter:
    """Give an attached model a new `wlora_weights` for other groups or another normalization, at uniform composition.

    Raises:
        MixtureError: an unknown granularity or normalize.
    """
    weights = attachment_of(model).regroup(granularity, normalize)
    model.register_parameter(PARAMETER, weights)
    return weights


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the base model as it was, but frozen; a trained head stays, and so do tensors taken from an adapter."""
    wrapped, model = model, whole_model(model)
    if isinstance(attachment := getattr(model, "wlora", None), Attachment):
        attachment.remove()
    for name in ("wlora", PARAMETER, SCALE_PARAMETER):
        if hasattr(model, name):
            delattr(model, name)
    if getattr(model, "hf_quantizer", None) is not None:
        model.is_quantized = True  # type: ignore[assignment]
    return wrapped


def _head_parameters(model: nn.Module, head: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    trained = []
    for part in head:
        found = [n for n in names if n == part or n.startswith(f"{part}.")]
        if not found:
            raise MixtureError(f"head {part!r}: the model has no module or parameter of that name.")
        trained += found
    return trained


def _refuse_new(base: BaseModel | None, tensors: Sequence[TensorDelta]) -> None:
    """Refuse to mix tensors against values that the model's base does not have, but that were drawn when it was loaded."""
    for delta in tensors:
        if base is not None and base.find_tensor(delta.tensor) is None and base.find_tied(delta.tensor) is None:
            raise UnsupportedError(
                f"{base.folder}: has no tensor {delta.tensor!r}, so what adapters carry of it cannot be mixed: take one, or "
                "drop it."
            )


def _take(model: nn.Module, saved: Mapping[str, torch.Tensor], choice: str | None) -> list[str]:
    """Put one adapter's saved tensors into the model where the user chose them; their names."""
    for name, tensor in saved.items():
        parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
        if parameter is None or parameter.shape != tensor.shape:
            got = "has none of that name" if parameter is None else f"has {list(parameter.shape)}"
            raise AdapterError(f"adapter {choice!r}: tensor {name!r} is {list(tensor.shape)}, the model {got}.")
        set_parameter(model, name, tensor)
    return sorted(saved)
