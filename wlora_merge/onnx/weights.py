"""Which tensors of a torch model are its weights, and all else that a graph traced from it depends on.

A weight is a floating tensor of the model's state dict: its numbers never shape a graph. Every other tensor may, and so may
every number that a module keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir
    import torch

_KEY = "weight"


@dataclass(frozen=True)
class Weight:
    """Which tensor of a model an initializer is: its name, and the order of its axes where that is another than the model's."""

    name: str
    axes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, value: onnx_ir.Value) -> Weight | None:
        """The weight that an initializer without numbers is; None for any other value."""
        found: Weight | None = value.meta.get(_KEY)
        return found

    def mark(self, value: onnx_ir.Value) -> None:
        """Say of an initializer that it is this weight, and take its numbers away."""
        value.meta[_KEY], value.const_value = self, None


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights by name, tied ones under each of their names."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def structure_of(model: torch.nn.Module) -> dict[str, Any]:
    """What a traced graph depends on in a model beside its config: a table that JSON can hold, without any number of a weight.

    The modules; each weight's shape, dtype, and the weight that it is tied to; the sha256 of each tensor that is no weight; the
    numbers that modules keep.
    """
    first: dict[Any, str] = {}
    weights = {}
    for name, tensor in weights_of(model).items():
        weights[name] = [list(tensor.shape), str(tensor.dtype), first.setdefault(_place(tensor), name)]
    return {
        "class": type(model).__name__,
        "modules": str(model),
        "weights": weights,
        "constants": {name: _digest(tensor) for name, tensor in _constants(model)},
        "numbers": {
            name: {key: repr(value) for key, value in vars(module).items() if isinstance(value, bool | int | float)}
            for name, module in model.named_modules()
        },
    }


def take_weights(graph: onnx_ir.Graph, model: torch.nn.Module) -> list[str]:
    """Take the numbers of the model's weights out of its graph; the initializers that held them are marked.

    Args:
        graph: the exporter's own, of a module that has `model` as its `model`.
        model: what was traced.

    Returns:
        The names of floating constants that may come from weights, so that the graph is of these weights alone: of several
        numbers, and neither weights nor known to `structure_of`; or of the number that a weight of one number holds.
    """
    import torch

    first: dict[Any, str] = {}
    for name, tensor in weights_of(model).items():
        if tensor.numel():
            first.setdefault(_place(tensor), name)
    known = {_digest(tensor) for _, tensor in _constants(model)}
    single = {float(tensor) for tensor in weights_of(model).values() if tensor.numel() == 1}
    strange = []
    for value in graph.initializers.values():
        constant = value.const_value
        if constant is None or not constant.size or not constant.dtype.is_floating_point():
            continue
        held: Any = getattr(constant, "raw", None)
        own = isinstance(held, torch.Tensor)
        if own and _place(held) in first:
            Weight(first[_place(held)]).mark(value)
            continue
        explained = constant.numpy().item() not in single if constant.size == 1 else own and _digest(held) in known
        if not explained:
            strange.append(str(value.name))
    for node in graph.all_nodes():
        literal = node.attributes.get("value") if node.op_type == "Constant" else None
        if literal is not None and literal.value.dtype.is_floating_point() and literal.value.size > 1:
            strange.append(str(node.outputs[0].name))
    return strange


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Tensors of one place are one tensor."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _constants(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the modules that are no weights: buffers that are not saved, whole numbers, and plain attributes."""
    import torch

    weights = {id(tensor) for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()}
    for prefix, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        for key, tensor in {**module._parameters, **module._buffers, **plain}.items():
            if tensor is not None and id(tensor) not in weights:
                yield f"{prefix}.{key}", tensor.detach()


def _digest(tensor: torch.Tensor) -> str:
    import torch

    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
