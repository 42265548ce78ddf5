"""The two files of a mixture folder, found and read; what they mean is `record.py`'s and `mixture.py`'s."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..constants import MIXTURE_FILE, MIXTURE_TENSORS
from ..errors import MixtureError, WloraMergeError
from ..io.records import read_record
from ..io.safetensors_file import read_header, read_tensor
from ..io.untrusted import find_file, read_json
from .record import FORMAT_VERSION, MixtureRecord

if TYPE_CHECKING:
    import torch


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
    file = find_file(folder, MIXTURE_TENSORS, MixtureError)
    if file is None:
        raise MixtureError(f"{folder}: has no {MIXTURE_TENSORS}: the mixture is not whole.")
    try:
        tensors = {name: read_tensor(entry) for name, entry in read_header(file).entries.items()}
    except WloraMergeError as error:
        raise MixtureError(str(error)) from error
    for name in ("mixture_weights", "wlora_weights"):
        if name not in tensors:
            raise MixtureError(f"{file}: lacks tensor {name!r}: make the mixture again.")
    return tensors
