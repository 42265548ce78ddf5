"""The two files of a mixture, read and checked key by key; what they mean is `mixture.py`'s."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.keys import check_adapter_name
from ..data.tasks import TASKS
from ..errors import MixtureError, WloraMergeError
from ..io.safetensors_file import read_header, read_tensor
from ..io.untrusted import find_file, read_json

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
JSON_FILE = "mixture.json"
TENSOR_FILE = "mixture.safetensors"


def read_mixture_table(folder: Path) -> dict[str, Any]:
    """`mixture.json` of a mixture folder, its keys not yet checked.

    Raises:
        MixtureError: there is none, or it is of another format version.
    """
    file = find_file(folder, JSON_FILE, MixtureError)
    if file is None:
        raise MixtureError(f"{folder}: has no {JSON_FILE}: give the folder that `wlora-merge fit` or `mix` wrote.")
    table = read_json(file, MixtureError)
    version = table.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise MixtureError(
            f"{file}: format_version is {version!r}, this version of wlora-merge reads {FORMAT_VERSION}: make the mixture again."
        )
    return table


def read_mixture_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a mixture folder, by name.

    Raises:
        MixtureError: there is no such file, it is broken, or it lacks the weights.
    """
    file = find_file(folder, TENSOR_FILE, MixtureError)
    if file is None:
        raise MixtureError(f"{folder}: has no {TENSOR_FILE}: the mixture is not whole.")
    try:
        tensors = {name: read_tensor(entry) for name, entry in read_header(file).entries.items()}
    except WloraMergeError as error:
        raise MixtureError(str(error)) from error
    for name in ("mixture_weights", "wlora_weights"):
        if name not in tensors:
            raise MixtureError(f"{file}: lacks tensor {name!r}: make the mixture again.")
    return tensors


def check_mixture_table(table: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, saying which key, for what has another type than `Mixture.save` gives it; KeyError lacks one."""
    for key in ("groups", "prefixes", "base_model"):
        _expect(table[key], dict, key)
    for key in ("config", "metrics", "data", "weights", "head"):
        _expect(table.get(key) or {}, dict, key)
    _expect(table["adapters"], list, "adapters")
    _expect(table["prefixes"]["in_file"], str, "prefixes.in_file")
    _expect(table["prefixes"]["in_model"], str, "prefixes.in_model")
    _check_ref(table["base_model"], "base_model")
    for row in table["adapters"]:
        _expect(row, dict, "each of adapters")
        _check_ref(row, "each of adapters")
        check_adapter_name(_expect(row["name"], str, "an adapter's name"))
    for key in ("task", "modules_to_save", "resize_vocab"):
        _expect(table.get(key), str | None, key)
    for name, tensor in (table.get("head") or {}).items():
        _expect(tensor, str | None, f"head: {name!r}")
    if table.get("task") not in (None, *TASKS):
        raise ValueError(f"task is {table['task']!r}, expected one of {', '.join(TASKS)}")
    if isinstance(table["delta_scale"], bool):
        raise TypeError("delta_scale must be a number")
    _expect(table["delta_scale"], int | float, "delta_scale")
    _check_groups(table["groups"])
    _check_candidates((table.get("metrics") or {}).get("candidates") or {})


def _check_ref(row: Mapping[str, Any], key: str) -> None:
    if not _expect(row["source"], str, f"{key}: source") or "\0" in row["source"]:
        raise ValueError(f"{key}: source must be a folder or a hub id")
    _expect(row.get("revision"), str | None, f"{key}: revision")
    for digest in _expect(row["sha256"], dict, f"{key}: sha256").values():
        _expect(digest, str, f"{key}: sha256 of a file")


def _check_groups(groups: Mapping[str, Any]) -> None:
    seen: set[str] = set()
    for group, modules in groups.items():
        for module in _expect(modules, list, f"group {group!r}") or [None]:
            if _expect(module, str, f"each module of group {group!r}") in seen:
                raise ValueError(f"module {module!r} stands twice in groups")
            seen.add(module)
    if not seen:
        raise ValueError("groups is empty")


def _check_candidates(candidates: Any) -> None:
    for name, row in _expect(candidates, dict, "metrics.candidates").items():
        for value in _expect(row, dict, f"metrics.candidates.{name}").values():
            if isinstance(value, bool) or not math.isfinite(_expect(value, int | float, f"metrics.candidates.{name}")):
                raise ValueError(f"metrics.candidates.{name} holds {value}, expected finite numbers")


def _expect(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise TypeError(f"{key} is a {type(value).__name__}, expected {expected}")
    return value
