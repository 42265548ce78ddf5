"""The sha256 of files without a second pass over their bytes.

This room knows bytes, paths and the user's cache folder; it must not know what the bytes mean.

A digest costs a pass once. It is then remembered in ``digests.jsonl`` in the cache folder (see `cache`). It stands there under
the file's real path, size, mtime, ctime, inode and device. A file that differs in one of them is hashed anew. Each line
carries its own checksum and is appended by one write, so several processes may write at once. A line that is damaged or half
written is passed over: never a wrong digest, never an error. A folder that cannot be read or written is no cache. LFS files of the
Hugging Face hub cache need no pass at all: the name of the blob is its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import WloraMergeError
from ..progress import Meter
from .cache import cache_folder

_READ_BYTES = 1 << 20
_LONG_BYTES = 256 << 20  # takes a second or so; what one file of fewer is read for tells of itself
_CACHE_BYTES = 1 << 20  # about 2,500 records; the older half goes when it is full
_RACY_NS = 2_000_000_000  # the coarsest mtime of a common file system (FAT); git's racy index has the same care
_HEX = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"(models|datasets|spaces)--")
_SEEN = ("size", "mtime_ns", "ctime_ns", "inode", "device")
_KEYS = {"path", "name", "sha256", *_SEEN}


def sha256_file(path: Path, *, fresh: bool = False) -> str:
    """Return a file's sha256, from memory where the file is known and unchanged.

    Args:
        path: the file; symlinks are followed.
        fresh: read the bytes whatever is remembered and whatever a hub blob is called, as a verification must.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        WloraMergeError: the file cannot be read, or changed while it was read.
    """
    return sha256_files([path], fresh=fresh)[path]


def sha256_files(paths: Iterable[Path], *, fresh: bool = False) -> dict[Path, str]:
    """Return the sha256 of several files, hashed side by side on threads.

    Args:
        paths: the files; the result has each once, in this order.
        fresh: as for ``sha256_file``.

    Returns:
        Path as given -> 64 hexadecimal digits.

    Raises:
        WloraMergeError: a file cannot be read, or changed while it was read.
    """
    names = list(dict.fromkeys(paths))
    stop, total = threading.Event(), _total(names)
    meter = Meter("reading files", total, len(names), "files", told=len(names) > 1 or total > _LONG_BYTES)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        try:
            return dict(zip(names, pool.map(lambda path: _digest(path, fresh, stop, meter), names), strict=True))
        except BaseException:  # Ctrl-C must not wait until the other files are read to their end
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def remember(path: Path, sha256: str) -> None:
    """Remember the digest of a file that this process has just written and put in place, however young it is.

    A file that somebody else may still be writing is remembered only once it is two seconds old.
    """
    real = os.path.realpath(path)
    with suppress(OSError):  # gone already: nothing to remember
        _remember({"path": real, "name": os.path.abspath(path), **_seen(real), "sha256": sha256})


def path_of(sha256: str, fits: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """Find a file by its content: one whose digest is remembered and which has not changed since.

    Args:
        sha256: 64 hexadecimal digits.
        fits: whether a file of that content is the one that is looked for: several may be copies of each other.

    Returns:
        The path under which it was last seen (of a hub file the one in ``snapshots``), or None.
    """
    for record in _records(sha256):
        for name in (record["name"], record["path"]):
            with suppress(OSError, ValueError):
                same = record["sha256"] == sha256 and _seen(name) == {key: record[key] for key in _SEEN}
                if same and fits(Path(name)):
                    return Path(name)
    return None


def _total(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(OSError):  # who reads it says so
            total += os.path.getsize(path)
    return total


def _digest(path: Path, fresh: bool, stop: threading.Event, meter: Meter) -> str:
    try:
        real, name, started = os.path.realpath(path), os.path.abspath(path), time.time_ns()
        before = _seen(real)
        named = None if fresh else _hub_name(Path(real))
        known = None if fresh else _recall(real, before) or named
        digest = known or _hash(real, stop, meter)
        meter.add(before["size"] if known else 0, 1)
        after = _seen(real)
    except OSError as error:
        raise WloraMergeError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and the disk."
        ) from error
    if after != before:
        raise WloraMergeError(
            f"{path}: changed while it was read ({before['size']} bytes before, {after['size']} after); "
            "wait until whoever writes it has finished, then run again."
        )
    # a write in the same tick of the clock as the last one would leave the mtime as it is
    if named or started - before["mtime_ns"] > _RACY_NS:
        _remember({"path": real, "name": name, **before, "sha256": digest})
    return digest


def _hash(path: str, stop: threading.Event, meter: Meter) -> str:
    digest = hashlib.sha256()
    view = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
            meter.add(count)
            if stop.is_set():
                raise OSError(f"hashing of {path} was stopped")
    return digest.hexdigest()


def _seen(path: str) -> dict[str, int]:
    now = os.stat(path)
    return dict(zip(_SEEN, (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_dev), strict=True))


def _hub_name(real: Path) -> str | None:
    """hub/models--org--name/blobs/<sha256> for LFS files; the blob of a small file has a git SHA-1 name, 40 digits."""
    blob = real.parent.name == "blobs" and _HUB.match(real.parent.parent.name) and _HEX.fullmatch(real.name)
    return real.name if blob else None


# The memory


def _cache_file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "digests.jsonl"


def _recall(real: str, seen: dict[str, int]) -> str | None:
    for record in _records(json.dumps(real)):
        if record["path"] == real and {key: record[key] for key in _SEEN} == seen:
            return str(record["sha256"])
    return None


def _records(needle: str) -> Iterator[dict[str, Any]]:
    """The sound records whose line holds the needle, the newest first."""
    for line in reversed(_tail().split(b"\n")):
        if needle.encode() in line and line[:8] == _checksum(line[9:]):
            with suppress(ValueError):  # sound, yet not JSON: not written by us
                record = json.loads(line[9:])
                if isinstance(record, dict) and record.keys() == _KEYS and _HEX.fullmatch(str(record["sha256"])):
                    yield record


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _tail() -> bytes:
    file = _cache_file()
    try:
        if file is None or not file.is_file():
            return b""
        with open(file, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 2 * _CACHE_BYTES))
            return stream.read(2 * _CACHE_BYTES)
    except OSError:  # no cache: every digest then costs its pass, and nothing else changes
        return b""


def _remember(record: dict[str, Any]) -> None:
    file = _cache_file()
    if file is None or any(known == record for known in _records(json.dumps(record["name"]))):
        return
    text = json.dumps(record).encode()
    with suppress(OSError):  # no cache, as above
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if file.exists() and file.stat().st_size > _CACHE_BYTES:
            _halve(file)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:  # the newline in front ends a line that another process left half written
            os.write(descriptor, b"\n" + _checksum(text) + b" " + text + b"\n")
        finally:
            os.close(descriptor)


def _halve(file: Path) -> None:
    """Keep the newer half; a record that another process appends meanwhile may be lost, and is a miss."""
    kept = _tail()[-_CACHE_BYTES // 2 :]
    fresh = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        fresh.write_bytes(b"\n" + kept)
        fresh.chmod(0o600)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
