"""The user's cache folder, and small sealed files in it that may be used as they are.

The folder: ``$WLORA_MERGE_CACHE``, else ``$XDG_CACHE_HOME/wlora_merge``, else ``~/.cache/wlora_merge``. A sealed file is a line with
the sha256 of the bytes behind it. It is read back only where it is this user's, nobody else may write it, and its digest fits: all
else counts as absent. A file appears all at once, so several processes may write at once. A folder that cannot be read or
written is no cache: never an error. This room knows bytes; it must not know what they mean.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 64 << 20
"""Of one sealed file."""
MAX_BYTES = 256 << 20
"""Of all sealed files of a folder; those that were used longest ago go first."""
_SUFFIX = ".sealed"


def cache_folder() -> Path | None:
    """The user's cache folder, which may not be there yet; None for a user without a home."""
    own, shared = os.environ.get("WLORA_MERGE_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own)
    try:  # the XDG rule: a relative path is to be ignored
        return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "wlora_merge"
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Sealed:
    """A sealed file of the cache: its content, None where it is not to be trusted, its size and when it was last used."""

    path: Path
    content: bytes | None
    nbytes: int
    used: float


def read_sealed(kind: str, name: str) -> bytes | None:
    """The content of a sealed file, which counts as used now; None where there is none that can be trusted.

    Args:
        kind: the folder in the cache folder.
        name: of the file, without its ending.
    """
    folder = _folder(kind)
    if folder is None:
        return None
    with _opened(folder) as place:
        content = None if place is None else _content(place, f"{name}{_SUFFIX}")
    if content is not None:
        with suppress(OSError):
            os.utime(folder / f"{name}{_SUFFIX}")
    return content


def write_sealed(kind: str, name: str, content: bytes) -> None:
    """Keep some bytes under a name, in the place of what has that name; nothing where there is no cache, or they are too many."""
    folder = _folder(kind)
    if folder is None or len(content) > MAX_FILE_BYTES:
        return
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(folder) as place:
            if place is None:
                return
        descriptor, fresh = tempfile.mkstemp(prefix=".new-", dir=folder)  # of mode 0600
        try:
            with open(descriptor, "wb") as stream:
                stream.write(_seal(content) + content)
            os.replace(fresh, folder / f"{name}{_SUFFIX}")
        except BaseException:
            os.unlink(fresh)
            raise
        _make_room(folder)


def sealed_files(kind: str) -> list[Sealed]:
    """All files of a kind, the last used first, those that are not to be trusted too."""
    folder, found = _folder(kind), []
    if folder is None:
        return []
    with _opened(folder) as place:
        for path in _files(folder):
            with suppress(OSError):  # gone meanwhile
                now = path.lstat()
                content = None if place is None else _content(place, path.name)
                found.append(Sealed(path, content, now.st_size, now.st_mtime))
    return sorted(found, key=lambda file: (-file.used, file.path))


def remove_sealed(kind: str, name: str | None = None) -> None:
    """Remove a file, or all of a kind, and what a writer that was killed left behind.

    Raises:
        OSError: a file may not be removed.
    """
    folder = _folder(kind)
    if folder is None:
        return
    files = [*_files(folder), *folder.glob(".new-*")] if name is None else [folder / f"{name}{_SUFFIX}"]
    for path in files:
        path.unlink(missing_ok=True)


def _folder(kind: str) -> Path | None:
    root = cache_folder()
    return None if root is None else root / kind


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A descriptor of a folder that only this user may write; None where it is not such a one."""
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield place if _is_own(os.fstat(place)) else None
    finally:
        os.close(place)


def _is_own(found: os.stat_result) -> bool:
    """Whether a file or folder is this user's, and nobody else may write it."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _content(place: int, name: str) -> bytes | None:
    """What is behind the seal of a file in an opened folder; None where the seal does not fit, or the file is not ours."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
        with open(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not (stat.S_ISREG(found.st_mode) and _is_own(found) and found.st_size <= MAX_FILE_BYTES + 100):
                return None
            data = stream.read(found.st_size)
    except OSError:
        return None
    seal, content = data[:65], data[65:]
    return content if seal == _seal(content) else None


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def _make_room(folder: Path) -> None:
    """Remove the files that were used longest ago, until the others fit."""
    files = [(path, path.stat()) for path in _files(folder)]
    total = sum(found.st_size for _, found in files)
    for path, found in sorted(files, key=lambda file: file[1].st_mtime):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= found.st_size
