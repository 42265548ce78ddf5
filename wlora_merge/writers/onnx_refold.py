"""A mixture -> an ONNX export of its base, with the base's weights replaced by the folded ones and nothing else touched.

No tracing, no model: a fold changes no size, so the new file is the old one with some byte ranges rewritten. Which ranges,
the content says and not the names: a weight of the graph is a base tensor, its transpose, or several of them side by side
(a fused QKV), in the file's dtype. Whatever cannot be told so is refused by name. Files are streamed by the dense writer;
in memory are a few weights at a time.

This room matches; it asks `dense` for folded tensors and `onnx_file` for byte ranges.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from wlora_merge.base_model import BaseModel
from wlora_merge.checkpoint import FLOATING, Entry, byte_length, read_rows, torch_dtype
from wlora_merge.errors import BaseModelError, UnsupportedError, VerifyError, WloraMergeError
from wlora_merge.layouts import matrix_shape
from wlora_merge.mixture import Mixture
from wlora_merge.names import NameResolver
from wlora_merge.sources import is_here
from wlora_merge.writers.dense import OutputFile, Piece
from wlora_merge.writers.onnx_file import OnnxFile, read_onnx
from wlora_merge.writers.stream import BLOCK_ELEMENTS, Workspace, fold_into, write_files

if TYPE_CHECKING:
    import torch

CORNER = 4  # rows and columns that find a base tensor's candidates; each is then compared in full
MODEL_FILE = "model.onnx"  # what the graph of a single file is called, whatever that file was
TRACE_INSTEAD = "leave --onnx-base out to trace the mixture anew"


@dataclass(frozen=True)
class Tile:
    """Where a base tensor lies in a weight of the graph, as it is or transposed.

    `twins` are other base tensors with the same numbers, which it may be as well.
    """

    tensor: str
    row: int
    col: int
    transposed: bool
    twins: tuple[str, ...] = ()


@dataclass
class Refold:
    """What will be written: the files, and in each graph the weights that change."""

    graphs: list[OnnxFile]
    files: list[OutputFile]
    tiles: dict[tuple[Path, int], list[Tile]]
    names: dict[Path, str] = field(default_factory=dict)

    @property
    def dtypes(self) -> set[str]:
        """safetensors names of the dtypes of the weights that change."""
        return {e.dtype for graph in self.graphs for e in graph.tensors if (e.file, e.start) in self.tiles}


def find_graphs(onnx_base: Path) -> list[Path]:
    """The graphs of an export: the file itself, or those of a folder's `onnx`, or of the folder.

    Raises:
        BaseModelError: there is none.
    """
    if is_here(onnx_base) and onnx_base.is_file():
        return [onnx_base]
    for folder in (onnx_base / "onnx", onnx_base) if is_here(onnx_base) else ():
        if found := sorted(folder.glob("*.onnx")):
            return found
    raise BaseModelError(f"{onnx_base}: no ONNX file there; say --onnx-base FILE.onnx, or a folder that holds one.")


def plan_refold(onnx_base: Path, base: BaseModel, pieces: Iterable[Piece], mixture: Mixture) -> Refold:
    """Find every changed tensor in the graphs, and lay out the files, before a byte is written.

    Args:
        onnx_base: an ONNX file exported from `base`, or a folder of such files.
        base: the opened base.
        pieces: the tensors of the mixture's dense export; those that are not the base's own bytes are looked for.
        mixture: whose weights the folds take.

    Raises:
        BaseModelError: the graph has a weight that is not this base's, or lacks one; the first is named.
        UnsupportedError: it is quantized, or holds a tensor that cannot be told from another or be replaced.
    """
    graphs = [read_onnx(path) for path in find_graphs(onnx_base)]
    for graph in graphs:
        for name, operator in graph.quantized.items():
            raise UnsupportedError(
                f"{graph.path}: its weight {name!r} is quantized ({operator}), and a fold into it would not be exact: give an export "
                "in float32 or float16, and quantize after the fold."
            )
    changed = {piece.name: piece for piece in pieces if not piece.untouched}
    for name in changed:
        if name not in base.entries:
            raise UnsupportedError(
                f"{onnx_base}: the mixture brings a tensor {name!r} that the base lacks, so no weight of the graph can be known for "
                f"it: {TRACE_INSTEAD}."
            )
    matcher = Matcher(base)
    refold = Refold(graphs, [], {}, {graph.path: graph.path.name for graph in graphs})
    if onnx_base.is_file():
        refold.names[onnx_base] = MODEL_FILE
    places: set[str] = set()
    for graph in graphs:
        found, unknown = matcher.match(graph, set(changed))
        _refuse_strange(graph, unknown, matcher)
        places |= _place(graph, found, set(changed), refold.tiles)
    for name in changed:
        if name not in places:
            raise BaseModelError(_missing(onnx_base, name, base.entries[name], graphs))
    refold.files = [file for graph in graphs for file in _files_of(graph, refold, matcher, changed, mixture)]
    return refold


def _place(
    graph: OnnxFile,
    found: Iterable[tuple[Entry, list[Tile]]],
    changed: set[str],
    tiles: dict[tuple[Path, int], list[Tile]],
) -> set[str]:
    """Add the weights of a graph that change to `tiles`; the changed tensors that are there, each once."""
    places: dict[str, str] = {}
    for stored, parts in found:
        for tile in parts:
            for name in sorted({tile.tensor, *tile.twins} & changed):
                if tile.twins:
                    other = sorted({tile.tensor, *tile.twins} - {name})[0]
                    raise UnsupportedError(
                        f"{graph.path}: its weight {stored.name!r} equals the base tensors {name!r} and {other!r} alike, so which "
                        f"of them it is cannot be told: {TRACE_INSTEAD}."
                    )
                if name in places:
                    raise UnsupportedError(
                        f"{graph.path}: the base tensor {name!r} is found more than once, as {places[name]!r} and as "
                        f"{stored.name!r}: {TRACE_INSTEAD}."
                    )
                places[name] = stored.name
                tiles[stored.file, stored.start] = parts
    return set(places)


def write_refold(refold: Refold, out: Path, mixture: Mixture) -> dict[str, str]:
    """Stream the files into the folder `out`; what is on the disk is what was folded, at the place where the base's weight was.

    Returns:
        File name -> sha256, hashed as the bytes passed.

    Raises:
        BaseModelError: a weight of the graph is not the base's.
        OutputError: the disk is full or refuses, or gives back other bytes than it was given.
        VerifyError: the new graph's weights do not lie where the base's do.
    """
    written = write_files(refold.files, out, mixture, read_back=True)
    for graph in refold.graphs:
        new = read_onnx(out / refold.names[graph.path])
        if [replace(e, file=out / refold.names.get(e.file, e.file.name)) for e in graph.tensors] != new.tensors:
            raise VerifyError(f"{new.path}: its weights do not lie where those of {graph.path} do: report this.")
    return written


# --------------------------------------------------------------------------------------------------- the matching


class Matcher:
    """Tells which base tensors a weight of the graph is made of, by their corners and then by every number."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.space = Workspace()
        self._tables: dict[str, dict[tuple[int, int], dict[bytes, list[tuple[str, bool]]]]] = {}

    @cached_property
    def _corners(self) -> dict[str, torch.Tensor]:
        """Name -> the upper left corner of the tensor as a matrix, in its own dtype."""
        return {e.name: _corner(e, 0, 0, CORNER, CORNER) for e in self.base.entries.values() if e.dtype in FLOATING}

    def _table(self, dtype: str) -> dict[tuple[int, int], dict[bytes, list[tuple[str, bool]]]]:
        """Corner's shape -> corner's bytes in `dtype` -> tensors, and whether transposed."""
        if dtype not in self._tables:
            table = self._tables[dtype] = {}
            for name, corner in self._corners.items():
                corner = corner.to(torch_dtype(dtype))
                flat = len(self.base.entries[name].shape) < 2
                for transposed in (False,) if flat else (False, True):
                    form = corner.T if transposed else corner
                    kinds = table.setdefault((form.shape[0], form.shape[1]), {})
                    kinds.setdefault(bytes(_bytes(form)), []).append((name, transposed))
        return self._tables[dtype]

    def match(self, graph: OnnxFile, changed: set[str]) -> tuple[list[tuple[Entry, list[Tile]]], list[Entry]]:
        """Weights with their tiles, and weights that are not made of the base's tensors.

        A weight with a changed tensor is compared in full when it is rewritten, the others here.
        """
        stored = list({(e.file, e.start): e for e in graph.tensors}.values())
        for dtype in {entry.dtype for entry in stored}:
            self._table(dtype)  # before the threads ask for it
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            tiles = list(pool.map(partial(self._tiles, changed=changed), stored))
        found = [(entry, parts) for entry, parts in zip(stored, tiles, strict=True) if parts]
        return found, [entry for entry, parts in zip(stored, tiles, strict=True) if not parts]

    def _tiles(self, stored: Entry, changed: set[str]) -> list[Tile]:
        """What the weight is made of: one tensor, or several below or beside each other; empty where it is not."""
        rows, cols = _matrix(stored.shape)
        tiles: list[Tile] = []
        row = col = 0
        down: bool | None = None
        while row < rows and col < cols:
            fits = []
            for tile in self._starting_at(stored, row, col):
                height, width = self._shape_of(tile)
                whole = (height == rows and down is not True, width == cols and down is not False)
                if any(whole) and row + height <= rows and col + width <= cols:
                    fits.append((tile, height, width, whole[1] and not whole[0] if down is None else down))
            if len(fits) > 1 or (fits and fits[0][0].tensor not in changed):
                fits = [fit for fit in fits if self.difference(stored, fit[0]) is None]
            if not fits:
                return []
            tile, height, width, down = max(fits, key=lambda fit: fit[1] * fit[2])
            twins = {t.tensor for t, h, w, _ in fits if (h, w) == (height, width)} - {tile.tensor}
            tiles.append(replace(tile, twins=tuple(sorted(twins))))
            row, col = (row + height, 0) if down else (0, col + width)
        return tiles

    def _starting_at(self, stored: Entry, row: int, col: int) -> Iterator[Tile]:
        rows, cols = _matrix(stored.shape)
        for (height, width), kinds in self._table(stored.dtype).items():
            if row + height <= rows and col + width <= cols:
                key = bytes(_bytes(_corner(stored, row, col, height, width)))
                yield from (Tile(name, row, col, transposed) for name, transposed in kinds.get(key, ()))

    def _shape_of(self, tile: Tile) -> tuple[int, int]:
        rows, cols = _matrix(self.base.entries[tile.tensor].shape)
        return (cols, rows) if tile.transposed else (rows, cols)

    def part(self, matrix: torch.Tensor, tile: Tile) -> torch.Tensor:
        """The tile's part of a weight as a matrix."""
        height, width = self._shape_of(tile)
        return matrix[tile.row : tile.row + height, tile.col : tile.col + width]

    def difference(self, stored: Entry, tile: Tile, matrix: torch.Tensor | None = None) -> str | None:
        """The first number of the tile that is not the base tensor's; None where all are."""
        import torch

        matrix = self._read("stored", stored) if matrix is None else matrix
        part = self.part(matrix, tile)
        part = part.T if tile.transposed else part
        own = self.base.entries[tile.tensor]
        rows, cols = _matrix(own.shape)
        step = max(1, BLOCK_ELEMENTS // max(1, cols))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            expected = self.space.own("expected", count * cols * matrix.itemsize)
            block = torch.frombuffer(expected, dtype=matrix.dtype).view(count, cols)
            block.copy_(self._read("base", own, row, count))
            if not torch.equal(part[row : row + count], block):
                i, j = (part[row : row + count] != block).nonzero()[0].tolist()
                got, wanted, at = part[row + i, j], block[i, j], [row + i, j]
                return (
                    f"weight {stored.name!r} differs from the base tensor {tile.tensor!r}: at "
                    f"{at[::-1] if tile.transposed else at} it holds {float(got):.6g}, expected {float(wanted):.6g}"
                )
        return None

    def _read(self, buffer: str, entry: Entry, row: int = 0, rows: int | None = None) -> torch.Tensor:
        """Rows of a tensor as a matrix, or all of them, in this thread's buffer of that name."""
        import torch

        height, cols = _matrix(entry.shape)
        rows, width = height if rows is None else rows, byte_length(entry.dtype, (cols,))
        data = self.space.own(buffer, rows * width)
        _fill(entry, data, row * width)
        return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).view(rows, cols)


