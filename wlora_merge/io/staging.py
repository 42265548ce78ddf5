"""All-or-nothing output folders: build beside, check, flush to disk, rename into place.

This room knows folders and full disks. It must not know what is written into a folder, or by whom.

The promise holds whatever happens while a folder is built: an exception, SIGKILL, a full disk, a power cut. ``out`` is
either what it was before (absent, empty, or the old content untouched) or the complete new folder. Everything temporary
stands beside ``out`` under names that begin with ``.NAME.wlora-``, so that the last step is a rename:

    .NAME.wlora-lock             held (flock) by the one run that may touch the two below
    .NAME.wlora-staging-PID-HEX  the new folder; after an exchange, the old one on its way out
    .NAME.wlora-old-PID-HEX      the old folder, where the system cannot exchange two folders in one step

Who holds the lock knows that any such folder was left by a killed run, and clears it away.

Weaker elsewhere: without renameat2 (Linux) or renamex_np (macOS) ``force`` takes two renames. A kill between them
leaves ``out`` absent until the next run restores the old folder. On a file system without flock two runs at once are
not told apart and leftovers are kept. One that cannot fsync a folder does not promise the rename after a power cut.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import OutputError, WloraMergeWarning
from ..progress import LOG
from ..text import human_bytes
from .locks import beside, locked
from .signals import signals_held

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS happen to be the same number
_AT_FDCWD = -100
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SPACE_MARGIN = 16 << 20  # bytes: directory blocks, the journal, and what other programs write meanwhile


@dataclass
class Staging:
    """A folder being built beside the output folder, and, once in place, how it got there."""

    out: Path  # absolute, symlinks resolved
    path: Path  # write here
    swap: Literal["rename", "exchange", "two renames"] | None = None  # None until the folder is in place


@contextmanager
def staged(
    out: Path,
    *,
    force: bool = False,
    inputs: Iterable[Path] = (),
    needed_bytes: int = 0,
    check: Callable[[Path], None] | None = None,
) -> Iterator[Staging]:
    """Yield an empty folder that becomes ``out`` if the block ends well, and vanishes if it does not.

    Args:
        out: the folder to bring into being; a symlink to a folder is followed and kept. It must not exist or be empty.
        force: replace what is in ``out``, in one step where the system can (``Staging.swap`` says which way it was).
        inputs: files and folders that are read meanwhile; ``out`` must not lie in, hold or be one of them.
        needed_bytes: what will be written, in bytes; checked against the free space before anything is written.
        check: called with the staging folder when the block has ended; what it raises keeps ``out`` as it was.

    Returns:
        A context manager that gives a ``Staging``: write into its ``path``; its ``swap`` is set on a clean exit. A new
        folder gets the ordinary permissions (0o777 less the umask); one that takes another's place keeps that one's. Every
        file gets 0o666 less the umask, whatever library wrote it.

    Raises:
        OutputError: ``out`` cannot be written safely, another run is writing it, the disk is full or fails.
    """
    target = _resolved(out)
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    staging = Staging(target, beside(target, f"staging-{token}"))
    with _output_errors(out, target):
        _refuse_unsafe(out, target, inputs)
        with _parents(target), locked(out, target) as sure, _cleared(target, None if sure else token):
            _refuse_occupied(out, target, force)
            _require_space(out, target, needed_bytes)
            os.mkdir(staging.path)
            mode = stat.S_IMODE(os.stat(staging.path).st_mode) & 0o666
            yield staging
            if check is not None:
                check(staging.path)
            _sync_tree(staging.path, mode)
            staging.swap = _place(staging, force, beside(target, f"old-{token}"))
            _sync(target.parent)
            if staging.swap != "rename":
                how = (
                    "in one step"
                    if staging.swap == "exchange"
                    else "in two renames, as this system cannot exchange folders"
                )
                LOG.info("%s: the old folder was replaced %s.", out, how)


# What may not be written to


def _resolved(out: Path) -> Path:
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of symlinks; a current folder that is gone; a NUL
        raise OutputError(f"{out}: cannot be resolved to a folder ({error}); choose another --out.") from error


def refuse_out(out: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output folder as `staged` would; for work that takes long before it writes.

    Raises:
        OutputError: `out` is not empty and not to be replaced, lies in an input, or is a mount point.
    """
    target = _resolved(out)
    with _output_errors(out, target):
        _refuse_unsafe(out, target, inputs)
        _refuse_occupied(out, target, force)


