"""The files of a model's folder: which hold weights, and which are carried along into an export.

It knows names of files. It knows neither tensors nor configs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from ..constants import FIT_STATE
from ..errors import BaseModelError
from ..io.untrusted import find_file, is_hidden, is_plain_file_name, is_utf8, read_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".data", ".index.json",
)  # fmt: skip
NOT_CARRIED = (
    "README.md", "wlora_merge.json", "report.html", "adapter_config.json", "trainer_state.json", "training_args.bin",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""What `save_pretrained` of a tokenizer writes."""
CARRIED_FOLDERS = re.compile(r"additional_chat_templates|\d+_(Pooling|Normalize|Dense|Dropout)")
"""Folders of a base that are copied, beside those that `modules.json` names: chat templates, and modules of sentence-transformers
behind the model."""
MODULES = "modules.json"
GENERATION = "generation_config.json"
CHAT_TEMPLATES = "additional_chat_templates"


def carried_files(folder: Path) -> list[Path]:
    """Everything beside a model's weights that a server or a tokenizer reads, relative to the folder, in order.

    Raises:
        BaseModelError: a link that leaves the folder: it would publish what it leads to; a module of sentence-transformers whose
            weights are a pickle.
    """
    names = sorted(name for name in _candidates(folder) if find_file(folder, name, BaseModelError) is not None)
    for name in names:
        if not all(map(is_plain_file_name, name.parts)) or not is_utf8(str(name)):
            raise BaseModelError(
                f"{folder}: the name of its file {str(name)!r} is none that every system takes: rename it."
            )
    return names


def _module_folders(folder: Path) -> set[str]:
    """The folders of the modules of sentence-transformers that stand behind the model."""
    if (file := find_file(folder, MODULES, BaseModelError)) is None:
        return set()
    try:
        rows = json.loads(read_bytes(file, BaseModelError))
        if not isinstance(rows, list):
            return set()  # a file of that name is not theirs alone
        return {row["path"] for row in rows if row["path"] and not row["type"].endswith("Transformer")}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BaseModelError(f"{file}: is no list of modules with a path and a type ({error}): mend it.") from error


def _candidates(folder: Path) -> Iterable[Path]:
    modules = _module_folders(folder)
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in NOT_CARRIED or path.name.endswith(WEIGHT_SUFFIXES):
            continue
        if FIT_STATE in path.name or path.name.endswith(":Zone.Identifier"):  # the latter is Windows', of a download
            continue
        if path.is_file() or (path.is_symlink() and not path.exists()):  # a link to nothing is refused, not left out
            yield path.relative_to(folder)
        elif CARRIED_FOLDERS.fullmatch(path.name) or path.name in modules:
            yield from (p.relative_to(folder) for p in _module_files(path))


def _module_files(folder: Path) -> list[Path]:
    """The files of a sentence-transformers module: a Dense has weights of its own, which no adapter changes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p.relative_to(folder)))
    weights = [p for p in files if p.name.endswith(WEIGHT_SUFFIXES)]
    kept = [p for p in weights if p.suffix == ".safetensors"]
    if weights and not kept:
        raise BaseModelError(
            f"{weights[0]}: is no safetensors, and other weights, which could run code, are never copied; without them the export "
            f"would lack a layer: save them where you trust them as {folder / SINGLE}, or take the folder away."
        )
    return [p for p in files if p not in weights or p in kept]
