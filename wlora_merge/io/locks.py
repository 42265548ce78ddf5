"""Locks beside an output, so that of two runs that write the same one wins and the other says so at once.

A lock is a file `.NAME.wlora-lock` held by flock: the kernel lets go of it when its process ends, however that happens. Where a file
system has no locks, two runs at once are not told apart.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError, WloraMergeWarning


def beside(target: Path, what: str) -> Path:
    """The name of something temporary that stands beside `target`."""
    name = target.name
    if len(os.fsencode(name)) > 180:  # a file name holds 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.parent / f".{name}.wlora-{what}"


@contextmanager
def locked(out: Path, target: Path) -> Iterator[bool]:
    """Hold the lock of `target` until the block ends; gives whether the file system has locks at all.

    Raises:
        OutputError: another run holds it; the message names `out` and that process.
    """
    path = beside(target, "lock")
    descriptor, sure = _acquire(path, out)
    owner = os.getpid()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(owner).encode(), 0)  # for the other run's message; nothing depends on it
        yield sure
    finally:
        if os.getpid() == owner:
            path.unlink(missing_ok=True)  # still locked: who opened this file before finds it gone, and tries again
        os.close(descriptor)


def _acquire(path: Path, out: Path) -> tuple[int, bool]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor, True
        except BlockingIOError as error:
            pid = os.pread(descriptor, 20, 0).decode("ascii", "replace") or "unknown"
            os.close(descriptor)
            raise OutputError(
                f"{out}: another run (process {pid}) is writing to it; wait until it has ended or choose another --out."
            ) from error
        except OSError as error:
            warnings.warn(f"{path.parent}: no file locks ({error.strerror}); start no second run", WloraMergeWarning, 4)
            return descriptor, False
        os.close(descriptor)  # locked a file that its last owner had just removed
