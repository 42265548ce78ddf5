"""`wlora_merge.json`: what went into an export and what came out, with digests. No local path stands in it.

The same inputs, options and versions give the same bytes, wherever the folders lie; so a digest of this file pins an export. It holds
the mixture in the form of `mixture.json`, with its weights as they are. It is a record, checked once when it is read; a file that the
version before wrote is turned into one.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import SerializeAsAny, ValidationInfo, field_validator, model_validator

from ..adapters.adapter import Adapter
from ..constants import DTYPES, MANIFEST_FILE
from ..errors import VerifyError
from ..io.digests import sha256_file
from ..io.hub import public_name
from ..io.records import Record, checked_by, one_of, read_record
from ..io.untrusted import find_file, is_plain_file_name, read_json
from ..mixture.mixture import InputRef, Mixture, adapter_ref, base_ref
from ..mixture.record import MixtureRecord
from ..models.base_model import BaseModel
from ..text import short
from .folders import below
from .format import Measures
from .formats import FORMATS
from .probe import is_probe

FORMAT_VERSION = 2
ADVICE = "export again"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package name -> installed version, Python and this package first."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("wlora-merge", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# ------------------------------------------------------------------------------------------------------- the record


class FileRecord(Record):
    """A file of an export.

    Attributes:
        sha256: of its bytes.
        bytes: its size.
    """

    sha256: str
    bytes: int


def _check_probe(value: Any) -> None:
    if not is_probe(value):
        raise ValueError("is neither rows of token ids nor a shape and a seed, of a bounded size")


def _check_asked(options: Mapping[str, Any]) -> None:
    if options.get("dtype") not in (None, *DTYPES):
        raise ValueError(f"says dtype {short(options['dtype'])}, expected one of {', '.join(DTYPES)}")


class Manifest(Record):
    """What an export is: its format, the mixture in it, how it was asked for, what was measured, and its files.

    Attributes:
        format_version: of this file; 1 is read too.
        format: `dense`, `lora` or `onnx`.
        mixture: the mixture, in the form of `mixture.json`; its weights stand nowhere else.
        options: how the export was asked for: every option by its Python name.
        report: what was measured while it was written.
        probe: inputs to compare outputs on: rows of token ids, or a shape and a seed.
        versions: package -> version that wrote it.
        files: every other file of the folder, by its path.
    """

    format_version: int
    format: Annotated[str, one_of(FORMATS)]
    mixture: MixtureRecord
    options: Annotated[dict[str, Any], checked_by(_check_asked)]
    report: SerializeAsAny[Measures]
    probe: dict[str, Annotated[Any, checked_by(_check_probe)]]
    versions: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def dtype(self) -> str | None:
        """The dtype that was asked for, as `--dtype` names it; None: the base's own."""
        dtype: str | None = self.options.get("dtype")
        return dtype

    @field_validator("report", mode="wrap")
    @classmethod
    def _of_its_format(cls, value: Any, _: Any, info: ValidationInfo) -> Measures:
        """The measures as the format has them."""
        kind = FORMATS.get(info.data.get("format", ""))
        if kind is None or not isinstance(value, dict):
            raise ValueError(f"is {short(value)}, expected a table of what was measured")
        return kind.measures_of(value).model_validate(value)

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        """Refuse files outside the folder, and weights that are not one number for each group and adapter."""
        for name in self.files:
            if not all(map(is_plain_file_name, name.split("/"))):
                raise ValueError(f"its table of files is broken: {short(name)} is no file of the folder")
        names = {adapter.name for adapter in self.mixture.adapters}
        weights = self.mixture.weights
        if set(weights) != set(self.mixture.groups) or any(set(row) != names for row in weights.values()):
            raise ValueError("its weights are not one number for each group and adapter")
        return self


# -------------------------------------------------------------------------------------------------------- written


