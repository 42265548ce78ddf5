"""The nn.Modules that a fit attaches: stacked low-rank factors beside each target module, and one parameter for all.

Nothing of the model is replaced. Each target module gets a child `wlora` that holds the stacked factors as buffers, and a
forward hook that adds its output; the model gets one parameter, `wlora_weights` [G, N], and everything else is frozen. So
names, state dict and saving stay the model's own, and `detach` leaves no trace.

The forward pass is y = base(x) + ((x @ lora_A.T) * gains) @ lora_B.T. As the factors need no gradient, autograd keeps only
the [tokens, R] product of the first matmul, whatever the number of adapters (and base(x) where an adapter is a DoRA, which
also adds Σ gains_n·row_scale_n · (base(x) - bias)). The gradient is the softmax's own; the public
WLoRA code loses its normalization term.

This room knows modules and tensors, no paths but those that a Mixture names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .adapters import Adapter, load_adapters
from .errors import AdapterError, MixtureError, UnsupportedError
from .layouts import Layout
from .mixture import (
    NORMALIZE,
    TRAINING_LOOP,
    Mixture,
    adapter_ref,
    at_module,
    base_ref,
    gains,
    make_groups,
    mixture_weights,
    prefixes,
    uniform,
)
from .module_tree import ModuleTree
from .names import NameResolver
from .stacking import Find, ModuleDelta, Target, refuse_overlap, stack, stack_tensors

if TYPE_CHECKING:
    from .base_model import BaseModel

PARAMETER = "wlora_weights"
CHANNELS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
"""Layers whose output has its rows in dimension 1."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SCALE_PARAMETER = "wlora_delta_scale"
LEARNED = "learned"


@dataclass
class Attachment:
    """What `attach` has done to a model, kept on it as `model.wlora`; every attached module reads its weights here."""

    adapters: list[Adapter]
    granularity: str
    normalize: str
    temperature: float
    delta_scale: float | nn.Parameter
    weights: nn.Parameter
    groups: dict[str, list[str]]
    head: list[str]
    taken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.row = {module: g for g, modules in enumerate(self.groups.values()) for module in modules}

    def weights_of(self, module: str, present: torch.Tensor) -> torch.Tensor:
        """Mixture weights [N] of one target module, differentiable in `wlora_weights`."""
        weights = mixture_weights(self.weights[self.row[module]], self.normalize, self.temperature)
        return at_module(weights, present, self.normalize)


