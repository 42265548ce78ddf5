"""PATH_OR_ID -> a local folder: a path as it is, a hub id through huggingface_hub and its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import WloraMergeError
from ..text import first_line, redacted
from .untrusted import is_utf8

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/(?!\.{1,2}[/@]|\.{1,2}$)[\w.-]+)*(@[\w./-]+)?")
"""`org/name`, `org/name/folder/in/it`, and either with `@revision`."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
BASE_PATTERNS = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.py", "LICENSE*",
    "NOTICE*", "*.md",
)  # fmt: skip
NOT_FETCHED = ("consolidated*", "original/*")
"""A second copy of the weights in another layout."""
ADAPTER_PATTERNS = (
    "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "modules.json", "*_Pooling/config.json",
)  # fmt: skip
"""An adapter, and the small files beside it that say whether it was trained with another tokenizer or pooling than its base's."""


@dataclass(frozen=True)
class Source:
    """Where an input came from: its folder here, and for a hub id also the id and the commit."""

    folder: Path
    hub_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """What to call it where no local path may stand: the hub id, or the folder's own name."""
        return self.hub_id or self.folder.resolve().name

    @property
    def location(self) -> str:
        """The hub id, or the local folder, absolute."""
        return self.hub_id or str(self.folder.resolve())


def _pickle(text: str) -> str:
    if not text.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
        return ""
    return (
        "is a pickle, which could run code and is never loaded: convert it where you trust it (load it with transformers or PEFT "
        "and call save_pretrained(folder), which writes safetensors), and give"
    )


def is_here(path: str | Path) -> bool:
    """Whether there is a file or a folder; a name that no file system takes (too long, an unknown user's, with a NUL) is nowhere."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def resolve_source(path_or_id: str | Path, patterns: Sequence[str]) -> Source:
    """The local folder of an input; a hub id (`org/name`, `org/name/folder`, `org/name@revision`) is fetched into the hub cache.

    Nothing is downloaded with HF_HUB_OFFLINE=1: what the cache holds is used.

    Raises:
        WloraMergeError: neither a folder here nor a hub id that can be had.
    """
    text = os.fspath(path_or_id)
    try:
        folder = Path(text).expanduser()
        is_folder, there = bool(text) and folder.is_dir(), bool(text) and folder.exists()
    except (OSError, RuntimeError, ValueError):  # a name too long, a user unknown, a NUL
        is_folder, there = False, True
    if is_folder:
        if not is_utf8(str(folder.resolve())):
            raise WloraMergeError(f"{text!r}: this path is not UTF-8, as a manifest must have it: rename the folder.")
        return Source(folder)
    if there or text.startswith((".", "/", "~")) or not HUB_ID.fullmatch(text):
        why = _pickle(text) or "no such folder: give"
        raise WloraMergeError(
            f"{redacted(text) or repr(text)}: {why} the folder of a model or adapter, or a hub id (org/name, or org/name/folder)."
        )
    return _fetched(text, patterns)


def seen_from(source: str, folder: str | Path) -> str:
    """A path that is relative to `folder`, as this process sees it; a hub id as it is."""
    local = Path(folder) / os.path.expanduser(source)
    return str(local) if is_here(local) or source.startswith(".") else source


def folder_here(path_or_id: str, revision: str | None = None) -> Path | None:
    """The folder of an input that is on this machine: a path as it is, a hub id's in the hub's cache; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    if is_here(path_or_id):
        return Path(path_or_id).expanduser() if Path(path_or_id).expanduser().is_dir() else None
    if not HUB_ID.fullmatch(path_or_id):
        return None
    found = try_to_load_from_cache(path_or_id, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _fetched(text: str, patterns: Sequence[str]) -> Source:
    """The folder of a hub id in the hub's cache."""
    from huggingface_hub import snapshot_download

    hub_id, _, revision = text.partition("@")
    organization, name, *folders = hub_id.split("/")
    wanted = ["/".join([*folders, pattern]) for pattern in patterns]
    try:
        found = Path(
            snapshot_download(
                f"{organization}/{name}",
                revision=revision or None,
                allow_patterns=wanted,
                ignore_patterns=list(NOT_FETCHED),
            )
        )
    except Exception as error:  # the hub's library lets those of its HTTP and transfer libraries through
        raise WloraMergeError(
            redacted(f"{text}: no such folder here, and the hub did not give it: {first_line(error)}.")
        ) from error
    folder = found.joinpath(*folders)
    if folders and not folder.is_dir():
        raise WloraMergeError(f"{text}: the repository {organization}/{name} has no folder {'/'.join(folders)!r}.")
    return Source(folder, hub_id, found.name if _COMMIT.fullmatch(found.name) else revision or None)


def public_name(source: str) -> str:
    """How a source is told to others: a hub id as it is; of a local folder its own name."""
    return Path(source).name if Path(source).is_absolute() else source


def at_revision(name: str, revision: str | None) -> str:
    """A hub id with its revision, as commands take it."""
    return f"{name}@{revision}" if revision and HUB_ID.fullmatch(name) else name
