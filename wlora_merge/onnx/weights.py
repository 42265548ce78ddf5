"""Which tensors of a torch model are its weights, and all else that a graph traced from it depends on.

A weight is a floating tensor of the model's state dict: its numbers never shape a graph. Every other tensor may, and so may
every number that a module keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
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
    weights = weights_of(model)
    first: dict[Any, str] = {}
    for name, tensor in weights.items():
        if tensor.numel():
            first.setdefault(_place(tensor), name)
    known = {_digest(tensor) for _, tensor in _constants(model)}
    single = {float(tensor) for tensor in weights.values() if tensor.numel() == 1}
    strange = []
    for value in _floating(graph):
        held = _torch_tensor(value)
        if held is not None and _place(held) in first:
            Weight(first[_place(held)]).mark(value)
        elif not _is_explained(value, held, known, single):
            strange.append(str(value.name))
    return strange + [str(node.outputs[0].name) for node in graph.all_nodes() if _is_floating_literal(node)]


def _floating(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    """The initializers that hold floating numbers."""
    for value in graph.initializers.values():
        constant = value.const_value
        if constant is not None and constant.size and constant.dtype.is_floating_point():
            yield value


def _torch_tensor(value: onnx_ir.Value) -> torch.Tensor | None:
    """The tensor of torch that an initializer holds, where it holds one."""
    import torch

    raw: Any = getattr(value.const_value, "raw", None)
    return raw if isinstance(raw, torch.Tensor) else None


def _is_explained(
    value: onnx_ir.Value, held: torch.Tensor | None, known: Collection[str], single: Collection[float]
) -> bool:
    """Whether a constant that is no weight comes from none either: `known` are the digests of the model's other tensors, `single`
    the numbers of weights that have one number."""
    constant: Any = value.const_value
    if constant.size == 1:
        return constant.numpy().item() not in single
    return held is not None and _digest(held) in known


def _is_floating_literal(node: onnx_ir.Node) -> bool:
    """Whether a node is a constant of several floating numbers."""
    literal = node.attributes.get("value") if node.op_type == "Constant" else None
    return literal is not None and bool(literal.value.dtype.is_floating_point()) and literal.value.size > 1


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
