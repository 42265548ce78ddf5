"""Which base tensors a weight of an ONNX graph is made of: told by its numbers, whatever its name.

A weight is a base tensor, its transpose, or several of them below or beside each other (a fused QKV), in the graph's dtype. Or it
is a stack of such (fused experts).
The corners of all base tensors are kept; a corner that fits finds the candidates, and every number then decides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from ..io.safetensors_file import FLOATING, Entry, byte_length, opened, read_rows, torch_dtype
from ..io.tensors import BLOCK_ELEMENTS, Workspace, matrix_shape
from ..models.base_model import BaseModel
from .protobuf import OnnxFile

if TYPE_CHECKING:
    import torch

CORNER = 4  # rows and columns that find a base tensor's candidates; each is then compared in full


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
            matched = list(pool.map(partial(self._made_of, changed=changed), stored))
        found = [(entry, parts) for entry, parts in matched if parts]
        return found, [entry for entry, parts in matched if not parts]

    def _made_of(self, stored: Entry, changed: set[str]) -> tuple[Entry, list[Tile]]:
        """The weight and its tiles; a stack of matrices, one for each expert, becomes one matrix with all of their rows."""
        tiles = self._tiles(stored, changed)
        if tiles or len(stored.shape) != 3:
            return stored, tiles
        count, rows, cols = stored.shape
        size = stored.nbytes // count
        for i in range(count):
            at = stored.start + i * size
            matrix = self._tiles(replace(stored, shape=(rows, cols), start=at, end=at + size), changed)
            if not matrix:
                return stored, []
            tiles += [replace(tile, row=tile.row + i * rows) for tile in matrix]
        return replace(stored, shape=(count * rows, cols)), tiles

    def _tiles(self, stored: Entry, changed: set[str]) -> list[Tile]:
        """What the weight is made of: one tensor, or several below or beside each other; empty where it is not."""
        rows, cols = as_matrix(stored.shape)
        tiles: list[Tile] = []
        row = col = 0
        down: bool | None = None
        while row < rows and col < cols:
            fits = self._fitting(stored, row, col, down)
            if len(fits) > 1 or (fits and fits[0][0].tensor not in changed):
                fits = [fit for fit in fits if self.difference(stored, fit[0]) is None]
            if not fits:
                return []
            tile, height, width, down = max(fits, key=lambda fit: fit[1] * fit[2])
            twins = {t.tensor for t, h, w, _ in fits if (h, w) == (height, width)} - {tile.tensor}
            tiles.append(replace(tile, twins=tuple(sorted(twins))))
            row, col = (row + height, 0) if down else (0, col + width)
        return tiles

    def _fitting(self, stored: Entry, row: int, col: int, down: bool | None) -> list[tuple[Tile, int, int, bool]]:
        """(tile, height, width, whether tiles follow below it) of the tensors that may stand at a place.

        Args:
            stored: the weight in the graph.
            row: the first row of the place.
            col: the first column of the place.
            down: whether tiles stand below each other; None: not known yet.
        """
        rows, cols = as_matrix(stored.shape)
        fits = []
        for tile in self._starting_at(stored, row, col):
            height, width = self._shape_of(tile)
            full_height, full_width = height == rows and down is not True, width == cols and down is not False
            if (full_height or full_width) and row + height <= rows and col + width <= cols:
                fits.append((tile, height, width, full_width and not full_height if down is None else down))
        return fits

    def _starting_at(self, stored: Entry, row: int, col: int) -> Iterator[Tile]:
        rows, cols = as_matrix(stored.shape)
        for (height, width), kinds in self._table(stored.dtype).items():
            if row + height <= rows and col + width <= cols:
                key = bytes(_bytes(_corner(stored, row, col, height, width)))
                yield from (Tile(name, row, col, transposed) for name, transposed in kinds.get(key, ()))

    def _shape_of(self, tile: Tile) -> tuple[int, int]:
        rows, cols = as_matrix(self.base.entries[tile.tensor].shape)
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
        rows, cols = as_matrix(own.shape)
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

        height, cols = as_matrix(entry.shape)
        rows, width = height if rows is None else rows, byte_length(entry.dtype, (cols,))
        data = self.space.own(buffer, rows * width)
        read_into(entry, data, row * width)
        return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).view(rows, cols)


def read_into(entry: Entry, data: memoryview, offset: int = 0) -> None:
    """Read a tensor's bytes from `offset` on."""
    fd = opened(entry)
    try:
        read_rows(fd, entry, data, offset)
    finally:
        os.close(fd)


def _corner(entry: Entry, row: int, col: int, height: int, width: int) -> torch.Tensor:
    """A few numbers of a tensor as a matrix, cut at its edges, without reading the rest."""
    import torch

    rows, cols = as_matrix(entry.shape)
    height, width = min(height, rows - row), min(width, cols - col)
    length, stride = byte_length(entry.dtype, (width,)), byte_length(entry.dtype, (cols,))
    data = bytearray(length * height)
    fd = opened(entry)
    try:
        for i in range(height):
            at = (row + i) * stride + byte_length(entry.dtype, (col,))
            read_rows(fd, entry, memoryview(data)[i * length : (i + 1) * length], at)
    finally:
        os.close(fd)
    return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).view(height, width)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's rows and columns; a vector is one row."""
    return matrix_shape(tuple(shape)) if len(shape) > 1 else (1, *shape, 1)[:2]  # type: ignore[return-value]


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