def _fill(entry: Entry, data: memoryview, offset: int = 0) -> None:
    """Read a tensor's bytes from `offset` on."""
    fd = os.open(entry.file, os.O_RDONLY)
    try:
        read_rows(fd, entry, data, offset)
    finally:
        os.close(fd)


def _corner(entry: Entry, row: int, col: int, height: int, width: int) -> torch.Tensor:
    """A few numbers of a tensor as a matrix, cut at its edges, without reading the rest."""
    import torch

    rows, cols = _matrix(entry.shape)
    height, width = min(height, rows - row), min(width, cols - col)
    length, stride = byte_length(entry.dtype, (width,)), byte_length(entry.dtype, (cols,))
    data = bytearray(length * height)
    fd = os.open(entry.file, os.O_RDONLY)
    try:
        for i in range(height):
            at = (row + i) * stride + byte_length(entry.dtype, (col,))
            read_rows(fd, entry, memoryview(data)[i * length : (i + 1) * length], at)
    finally:
        os.close(fd)
    return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).view(height, width)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's rows and columns; a vector is one row."""
    return matrix_shape(tuple(shape)) if len(shape) > 1 else (1, *shape, 1)[:2]  # type: ignore[return-value]


def _refuse_strange(graph: OnnxFile, unknown: Sequence[Entry], matcher: Matcher) -> None:
    """Refuse a weight that is called like a base tensor, or has the shape of one, and is none."""
    entries = matcher.base.entries
    resolver = NameResolver(entries)
    shapes = {_matrix(e.shape) for e in entries.values() if len(e.shape) > 1}
    for stored in unknown:
        try:
            known = resolver.find(stored.name) or resolver.find(stored.name.partition(".")[2])
        except WloraMergeError:  # the name fits several
            known = None
        if known is not None and entries[known].shape == stored.shape:
            raise BaseModelError(_foreign(graph, matcher.difference(stored, Tile(known, 0, 0, False))))
        rows, cols = _matrix(stored.shape)
        if len(stored.shape) > 1 and {(rows, cols), (cols, rows)} & shapes:
            like = next(n for n, e in entries.items() if _matrix(e.shape) in ((rows, cols), (cols, rows)))
            raise BaseModelError(
                _foreign(graph, f"weight {stored.name!r} has the shape of {like!r} and equals no tensor of the base")
            )