def build_manifest(
    mixture: Mixture,
    base: BaseModel,
    adapters: Sequence[Adapter],
    *,
    kind: str,
    base_name: str,
    options: Mapping[str, Any],
    report: Measures,
    probe: Mapping[str, Any],
) -> Manifest:
    """Everything but the table of output files, which `write_manifest` adds.

    Args:
        mixture: the mixture.
        base: the base that was read; with --any-digest it need not be the mixture's.
        adapters: the adapters that were read; with --any-digest they need not be the mixture's.
        kind: the format's name.
        base_name: what to call the base, whatever its folder is called.
        options: the options of the export.
        report: what the writer measured.
        probe: the inputs to compare outputs on.
    """
    read = replace(
        mixture,
        base=_true(mixture.base, base_ref(base)),
        adapters=list(map(_true, mixture.adapters, map(adapter_ref, adapters))),
        head_tensors={name: mixture.head_tensors.get(name) for name in sorted(mixture.head)},
    )
    return Manifest.model_construct(
        format_version=FORMAT_VERSION,
        format=kind,
        mixture=read.record(lambda ref: public_name(ref.source) if ref.name else base_name),
        options=dict(options),
        report=report,
        probe=dict(probe),
        versions=versions((*FORMATS[kind].packages, *(("matplotlib",) if options.get("report") else ()))),
        files={},
    )


def write_manifest(manifest: Manifest, folder: Path, known: Mapping[str, str]) -> None:
    """Write the file with every other file of the folder, its sha256 (taken from `known`, name -> sha256, where it is) and bytes."""
    table = manifest.model_dump(warnings=False) | {
        "mixture": manifest.mixture.table(),
        "report": manifest.report.table(),
    }
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST_FILE):
        name = path.relative_to(folder).as_posix()
        table["files"][name] = {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
    text = json.dumps(table, indent=2, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _true(told: InputRef, read: InputRef) -> InputRef:
    """Where an input came from: what the mixture says of it if these are its bytes, else where they were read."""
    return told if told.sha256 == read.sha256 else read


def digest(folder: Path) -> str:
    """`sha256:...` of an export's manifest, which has the sha256 of every other file: one line pins the export."""
    return f"sha256:{sha256_file(folder / MANIFEST_FILE)}"


# ----------------------------------------------------------------------------------------------------------- read


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export, of this format version or the one before.

    Raises:
        VerifyError: none there, one of another version, or one that is broken.
    """
    file = find_file(folder, MANIFEST_FILE, VerifyError)
    if file is None:
        if not os.path.exists(folder):  # of a name too long too
            raise VerifyError(f"{folder}: does not exist.")
        inside = f"; below it are {', '.join(found)}: give one of the exports" if (found := below(folder)) else ""
        raise VerifyError(f"{folder}: has no {MANIFEST_FILE}: this is not an export of wlora-merge{inside}.")
    table = read_json(file, VerifyError)
    found_version = table.get("format_version")
    if type(found_version) is int and found_version == 1:
        table = _of_version_1(table, file)
    elif type(found_version) is not int or found_version != FORMAT_VERSION:
        raise VerifyError(
            f"{file}: its format_version is not {FORMAT_VERSION}: another version of wlora-merge wrote it."
        )
    return read_record(Manifest, table, file, VerifyError, ADVICE)


class _BaseOfVersion1(Record):
    name: str
    revision: str | None = None
    sha256: dict[str, str]


class _Version1(Record):
    """What format version 1 said in another form: it had the mixture's keys beside its own."""

    base_model: _BaseOfVersion1
    prefixes: list[str]
    head: list[str]

    @model_validator(mode="after")
    def _two(self) -> _Version1:
        if len(self.prefixes) != 2:
            raise ValueError("its prefixes are not two")
        return self


def _of_version_1(table: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A table of format version 1 in the form of version 2; which tensors of the base the head replaces, it does not say."""
    old = read_record(_Version1, table, file, VerifyError, ADVICE)
    base = old.base_model
    mixture = {key: table[key] for key in MixtureRecord.model_fields if key in table} | {
        "base_model": {"source": base.name, "revision": base.revision, "sha256": base.sha256},
        "prefixes": dict(zip(("in_file", "in_model"), old.prefixes, strict=True)),
        "head": dict.fromkeys(old.head),
    }
    return {key: table[key] for key in Manifest.model_fields if key in table} | {
        "format_version": FORMAT_VERSION,
        "mixture": mixture,
    }
