"""An export's files against its manifest, and its config against its tensors, before anything is loaded.

It knows files, digests and headers. It loads no model and folds nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..adapters.keys import parse_adapter_key
from ..constants import DTYPES, MANIFEST_FILE
from ..errors import VerifyError
from ..io.digests import sha256_files
from ..io.safetensors_file import FLOATING, read_header
from ..io.untrusted import find_file, read_json
from ..models.base_model import BaseModel, open_base
from ..models.files import INDEX
from ..models.tied_embeddings import stored_apart

if TYPE_CHECKING:
    from .manifest import FileRecord

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

OF_THE_HUB = (".gitattributes", ".git", ".cache")
"""What a repository, or a download of one, has beside what was uploaded."""


def check_files(folder: Path, files: Mapping[str, FileRecord]) -> int:
    """Read every file again and compare its sha256; refuse pickles, and safetensors whose headers are broken.

    Args:
        folder: the export folder.
        files: the manifest's: name -> sha256 and bytes.

    Returns:
        The number of files.

    Raises:
        VerifyError: a file that is missing, is not in the manifest, has other bytes, or is a pickle.
    """
    _check_names(folder, files)
    digests = sha256_files([folder / name for name in files], fresh=True)
    for name, row in files.items():
        if digests[folder / name] != row.sha256:
            raise VerifyError(
                f"{folder / name}: its sha256 is {digests[folder / name][:12]}…, the manifest says {row.sha256[:12]}…: "
                "the file changed after the export; export again."
            )
        if name.endswith(".safetensors"):
            read_header(folder / name)
    for name in files:
        if name.endswith(PICKLES):
            raise VerifyError(f"{folder / name}: is a pickle, which no export holds and which is never loaded.")
    return len(files)


def _check_names(folder: Path, files: Collection[str]) -> None:
    """Refuse a folder with other files than those, or with a link among them that leaves it."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()} - {
        MANIFEST_FILE
    }
    found = {name for name in found if name.split("/")[0] not in OF_THE_HUB or name in files}
    if missing := sorted(set(files) - found):
        raise VerifyError(f"{folder / missing[0]}: is missing; the manifest lists it: export again.")
    if foreign := sorted(found - set(files)):
        raise VerifyError(
            f"{folder / foreign[0]}: is not in the manifest: it was added after the export; take it away."
        )
    for name in files:
        find_file(folder, name, VerifyError)


def check_checkpoint(folder: Path, files: Collection[str], dtype: str | None) -> None:
    """Compare what the config and the index of a dense export say with what its headers say.

    Args:
        folder: the export folder.
        files: the names of its files.
        dtype: that it was exported with; None: the base's own.

    Raises:
        VerifyError: an index or a config that does not describe the tensors.
        BaseModelError: it is no checkpoint.
    """
    opened = open_base(folder, VerifyError)
    for name in files:
        if name.endswith(".safetensors") and "/" not in name and name not in opened.headers:
            raise VerifyError(f"{folder / name}: holds tensors that {INDEX} does not name: export again.")
    for file, header in opened.headers.items():
        for name in header.entries:
            if opened.index is not None and opened.index["weight_map"].get(name) != file:
                raise VerifyError(f"{folder / file}: tensor {name!r} is not where {INDEX} places it: export again.")
    if dtype is not None:
        _check_dtype(opened, dtype)
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
    """Where the config ties tensors, those that are stored must be equal."""
    for name, source in sorted(stored_apart(opened).items()):
        raise VerifyError(
            f"{opened.folder}: tensor {name!r} is not {source!r}, though config.json ties them (tie_word_embeddings): export again."
        )


def check_adapter(folder: Path) -> None:
    """Compare what the config of a lora export says with what its header says: one rank, and which modules.

    Raises:
        VerifyError: a file is missing, or they disagree.
    """
    file = find_file(folder, WEIGHTS_FILE, VerifyError)
    config_file = find_file(folder, CONFIG_FILE, VerifyError)
    if file is None or config_file is None:
        raise VerifyError(f"{folder}: lacks {CONFIG_FILE} or {WEIGHTS_FILE}: export again.")
    config = read_json(config_file, VerifyError)
    r, targets = config.get("r"), config.get("target_modules")
    if type(r) is not int or config.get("lora_alpha") != r or not isinstance(targets, list):
        raise VerifyError(
            f"{config_file}: r is {r!r} and lora_alpha {config.get('lora_alpha')!r}, expected one number."
        )
    for entry in read_header(file).entries.values():
        key = parse_adapter_key(entry.name)
        if key.part == "tensor":
            continue
        axis = 0 if key.part.endswith("A") else 1
        if len(entry.shape) <= axis or entry.shape[axis] != r:
            raise VerifyError(
                f"{file}: tensor {entry.name!r} has shape {list(entry.shape)}, expected rank {r} in axis {axis}."
            )
        if not any(f".{key.name}".endswith(f".{target}") for target in targets):
            raise VerifyError(f"{config_file}: target_modules lack {key.name!r}, of which there are tensors.")
