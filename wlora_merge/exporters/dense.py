"""The files of a dense export, laid out before a byte is written: what `save_pretrained` would give.

Names, shards, order and headers are the base's own, but where tensors are cast, laid out anew, or come anew. `stream` writes
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..errors import BaseModelError
from ..io.safetensors_file import FLOATING, Entry, build_header, byte_length, safetensors_dtype
from ..models.base_model import BaseModel
from ..models.files import INDEX, SINGLE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """One tensor of the output: its dtype and shape there, and where its numbers come from.

    `make` gives the bytes of a tensor that another writer puts together, in memory that it is handed: length -> bytes. `added`
    are rows that stand behind the source's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Entry | None = None
    deltas: tuple[ModuleDelta | TensorDelta, ...] = ()
    tensor: torch.Tensor | None = None
    make: Callable[[Callable[[int], memoryview]], memoryview] | None = None
    added: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Length in the output, in bytes."""
        return byte_length(self.dtype, self.shape)

    @property
    def untouched(self) -> bool:
        """True where the output has the base's own bytes."""
        own = self.source is not None and self.dtype == self.source.dtype
        return own and not self.deltas and self.tensor is None and self.added is None


@dataclass(frozen=True)
class OutputFile:
    """One file of the output, with the base's metadata table, and its header where that is the base's own."""

    name: str
    pieces: list[Piece]
    metadata: dict[str, str]
    raw_header: bytes | None = None

    @property
    def header(self) -> bytes:
        """The header's bytes: the base's own where nothing in it changes."""
        if self.raw_header is not None:
            return self.raw_header
        return build_header({p.name: (p.dtype, p.shape) for p in self.pieces}, self.metadata)

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""
        return len(self.header) + sum(p.nbytes for p in self.pieces)


# ------------------------------------------------------------------------------------------------------ the plan


def plan(
    base: BaseModel,
    deltas: Sequence[ModuleDelta | TensorDelta],
    head: Mapping[str, torch.Tensor],
    *,
    untied: Mapping[str, Entry] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    added: Sequence[Piece] = (),
) -> list[OutputFile]:
    """Lay out the output files before a byte is written.

    Args:
        base: the opened base.
        deltas: what changes; each names its base tensor.
        head: trained tensors under their own names; they replace the base's of that name or stand behind the last tensor.
        untied: tensor name -> the base's tensor that it was tied to and no longer is; it stands behind the last tensor.
        dtype: safetensors name (`F32`, `BF16`, `F16`) that floating tensors are cast to; None keeps each its own.
        max_shard_bytes: lay the tensors out anew in files of at most this size; None keeps the base's files.
        added: tensors that neither the base nor the head has; they stand last.
    """
    changed: dict[str, tuple[ModuleDelta | TensorDelta, ...]] = {}
    for delta in deltas:
        for name in _tensor_names(base, delta):
            changed[name] = (*changed.get(name, ()), delta)
    stored = base.stored_names(head)
    head = {stored[name] or name: tensor for name, tensor in head.items()}
    files = [_plan_file(name, base, changed, head, dtype) for name in base.headers]
    new = [name for name in head if name not in base.entries]
    extra = [
        Piece(name, safetensors_dtype(head[name].dtype), tuple(head[name].shape), tensor=head[name]) for name in new
    ]
    extra += [
        _from_base(base, name, entry, changed.get(name, ()))
        for name, entry in (untied or {}).items()
        if name not in new
    ]
    extra += added
    planned = {piece.name for file in files for piece in file.pieces} | {piece.name for piece in extra}
    if lost := sorted(set(changed) - planned):
        raise BaseModelError(
            f"{base.folder}: the adapters change tensor {lost[0]!r}, which the exported model does not have: leave those out."
        )
    if extra:
        last = files[-1]
        extra = [_cast(piece, dtype) for piece in extra]
        files[-1] = replace(last, pieces=[*last.pieces, *extra], raw_header=None)
    return _reshard(files, max_shard_bytes) if max_shard_bytes else files


def _tensor_names(base: BaseModel, delta: ModuleDelta | TensorDelta) -> list[str]:
    if isinstance(delta, TensorDelta):
        return [delta.tensor]
    return [delta.module] if delta.module in base.entries else delta.changes


