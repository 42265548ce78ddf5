"""`wlora_merge.json`: what went into an export and what came out, with digests. No local path stands in it.

The same inputs, options and versions give the same bytes, wherever the folders lie; so a digest of this file pins an export.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..constants import DTYPES, MIXTURE_FILE
from ..errors import VerifyError
from ..io.digests import sha256_file
from ..io.hub import public_name
from ..io.untrusted import find_file, is_plain_file_name, read_json
from ..mixture.mixture import InputRef, Mixture, adapter_ref, base_ref
from ..models.base_model import BaseModel

FILE = "wlora_merge.json"
FORMAT_VERSION = 1
PROBE_ELEMENTS = 16_000_000
PACKAGES = {
    "dense": ("torch",),
    "lora": ("torch", "safetensors"),
    "onnx": ("torch", "transformers", "onnx", "onnxscript"),
}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Package name -> installed version, Python and this package first."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("wlora-merge", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def build_manifest(
    mixture: Mixture,
    base: BaseModel,
    adapters: Sequence[Adapter],
    *,
    kind: str,
    base_name: str,
    options: Mapping[str, Any],
    report: Mapping[str, Any],
    probe: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything but the table of output files, which `write_manifest` adds.

    Args:
        base, adapters: the inputs that were read; with --any-digest they need not be those of the mixture.
    """
    read = base_ref(base)
    return {
        "format_version": FORMAT_VERSION,
        "format": kind,
        "task": mixture.task,
        "base_model": {
            "name": base_name,
            "revision": _true(mixture.base, read).revision,
            "sha256": read.sha256,
        },
        "adapters": [
            {"name": a.name, "source": public_name(a.source), "revision": a.revision, "sha256": a.sha256}
            for a in map(_true, mixture.adapters, map(adapter_ref, adapters))
        ],
        "granularity": mixture.granularity,
        "normalize": mixture.normalize,
        "delta_scale": mixture.delta_scale,
        "groups": mixture.groups,
        "weights": {
            group: dict(zip(mixture.adapter_names, row, strict=True))
            for group, row in zip(mixture.groups, mixture.mixture_weights.double().tolist(), strict=True)
        },
        "prefixes": list(mixture.prefixes),
        "modules_to_save": mixture.modules_to_save,
        **({"resize_vocab": mixture.resize_vocab} if mixture.resize_vocab else {}),
        "head": sorted(mixture.head),
        "config": mixture.config,
        "metrics": mixture.metrics,
        "data": mixture.data,
        "options": dict(options),
        "report": dict(report),
        "probe": dict(probe),
        "versions": versions((*PACKAGES[kind], *(("matplotlib",) if options.get("report") else ()))),
    }


def write_manifest(manifest: dict[str, Any], folder: Path, known: Mapping[str, str]) -> None:
    """Add every file of the folder with its sha256 (taken from `known`, name -> sha256, where it is) and write the file."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / FILE):
        name = path.relative_to(folder).as_posix()
        files[name] = {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
    text = json.dumps(manifest | {"files": files}, indent=2, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def digest(folder: Path) -> str:
    """`sha256:...` of an export's manifest, which has the sha256 of every other file: one line pins the export."""
    return f"sha256:{sha256_file(folder / FILE)}"


