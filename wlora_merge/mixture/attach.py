"""attach and detach: adapters on a model in memory, and the Mixture that a loop has trained on it.

Nothing of the model is replaced. Each target module gets a child `wlora` that holds the stacked factors as buffers, and a
forward hook that adds its output; the model gets one parameter, `wlora_weights` [G, N], and everything else is frozen. So
names, state dict and saving stay the model's own, and `detach` leaves no trace.

This room knows modules and tensors, no paths but those that a Mixture names.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.adapter import Adapter, load_adapters
from ..adapters.modules_to_save import join_changes, stack_tensors
from ..adapters.stacking import stack
from ..constants import NORMALIZE
from ..errors import AdapterError, MixtureError, UnsupportedError, WloraMergeWarning
from .groups import make_groups, prefixes
from .live_model import check_bias, live_modules, live_tensors, set_parameter
from .mixture import TRAINING_LOOP, Mixture, adapter_ref, base_ref
from .stacked_lora import Attachment, StackedLora, add_delta
from .weights import mixture_weights, uniform_start
from .whole_tensors import with_whole_tensors

if TYPE_CHECKING:
    from ..adapters.deltas import ModuleDelta, TensorDelta
    from ..models.base_model import BaseModel

PARAMETER = "wlora_weights"
SCALE_PARAMETER = "wlora_delta_scale"
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
    modules_to_save: str | None = None,
    residual: str | None = None,
) -> nn.Module:
    """Attach adapters to a model, in place: only `wlora_weights`, and the head if asked, require gradients afterwards.

    The logits start at zero (free weights at 1/N), so the model starts from uniform composition.

    Args:
        model: a transformers model, or any model with the adapters' module names.
        adapters: one or more, as PATH_OR_ID, `NAME=PATH_OR_ID`, (name, PATH_OR_ID), or loaded ones.
        granularity: `module`, `layer` or `global`: which modules share a row of weights.
        normalize: `all` (softmax over all N), `present` (renormalized at each module over those that target it), or `none`
            (free signed weights).
        delta_scale: factor of the whole delta weight; `learned` makes it a parameter too, `wlora_delta_scale`, from 1.
        temperature: of the softmax, v̂ = softmax(v / temperature); without effect on free weights.
        head: names of modules or parameters to train along (`classifier`).
        modules_to_save: what becomes of whole tensors that the adapters carry: a name, `drop`, `mix`, or None to refuse those
            that the head does not replace.
        residual: name of the adapter whose residual the base is (PiSSA and its kind).

    Returns:
        The model itself.

    Raises:
        AdapterError, UnsupportedError: an adapter that does not fit the model, or a feature that is not supported.
    """
    given = list(adapters)
    read = iter(load_adapters([a for a in given if not isinstance(a, Adapter)], residual=residual))
    loaded = [a if isinstance(a, Adapter) else next(read) for a in given]
    _check_model(model)
    _check_options(loaded, normalize, delta_scale, temperature)
    trained = _head_parameters(model, head)
    deltas, taken = _changes(model, loaded, trained, modules_to_save)
    groups = make_groups([d.module for d in deltas], granularity)
    device = next(model.parameters()).device
    model.requires_grad_(False)
    model.register_parameter(PARAMETER, _start(len(groups), len(loaded), normalize, device))
    if isinstance(delta_scale, str):
        model.register_parameter(SCALE_PARAMETER, nn.Parameter(torch.ones((), device=device)))
    scale = delta_scale if isinstance(delta_scale, float | int) else model.get_parameter(SCALE_PARAMETER)
    for name in trained:
        model.get_parameter(name).requires_grad_(True)
    weights = model.get_parameter(PARAMETER)
    attachment = Attachment(
        loaded, granularity, normalize, temperature, scale, weights, groups, trained, taken, modules_to_save
    )
    try:
        for delta in deltas:
            layer = model.get_submodule(delta.module)
            layer.add_module("wlora", StackedLora(delta, layer, attachment))
            layer.wlora_hook = layer.register_forward_hook(add_delta, with_kwargs=True)  # type: ignore[assignment]
    except BaseException:  # out of memory, Ctrl-C: a second attempt must not add to half of a first
        detach(model)
        raise
    model.wlora = attachment  # type: ignore[assignment]
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]  # else Trainer refuses it: it knows PEFT's adapters alone
    return model


def _check_model(model: nn.Module) -> None:
    """Refuse a model to which nothing can be attached."""
    if _whole(model) is not model:
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


def _check_options(adapters: Sequence[Adapter], normalize: str, delta_scale: float | str, temperature: float) -> None:
    if not adapters:
        raise AdapterError("a mixture needs an adapter or more, got none.")
    _check_normalize(normalize)
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
    model: nn.Module, adapters: list[Adapter], trained: Sequence[str], modules_to_save: str | None
) -> tuple[list[ModuleDelta], list[str]]:
    """What the adapters change, stacked module by module; the parameters that became one adapter's, as the user chose."""
    find, layers = live_tensors(model), dict(model.named_modules())
    for name in trained:
        if (target := find(name)) is not None and target.tied:
            raise UnsupportedError(
                f"head: {name!r} is an embedding that this encoder-decoder uses in several places (tie_word_embeddings), and it "
                "computes otherwise when an export has them apart: leave it out of the head."
            )
        if model.get_parameter(name).dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"head: {name!r} is trained in 16 bits, in which small steps are lost: load the model with dtype=torch.float32.",
                WloraMergeWarning,
                stacklevel=3,
            )
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    deltas = stack(adapters, live_modules(model), find, model_type=model_type)
    tensors, saved = stack_tensors(adapters, modules_to_save, trained, find)
    join_changes(deltas, tensors, trained, find)
    if tensors:
        _refuse_new(model, tensors)
        changed = with_whole_tensors(adapters, tensors, layers, find)
        deltas = stack(changed, live_modules(model), find, model_type=model_type)
    for delta in deltas:
        if delta.biases:
            check_bias(delta.module, layers[delta.module])
    return deltas, _take(model, saved, modules_to_save)


