"""The planned files of a dense export, streamed at the speed of the disk.

One pass over the base's files. Untouched tensors move as byte ranges and never become tensors; target modules are folded in
row blocks through reused buffers. Workers read and fold blocks. Whoever finishes one hashes and writes what is next in the
file. So all cores are busy, and nothing is held but a few blocks and the adapters' factors.

This room knows byte ranges and blocks, and asks `fold` for the numbers.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..errors import OutputError, WloraMergeError, WloraMergeWarning
from ..io.direct_write import DirectFile
from ..io.safetensors_file import FLOATING, Entry, byte_length, opened, read_rows, read_tensor, torch_dtype
from ..io.tensors import (
    BLOCK_BYTES,
    BLOCK_ELEMENTS,
    Workspace,
    all_finite,
    matrix_shape,
    one_torch_thread,
    overflow_advice,
)
from ..mixture.fold import LinearFold, RowFold, bias_factors, fold_saved
from ..mixture.mixture import Mixture
from ..progress import Meter
from .dense import OutputFile, Piece

if TYPE_CHECKING:
    import torch

AHEAD = 4  # blocks in memory for each output file, beyond one for each thread


def write_files(
    files: Sequence[OutputFile],
    out: Path,
    mixture: Mixture,
    *,
    hashed: bool = True,
) -> dict[str, str]:
    """Stream the planned files into the folder `out`, with a few blocks for each in memory.

    Args:
        files: what `plan` laid out.
        out: the folder to write into.
        mixture: the mixture.
        hashed: hash the bytes as they pass; not for files that are gone before the export is done.

    Returns:
        File name -> sha256; empty where they are not hashed.

    Raises:
        WloraMergeError: an input that cannot be read or changed meanwhile, or a NaN or infinity in a folded tensor.
        OutputError: the disk is full or refuses.
    """
    workers = os.cpu_count() or 1
    side_by_side = max(1, min(len(files), workers // 2))  # a file's bytes are hashed one after another
    stop = threading.Event()
    meter = Meter("writing weights", sum(file.nbytes for file in files), sum(len(file.pieces) for file in files))
    with (
        one_torch_thread(),
        ThreadPoolExecutor(side_by_side) as disk,
        ThreadPoolExecutor(workers) as pool,
        ThreadPoolExecutor(side_by_side) as writers,
    ):
        crew = Crew(pool, max(1, workers // side_by_side), disk, meter, stop, hashed)
        odd: set[str] = set()
        jobs = [writers.submit(_write_file, file, out, mixture, crew, odd) for file in files]
        try:
            digests = [job.result() for job in jobs]
        except BaseException:
            stop.set()
            for job in jobs:
                job.cancel()
            raise
    if odd:
        warnings.warn(
            f"{len(odd)} tensors of the base hold an infinity, first {min(odd)!r}: no adapter changes them, so they are copied as "
            "they are; if they are weights, the base is broken.",
            WloraMergeWarning,
            stacklevel=3,
        )
    return {file.name: digest for file, digest in zip(files, digests, strict=True) if digest is not None}


@dataclass(frozen=True)
class Crew:
    """Who works on all files: threads that fold and hash, so many of them on each file, and threads that wait for the disk."""

    pool: ThreadPoolExecutor
    each: int
    disk: ThreadPoolExecutor
    meter: Meter
    stop: threading.Event
    hashed: bool


def _write_file(file: OutputFile, out: Path, mixture: Mixture, crew: Crew, odd: set[str]) -> str | None:
    """Stream one file; its digest, where the crew hashes. `odd` gets the names of copied tensors that hold an infinity."""
    digest, space, at = hashlib.sha256() if crew.hashed else None, Workspace(), 0
    ends = list(accumulate((piece.nbytes for piece in file.pieces), initial=len(file.header)))[1:]
    inputs: dict[Path, int] = {}

    def put(block: memoryview) -> None:
        """Hash a block where the crew does, write it, and give its memory back."""
        if crew.stop.is_set():
            raise OutputError(f"{out / file.name}: stopped, as another file failed.")
        if digest is not None:
            digest.update(block)
        stream.write(block)
        nonlocal at
        before, at = at, at + len(block)
        crew.meter.add(len(block), bisect(ends, at) - bisect(ends, before))
        space.give_back(block)

    try:
        with DirectFile(out / file.name, crew.disk) as stream:
            _in_order(_jobs(space, file, mixture, inputs, odd), put, crew.pool, crew.each)
    except OSError as error:
        raise OutputError(f"{out / file.name}: cannot be written ({error.strerror or error}).") from error
    finally:
        for fd in inputs.values():
            os.close(fd)
    return None if digest is None else digest.hexdigest()


def _in_order(
    jobs: Iterator[Callable[[], memoryview]], put: Callable[[memoryview], None], pool: ThreadPoolExecutor, threads: int
) -> None:
    """Run jobs on several threads, and give their results to `put` one at a time and in order.

    Whoever finishes a job also puts what is ready, unless another thread is at it; nobody waits but for room.
    """
    numbered, taking, putting = enumerate(jobs), threading.Lock(), threading.Lock()
    room, ready = threading.Semaphore(threads + AHEAD), dict[int, memoryview]()
    done, failed = 0, False

    def work() -> None:
        """Run jobs until there are none, or one has failed."""
        nonlocal failed
        try:
            while True:
                room.acquire()
                with taking:
                    number, job = next(numbered, (-1, None))
                if job is None or failed:
                    room.release()
                    return
                ready[number] = job()
                put_ready()
        except BaseException:
            failed = True
            room.release(threads)
            raise

    def put_ready() -> None:
        """Put the results whose turn it is, unless another thread is at it."""
        nonlocal done
        while done in ready and not failed and putting.acquire(blocking=False):
            try:
                while done in ready and not failed:
                    put(ready.pop(done))
                    done += 1
                    room.release()
            finally:
                putting.release()

    running = [pool.submit(work) for _ in range(threads)]
    wait(running)  # all of them: they read from files that are closed next
    for future in running:
        future.result()


def _jobs(
    space: Workspace, file: OutputFile, mixture: Mixture, inputs: dict[Path, int], odd: set[str]
) -> Iterator[Callable[[], memoryview]]:
    header = file.header
    yield lambda: memoryview(header)
    pieces = deque(file.pieces)
    while pieces:
        piece = pieces.popleft()
        if piece.untouched and piece.source is not None:
            run = [piece.source]
            while pieces and (after := _continues(run[-1], pieces[0])):
                run.append(after)
                pieces.popleft()
            yield from _copy_jobs(space, _opened(inputs, run[0]), run, odd)
        else:
            yield from _piece_jobs(space, piece, mixture, inputs)


def _piece_jobs(
    space: Workspace, piece: Piece, mixture: Mixture, inputs: dict[Path, int]
) -> Iterator[Callable[[], memoryview]]:
    """The blocks of a tensor that is not the base's own bytes."""
    if piece.make is not None:
        yield partial(piece.make, space.take)
    elif piece.tensor is not None:
        yield partial(_tensor_bytes, piece)
    elif piece.source is not None:
        yield from _fold_jobs(space, _opened(inputs, piece.source), piece, piece.source, mixture)


