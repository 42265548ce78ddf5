"""DirectFile: the bytes that were written, with and without O_DIRECT."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from wlora_merge.io import direct_write as direct
from wlora_merge.io.direct_write import BUFFER_BYTES, DirectFile


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [1],
        [BUFFER_BYTES],
        [BUFFER_BYTES, 3],
        [7, BUFFER_BYTES - 7],
        [9, 2 * BUFFER_BYTES + 4095, 11],
        [5] * 1000,
    ],
)
@pytest.mark.parametrize("refusal", ["none", "open", "open and leave the file", "write"])
def test_the_file_holds_what_was_written(
    tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, sizes: list[int], refusal: str
) -> None:
    """Also where the file system refuses O_DIRECT: when the file is opened, or only when it is written."""
    real_open, real_write = os.open, os.write

    def refuse_open(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & direct.O_DIRECT:
            if "leave" in refusal:
                os.close(real_open(path, flags & ~direct.O_DIRECT, mode))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def refuse_write(fd: int, block: memoryview) -> int:
        if direct.fcntl.fcntl(fd, direct.fcntl.F_GETFL) & direct.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(fd, block)

    if refusal.startswith("open"):
        monkeypatch.setattr(direct.os, "open", refuse_open)
    if refusal == "write":
        monkeypatch.setattr(direct.os, "write", refuse_write)
    blocks = [Random(size).randbytes(size) for size in sizes]
    with DirectFile(tmp_path / "f", disk) as file:
        for block in blocks:
            scratch = bytearray(block)
            file.write(memoryview(scratch))
            scratch[:] = bytes(len(scratch))  # the caller's buffer is its own again
    assert (tmp_path / "f").read_bytes() == b"".join(blocks)


def test_an_existing_file_is_never_opened(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "f", disk)
    assert (tmp_path / "f").read_bytes() == b"mine"


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_the_error_of_any_write_reaches_the_caller(
    tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = os.write, [0]

    def full(fd: int, block: memoryview) -> int:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, block)

    monkeypatch.setattr(direct.os, "write", full)
    with (
        pytest.raises(OSError, match="No space left on device"),
        DirectFile(tmp_path / "f", disk) as file,
    ):
        file.write(memoryview(bytes(2 * BUFFER_BYTES + 5)))


def test_the_callers_own_error_is_the_one_that_is_seen(
    tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, block: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail() -> None:
        with DirectFile(tmp_path / "f", disk) as file:
            file.write(memoryview(bytes(BUFFER_BYTES)))
            raise KeyError

    monkeypatch.setattr(direct.os, "write", full)
    with pytest.raises(KeyError):
        fail()
