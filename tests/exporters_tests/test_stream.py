"""The weight files of an export: new files alone, and errors of the disk that reach the caller."""

from __future__ import annotations

import errno
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.cards import mixture

from wlora_merge.errors import OutputError, WloraMergeError
from wlora_merge.exporters import stream
from wlora_merge.exporters.dense import OutputFile, plan
from wlora_merge.models.base_model import open_base

BLOCKS = 3
"""Blocks of weights that a file of these tests has."""


@pytest.fixture
def file(tmp_path: Path) -> OutputFile:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    numbers = torch.arange(BLOCKS * stream.BLOCK_BYTES // 4, dtype=torch.float32)
    save_file({"w": numbers}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (found,) = plan(open_base(tmp_path / "base"), [], {})
    return found


class FullDisk(FileIO):
    """A file on a disk that is full from its write of number `at` on, counted from one."""

    at = 0
    calls = 0

    def write(self, block: Any) -> int:
        self.calls += 1
        if self.calls >= self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(block)


def test_a_file_that_exists_is_not_opened(file: OutputFile, tmp_path: Path) -> None:
    (tmp_path / file.name).write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"cannot be written \(File exists\)"):
        stream.write_files([file], tmp_path, mixture())
    assert (tmp_path / file.name).read_bytes() == b"mine"


def test_a_file_of_several_blocks_has_the_bytes_of_the_base(file: OutputFile, tmp_path: Path) -> None:
    stream.write_files([file], tmp_path, mixture())
    assert (tmp_path / file.name).read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("at", range(1, BLOCKS + 2))
def test_the_error_of_any_write_reaches_the_caller(
    file: OutputFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(FullDisk, "at", at)
    monkeypatch.setattr(stream, "open", FullDisk, raising=False)
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written \(No space left on device\)"):
        stream.write_files([file], tmp_path, mixture())


def test_the_error_of_an_input_is_the_one_that_is_seen(file: OutputFile, tmp_path: Path) -> None:
    (tmp_path / "base" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(WloraMergeError, match=r"model\.safetensors: changed meanwhile"):
        stream.write_files([file], tmp_path, mixture())
