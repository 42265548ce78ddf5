"""An export's files against its manifest, and its config against its tensors, before anything is loaded.

It knows files, digests and headers. It loads no model and folds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..adapters.keys import parse_adapter_key
from ..constants import DTYPES
from ..errors import VerifyError
from ..io.digests import sha256_files
from ..io.safetensors_file import FLOATING, Entry, read_header, read_tensor
from ..io.untrusted import find_file, read_json
from ..models.base_model import BaseModel, open_base
from ..models.files import INDEX
from ..models.names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS
from .manifest import FILE

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

OF_THE_HUB = (".gitattributes", ".git", ".cache")
"""What a repository, or a download of one, has beside what was uploaded."""


def check_files(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Read every file again and compare its sha256; compare config, index and headers with each other.

    Returns:
        The number of files.

    Raises:
        VerifyError: a file that is missing, is not in the manifest, or has other bytes.
    """
    expected = manifest["files"]
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()} - {FILE}
    found = {name for name in found if name.split("/")[0] not in OF_THE_HUB or name in expected}
    if missing := sorted(set(expected) - found):
        raise VerifyError(f"{folder / missing[0]}: is missing; the manifest lists it: export again.")
    if foreign := sorted(found - set(expected)):
        raise VerifyError(
            f"{folder / foreign[0]}: is not in the manifest: it was added after the export; take it away."
        )
    for name in expected:
        find_file(folder, name, VerifyError)
    digests = sha256_files([folder / name for name in expected], fresh=True)
    for name, row in expected.items():
        if digests[folder / name] != row.get("sha256"):
            raise VerifyError(
                f"{folder / name}: its sha256 is {digests[folder / name][:12]}…, the manifest says {str(row.get('sha256'))[:12]}…: "
                "the file changed after the export; export again."
            )
        if name.endswith(".safetensors"):
            read_header(folder / name)
    check_structure(folder, manifest)
    return len(expected)


def check_structure(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare what an export's config and index say with what its headers say.

    Raises:
        VerifyError: a pickle among the files, an index or a config that does not describe the tensors.
        BaseModelError: a dense export that is no checkpoint.
    """
    for name in manifest["files"]:
        if name.endswith(PICKLES):
            raise VerifyError(f"{folder / name}: is a pickle, which no export holds and which is never loaded.")
    if manifest["format"] == "dense":
        _check_dense(folder, manifest)
    if manifest["format"] == "lora":
        _check_lora(folder)


def _check_dense(folder: Path, manifest: Mapping[str, Any]) -> None:
    opened = open_base(folder, VerifyError)
    for name in manifest["files"]:
        if name.endswith(".safetensors") and "/" not in name and name not in opened.headers:
            raise VerifyError(f"{folder / name}: holds tensors that {INDEX} does not name: export again.")
    for file, header in opened.headers.items():
        for name in header.entries:
            if opened.index is not None and opened.index["weight_map"].get(name) != file:
                raise VerifyError(f"{folder / file}: tensor {name!r} is not where {INDEX} places it: export again.")
    wanted = (manifest.get("options") or {}).get("dtype")
    if wanted:
        _check_dtype(opened, wanted)
    _check_tied(opened)


def _check_dtype(opened: BaseModel, wanted: str) -> None:
    expected = DTYPES[wanted]
    for entry in opened.entries.values():
        if entry.dtype in FLOATING and entry.dtype != expected:
            raise VerifyError(
                f"{entry.file}: tensor {entry.name!r} is {entry.dtype}, expected {expected} (--dtype {wanted})."
            )
    told = {opened.config[key] for key in ("torch_dtype", "dtype") if key in opened.config}
    if told != {wanted}:
        raise VerifyError(
            f"{opened.folder / 'config.json'}: its dtype is {', '.join(map(repr, told)) or 'not said'}, and the tensors' is {wanted}."
        )


def _check_tied(opened: BaseModel) -> None:
    """Where the config ties them, an output embedding that is stored must be the input embedding."""
    if opened.config.get("tie_word_embeddings") is not True:
        return
    tables = {
        e.name.removesuffix(".weight").rpartition(".")[2]: e
        for name, e in opened.entries.items()
        if name in opened.tied
    }
    outputs = [tables[n] for n in OUTPUT_EMBEDDINGS if n in tables]
    inputs = [tables[n] for n in INPUT_EMBEDDINGS if n in tables]
    for output in outputs[:1]:
        for source in inputs[:1]:
            if output.shape != source.shape or not bool((read_tensor(output) == read_tensor(source)).all()):
                raise VerifyError(
                    f"{output.file}: tensor {output.name!r} is not {source.name!r}, though config.json ties them: export again."
                )


def _check_lora(folder: Path) -> None:
    file = find_file(folder, WEIGHTS_FILE, VerifyError)
    config_file = find_file(folder, CONFIG_FILE, VerifyError)
    if file is None or config_file is None:
        raise VerifyError(f"{folder}: lacks {CONFIG_FILE} or {WEIGHTS_FILE}: export again.")
    config, entries = read_json(config_file, VerifyError), read_header(file).entries
    r, targets = config.get("r"), config.get("target_modules")
    if type(r) is not int or config.get("lora_alpha") != r or not isinstance(targets, list):
        raise VerifyError(
            f"{config_file}: r is {r!r} and lora_alpha {config.get('lora_alpha')!r}, expected one number."
        )
    modules: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        parsed = parse_adapter_key(key)
        if parsed.part != "tensor":
            modules.setdefault(parsed.name, {})[parsed.part] = entry
    for module, parts in modules.items():
        for part, entry in parts.items():
            axis = 0 if part.endswith("A") else 1
            if len(entry.shape) <= axis or entry.shape[axis] != r:
                raise VerifyError(
                    f"{file}: tensor {entry.name!r} has shape {list(entry.shape)}, expected rank {r} in axis {axis}."
                )
        if not any(module == t or module.endswith(f".{t}") for t in targets):
            raise VerifyError(f"{config_file}: target_modules lack {module!r}, of which there are tensors.")
