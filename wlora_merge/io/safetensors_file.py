"""The safetensors file as bytes: its header, its offsets, its dtypes.

Weights are moved as byte ranges and folded in row blocks, so what is needed of a file is where each tensor lies. This room
reads headers, and refuses those that lie: too long, overlapping, out of range, of the wrong size, with duplicate names. It
knows nothing of models.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import OutputError, UnsupportedError, WloraMergeError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the library's own bound
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 64  # torch's own bound
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
"""How torch calls what safetensors calls so."""
FLOATING = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` and `end` are byte offsets in `file`, header included."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stamp: tuple[int, ...] = ()
    """What the file was when its header was read; see `opened`."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def rows(self) -> int:
        """How many rows it has as a matrix whose columns are its last dimension."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Header:
    """A file's header: its entries by offset, its metadata, and its own bytes (length prefix and padding included)."""

    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    raw: bytes


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        WloraMergeError: a file that is not safetensors, is truncated, or whose header lies.
    """
    try:
        with open(file, "rb") as f:
            stamp = _, size, _ = _stamp(f.fileno())
            prefix = f.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _broken(file, f"its header claims {length} bytes of a file of {size}")
            text = f.read(length)
    except OSError as error:
        raise WloraMergeError(f"{file}: cannot be read ({error.strerror}).") from error
    try:
        table = json.loads(
            text.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_number, parse_float=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid JSON ({error})") from error
    if not text.startswith(b"{") or not isinstance(table, dict) or len(table) > MAX_TENSORS:
        raise _broken(file, "its header is not a table of tensors")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(file, "its __metadata__ is not a table of strings")
    entries = sorted(
        (_entry(file, 8 + length, name, row, stamp) for name, row in table.items()), key=lambda e: (e.start, e.end)
    )
    _check_tiling(file, entries, 8 + length, size)
    return Header(file, {e.name: e for e in entries}, metadata, prefix + text)


def _stamp(descriptor: int) -> tuple[int, int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns


def opened(entry: Entry) -> int:
    """A descriptor of an entry's file, to be closed.

    Raises:
        WloraMergeError: it cannot be read, or is not what it was when its header was read.
    """
    try:
        descriptor = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise WloraMergeError(f"{entry.file}: cannot be read ({error.strerror}).") from error
    if entry.stamp and _stamp(descriptor) != entry.stamp:
        os.close(descriptor)
        raise WloraMergeError(f"{entry.file}: changed meanwhile; run this again when nothing writes to it.")
    return descriptor


def _entry(file: Path, data: int, name: str, row: Any, stamp: tuple[int, ...]) -> Entry:
    try:
        if len(row) != 3:
            raise ValueError(f"it has {', '.join(map(str, row))}, expected dtype, shape, data_offsets")
        dtype, shape, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        numbers = (*shape, start, end)
        if not all(type(x) is int and 0 <= x < 2**63 for x in numbers) or dtype not in BITS:
            raise ValueError(f"dtype {dtype!r}, shape {list(shape)}, offsets {[start, end]}")
        if len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**63:
            raise ValueError(f"a shape of {len(shape)} dimensions is too large")
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(file, f"the entry of tensor {name!r} is malformed ({error})") from error
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - start != bits // 8:
        raise _broken(
            file, f"tensor {name!r} of dtype {dtype} and shape {list(shape)} needs {bits // 8} bytes, has {end - start}"
        )
    return Entry(name, file, dtype, shape, data + start, data + end, stamp)


def _check_tiling(file: Path, entries: list[Entry], data: int, size: int) -> None:
    at = data
    for entry in entries:
        if entry.start != at:
            raise _broken(file, f"tensor {entry.name!r} starts at byte {entry.start}, expected {at}")
        at = entry.end
    if at != size:
        raise _broken(file, f"it has {size} bytes, its tensors end at {at}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = sorted(name for name, _ in pairs)
        raise ValueError(f"duplicate key {next(a for a, b in pairwise(names) if a == b)!r}")
    for text in (*table, *(v for v in table.values() if isinstance(v, str))):
        text.encode()  # half of a surrogate pair is no name: UnicodeEncodeError is a ValueError
    return table


def _no_number(text: str) -> None:
    """Refuse what Python's reader of JSON takes and others do not (NaN, Infinity), and fractions, which no header has."""
    raise ValueError(f"{text} is no whole number")


def _broken(file: Path, what: str) -> WloraMergeError:
    return WloraMergeError(f"{file}: not a sound safetensors file: {what}; fetch or convert it again.")


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header bytes (length prefix included, padded to 8) of a file that holds these tensors one after another.

    Args:
        tensors: name -> (safetensors dtype, shape), in the order of the data.
        metadata: the `__metadata__` table; left out when empty.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + byte_length(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def byte_length(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this safetensors dtype and shape takes."""
    return math.prod(shape) * BITS[dtype] // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name (`BF16` -> torch.bfloat16)."""
    import torch

    if dtype not in TORCH_NAMES:
        raise UnsupportedError(f"tensors of dtype {dtype} cannot be folded; give the original 16-bit base.")
    return cast("torch.dtype", getattr(torch, TORCH_NAMES[dtype]))


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype (torch.bfloat16 -> `BF16`)."""
    name = str(dtype).removeprefix("torch.")
    return next(key for key, value in TORCH_NAMES.items() if value == name)


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a small safetensors file (an adapter, a mixture) at once.

    Raises:
        OutputError: the disk is full or refuses; the library has an error of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, {"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file}: cannot be written ({error}); free some space or choose another --out.") from error


def read_rows(fd: int, entry: Entry, buffer: memoryview, offset: int = 0) -> None:
    """Fill `buffer` with the entry's bytes from byte `offset` on, by positioned reads (no seek, safe across threads).

    Raises:
        WloraMergeError: the file ends early (it was truncated while being read) or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            n = os.preadv(fd, [buffer[done:]], entry.start + offset + done)
        except OSError as error:
            raise WloraMergeError(f"{entry.file}: reading tensor {entry.name!r} failed ({error.strerror}).") from error
        if n == 0:
            raise WloraMergeError(
                f"{entry.file}: ended while reading tensor {entry.name!r}: the file changed meanwhile."
            )
        done += n


def tensor_bytes(entry: Entry) -> bytearray:
    """The bytes of one whole tensor."""
    data, fd = bytearray(entry.nbytes), opened(entry)
    try:
        read_rows(fd, entry, memoryview(data))
    finally:
        os.close(fd)
    return data


def read_tensor(entry: Entry) -> torch.Tensor:
    """One whole tensor, in its own dtype and shape."""
    import torch

    if entry.dtype not in TORCH_NAMES:
        raise UnsupportedError(
            f"{entry.file}: tensor {entry.name!r} has dtype {entry.dtype}, which is not read: give the original 16-bit tensors."
        )
    data = tensor_bytes(entry)
    if not data:
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).reshape(entry.shape)