@contextmanager
def reserved(out: Path, file: Path) -> Iterator[None]:
    """Keep a file that lies beside `out`, and outlives a run, to this run until the block ends.

    Raises:
        OutputError: another run has it, or the folder that it lies in cannot be written to.
    """
    target = _resolved(file)
    with _output_errors(out, target), _parents(target), locked(out, target):
        yield


def _refuse_unsafe(out: Path, target: Path, inputs: Iterable[Path]) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{out}: is a file, expected a folder that is empty or does not exist; choose another --out.")
    for place, words in ((".", "the current folder"), (os.path.expanduser("~"), "your home folder")):
        if _inside(place, target):
            raise OutputError(f"{out}: is or holds {words}, which is not replaced; choose a folder inside it as --out.")
    mount = _mount_in(target)
    if mount is not None:
        where = "is a mount point" if mount == target else f"holds the mount point {mount}"
        inner = Path(out) / "export"
        raise OutputError(f"{out}: {where}, so no folder can be renamed into its place; use one inside, as {inner}.")
    for source in inputs:
        _refuse_nested(out, target, Path(source))


def _refuse_nested(out: Path, target: Path, source: Path) -> None:
    if _inside(target, source):
        raise OutputError(
            f"{out}: lies in (or is) the input {source}, which is never written to; choose another --out."
        )
    for path in (source, *_links(source)):
        if _inside(path, target):
            raise OutputError(f"{out}: holds the input {path}, which would be removed with it; choose another --out.")


def _links(source: Path) -> list[Path]:
    """The links in a folder: of a hub snapshot, all files, and the bytes lie elsewhere."""
    try:
        return [entry for entry in source.iterdir() if entry.is_symlink()]
    except OSError:  # a file, or a folder that who reads it will find missing
        return []


def _inside(path: str | Path, folder: Path) -> bool:
    """Whether path is folder or lies in it: by identity, so that links, bind mounts and letter case cannot hide it."""
    try:
        mark, real = _identity(folder), Path(os.path.realpath(path))
    except FileNotFoundError:  # a current folder that has been removed
        return False
    return mark is not None and any(_identity(place) == mark for place in (real, *real.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:  # what is not there, or may not be looked at, is identical to nothing
        return None
    return found.st_dev, found.st_ino


def _mount_in(target: Path) -> Path | None:
    if target.is_dir() and os.path.ismount(target):
        return target
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux: a bind mount of the same file system is then noticed by the rename (EBUSY)
        return None
    for line in lines:
        raw = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split(b" ")[4])
        point = Path(os.fsdecode(raw))
        if point == target or target in point.parents:
            return point
    return None


def _refuse_occupied(out: Path, target: Path, force: bool) -> None:
    if not force and target.is_dir() and any(target.iterdir()):
        raise OutputError(f"{out}: is not empty; choose another --out, or give --force to replace all that is in it.")


def _require_space(out: Path, target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed_bytes and free < needed_bytes + _SPACE_MARGIN:
        raise OutputError(
            f"{out}: its file system has {human_bytes(free)} free, expected {human_bytes(needed_bytes)} and "
            f"{human_bytes(_SPACE_MARGIN)} to spare; free some space or choose another --out."
        )


# Parents


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    missing = [folder for folder in target.parents if not folder.exists()]  # the deepest first
    try:
        os.makedirs(target.parent, exist_ok=True)
        for folder in missing:
            _sync(folder.parent)
        yield
    except BaseException:
        with suppress(OSError):  # one that is no longer empty is someone else's by now
            for folder in missing:
                os.rmdir(folder)
        raise


# Into place, and away


def _place(staging: Staging, force: bool, old: Path) -> Literal["rename", "exchange", "two renames"]:
    out = staging.out
    if out.is_dir():
        os.chmod(staging.path, stat.S_IMODE(os.stat(out).st_mode))
    if not force or not out.is_dir() or not any(out.iterdir()):
        os.rename(staging.path, out)  # replaces an empty folder, and fails on any other
        return "rename"
    if _exchange(staging.path, out):
        return "exchange"
    os.rename(out, old)
    os.rename(staging.path, out)  # should this fail, or not be reached, _clear puts the old one back
    return "two renames"


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the C library, the kernel or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return hasattr(libc, "renamex_np") and bool(libc.renamex_np(*names, ctypes.c_uint(_EXCHANGE)) == 0)
    if not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE)) == 0)