class StackedLora(nn.Module):
    """The stacked changes of one target module; its output is the mixture's change of that module's output.

    Buffers: present [N]; lora_A [R, in], lora_B [out, R], scaling [R] float32 and adapter_index [R] where R > 0; with a DoRA
    row_scale, and with a trained bias `bias`, both [N, out] float32. They are not part of the state dict: they come from the
    adapters.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor
    adapter_index: torch.Tensor
    present: torch.Tensor
    row_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        delta: ModuleDelta,
        layer: nn.Module,
        attachment: Attachment,
    ) -> None:
        super().__init__()
        self.layout, self.module, self.attachment = delta.layout, delta.module, attachment
        weight = layer.weight
        dtype = weight.dtype if isinstance(weight, torch.Tensor) and weight.is_floating_point() else torch.float32
        device = weight.device if isinstance(weight, torch.Tensor) else None
        values = {
            "lora_A": delta.lora_A.to(dtype) if delta.factors else None,
            "lora_B": delta.lora_B.to(dtype) if delta.factors else None,
            "scaling": delta.scaling.to(attachment.weights.dtype),
            "adapter_index": delta.adapter_index,
            "present": delta.present,
            "row_scale": None if delta.row_scale is None else delta.row_scale.to(attachment.weights.dtype),
            "bias": None if delta.bias is None else delta.bias.to(attachment.weights.dtype),
        }
        for name, value in values.items():
            self.register_buffer(name, None if value is None else value.to(device), persistent=False)

    def gains(self) -> torch.Tensor:
        """gains [R], differentiable in `wlora_weights`."""
        return gains(self.weights(), self.scaling, self.adapter_index, self.attachment.delta_scale)

    def weights(self) -> torch.Tensor:
        """Mixture weights [N] of this module, differentiable in `wlora_weights`."""
        return self.attachment.weights_of(self.module, self.present)

    def forward(self, x: torch.Tensor, output: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """The change of the module's output [..., out], given its input [..., in] (token ids for an embedding) and `layer`."""
        parts = []
        if self.lora_A is not None:
            product = self.product(x, layer)
            scale = getattr(layer, "embed_scale", None)  # Gemma's embedding multiplies its output
            parts.append(product * scale if isinstance(scale, torch.Tensor | float | int) else product)
        if self.row_scale is not None:
            own, factor = getattr(layer, "bias", None), self.mixed(self.row_scale, output, layer)
            parts.append(output * factor)
            if own is not None:
                parts.append(-_along_rows(own, layer, output) * factor)
        if self.bias is not None:
            parts.append(self.mixed(self.bias, output, layer))
        return sum(parts[1:], parts[0])

    def adds_in_place(self, x: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether the product is all there is, in one dtype, and can be added in the memory of a linear layer's output."""
        plain = self.lora_A is not None and self.row_scale is None and self.bias is None
        same = plain and x.dtype == output.dtype == self.lora_A.dtype and output.is_contiguous()
        return same and not torch.is_autocast_enabled(x.device.type)

    def mixed(self, rows: torch.Tensor, output: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """Σ gains_n·rows_n of [N, out], in a shape that broadcasts with the module's output."""
        weights = self.weights()
        total = self.attachment.delta_scale * weights @ rows.to(weights.dtype)
        return _along_rows(total.to(output.dtype), layer, output)

    def product(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """((x @ lora_A.T) * gains) @ lora_B.T"""
        if self.layout is Layout.CONV:
            return self.convolved(x, layer)
        if self.layout is Layout.EMBEDDING:
            hidden = F.embedding(x, self.lora_A.T)
        else:
            hidden = F.linear(
                x.to(self.lora_A.dtype) if not torch.is_autocast_enabled(x.device.type) else x, self.lora_A
            )
        return F.linear(hidden * self.gains().to(hidden.dtype), self.lora_B)

    def convolved(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """The product where the layer is a convolution: lora_A with the layer's kernel, stride and padding, lora_B with 1x1."""
        assert isinstance(layer, CONVOLUTIONS)
        convolve, ones = CONVOLVE[len(layer.kernel_size)], [1] * len(layer.kernel_size)
        lora_A = self.lora_A.view(-1, *layer.weight.shape[1:])
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(lora_A.dtype)
        hidden = convolve(x, lora_A, None, layer.stride, layer.padding)
        return convolve(
            hidden * self.gains().to(hidden.dtype).view(-1, *ones), self.lora_B.view(*self.lora_B.shape, *ones)
        )


class AddProduct(torch.autograd.Function):
    """output + ((x @ lora_A.T) * gains) @ lora_B.T in the memory of `output`, which a linear layer does not need again.

    Only the [tokens, R] product is kept for the backward pass; lora_A and lora_B get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, gains: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor
    ) -> torch.Tensor:
        """output [..., out], x [..., in], gains [R], lora_A [R, in], lora_B [out, R], all of one dtype."""
        hidden = x.reshape(-1, x.shape[-1]) @ lora_A.T
        output.view(-1, output.shape[-1]).addmm_(hidden * gains, lora_B.T)
        ctx.mark_dirty(output)
        ctx.save_for_backward(hidden, gains, lora_A, lora_B)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of output, x and gains."""
        hidden, gains, lora_A, lora_B = ctx.saved_tensors
        back = grad.reshape(-1, grad.shape[-1]) @ lora_B
        to_x = ((back * gains) @ lora_A).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        return grad, to_x, (back * hidden).sum(0) if ctx.needs_input_grad[2] else None, None, None


def _along_rows(values: torch.Tensor, layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """[out] in the shape that broadcasts over an output, whose rows are its last dimension, or a convolution's channels."""
    if isinstance(layer, CHANNELS):
        return values.view(-1, *[1] * (output.dim() - 2))
    return values


def _add_delta(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """The forward hook of a target module; a function of the module alone, so that copies of a model stay whole."""
    x = args[0] if args else next(iter(kwargs.values()))
    lora: StackedLora = layer.wlora  # type: ignore[assignment]
    if type(layer) is nn.Linear and lora.adds_in_place(x, output):
        added: torch.Tensor = AddProduct.apply(output, x, lora.gains().to(x.dtype), lora.lora_A, lora.lora_B)  # type: ignore[no-untyped-call]
        return added
    change: torch.Tensor = lora(x, output, layer)
    return output + change.to(output.dtype)


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
        modules_to_save: what becomes of whole tensors that the adapters carry: a name, `drop`, or None to refuse those that
            the head does not replace.
        residual: name of the adapter whose residual the base is (PiSSA and its kind).

    Returns:
        The model itself.

    Raises:
        AdapterError, UnsupportedError: an adapter that does not fit the model, or a feature that is not supported.
    """
    given = list(adapters)
    read = iter(load_adapters([a for a in given if not isinstance(a, Adapter)], residual=residual))
    loaded = [a if isinstance(a, Adapter) else next(read) for a in given]
    if not loaded:
        raise AdapterError("a mixture needs an adapter or more, got none.")
    if normalize not in NORMALIZE:
        raise MixtureError(f"normalize is {normalize!r}, expected one of {', '.join(NORMALIZE)}.")
    if isinstance(delta_scale, str) and delta_scale != LEARNED:
        raise MixtureError(f"delta_scale is {delta_scale!r}, expected a number or {LEARNED}.")
    if not temperature > 0:
        raise MixtureError(f"temperature is {temperature}, expected a number above 0.")
    if hasattr(model, "wlora"):
        raise MixtureError("the model has adapters attached already: call wlora_merge.detach(model) first.")
    for adapter in loaded:
        if adapter.config.get("target_parameters"):
            raise UnsupportedError(
                f"{adapter.where}: it changes fused expert weights (target_parameters), which a fit does not train through yet: "
                "`wlora-merge mix` and an export fold it."
            )
    layers = dict(model.named_modules())
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    deltas = stack(loaded, live_modules(model), live_tensors(model), model_type=model_type)
    for delta in deltas:
        if delta.biases:
            _check_bias(delta.module, layers[delta.module])
    trained = _head_parameters(model, head)
    refuse_overlap(deltas, [], trained, live_tensors(model))
    taken = _take_saved(model, loaded, modules_to_save, trained)
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
    attachment = Attachment(loaded, granularity, normalize, temperature, scale, weights, groups, trained, taken)
    for delta in deltas:
        layer = layers[delta.module]
        layer.add_module("wlora", StackedLora(delta, layer, attachment))
        layer.wlora_hook = layer.register_forward_hook(_add_delta, with_kwargs=True)
    model.wlora = attachment  # type: ignore[assignment]
    return model


def _start(groups: int, n: int, normalize: str, device: torch.device) -> nn.Parameter:
    """Uniform composition: logits [G, N] of zero, or free weights of 1/N."""
    row = uniform(n) if normalize == "none" else [0.0] * n
    return nn.Parameter(torch.tensor([row] * groups, dtype=torch.float32, device=device))


def set_delta_scale(model: nn.Module, delta_scale: float | nn.Parameter) -> None:
    """Set the factor of the whole delta weight in every attached module; 0 gives the base model."""
    attachment_of(model).delta_scale = delta_scale


def regroup(model: nn.Module, granularity: str, normalize: str) -> nn.Parameter:
    """Give an attached model a new `wlora_weights` for other groups or another normalization, at uniform composition."""
    attachment = attachment_of(model)
    modules = [m for group in attachment.groups.values() for m in group]
    attachment.granularity, attachment.normalize = granularity, normalize
    attachment.groups = make_groups(modules, granularity)
    attachment.__post_init__()
    n, device = len(attachment.adapters), attachment.weights.device
    attachment.weights = _start(len(attachment.groups), n, normalize, device)
    model.register_parameter(PARAMETER, attachment.weights)
    return attachment.weights


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the base model as it was, but frozen; a trained head stays."""
    for layer in list(model.modules()):
        if isinstance(getattr(layer, "wlora", None), StackedLora):
            layer.wlora_hook.remove()  # type: ignore[operator, union-attr]
            del layer.wlora_hook, layer.wlora
    if hasattr(model, "wlora"):
        del model.wlora
        for name in (PARAMETER, SCALE_PARAMETER):
            if hasattr(model, name):
                delattr(model, name)
    return model


def attachment_of(model: nn.Module) -> Attachment:
    """What `attach` has done to this model.

    Raises:
        MixtureError: nothing.
    """
    attachment = getattr(model, "wlora", None)
    if not isinstance(attachment, Attachment):
        raise MixtureError("the model has no adapters attached: call wlora_merge.attach(model, adapters) first.")
    return attachment


def live_modules(model: nn.Module) -> Find:
    """Finds target modules in a live model."""
    layers = dict(model.named_modules())
    names = NameResolver(name for name in layers if name)
    tied = _tied_embeddings(model) if _is_encoder_decoder(model) else []

    def find(name: str) -> Target | None:
        found = names.find(name) or names.find(_renamed(model, name))
        if found is None and ".experts." in name:
            raise UnsupportedError(
                f"target module {name!r}: the model has its experts in one tensor, and a fit does not train through that yet: "
                "`wlora-merge mix` and an export fold it."
            )
        if found is None:
            return None
        layer = layers[found]
        tie = any(layer is other for other in tied)
        return Target(
            found, _weight_shape(found, layer), tie, partial(_weight, layer), twin=partial(_twin, model, layer)
        )

    return find


def _twin(model: nn.Module, layer: nn.Module) -> str | None:
    """The output embedding's name, where this layer is the input embedding and they share one weight."""
    pair = _tied_embeddings(model)
    if not pair or layer is not pair[0]:
        return None
    return next((str(name) for name, other in model.named_modules() if other is pair[1]), None)


def _renamed(model: nn.Module, module: str) -> str:
    """What transformers makes of a module's name from before a renaming, as older adapters have it."""
    if not hasattr(model, "config"):
        return module
    return ModuleTree(model, {}).rename(f"{module}.weight")[0].removesuffix(".weight")


def live_tensors(model: nn.Module) -> Find:
    """Finds whole tensors in a live model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = NameResolver(parameters)
    tied = [layer.weight for layer in _tied_embeddings(model)] if _is_encoder_decoder(model) else []

    def find(name: str) -> Target | None:
        found = names.find(name)
        if found is None:
            return None
        tie = any(parameters[found] is other for other in tied)
        return Target(found, tuple(parameters[found].shape), tie, parameters[found].detach)

    return find


def _tied_embeddings(model: nn.Module) -> list[nn.Module]:
    """Input and output embedding where they share one weight."""
    if not hasattr(model, "get_input_embeddings"):
        return []
    pair = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    return pair if None not in pair and pair[0].weight is pair[1].weight else []


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give one parameter a value of its own: where it was tied to another, that one keeps the old value."""
    module, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    value = torch.empty_like(old).copy_(tensor.detach())
    setattr(model.get_submodule(module), leaf, nn.Parameter(value.detach(), requires_grad=old.requires_grad))


def _weight_shape(name: str, layer: nn.Module) -> tuple[int, ...]:
    attention = (
        nn.MultiheadAttention,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    )  # it never calls its out_proj
    if isinstance(layer, attention) or not isinstance(getattr(layer, "weight", None), torch.Tensor):
        raise UnsupportedError(
            f"target module {name!r} is a {type(layer).__name__}, which a fit does not train through: `wlora-merge mix` and a dense "
            "export fold a MultiheadAttention."
        )
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)  # a quantized linear packs its weight
    if isinstance(layer, nn.modules.conv._ConvNd):
        _check_convolution(name, layer)
    weight = layer.weight
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()


def _check_convolution(name: str, layer: nn.modules.conv._ConvNd) -> None:
    """Refuse a convolution whose LoRA PEFT trains as another function than its merge: its lora_A has kernel, stride and
    padding of the layer, and neither its groups nor its dilation nor its padding mode."""
    spread = layer.dilation != (1,) * len(layer.kernel_size) and layer.kernel_size != (1,) * len(layer.kernel_size)
    padded = layer.padding_mode != "zeros" and layer.kernel_size != (1,) * len(layer.kernel_size)
    if not isinstance(layer, CONVOLUTIONS) or layer.groups > 1 or spread or padded:
        raise UnsupportedError(
            f"target module {name!r} is {layer}, and a LoRA of it cannot be folded: PEFT's has no groups, dilation or padding mode, "
            "so leave this adapter out."
        )


def _weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer computes with; a quantized one dequantized."""
    weight = layer.weight
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.detach()
    from peft.utils.integrations import dequantize_module_weight

    dequantized: torch.Tensor = dequantize_module_weight(layer).detach()
    return dequantized


def _check_bias(name: str, layer: nn.Module) -> None:
    """Refuse a trained bias of a layer that does more with its bias than add it to its output."""
    from transformers.pytorch_utils import Conv1D

    adds = isinstance(layer, (nn.Linear, Conv1D, nn.LayerNorm, *CHANNELS)) or type(layer).__name__.endswith("Norm")
    if not adds or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UnsupportedError(
            f"module {name!r} is a {type(layer).__name__}, whose trained bias a fit cannot mix: leave that adapter out, or use "
            "`wlora-merge mix`."
        )


def _head_parameters(model: nn.Module, head: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    trained = []
    for part in head:
        found = [n for n in names if n == part or n.startswith(f"{part}.")]
        if not found:
            raise MixtureError(f"head {part!r}: the model has no module or parameter of that name.")
        trained += found
    return trained


def _take_saved(model: nn.Module, adapters: list[Adapter], choice: str | None, trained: list[str]) -> list[str]:
    """Put one adapter's saved tensors into the model where the user chose them; their names."""
    if choice == "mix":
        raise UnsupportedError("--modules-to-save mix: a fit does not mix whole tensors yet; `wlora-merge mix` does.")
    _, taken = stack_tensors(adapters, choice, trained, live_tensors(model))
    for name, tensor in taken.items():
        parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
        if parameter is None or parameter.shape != tensor.shape:
            got = "has none of that name" if parameter is None else f"has {list(parameter.shape)}"
            raise AdapterError(f"adapter {choice!r}: tensor {name!r} is {list(tensor.shape)}, the model {got}.")
        set_parameter(model, name, tensor)
    return sorted(taken)


# ------------------------------------------------------------------------------------------------ back to a Mixture


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
    from .base_model import BaseModel, open_base
    from .tasks import task_of

    attachment = attachment_of(model)
    source = base or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not source:
        raise MixtureError(
            "the model does not say which base it was loaded from: call Mixture.from_model(model, base=PATH)."
        )
    opened = source if isinstance(source, BaseModel) else open_base(source)
    names = {m: _base_name(opened, m) for modules in attachment.groups.values() for m in modules}
    groups = make_groups(names.values(), attachment.granularity)
    row = {names[m]: g for g, modules in enumerate(attachment.groups.values()) for m in modules}
    logits = model.get_parameter(PARAMETER).detach().float().cpu()[[row[modules[0]] for modules in groups.values()]]
    scale = attachment.delta_scale
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
        data={"method": TRAINING_LOOP},
        prefixes=prefixes((in_file, live) for live, in_file in names.items()),
        head={name: model.get_parameter(name).detach().cpu().clone() for name in (*attachment.head, *attachment.taken)},
    )


def _base_name(base: BaseModel, module: str) -> str:
    name = base.find_module(module)
    if name is None:
        raise MixtureError(f"{base.folder}: has no tensor for target module {module!r}: is this the model's base?")
    return name