def below(folder: Path) -> dict[str, str]:
    """The exports and mixtures in a folder that `run` wrote: path -> `export` or `mixture`."""
    kinds = {FILE: "export", MIXTURE_FILE: "mixture"}
    return {
        str(folder / child.name): kind
        for child in (sorted(folder.iterdir()) if folder.is_dir() else ())
        for file, kind in kinds.items()
        if (child / file).is_file()
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        VerifyError: none there, or one that is not of this version.
    """
    file = find_file(folder, FILE, VerifyError)
    if file is None:
        if not os.path.exists(folder):  # of a name too long too
            raise VerifyError(f"{folder}: does not exist.")
        inside = f"; below it are {', '.join(found)}: give one of the exports" if (found := below(folder)) else ""
        raise VerifyError(f"{folder}: has no {FILE}: this is not an export of wlora-merge{inside}.")
    table = read_json(file, VerifyError)
    if table.get("format_version") != FORMAT_VERSION:
        raise VerifyError(
            f"{file}: its format_version is not {FORMAT_VERSION}: another version of wlora-merge wrote it."
        )
    files = table.get("files")
    if not isinstance(files, dict) or not all(
        all(map(is_plain_file_name, name.split("/"))) and isinstance(row, dict) for name, row in files.items()
    ):
        raise VerifyError(f"{file}: its table of files is broken: export again.")
    try:
        _check(table)
    except (KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise VerifyError(f"{file}: {what}: export again.") from error
    return table


def _check(table: Mapping[str, Any]) -> None:
    """Raise KeyError for a key that is missing, TypeError or ValueError for one that is not as `build_manifest` has it."""
    kinds: dict[str, type] = {"base_model": dict, "adapters": list, "groups": dict, "weights": dict, "versions": dict}
    for key, kind in kinds.items():
        if not isinstance(table[key], kind):
            raise TypeError(f"its {key} is a {type(table[key]).__name__}, expected a {kind.__name__}")
    if table["format"] not in tuple(PACKAGES):
        raise ValueError(f"its format is {table['format']!r}, expected one of {', '.join(PACKAGES)}")
    for row in (table["base_model"], *table["adapters"]):
        if not isinstance(row, dict) or not isinstance(row["name"], str) or not isinstance(row["sha256"], dict):
            raise TypeError("one of its inputs has no name or no table of sha256")
    _check_strings(table)
    probe = table.get("probe") or {}
    if not isinstance(probe, dict) or not all(is_probe(name, value) for name, value in probe.items()):
        raise TypeError("its probe is not a table of small inputs")
    if not isinstance((table.get("report") or {}).get("relative_error", 0.0), int | float):
        raise TypeError("its report has a relative_error that is no number")
    for name, row in table["files"].items():
        if not isinstance(row["sha256"], str) or type(row["bytes"]) is not int:
            raise TypeError(f"the row of file {name!r} is not a sha256 and a number of bytes")


def _check_strings(table: Mapping[str, Any]) -> None:
    for key in ("prefixes", "head"):
        if not isinstance(table[key], list) or not all(isinstance(text, str) for text in table[key]):
            raise TypeError(f"its {key} is not a list of names")
    if len(table["prefixes"]) != 2:
        raise ValueError("its prefixes are not two")
    for key in ("config", "options", "report", "metrics", "data"):
        if not isinstance(table.get(key) or {}, dict):
            raise TypeError(f"its {key} is a {type(table[key]).__name__}, expected a table")
    if (table.get("options") or {}).get("dtype") not in (None, *DTYPES):
        raise ValueError(f"its dtype is not one of {', '.join(DTYPES)}")
    for modules in table["groups"].values():
        if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise TypeError("one of its groups is not a list of modules")
    for row in (table["base_model"], *table["adapters"]):
        if not all(isinstance(text, str) for text in row["sha256"].values()):
            raise TypeError("one of its inputs has a sha256 that is no text")


def is_probe(name: str, value: Any) -> bool:
    """Whether it is a table {shape, seed} or rows of token ids, as `check.make_probe` makes them, of a bounded size."""
    if isinstance(value, dict):
        shape = value.get("shape")
        numbers: list[Any] = [*shape, value.get("seed")] if isinstance(shape, list) else [None]
        return all(type(n) is int and 0 <= n < 2**31 for n in numbers) and math.prod(numbers[:-1]) <= PROBE_ELEMENTS
    rows = value if isinstance(value, list) and all(isinstance(row, list) for row in value) else [[None]]
    return len({len(row) for row in rows}) == 1 and all(type(n) is int and 0 <= n < 2**63 for row in rows for n in row)


def _true(told: InputRef, read: InputRef) -> InputRef:
    """Where an input came from: what the mixture says of it if these are its bytes, else where they were read."""
    return told if told.sha256 == read.sha256 else read