def _plan_file(
    name: str,
    base: BaseModel,
    changed: Mapping[str, tuple[ModuleDelta | TensorDelta, ...]],
    head: Mapping[str, torch.Tensor],
    dtype: str | None,
) -> OutputFile:
    header = base.headers[name]
    pieces = []
    for entry in header.entries.values():
        if base.entries.get(entry.name) is not entry:
            continue  # the index places this tensor in another file
        piece = _from_base(base, entry.name, entry, changed.get(entry.name, ()))
        if entry.name in head:
            tensor = head[entry.name]
            piece = Piece(entry.name, entry.dtype, tuple(tensor.shape), tensor=tensor)
        pieces.append(_cast(piece, dtype))
    same = len(pieces) == len(header.entries) and all(
        p.source is not None and (p.dtype, p.shape) == (p.source.dtype, p.source.shape) for p in pieces
    )
    return OutputFile(name, pieces, header.metadata, header.raw if same else None)


def _from_base(base: BaseModel, name: str, entry: Entry, deltas: tuple[ModuleDelta | TensorDelta, ...]) -> Piece:
    rows, shape = base.added_rows(name, entry), base.shape_of(name, entry)
    if rows is not None and shape[0] == entry.shape[0]:  # columns behind its only row
        return Piece(name, entry.dtype, shape, tensor=base.read_whole(name, entry))
    return Piece(name, entry.dtype, shape, entry, deltas, added=rows)


def _cast(piece: Piece, dtype: str | None) -> Piece:
    return replace(piece, dtype=dtype) if dtype and piece.dtype in FLOATING else piece


def _reshard(files: list[OutputFile], limit: int) -> list[OutputFile]:
    shards: list[list[Piece]] = [[]]
    for piece in (p for file in files for p in file.pieces):
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + piece.nbytes > limit:
            shards.append([])
        shards[-1].append(piece)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return [
        OutputFile(n, p, files[0].metadata) for n, p in zip(names if len(shards) > 1 else [SINGLE], shards, strict=True)
    ]


def renamed(files: Sequence[OutputFile], names: Mapping[str, str | None]) -> list[OutputFile]:
    """The files with their tensors under other names, without those whose name is None.

    Args:
        files: from `plan`.
        names: of every tensor in them -> the name to write.

    Raises:
        BaseModelError: adapters change a tensor that is left out.
    """
    result = []
    for file in files:
        for piece in file.pieces:
            if names[piece.name] is None and piece.deltas:
                raise BaseModelError(
                    f"the adapters change tensor {piece.name!r}, which the exported model does not have: leave those out."
                )
        pieces = [replace(piece, name=name) for piece in file.pieces if (name := names[piece.name]) is not None]
        if pieces:
            result.append(file if pieces == file.pieces else replace(file, pieces=pieces, raw_header=None))
    return result


def index_bytes(base: BaseModel, files: Sequence[OutputFile]) -> bytes | None:
    """The index file for these files; the base's own bytes where it still holds; None for a single file."""
    if len(files) == 1 and (base.index is None or files[0].name == SINGLE):
        return None
    weight_map = {piece.name: file.name for file in files for piece in file.pieces}
    total = sum(p.nbytes for file in files for p in file.pieces)
    if base.index is not None and all(file.raw_header for file in files) and base.index["weight_map"] == weight_map:
        return (base.folder / INDEX).read_bytes()
    metadata = dict((base.index or {}).get("metadata") or {}) | {"total_size": total}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(p.shape) for file in files for p in file.pieces)
    table = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(table, indent=2) + "\n").encode()


def folder_bytes(files: Sequence[OutputFile]) -> int:
    """Bytes that the planned files will take."""
    return sum(file.nbytes for file in files)


def dtype_keys(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The keys of a config that say which dtype the weights have, changed: old and new spelling, and those of its parts."""
    keys = [key for key in ("torch_dtype", "dtype") if key in config]
    parts = {k: v for k, v in config.items() if isinstance(v, dict) and k != "quantization_config"}
    changes = {
        name: dict(part) | dtype_keys(part, dtype) for name, part in parts.items() if {"torch_dtype", "dtype"} & {*part}
    }
    return dict.fromkeys(keys, dtype) | changes


def with_dtype(base: BaseModel, changes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Changes of the base's config, and with them every key that says which dtype the weights have; `dtype` where none does."""
    said = {"torch_dtype", "dtype"} & {*base.config}
    full = base.config | dict(changes) | ({} if said else {"dtype": dtype})
    return {**changes, **dtype_keys(full, dtype)}


def changed_config(base: BaseModel, changes: Mapping[str, Any]) -> bytes:
    """`config.json` with some keys changed, the others in their order; the base's own bytes where none is."""
    text = (base.folder / "config.json").read_bytes()
    if all(key in base.config and base.config[key] == value for key, value in changes.items()):
        return text
    return (json.dumps(base.config | dict(changes), indent=2, ensure_ascii=False) + "\n").encode()
