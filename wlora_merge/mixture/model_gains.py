"""ModelGains: the gains of all target modules, made in one operation at the start of a model's forward pass.

Made module by module they are most of what a step launches. So a hook of the whole model makes them once, before its forward
pass, and each module takes its part; a second hook forgets them. A module that is called alone, or again by gradient
checkpointing, makes its own in the same way.

It knows tensors of numbers and the two hooks. It knows no layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.deltas import ModuleDelta
from .weights import at_module, gains, mixture_weights

if TYPE_CHECKING:
    from .attachment import Attachment

FACTORS, ADAPTERS = "factors", "adapters"
"""Of what a part has gains: of the R stacked rows of a module, or of its N adapters as such (a DoRA's rows, a bias)."""
Part = tuple[str, str]
"""A module's name, and FACTORS or ADAPTERS."""
Place = tuple[torch.device, torch.dtype]


@dataclass(frozen=True)
class _Running:
    """Gains of the forward pass that runs, by part; whether they have gradients; how often the weights had been written."""

    gains: dict[Part, torch.Tensor]
    differentiable: bool
    version: int | None


class ModelGains:
    """Of what the gains of M target modules are made: their groups, and the scaling of each stacked row.

    gains [R] = delta_scale · mixture weight · scaling, one for each stacked row of a module. A DoRA and a bias have no scaling:
    [N], one for each adapter.

    Args:
        attachment: which has the weights and says how they are normalized.
        deltas: what is stacked on each module, M of them.
    """

    def __init__(self, attachment: Attachment, deltas: Sequence[ModuleDelta]) -> None:
        self.attachment, n = attachment, len(attachment.adapters)
        self.number = {delta.module: m for m, delta in enumerate(deltas)}
        self.present = torch.stack([delta.present for delta in deltas])
        self.parts: dict[Part, slice] = {}
        self.running: _Running | None = None
        index, scaling, end = [], [], 0
        for m, delta in enumerate(deltas):
            parts = {FACTORS: (delta.adapter_index, delta.scaling)} if delta.factors else {}
            if delta.row_scale is not None or delta.biases:
                parts[ADAPTERS] = torch.arange(n), torch.ones(n)
            for kind, (adapters, factor) in parts.items():
                index.append(m * n + adapters)
                scaling.append(factor)
                self.parts[delta.module, kind] = slice(end, end := end + len(adapters))
        self.index, self.scaling = torch.cat(index), torch.cat(scaling).to(attachment.weights.dtype)
        self.regroup()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model takes along: not the gains of a pass that Ctrl-C has left open."""
        return self.__dict__ | {"running": None}

    def regroup(self) -> None:
        """Take the attachment's groups."""
        self.rows = torch.tensor([self.attachment.row[module] for module in self.number])
        self.running = None

    def set_present(self, module: str, present: torch.Tensor) -> None:
        """Say which adapters [N] bool change one module."""
        self.present[self.number[module]] = present.to(self.present.device)

    def weights_of(self, module: str) -> torch.Tensor:
        """Mixture weights [N] of one module, differentiable in `wlora_weights`."""
        m = self.number[module]
        return self._weights(slice(m, m + 1))[0]

    def of(self, part: Part) -> torch.Tensor:
        """Gains of a part, differentiable in `wlora_weights`: those of the model's forward pass where it runs, else its own."""
        running = self.running
        if running is not None and self._holds(running):
            return running.gains[part]
        m = self.number[part[0]]
        with nullcontext() if torch.compiler.is_compiling() else _kept_by_autograd():
            return self._make(slice(m, m + 1), self.parts[part])

    def open(self, places: Sequence[Place]) -> None:
        """Make the gains of all parts, for the forward pass that begins.

        Args:
            places: device and dtype in which each part needs them.
        """
        made, sizes = self._make(slice(None), slice(None)), [part.stop - part.start for part in self.parts.values()]
        cut = {place: _Cut.apply(made.to(*place), sizes) for place in dict.fromkeys(places)}  # type: ignore[no-untyped-call]
        found = {part: cut[place][i] for i, (part, place) in enumerate(zip(self.parts, places, strict=True))}
        self.running = _Running(found, torch.is_grad_enabled(), _version(self.attachment.weights))

    def close(self) -> None:
        """Forget those of the forward pass."""
        self.running = None

    def _holds(self, running: _Running) -> bool:
        """Whether the gains of a pass are those that are needed now: Ctrl-C in a pass leaves it open."""
        if torch.is_grad_enabled() and not running.differentiable:
            return False
        return torch.compiler.is_compiling() or running.version == _version(self.attachment.weights)

    def _weights(self, modules: slice) -> torch.Tensor:
        """Mixture weights [modules, N]."""
        weights = self.attachment.weights
        if self.rows.device != weights.device:
            self._move(weights.device)
        mixed = mixture_weights(weights[self.rows[modules]], self.attachment.normalize, self.attachment.temperature)
        return at_module(mixed, self.present[modules], self.attachment.normalize)

    def _move(self, device: torch.device) -> None:
        """Take the numbers to where the weights are; a pass in inference mode must not make tensors that autograd refuses."""
        with torch.inference_mode(False):
            for name in ("rows", "present", "index", "scaling"):
                setattr(self, name, getattr(self, name).to(device))

    def _make(self, modules: slice, rows: slice) -> torch.Tensor:
        """Gains [rows] of these modules."""
        weights = self._weights(modules)
        index = self.index[rows] - (modules.start or 0) * weights.shape[1]
        return gains(weights.flatten(), self.scaling[rows], index, self.attachment.delta_scale)


class _Cut(torch.autograd.Function):
    """A vector in parts. Its backward pass joins their gradients at once, and has one zero for all parts that were not used."""

    @staticmethod
    def forward(ctx: Any, vector: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        """vector [Σ sizes]"""
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return torch.split(vector, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        """Gradient of the vector."""
        used = next((grad for grad in grads if grad is not None), None)
        if used is None:
            return None, None
        if any(grad is None for grad in grads):
            zero = used.new_zeros(max(ctx.sizes))
            grads = tuple(zero[:size] if grad is None else grad for size, grad in zip(ctx.sizes, grads, strict=True))
        return torch.cat(grads), None  # type: ignore[arg-type]


def _kept_by_autograd() -> Any:
    """A block whose saved tensors no other hook sees.

    Gradient checkpointing counts what a layer keeps in its two passes. The gains of the first are the whole model's.
    """
    unchanged: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    return torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged)


def _version(weights: torch.Tensor) -> int | None:
    """How often the weights were written; None where nobody counts."""
    return None if torch.compiler.is_compiling() or weights.is_inference() else weights._version


def open_gains(model: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook before the forward pass of a whole model; a replica of nn.DataParallel, which shares it with others, does without."""
    if not getattr(model, "_is_replica", False):
        model.wlora.open_gains()  # type: ignore[union-attr,operator]


def close_gains(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The hook after it, and after an error in it."""
    if not getattr(model, "_is_replica", False):
        model.wlora.gains.close()  # type: ignore[union-attr,operator]