def _whole(model: nn.Module) -> nn.Module:
    """The model that torch.compile has wrapped, or itself."""
    whole = getattr(model, "_orig_mod", model)
    return whole if isinstance(whole, nn.Module) else model


def _check_normalize(normalize: str) -> None:
    if normalize not in NORMALIZE:
        raise MixtureError(f"normalize is {normalize!r}, expected one of {', '.join(NORMALIZE)}.")


def _start(groups: int, n: int, normalize: str, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.tensor([uniform_start(n, normalize)] * groups, dtype=torch.float32, device=device))


def set_delta_scale(model: nn.Module, delta_scale: float | nn.Parameter) -> None:
    """Set the factor of the whole delta weight in every attached module; 0 gives the base model."""
    attachment_of(model).delta_scale = delta_scale


def regroup(model: nn.Module, granularity: str, normalize: str) -> nn.Parameter:
    """Give an attached model a new `wlora_weights` for other groups or another normalization, at uniform composition.

    Raises:
        MixtureError: an unknown granularity or normalize.
    """
    attachment = attachment_of(model)
    _check_normalize(normalize)
    modules = [m for group in attachment.groups.values() for m in group]
    attachment.granularity, attachment.normalize = granularity, normalize
    attachment.groups = make_groups(modules, granularity)
    attachment.__post_init__()
    n, device = len(attachment.adapters), attachment.weights.device
    attachment.weights = _start(len(attachment.groups), n, normalize, device)
    model.register_parameter(PARAMETER, attachment.weights)
    return attachment.weights


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the base model as it was, but frozen; a trained head stays, and so do tensors taken from an adapter."""
    wrapped, model = model, _whole(model)
    for layer in list(model.modules()):
        if isinstance(getattr(layer, "wlora", None), StackedLora):
            if hasattr(layer, "wlora_hook"):
                layer.wlora_hook.remove()  # type: ignore[operator, union-attr]
                del layer.wlora_hook
            del layer.wlora
        if hasattr(layer, "wlora_new"):
            layer.wlora_new_hook.remove()  # type: ignore[operator, union-attr]
            del layer.wlora_new_hook, layer.wlora_new
    for name in ("wlora", PARAMETER, SCALE_PARAMETER):
        if hasattr(model, name):
            delattr(model, name)
    if getattr(model, "hf_quantizer", None) is not None:
        model.is_quantized = True  # type: ignore[assignment]
    return wrapped


def attachment_of(model: nn.Module) -> Attachment:
    """What `attach` has done to this model.

    Raises:
        MixtureError: it has no adapters attached.
    """
    attachment = getattr(_whole(model), "wlora", None)
    if not isinstance(attachment, Attachment):
        raise MixtureError("the model has no adapters attached: call wlora_merge.attach(model, adapters) first.")
    return attachment


def _head_parameters(model: nn.Module, head: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    trained = []
    for part in head:
        found = [n for n in names if n == part or n.startswith(f"{part}.")]
        if not found:
            raise MixtureError(f"head {part!r}: the model has no module or parameter of that name.")
        trained += found
    return trained


def _refuse_new(model: nn.Module, tensors: Sequence[TensorDelta]) -> None:
    """Refuse to mix tensors against values that the model's base does not have, but that were drawn when it was loaded."""
    from ..models.base_model import open_base

    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    base = open_base(source) if source and Path(source).is_dir() else None
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