def _foreign(graph: OnnxFile, difference: str | None) -> str:
    return (
        f"{graph.path}: its {difference}: it was exported from another model or revision; give an export of this base, or "
        f"{TRACE_INSTEAD}."
    )


def _missing(onnx_base: Path, name: str, entry: Entry, graphs: Sequence[OnnxFile]) -> str:
    dtypes = ", ".join(sorted({e.dtype for graph in graphs for e in graph.tensors})) or "it has none"
    return (
        f"{onnx_base}: the base tensor {name!r} {list(entry.shape)} is in none of its weights ({dtypes}), neither as it is nor "
        "transposed nor side by side with others: it was exported from another model or revision, or its exporter changed the "
        f"weight; {TRACE_INSTEAD}."
    )


# --------------------------------------------------------------------------------------------------- the rewriting


def _files_of(
    graph: OnnxFile, refold: Refold, matcher: Matcher, changed: Mapping[str, Piece], mixture: Mixture
) -> Iterator[OutputFile]:
    """The graph's files: ranges that are copied, between weights that are made anew."""
    stored = {(e.file, e.start): e for e in graph.tensors}
    for path in (graph.path, *graph.data):
        pieces, at = [], 0
        for key in sorted(key for key in refold.tiles if key[0] == path):
            entry = stored[key]
            pieces.append(_copied(path, at, entry.start))
            make = partial(_rewritten, refold, matcher, entry, changed, mixture)
            pieces.append(Piece(entry.name, entry.dtype, entry.shape, make=make))
            at = entry.end
        pieces.append(_copied(path, at, path.stat().st_size))
        yield OutputFile(refold.names.get(path, path.name), [piece for piece in pieces if piece.nbytes], {}, b"")


