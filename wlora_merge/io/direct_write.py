"""A new file, written past the page cache.

What is written through the page cache is copied into fresh pages and flushed from there later. Both cost the processor more
than the fold's own reading and rounding. They push out of memory what others keep there. So the bytes are gathered in two
aligned buffers; while one goes to the disk, the other fills. Where a file system takes no O_DIRECT (or the system has none)
the same writes go through the page cache.

What it brings, on two quiet cores (2026-11-30): the dense export of 1.1 B parameters took 1.06 times what another version of this
package took beside it, and 1.24 times with plain writes. Where other programs shared the cores the two were alike.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Executor, Future, wait
from pathlib import Path

O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux and the BSDs
BUFFER_BYTES = 4 << 20  # a multiple of any sector or page


class DirectFile:
    """A file that must not exist yet, open for writing from its start to its end; on disk when the block is left.

    Args:
        path: the file to make.
        disk: who runs the writes while the caller goes on.
    """

    def __init__(self, path: Path, disk: Executor) -> None:
        self._disk = disk
        self._fd = _create(path)
        self._buffers = [mmap.mmap(-1, BUFFER_BYTES), mmap.mmap(-1, BUFFER_BYTES)]
        self._filled = 0
        self._running: Future[None] | None = None

    def write(self, block: memoryview) -> None:
        """Append bytes; `block` may be used again at once. Raises OSError, perhaps that of an earlier write."""
        while block:
            part = block[: BUFFER_BYTES - self._filled]
            self._buffers[0][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            block = block[len(part) :]
            if self._filled == BUFFER_BYTES:
                self._wait()
                self._running = self._disk.submit(_write_all, self._fd, memoryview(self._buffers[0]))
                self._buffers.reverse()
                self._filled = 0

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._wait()
                _use_cache(self._fd)  # what is left is no whole number of sectors
                _write_all(self._fd, memoryview(self._buffers[0])[: self._filled])
                os.fsync(self._fd)
        finally:
            if self._running is not None:
                wait([self._running])
            os.close(self._fd)


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some file systems make the file before they refuse
    return os.open(path, flags, 0o666)


def _use_cache(fd: int) -> bool:
    """Write through the page cache from here on; False where that is so already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~O_DIRECT)
    return True


def _write_all(fd: int, block: memoryview) -> None:
    while block:
        try:
            block = block[os.write(fd, block) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _use_cache(fd):  # an alignment that this disk does not take
                raise