@contextmanager
def _cleared(target: Path, token: str | None) -> Iterator[None]:
    """Have nothing left over beside target, neither before the block nor after it, however it ends."""
    owner = os.getpid()
    _clear(target, token)
    try:
        yield
    finally:
        if os.getpid() == owner:  # a forked worker that leaves through here must not tidy up after its parent
            with signals_held():
                _clear(target, token)


def _clear(target: Path, token: str | None) -> None:
    """Under the lock, put back an old folder whose successor never came, and remove every other leftover of target."""
    prefix = beside(target, "").name
    pattern = re.compile(re.escape(prefix) + rf"(staging|old)-({re.escape(token) if token else '[0-9]+-[0-9a-f]{8}'})")
    for name in sorted(os.listdir(target.parent)):  # "old" before "staging"
        path = target.parent / name
        match = pattern.fullmatch(name)
        if match is None or not stat.S_ISDIR(os.lstat(path).st_mode):
            continue
        if match[1] == "old" and not os.path.lexists(target):
            os.rename(path, target)
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            warnings.warn(f"{path}: leftover of {target}, not removed ({error}); remove it", WloraMergeWarning, 4)


def _sync_tree(folder: Path, mode: int) -> None:
    def fail(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, topdown=False, onerror=fail):
        for name in names:
            path = Path(place, name)
            found = os.lstat(path).st_mode
            if stat.S_ISREG(found):
                if stat.S_IMODE(found) != mode:
                    with suppress(PermissionError):  # a file system that has one mode for all its files
                        os.chmod(path, mode)
                _sync(path)
        _sync(Path(place))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: its fsync stops at the drive's own cache
        if full is not None:
            with suppress(OSError):  # not every file system has it; then the plain one below counts
                fcntl.fcntl(descriptor, full)
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in {errno.EINVAL, errno.ENOTSUP}):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


# Errors and signals


@contextmanager
def _output_errors(out: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not _about(target, error):
            raise
        raise OutputError(_sentence(out, target, error)) from error


def _about(target: Path, error: OSError) -> bool:
    """Whether an error is about the output: by its path, or, where it has none (a write), by its kind."""
    if not isinstance(error.filename, (str, bytes)):
        return error.errno in _FULL | {errno.EROFS}
    path = os.path.abspath(os.fsdecode(error.filename))
    return path.startswith(str(beside(target, ""))) or Path(path) in (target, *target.parents)


def _sentence(out: Path, target: Path, error: OSError) -> str:
    why = error.strerror or str(error)
    if error.errno in _FULL:
        place = next(folder for folder in target.parents if folder.exists())
        free = human_bytes(shutil.disk_usage(place).free)
        return f"{out}: {why} while it was written ({free} free now); free some space or choose another --out"
    if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR} and error.filename2 is not None:  # the rename's
        return f"{out}: {why}; something else was put there meanwhile and is left as it is; choose another --out"
    if error.errno == errno.EBUSY:
        return f"{out}: {why}, as for a mount point; use a folder inside it, as {Path(out) / 'export'}"
    return f"{out}: {why} ({error.filename or 'a file in it'}); choose an --out whose parent folder can be written to"