def read_mixture(model: nn.Module, base: str | Path | BaseModel | None = None) -> Mixture:
    """The Mixture of a model that `attach` has changed and a loop has trained.

    Args:
        model: the model (unwrap DistributedDataParallel first).
        base: the folder or hub id that the model was loaded from; None takes `model.config._name_or_path`.

    Returns:
        A mixture whose modules have the base files' names; the trained head, if any, under its parameter names; the task
        that the model's class tells, where it tells one.

    Raises:
        MixtureError: the model has no adapters attached, or its base is not known.
    """
    from ..data.tasks import task_of
    from ..models.base_model import BaseModel, open_base

    model = _whole(model)
    attachment = attachment_of(model)
    source = base or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not source:
        raise MixtureError(
            "the model does not say which base it was loaded from: call Mixture.from_model(model, base=PATH)."
        )
    opened = source if isinstance(source, BaseModel) else open_base(source)
    _check_trained(model, attachment)
    names = {m: _base_name(opened, m) for modules in attachment.groups.values() for m in modules}
    groups = make_groups(names.values(), attachment.granularity)
    row = {names[m]: g for g, modules in enumerate(attachment.groups.values()) for m in modules}
    logits = model.get_parameter(PARAMETER).detach().float().cpu()[[row[modules[0]] for modules in groups.values()]]
    scale = attachment.delta_scale
    every = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(every[name]) for name in attachment.head}  # a tied parameter has two names, and both sides changed
    named = [name for name, parameter in every.items() if id(parameter) in trained or name in attachment.taken]
    head = {name: every[name].detach().cpu().clone() for name in sorted(named)}  # as a file has them
    return Mixture(
        base=base_ref(opened),
        adapters=[adapter_ref(a) for a in attachment.adapters],
        granularity=attachment.granularity,
        normalize=attachment.normalize,
        delta_scale=float(scale.detach() if isinstance(scale, torch.Tensor) else scale),
        groups=groups,
        mixture_weights=mixture_weights(logits, attachment.normalize, attachment.temperature),
        wlora_weights=logits,
        task=task_of(model),
        config=_config_of(model, opened) if head else {},
        modules_to_save=attachment.modules_to_save,
        data={"method": TRAINING_LOOP},
        prefixes=prefixes((in_file, live) for live, in_file in names.items()),
        head=head,
        head_tensors=opened.stored_names(head),
    )


def _check_trained(model: nn.Module, attachment: Attachment) -> None:
    """Refuse a model whose mixture would not be what it computes."""
    if model.get_parameter(PARAMETER) is not attachment.weights:
        raise MixtureError(
            f"the model's {PARAMETER} is not the one that its layers use any more: load a state dict without assign=True."
        )
    if bool(attachment.weights.isnan().any()):
        raise MixtureError(f"the model's {PARAMETER} hold a NaN: the training diverged; use a smaller learning rate.")
    known = {id(model.get_parameter(name)) for name in (PARAMETER, *attachment.head)}  # a tied one has two names
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known and name != SCALE_PARAMETER and ".wlora" not in name:
            raise MixtureError(
                f"parameter {name!r} is trained, and belongs to no head, so no export would have it: name it in "
                "attach(head=[...]), or freeze it."
            )


def _config_of(model: nn.Module, base: BaseModel) -> dict[str, Any]:
    """The config keys in which a model with a head of its own differs from its base, as JSON has them."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    now = json.loads(config.to_json_string(use_diff=False))
    keys = ("id2label", "label2id", "problem_type", "pad_token_id")
    changed = {key: now[key] for key in keys if now.get(key) is not None and now[key] != base.config.get(key)}
    return {"architectures": [type(model).__name__], **changed}


def _base_name(base: BaseModel, module: str) -> str:
    name = base.find_module(module)
    if name is None:
        raise MixtureError(f"{base.folder}: has no tensor for target module {module!r}: is this the model's base?")
    return name
