"""A graph without the numbers of its weights, and the file that it becomes with them.

A skeleton is an ONNX model that lacks its weights, with a table that says which tensor of the model each of them is. Filling it
streams the weights to where they belong: no graph is built, and no number is looked at. Must not know how a graph comes about,
nor where skeletons are kept.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3, https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import VerifyError
from .graph import data_file, graph_file
from .protobuf import GRAPH, INITIALIZER, RAW_DATA, tag, varint
from .weights import Weight

if TYPE_CHECKING:
    import onnx_ir
    import torch

# One protobuf file holds at most 2 GiB; what the graph itself takes fits in the margin. Below it, one file, as Optimum
# writes: transformers.js loads external data only when its config says so.
INLINE_LIMIT = 1_900_000_000
ALIGNMENT = 4096  # of a weight in a data file, so that a runtime can map it


@dataclass(frozen=True)
class Skeleton:
    """A graph without its weights.

    Attributes:
        graph: a serialized ModelProto; its weights are initializers of a dtype and a shape, without numbers.
        weights: name of each such initializer -> which tensor of the model it is.
    """

    graph: bytes
    weights: Mapping[str, Weight]


def skeleton_of(model: onnx_ir.Model) -> Skeleton:
    """The skeleton of a graph that `tidy` left, whose weights have no numbers."""
    import onnx_ir as ir

    weights = {}
    for value in model.graph.initializers.values():
        weight = Weight.of(value)
        if weight is not None:
            weights[str(value.name)] = weight
            dtype, shape = value.dtype, value.shape
            if dtype is None or shape is None:  # the exporter gives every parameter both
                raise ValueError(f"the initializer {value.name!r} has no dtype or no shape")
            value.const_value = ir.ExternalTensor("nowhere", 0, 0, dtype, shape=shape, name=str(value.name))
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return Skeleton(proto.SerializeToString(deterministic=True), weights)


def fill(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor], folder: Path, name: str, inline_limit: int) -> None:
    """Write `name.onnx` in `folder`, with the weights inside, or in `name.onnx_data` when above `inline_limit` bytes.

    Args:
        skeleton: the graph.
        tensors: the model's, by name, of any floating dtype; each is cast to the graph's.
        folder: exists, and has no ONNX file of that name yet.
        name: what stands before `.onnx`.
        inline_limit: bytes of weights up to which they stay inside.

    Raises:
        VerifyError: it is no graph, or not of this model: it needs a tensor that the model has in another shape, or not at all.
    """
    import onnx

    try:
        model = onnx.ModelProto.FromString(skeleton.graph)
    except Exception as e:  # protobuf's DecodeError moves between its versions
        raise VerifyError(f"{folder / graph_file(name)}: what was traced is not an ONNX graph ({e}).") from e
    lacking = [tensor for tensor in model.graph.initializer if tensor.name in skeleton.weights]
    images = {t.name: _image(tensors, skeleton.weights[t.name], t) for t in lacking}
    if sum(image.nbytes for image in images.values()) <= inline_limit:
        with open(folder / graph_file(name), "wb") as stream:
            for part in _inline(model, images):
                stream.write(part)
        return
    with open(folder / data_file(name), "wb") as stream:
        for tensor in lacking:
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            _lies_in(tensor, data_file(name), stream.tell(), images[tensor.name].nbytes)
            stream.write(_bytes(images[tensor.name]))
    (folder / graph_file(name)).write_bytes(model.SerializeToString(deterministic=True))


def _image(tensors: Mapping[str, torch.Tensor], weight: Weight, stored: Any) -> torch.Tensor:
    """The model's tensor in the dtype and the order of axes of the graph's: a view where the dtype is the same."""
    import onnx
    import torch

    tensor, axes = tensors.get(weight.name), weight.axes
    shape = () if tensor is None else tuple(tensor.shape)
    turned = shape if axes is None or sorted(axes) != [*range(len(shape))] else tuple(shape[axis] for axis in axes)
    if tensor is None or turned != tuple(stored.dims):
        raise VerifyError(
            f"the graph's weight {stored.name!r} {list(stored.dims)} is not the model's {weight.name!r} {list(shape)}: report this."
        )
    image = tensor.to(getattr(torch, onnx.helper.tensor_dtype_to_np_dtype(stored.data_type).name))
    return image if axes is None else image.permute(axes)


def _inline(model: Any, images: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a ModelProto with the weights in it; of a message, fields may stand in any order."""
    lacking = [tensor for tensor in model.graph.initializer if tensor.name in images]
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in images]
    heads = {}
    for tensor in lacking:
        nbytes = images[tensor.name].nbytes
        head = tensor.SerializeToString(deterministic=True) + tag(RAW_DATA) + varint(nbytes)
        heads[tensor.name] = tag(INITIALIZER) + varint(len(head) + nbytes) + head
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    yield model.SerializeToString(deterministic=True)
    yield tag(GRAPH) + varint(len(graph) + sum(len(heads[key]) + images[key].nbytes for key in heads)) + graph
    for key, head in heads.items():
        yield head
        yield _bytes(images[key])


def _lies_in(tensor: Any, location: str, offset: int, length: int) -> None:
    """Say of an initializer in which file its numbers lie, and where."""
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
