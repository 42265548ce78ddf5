"""The two files of a mixture folder, found and read; what they mean is `record.py`'s and `mixture.py`'s."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..constants import MIXTURE_FILE, MIXTURE_TENSORS
from ..errors import MixtureError, WloraMergeError
from ..io.records import read_record
from ..io.safetensors_file import Entry, read_header, read_tensor, tensor_bytes
from ..io.untrusted import find_file, read_json
from .record import FORMAT_VERSION, MixtureRecord

if TYPE_CHECKING:
    import torch

WEIGHTS = "mixture_weights"
"""The tensor that an export reads."""


def read_mixture_record(folder: Path) -> MixtureRecord:
    """`mixture.json` of a mixture folder.

    Raises:
        MixtureError: there is none, it is of another format version, or something in it is wrong.
    """
    file = find_file(folder, MIXTURE_FILE, MixtureError)
    if file is None:
        raise MixtureError(f"{folder}: has no {MIXTURE_FILE}: give the folder that `wlora-merge fit` or `mix` wrote.")
    table = read_json(file, MixtureError)
    version = table.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise MixtureError(
            f"{file}: format_version is {version!r}, this version of wlora-merge reads {FORMAT_VERSION}: make the mixture again."
        )
    return read_record(MixtureRecord, table, file, MixtureError, "make the mixture again")


def read_mixture_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a mixture folder, by name.

    Raises:
        MixtureError: there is no such file, it is broken, or it lacks the weights.
    """
    with _of_mixture():
        return {name: read_tensor(entry) for name, entry in _entries(folder).items()}


def read_mixture_weights(folder: Path, record: MixtureRecord) -> list[list[float]]:
    """The mixture weights of a folder, a row for each group and a column for each adapter; torch is not needed for it.

    Raises:
        MixtureError: as of `read_mixture_tensors`, or they are of another shape, or not finite.
    """
    with _of_mixture():
        entry = _entries(folder)[WEIGHTS]
        expected = len(record.groups), len(record.adapters)
        if (entry.dtype, entry.shape) != ("F32", expected):
            raise wrong_weights(entry.file, WEIGHTS, entry.shape, entry.dtype, expected)
        numbers = struct.unpack(f"<{math.prod(expected)}f", tensor_bytes(entry))
    if not all(map(math.isfinite, numbers)):
        raise wrong_weights(entry.file, WEIGHTS, entry.shape, entry.dtype, expected)
    return [list(numbers[at : at + expected[1]]) for at in range(0, len(numbers), expected[1])]


def wrong_weights(file: Path, name: str, shape: Sequence[int], dtype: str, expected: tuple[int, int]) -> MixtureError:
    """What to raise for weights that are none of these groups and adapters."""
    return MixtureError(
        f"{file}: {name} is {list(shape)} {dtype}, expected finite float32 [groups, adapters] = {list(expected)}: make the mixture "
        "again."
    )


@contextmanager
def _of_mixture() -> Iterator[None]:
    """An error of a broken file is the mixture's."""
    try:
        yield
    except WloraMergeError as error:
        raise MixtureError(str(error)) from error


def _entries(folder: Path) -> dict[str, Entry]:
    """Where the tensors of a mixture folder lie, by name."""
    file = find_file(folder, MIXTURE_TENSORS, MixtureError)
    if file is None:
        raise MixtureError(f"{folder}: has no {MIXTURE_TENSORS}: the mixture is not whole.")
    entries = read_header(file).entries
    for name in (WEIGHTS, "wlora_weights"):
        if name not in entries:
            raise MixtureError(f"{file}: lacks tensor {name!r}: make the mixture again.")
    return entries
