"""Sealed files of the cache folder: read back whole or not at all, bounded, and safe between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wlora_merge.io import cache as room
from wlora_merge.io.cache import cache_folder, read_sealed, remove_sealed, sealed_files, write_sealed

WRITER = """
import sys
from wlora_merge.io.cache import read_sealed, write_sealed
sizes = {}
for i in range(200):
    write_sealed("kind", "name", sys.argv[1].encode() * (1000 + i))
    got = read_sealed("kind", "name")
    assert got is not None and len({*got}) == 1, got
print("done")
"""


def test_what_is_written_is_read_and_what_is_not_there_is_none() -> None:
    assert read_sealed("kind", "name") is None
    write_sealed("kind", "name", b"content")
    assert read_sealed("kind", "name") == b"content"
    assert read_sealed("other", "name") is None
    write_sealed("kind", "name", b"")
    assert read_sealed("kind", "name") == b""


def test_processes_that_write_one_name_at_once_never_see_half_a_file() -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, letter], stdout=subprocess.PIPE, text=True) for letter in "abc"
    ]
    assert [process.communicate()[0].strip() for process in running] == ["done"] * 3
    folder = cache_folder()
    assert folder is not None
    assert [path.name for path in (folder / "kind").iterdir()] == ["name.sealed"]


def test_a_file_and_its_folder_are_the_users_alone() -> None:
    write_sealed("kind", "name", b"content")
    (file,) = sealed_files("kind")
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("length", [0, 1, 30, 64, 65, 70])
def test_a_file_that_is_cut_short_is_listed_and_not_read(length: int) -> None:
    write_sealed("kind", "name", b"content")
    (file,) = sealed_files("kind")
    file.path.write_bytes(file.path.read_bytes()[:length])
    assert read_sealed("kind", "name") is None
    assert [found.content for found in sealed_files("kind")] == [None]


def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_not_read() -> None:
    write_sealed("kind", "name", b"content")
    (file,) = sealed_files("kind")
    file.path.unlink()
    os.mkfifo(file.path)
    assert read_sealed("kind", "name") is None
    file.path.unlink()
    file.path.mkdir()
    assert read_sealed("kind", "name") is None
    write_sealed("kind", "name", b"content")  # cannot, and is no error


def test_a_folder_that_is_a_link_is_no_cache(tmp_path: Path) -> None:
    write_sealed("kind", "name", b"content")
    folder = cache_folder()
    assert folder is not None
    (folder / "kind").rename(tmp_path / "elsewhere")
    (folder / "kind").symlink_to(tmp_path / "elsewhere")
    assert read_sealed("kind", "name") is None
    write_sealed("kind", "other", b"content")
    assert not (tmp_path / "elsewhere" / "other.sealed").exists()


def test_the_files_used_longest_ago_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_BYTES", 3 * 165)
    for i, name in enumerate("abc"):
        write_sealed("kind", name, bytes(100))
        file = next(found.path for found in sealed_files("kind") if found.path.name == f"{name}.sealed")
        os.utime(file, (1000 + i, 1000 + i))
    assert read_sealed("kind", "a") is not None  # is used now
    write_sealed("kind", "d", bytes(100))
    assert sorted(found.path.name[0] for found in sealed_files("kind")) == ["a", "c", "d"]


def test_what_is_too_long_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_FILE_BYTES", 10)
    write_sealed("kind", "name", bytes(11))
    assert read_sealed("kind", "name") is None


def test_removing_takes_what_a_killed_writer_left() -> None:
    for name in "ab":
        write_sealed("kind", name, b"content")
    folder = cache_folder()
    assert folder is not None
    (folder / "kind" / ".new-left").write_bytes(b"half")
    remove_sealed("kind", "a")
    assert [found.path.name for found in sealed_files("kind")] == ["b.sealed"]
    remove_sealed("kind")
    assert list((folder / "kind").iterdir()) == []


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WLORA_MERGE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("WLORA_MERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "wlora_merge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "wlora_merge"
