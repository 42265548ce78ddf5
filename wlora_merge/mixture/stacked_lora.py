"""StackedLora: the nn.Module that a fit attaches to each target module, and what it adds to that module's output.

The forward pass is y = base(x) + ((x @ lora_A.T) * gains) @ lora_B.T. As the factors need no gradient, autograd keeps only
the [tokens, R] product of the first matmul, whatever the number of adapters. A DoRA also adds
Σ gains_n·row_scale_n · (base(x) - bias), so base(x) is kept then. The gradient is the softmax's own; the public
WLoRA code loses its normalization term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..adapters.deltas import ModuleDelta
from ..adapters.layouts import Layout
from .live_model import CHANNELS, CONVOLUTIONS, FLOATS
from .model_gains import ADAPTERS, FACTORS, Place

if TYPE_CHECKING:
    from .attachment import Attachment

EXACT = ("row_scale", "bias")
"""Buffers of a StackedLora that are float32 whatever the model's dtype."""
CONVOLVE: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class StackedLora(nn.Module):
    """The stacked changes of one target module; its output is the mixture's change of that module's output.

    Buffers: lora_A [R, in] and lora_B [out, R] where R > 0. With a DoRA there is row_scale, and with a trained bias `bias`, both
    [N, out] float32. They are not part of the state dict: they come from the adapters.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
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
        dtype = weight.dtype if isinstance(weight, torch.Tensor) and weight.dtype in FLOATS else torch.float32
        device = weight.device if isinstance(weight, torch.Tensor) else None
        values = {
            "lora_A": delta.lora_A.to(dtype) if delta.factors else None,
            "lora_B": delta.lora_B.to(dtype) if delta.factors else None,
            "row_scale": None if delta.row_scale is None else delta.row_scale.to(attachment.weights.dtype),
            "bias": None if delta.bias is None else delta.bias.to(attachment.weights.dtype),
        }
        for name, value in values.items():
            self.register_buffer(name, None if value is None else value.to(device), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StackedLora:
        """What `model.to` and `model.bfloat16` call: the float32 buffers change their device, and never their dtype."""
        exact = {name: value for name, value in self.named_buffers() if name in EXACT}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def gains(self, kind: str = FACTORS) -> torch.Tensor:
        """gains [R], or those of the adapters [N], differentiable in `wlora_weights`."""
        return self.attachment.gains.of((self.module, kind)).to(*self.place(kind))

    def place(self, kind: str) -> Place:
        """Device and dtype in which it needs the gains of its rows, or of the adapters."""
        if kind == FACTORS:
            return self.lora_A.device, self.lora_A.dtype
        rows: torch.Tensor = self.bias if self.row_scale is None else self.row_scale  # type: ignore[assignment]
        return rows.device, self.attachment.weights.dtype

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

    def adds_in_place(self, x: torch.Tensor, output: torch.Tensor, layer: nn.Linear) -> bool:
        """Whether the product is all there is, in one dtype, and can be added in the memory of a frozen layer's output."""
        plain = self.lora_A is not None and self.row_scale is None and self.bias is None
        same = plain and x.dtype == output.dtype == self.lora_A.dtype and output.is_contiguous()
        frozen = not any(p.requires_grad for p in layer.parameters(recurse=False))
        return same and frozen and not torch.is_autocast_enabled(x.device.type)

    def mixed(self, rows: torch.Tensor, output: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """Σ gains_n·rows_n of [N, out], in a shape that broadcasts with the module's output."""
        gains = self.gains(ADAPTERS)
        total = gains @ rows.to(gains.dtype)
        return _along_rows(total.to(output.dtype), layer, output)

    def product(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """((x @ lora_A.T) * gains) @ lora_B.T"""
        if isinstance(layer, CONVOLUTIONS):
            return self.convolved(x, layer)
        if self.layout is Layout.EMBEDDING:
            hidden = F.embedding(x, self.lora_A.T)
        else:
            hidden = F.linear(
                x.to(self.lora_A.dtype) if not torch.is_autocast_enabled(x.device.type) else x, self.lora_A
            )
        return F.linear(hidden * self.gains().to(hidden.dtype), self.lora_B)

    def convolved(self, x: torch.Tensor, layer: nn.modules.conv._ConvNd) -> torch.Tensor:
        """The product where the layer is a convolution: lora_A with the layer's kernel, stride and padding, lora_B with 1x1."""
        lora_A = self.lora_A.view(-1, *layer.weight.shape[1:])
        convolve, ones = CONVOLVE[lora_A.dim() - 2], [1] * (lora_A.dim() - 2)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(lora_A.dtype)
        hidden = convolve(x, lora_A, None, layer.stride, layer.padding)
        return convolve(
            hidden * self.gains().to(hidden.dtype).view(-1, *ones), self.lora_B.view(*self.lora_B.shape, *ones)
        )


class AddProduct(torch.autograd.Function):
    """output + ((x @ lora_A.T) * gains) @ lora_B.T in the memory of `output`, which a frozen linear layer does not need again.

    The backward pass is the layer's and the product's in one, so that the gradient of x is written once. Of the tokens only
    the [tokens, R] product is kept for it; weight, lora_A and lora_B get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor,
        gains: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
    ) -> torch.Tensor:
        """output [..., out] without its graph, x [..., in], gains [R], weight [out, in], lora_A [R, in], lora_B [out, R]."""
        hidden = x.reshape(-1, x.shape[-1]) @ lora_A.T
        output.view(-1, output.shape[-1]).addmm_(hidden * gains, lora_B.T)
        ctx.mark_dirty(output)
        ctx.save_for_backward(hidden, gains, weight, lora_A, lora_B)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and gains."""
        hidden, gains, weight, lora_A, lora_B = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        back = rows @ lora_B
        to_x = to_gains = None
        if ctx.needs_input_grad[1]:
            to_x = (rows @ weight).addmm_(back * gains, lora_A).view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[2]:
            to_gains = (back * hidden).sum(0)
        return None, to_x, to_gains, None, None, None


def _along_rows(values: torch.Tensor, layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """[out] in the shape that broadcasts over an output, whose rows are its last dimension, or a convolution's channels."""
    if isinstance(layer, CHANNELS):
        return values.view(-1, *[1] * (output.dim() - 2))
    return values


def add_delta(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """The forward hook of a target module; a function of the module alone, so that copies of a model stay whole."""
    x = args[0] if args else next(iter(kwargs.values()))
    lora: StackedLora = layer.wlora  # type: ignore[assignment]
    if type(layer) is nn.Linear and lora.adds_in_place(x, output, layer):
        added: torch.Tensor = AddProduct.apply(  # type: ignore[no-untyped-call]
            output.detach(), x, lora.gains().to(x.dtype), layer.weight, lora.lora_A, lora.lora_B
        )
        return added
    change: torch.Tensor = lora(x, output, layer)
    return output + change.to(output.dtype)