def fold_into(piece: Piece, mixture: Mixture, space: Workspace, out: torch.Tensor) -> None:
    """Put one tensor of the output where another writer wants it, rounded once to the piece's dtype.

    Args:
        piece: what `plan` laid out.
        mixture: the mixture.
        space: memory for the blocks.
        out: [rows, cols] of the piece's dtype, any strides: the tensor as a matrix.
    """
    import torch

    # blocks are whole rows of a matrix; of a stack of matrices (experts) they are rows of its matrices
    whole = torch.empty(piece.shape, dtype=out.dtype) if len(piece.shape) > 2 else None
    rows = out if whole is None else whole.view(-1, piece.shape[-1])
    inputs, row = dict[Path, int](), 0
    try:
        for job in _piece_jobs(space, piece, mixture, inputs):
            data = job()
            block = torch.frombuffer(data, dtype=out.dtype).view(-1, rows.shape[1])
            rows[row : row + len(block)] = block
            row += len(block)
            space.give_back(data)
    finally:
        for fd in inputs.values():
            os.close(fd)
    if whole is not None:
        out.copy_(whole.view(out.shape))


def differing(piece: Piece, mixture: Mixture, space: Workspace, stored: Entry) -> int:
    """How many numbers of a tensor that was written are not those of its fold, but for the last bit; a block at a time.

    Args:
        piece: what `plan` laid out.
        mixture: the mixture.
        space: memory for the blocks.
        stored: where it was written, in the piece's dtype and shape.
    """
    import torch

    dtype, count, at = torch_dtype(piece.dtype), 0, 0
    inputs, descriptor = dict[Path, int](), opened(stored)
    try:
        for job in _piece_jobs(space, piece, mixture, inputs):
            data = job()
            got = _read(space, descriptor, stored, at, len(data))
            at += len(data)
            found, wanted = (torch.frombuffer(part, dtype=dtype).double() for part in (got, data))
            last = torch.finfo(dtype).eps * wanted.abs().add(1e-6 * wanted.abs().max())
            count += int((~((found - wanted).abs() <= last)).sum())  # a NaN is not near
            space.give_back(data)
            space.give_back(got)
    finally:
        for fd in (descriptor, *inputs.values()):
            os.close(fd)
    return count


