"""The ONNX file as bytes: where each weight lies, in the file itself or in its data files.

A fold changes no size, so what is needed of a file is the byte range of each tensor. This room walks the protobuf fields
that lead there and skips all others: no weight is read, whatever its size. It knows nothing of models.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3, https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BaseModelError
from ..io.safetensors_file import Entry, byte_length
from ..io.untrusted import is_plain_file_name

GRAPH, INITIALIZER, INPUT, RAW_DATA = 7, 5, 11, 9
"""Numbers of fields that hold bytes: of a ModelProto, twice of a GraphProto, of a TensorProto."""
LONG = 4096  # bytes of an initializer that is a weight, and no shape, index or scale
WIDTHS = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 10: 2, 11: 8, 16: 2}
"""TensorProto.DataType of what a long initializer can be -> bytes of a number."""
# TensorProto.DataType of what a base weight can be
FLOATS = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}
QUANTIZED = {
    "DequantizeLinear": 0, "MatMulNBits": 1, "MatMulBnb4": 1, "MatMulInteger": 1, "QLinearMatMul": 3,
    "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "GatherBlockQuantized": 0, "QGemm": 3,
}  # fmt: skip
"""Operators on quantized weights, and which of their inputs the weight is."""
_LENGTH = 2  # the wire type of messages, strings and packed numbers


@dataclass
class OnnxFile:
    """Where the weights of one graph lie.

    Attributes:
        path: the graph's file.
        tensors: each floating weight: its name, file, dtype, shape and byte range.
        data: the files beside it that hold weights, in order of their names.
        quantized: name of each weight that an operator of `QUANTIZED` takes -> that operator.
    """

    path: Path
    tensors: list[Entry] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    quantized: dict[str, str] = field(default_factory=dict)


def read_onnx(path: Path) -> OnnxFile:
    """Find the weights of a graph: initializers and constants, those of its branches too; none of them is read.

    Raises:
        BaseModelError: not an ONNX file, or one that is cut short or points outside its folder.
    """
    found = OnnxFile(path)
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            data.madvise(mmap.MADV_RANDOM)  # the weights between the fields are not read
            try:
                graphs = [(start, end) for key, start, end in _fields(view, 0, len(view)) if key == (GRAPH, _LENGTH)]
                for graph in graphs:
                    _walk(found, view, *graph)
            finally:
                view.release()
    except OSError as error:
        raise BaseModelError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, IndexError, KeyError) as error:
        raise BaseModelError(f"{path}: not a sound ONNX file ({error}); export the base again.") from error
    if not graphs:
        raise BaseModelError(f"{path}: not an ONNX file: it holds no graph.")
    found.data = sorted({entry.file for entry in found.tensors} - {path})
    for entry in found.tensors:
        if not entry.file.is_file() or entry.file.stat().st_size < entry.end:
            raise BaseModelError(
                f"{entry.file}: missing or shorter than the {entry.end} bytes that {entry.name!r} of {path.name} needs."
            )
    return found


def without_weights(path: Path) -> bytes:
    """A graph whose long initializers have become inputs, so that it can be judged without reading them.

    Raises:
        OSError: the file cannot be read.
        ValueError, IndexError: its fields do not fit into each other.
    """
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        data.madvise(mmap.MADV_RANDOM)
        try:
            parts = []
            for key, at, to in _fields(view, 0, len(view)):
                graph = b"".join(_without_initializers(view, at, to)) if key == (GRAPH, _LENGTH) else None
                parts.append(_copied(view, key, at, to) if graph is None else tag(GRAPH) + varint(len(graph)) + graph)
            return b"".join(parts)
        finally:
            view.release()


def _without_initializers(view: memoryview, start: int, end: int) -> Iterator[bytes]:
    """The fields of a GraphProto, a long initializer as the input of its name, dtype and shape; one that is unsound as it is."""
    import onnx

    for key, at, to in _fields(view, start, end):
        tensor = _read_tensor(view, at, to) if key == (INITIALIZER, _LENGTH) and to - at >= LONG else None
        first, last = tensor.where or (0, 0) if tensor else (0, 0)
        if tensor is None or last - first != WIDTHS.get(tensor.dtype, 0) * math.prod(tensor.shape):
            yield _copied(view, key, at, to)
            continue
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.dtype, tensor.shape).SerializeToString()
        yield tag(INPUT) + varint(len(value)) + value


def _copied(view: memoryview, key: tuple[int, int], at: int, to: int) -> bytes:
    """A field as it is."""
    number, wire = key
    if wire == 0:
        return tag(number, 0) + varint(at)
    return tag(number, wire) + (varint(to - at) if wire == _LENGTH else b"") + bytes(view[at:to])


def tag(number: int, wire: int = _LENGTH) -> bytes:
    """The tag of a field, by default of one that holds bytes."""
    return varint(number << 3 | wire)


def varint(value: int) -> bytes:
    """A number of at least 0 as protobuf writes it: in groups of seven bits, least first."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*data, value))