def _copied(path: Path, start: int, end: int) -> Piece:
    return Piece(path.name, "U8", (end - start,), Entry(path.name, path, "U8", (end - start,), start, end))


def _rewritten(
    refold: Refold,
    matcher: Matcher,
    stored: Entry,
    changed: Mapping[str, Piece],
    mixture: Mixture,
    take: Callable[[int], memoryview],
) -> memoryview:
    """A weight of the graph with its base tensors replaced by the folded ones, after each was found to be the base's."""
    import torch

    data = take(stored.nbytes)
    _fill(stored, data)
    matrix = torch.frombuffer(data, dtype=torch_dtype(stored.dtype)).view(_matrix(stored.shape))
    for tile in refold.tiles[stored.file, stored.start]:
        if difference := matcher.difference(stored, tile, matrix):
            raise BaseModelError(_foreign(refold.graphs[0], difference))
        if tile.tensor in changed:
            piece = replace(changed[tile.tensor], dtype=stored.dtype)
            if piece.shape != matcher.base.entries[tile.tensor].shape:
                raise UnsupportedError(
                    f"{stored.file}: the mixture's {piece.name!r} is {list(piece.shape)}, the graph's "
                    f"{list(matcher.base.entries[tile.tensor].shape)}: another number of labels needs a new graph: {TRACE_INSTEAD}."
                )
            part = matcher.part(matrix, tile)
            fold_into(piece, mixture, matcher.space, part.T if tile.transposed else part)
    return data


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