def _opened(inputs: dict[Path, int], entry: Entry) -> int:
    if entry.file not in inputs:
        inputs[entry.file] = opened(entry)
    return inputs[entry.file]


def _continues(last: Entry, piece: Piece) -> Entry | None:
    """The piece's source, if its bytes follow those of `last` and are numbers of the same kind."""
    source = piece.source
    follows = source is not None and (source.file, source.start, source.dtype) == (last.file, last.end, last.dtype)
    return source if follows and piece.untouched else None


def _copy_jobs(space: Workspace, fd: int, run: Sequence[Entry], odd: set[str]) -> Iterator[Callable[[], memoryview]]:
    whole = replace(run[0], end=run[-1].end)
    width = max(1, byte_length(whole.dtype, (1,)))
    step = max(1, BLOCK_BYTES // width) * width
    for offset in range(0, whole.nbytes, step):
        length = min(step, whole.nbytes - offset)
        yield partial(_copy_block, space, fd, run, whole, offset, length, odd)


def _copy_block(
    space: Workspace, fd: int, run: Sequence[Entry], whole: Entry, offset: int, length: int, odd: set[str]
) -> memoryview:
    import torch

    data = _read(space, fd, whole, offset, length)
    if whole.dtype in FLOATING and not all_finite(torch.frombuffer(data, dtype=torch_dtype(whole.dtype))):
        for entry in run:
            low, high = (min(max(at - whole.start - offset, 0), length) for at in (entry.start, entry.end))
            if low < high and not all_finite(torch.frombuffer(data[low:high], dtype=torch_dtype(entry.dtype))):
                if bool(torch.frombuffer(data[low:high], dtype=torch_dtype(entry.dtype)).isnan().any()):
                    raise WloraMergeError(
                        f"{entry.file}: tensor {entry.name!r} holds a NaN: the base is broken; fetch it again."
                    )
                odd.add(entry.name)
    return data


def _read(space: Workspace, fd: int, entry: Entry, offset: int, length: int) -> memoryview:
    buffer = space.take(length)
    read_rows(fd, entry, buffer, offset)
    return buffer


def _fold_jobs(
    space: Workspace, fd: int, piece: Piece, source: Entry, mixture: Mixture
) -> Iterator[Callable[[], memoryview]]:
    cols, spans = _spans(piece.shape, [d for d in piece.deltas if isinstance(d, ModuleDelta)])
    own = source.nbytes // max(1, byte_length(source.dtype, (cols,)))  # rows; those behind them are added
    whole = [(d, mixture.whole_gains_of(d)) for d in piece.deltas if isinstance(d, TensorDelta)]
    step = max(1, BLOCK_ELEMENTS // max(1, cols))
    for first, end, delta in spans:
        fold = _Fold(
            space, fd, piece, source, None if delta is None else _fold_of(piece, delta, mixture), whole, first, cols
        )
        row = 0
        while row < end - first:
            count = min(step, end - first - row, own - first - row if first + row < own else step)
            yield partial(fold.block, row, count)
            row += count


def _fold_of(piece: Piece, delta: ModuleDelta, mixture: Mixture) -> RowFold:
    if piece.name == delta.bias_name:
        return LinearFold(*bias_factors(delta, mixture.whole_gains_of(delta)))
    return mixture.fold_of(delta)


def _spans(
    shape: tuple[int, ...], deltas: Sequence[ModuleDelta]
) -> tuple[int, list[tuple[int, int, ModuleDelta | None]]]:
    """Columns of a tensor, and (first row, end, delta) for all its rows in order: None where no low-rank delta is."""
    rows, cols = matrix_shape(shape) if shape else (1, 1)
    if not deltas or deltas[0].start is None:
        return cols, [(0, rows, deltas[0] if deltas else None)]
    rows, cols = rows * cols // shape[-1], shape[-1]
    spans: list[tuple[int, int, ModuleDelta | None]] = []
    at = 0
    for delta in sorted(deltas, key=lambda d: d.start or 0):
        start = delta.start or 0
        spans += [(at, start, None), (start, start + delta.shape[0], delta)]
        at = start + delta.shape[0]
    return cols, [*spans, (at, rows, None)]


@dataclass(frozen=True)
class _Fold:
    """Rows of a tensor that are folded alike: those of the base from `first` on, of `cols` numbers each, in the file `fd`.

    They are rows 0 and on of the fold; `whole` are the changes of the tensor as a whole, with their gains [N].
    """

    space: Workspace
    fd: int
    piece: Piece
    source: Entry
    fold: RowFold | None
    whole: Sequence[tuple[TensorDelta, torch.Tensor]]
    first: int
    cols: int

    def block(self, row: int, count: int) -> memoryview:
        """The bytes of `count` rows from `row` on, folded and rounded."""
        block, data = self._base(row, count)
        if self.fold is None and not self.whole:
            return _rounded(self.space, block, self.piece)
        total = self.space.sum(count * self.cols).view(count, self.cols)
        if self.fold is None:
            total.copy_(block)
        else:
            self.fold.rows(block, slice(row, row + count), total)
        for delta, gains in self.whole:
            fold_saved(block, delta, gains, total, self.first + row)
        return _rounded(self.space, total, self.piece, data)

    def _base(self, row: int, count: int) -> tuple[torch.Tensor, memoryview | None]:
        """The base's rows, and the memory that they were read into; of rows that are added behind the base's, none."""
        import torch

        width = byte_length(self.source.dtype, (self.cols,))
        at = (self.first + row) * width
        if at < self.source.nbytes or self.piece.added is None:
            data = _read(self.space, self.fd, self.source, at, count * width)
            return torch.frombuffer(data, dtype=torch_dtype(self.source.dtype)).view(count, self.cols), data
        return self.piece.added.reshape(-1, self.cols)[(at - self.source.nbytes) // width :][:count], None


def _rounded(space: Workspace, block: torch.Tensor, piece: Piece, spare: memoryview | None = None) -> memoryview:
    """Round once to the output dtype, into `spare` where that has the size: the bytes that the base's block came in."""
    import torch

    dtype = torch_dtype(piece.dtype)
    nbytes = block.numel() * dtype.itemsize
    data = spare if spare is not None and len(spare) == nbytes else space.take(nbytes)
    result = torch.frombuffer(data, dtype=dtype)
    result.copy_(block.reshape(-1))
    if spare is not None and data is not spare:
        space.give_back(spare)
    _check_finite(result, piece, None if piece.deltas else block)
    return data


def _check_finite(block: torch.Tensor, piece: Piece, base: torch.Tensor | None = None) -> None:
    """Refuse a NaN or an infinity; of a tensor that no adapter changes, given as `base`, one that rounding made."""
    if all_finite(block):
        return
    if base is not None and bool((block.isinf() == base.reshape(-1).isinf()).all()) and not bool(base.isnan().any()):
        return
    file = piece.source.file if piece.source else "the head"
    if piece.source is not None and not all_finite(read_tensor(piece.source)):
        raise WloraMergeError(
            f"{file}: tensor {piece.source.name!r} of the base holds a NaN or an infinity: this base is broken; fetch or train it "
            "again."
        )
    raise WloraMergeError(
        f"{file}: folding gives tensor {piece.name!r} a NaN or an infinity in {block.dtype}: the sum overflows; "
        f"{overflow_advice(block.dtype)}."
    )


def _tensor_bytes(piece: Piece) -> memoryview:
    import torch

    tensor = piece.tensor if piece.tensor is not None else torch.empty(0)
    result = tensor.detach().cpu().to(torch_dtype(piece.dtype)).contiguous()
    _check_finite(result, piece)
    return memoryview(result.reshape(-1).view(torch.uint8).numpy().data)