def _walk(found: OnnxFile, view: memoryview, start: int, end: int) -> None:
    """A GraphProto: its initializers, and its nodes' constants and branches."""
    for key, at, to in _fields(view, start, end):
        if key == (INITIALIZER, _LENGTH):
            _add(found, view, at, to, None)
        elif key == (1, _LENGTH):
            _walk_node(found, view, at, to)


def _walk_node(found: OnnxFile, view: memoryview, start: int, end: int) -> None:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}  # inputs, outputs, operator
    tensors = []
    for (number, wire), at, to in _fields(view, start, end):
        if wire == _LENGTH and number in texts:
            texts[number].append(str(view[at:to], "utf-8"))
        elif (number, wire) == (5, _LENGTH):
            for attribute, a, b in _fields(view, at, to):
                if attribute == (5, _LENGTH):
                    tensors.append((a, b))
                elif attribute in ((6, _LENGTH), (11, _LENGTH)):
                    _walk(found, view, a, b)
    inputs, outputs, (operator, *_) = texts[1], texts[2], (*texts[4], "")
    for a, b in tensors:
        _add(found, view, a, b, outputs[0] if outputs else None)
    if operator in QUANTIZED and len(inputs) > QUANTIZED[operator]:
        found.quantized[inputs[QUANTIZED[operator]]] = operator


def _add(found: OnnxFile, view: memoryview, start: int, end: int, name: str | None) -> None:
    """A TensorProto, where it is of a floating dtype and its numbers lie in one range of bytes."""
    tensor = _read_tensor(view, start, end)
    if tensor.dtype not in FLOATS or not (tensor.where or tensor.outside):
        return
    dtype, shape = FLOATS[tensor.dtype], tuple(tensor.shape)
    length = byte_length(dtype, shape)
    file, first, last = _range_of(found.path, tensor, length)
    if math.prod(shape) < 1:
        return
    if last - first != length:
        raise ValueError(f"{tensor.name!r} of shape {tensor.shape} needs {length} bytes")
    found.tensors.append(Entry(tensor.name or name or "", file, dtype, shape, first, last))


@dataclass
class _Tensor:
    """The fields of a TensorProto: where its numbers lie in this file, or what it says of another."""

    name: str = ""
    dtype: int = 0
    shape: list[int] = field(default_factory=list)
    where: tuple[int, int] | None = None
    outside: dict[str, str] = field(default_factory=dict)


def _read_tensor(view: memoryview, start: int, end: int) -> _Tensor:
    tensor = _Tensor()
    for (number, wire), at, to in _fields(view, start, end):
        if number == 1:
            tensor.shape += [at] if wire == 0 else _varints(view, at, to)
        elif number == 2:
            tensor.dtype = at
        elif number == 8:
            tensor.name = str(view[at:to], "utf-8")
        elif number == 9 or (number == 4 and wire == _LENGTH):  # float_data, packed, has the bytes of raw_data
            tensor.where = (at, to)
        elif number == 13:
            pair = {n: str(view[a:b], "utf-8") for (n, _), a, b in _fields(view, at, to)}
            tensor.outside[pair.get(1, "")] = pair.get(2, "")
    return tensor


def _range_of(path: Path, tensor: _Tensor, length: int) -> tuple[Path, int, int]:
    """The file that holds a tensor's numbers, and their range of bytes in it."""
    if not tensor.outside:
        return path, *(tensor.where or (0, 0))
    location = tensor.outside["location"]
    if not is_plain_file_name(location):
        raise ValueError(f"{tensor.name!r} lies in {location!r}, expected a plain file name")
    at = int(tensor.outside.get("offset") or 0)
    return path.parent / location, at, at + int(tensor.outside.get("length") or length)


def _varints(view: memoryview, at: int, end: int) -> list[int]:
    """The numbers of a packed field."""
    numbers = []
    while at < end:
        number, at = _varint(view, at)
        numbers.append(number)
    return numbers


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[tuple[int, int], int, int]]:
    """The fields of a message: (number, wire type), and the range of its bytes, or its number twice for a varint."""
    at = start
    while at < end:
        tag, at = _varint(view, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(view, at)
            yield (tag >> 3, wire), value, value
            continue
        if wire == _LENGTH:
            length, at = _varint(view, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire} at byte {at}")
        if at + length > end:
            raise ValueError(f"a field of {length} bytes at byte {at} ends behind its message")
        yield (tag >> 3, wire), at, at + length
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, least first, and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than ten bytes at byte {at}")
