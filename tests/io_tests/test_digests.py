"""Digests against hashlib's own, and a memory that may forget but must never be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT

from wlora_merge.errors import WloraMergeError
from wlora_merge.io import digests as room
from wlora_merge.io.digests import path_of, sha256_file, sha256_files


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def aged(path: Path, data: bytes, seconds: int = 60) -> Path:
    """A file that was last written some time ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    then = time.time_ns() - seconds * 10**9
    os.utime(path, ns=(then, then))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WLORA_MERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests.jsonl"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose bytes were read."""
    seen: list[str] = []
    hashed = room._hash
    monkeypatch.setattr(room, "_hash", lambda path, *rest: (seen.append(Path(path).name), hashed(path, *rest))[1])
    return seen


# The memory


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 7])
def test_the_digest_is_that_of_hashlib(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    assert sha256_file(aged(tmp_path / "file", data)) == sha(data)


def test_a_known_file_is_not_read_again(tmp_path: Path, read: list[str]) -> None:
    file = aged(tmp_path / "file", b"abc")
    assert sha256_file(file) == sha256_file(file) == sha(b"abc")
    assert read == ["file"]
    assert sha256_file(file, fresh=True) == sha(b"abc")
    assert read == ["file", "file"]


def test_a_known_file_is_known_by_another_process_and_through_a_link(tmp_path: Path, read: list[str]) -> None:
    file = aged(tmp_path / "file", b"abc")
    code = "import sys; from pathlib import Path; from wlora_merge.io.digests import *; print(sha256_file(Path(sys.argv[1])))"
    out = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True, check=True)
    (tmp_path / "link").symlink_to("file")
    assert out.stdout.strip() == sha256_file(tmp_path / "link") == sha(b"abc")
    assert read == []


def test_a_changed_file_is_read_again_even_if_size_and_mtime_are_the_same(tmp_path: Path) -> None:
    file = aged(tmp_path / "file", b"abc")
    assert sha256_file(file) == sha(b"abc")
    before = file.stat()
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert sha256_file(file) == sha(b"abd")
    aged(tmp_path / "other", b"xyz")
    os.replace(tmp_path / "other", file)
    assert sha256_file(file) == sha(b"xyz")


@pytest.mark.parametrize("seconds", [0, -60])
def test_a_file_that_was_just_written_or_comes_from_the_future_is_not_remembered(
    tmp_path: Path, cache: Path, read: list[str], seconds: int
) -> None:
    file = aged(tmp_path / "file", b"abc", seconds)
    assert sha256_file(file) == sha256_file(file) == sha(b"abc")
    assert read == ["file", "file"]
    assert not cache.exists()


def test_names_that_are_not_utf8_are_remembered(tmp_path: Path, read: list[str]) -> None:
    file = aged(tmp_path / os.fsdecode(b"caf\xe9 \n"), b"abc")
    assert sha256_file(file) == sha256_file(file) == sha(b"abc")
    assert len(read) == 1
    assert path_of(sha(b"abc")) == file


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = aged(tmp_path / "file", b"abc")
    hashed = room._hash
    monkeypatch.setattr(room, "_hash", lambda path, *rest: (hashed(path, *rest), os.truncate(path, 1))[0])
    with pytest.raises(WloraMergeError, match=r"file: changed while it was read \(3 bytes before, 1 after\)"):
        sha256_file(file)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WloraMergeError, match=r"missing: cannot be read \(No such file"):
        sha256_file(tmp_path / "missing")
    with pytest.raises(WloraMergeError, match="cannot be read"):
        sha256_file(tmp_path)


def test_a_cache_of_which_every_byte_was_damaged_gives_misses_and_never_a_wrong_digest(
    tmp_path: Path, cache: Path
) -> None:
    file = aged(tmp_path / "file", b"abc")
    sha256_file(file)
    sound = cache.read_bytes()
    seen = room._seen(str(file))
    assert room._recall(str(file), seen) == sha(b"abc")
    for place in range(len(sound)):
        damaged = sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :]
        cache.write_bytes(damaged)
        assert room._recall(str(file), seen) in (None, sha(b"abc"))
        cache.write_bytes(sound[:place])
        assert room._recall(str(file), seen) in (None, sha(b"abc"))


@pytest.mark.parametrize("text", ["null", "[%s]", "1 %s", '{"path": %s}', "%s"])
def test_a_line_that_is_sound_but_not_a_record_is_passed_over(tmp_path: Path, cache: Path, text: str) -> None:
    file = aged(tmp_path / "file", b"abc")
    cache.parent.mkdir()
    line = text.replace("%s", json.dumps(str(file))).encode()
    cache.write_bytes(room._checksum(line) + b" " + line + b"\n")
    assert sha256_file(file) == sha(b"abc")


def test_a_half_written_line_costs_only_itself(tmp_path: Path, cache: Path, read: list[str]) -> None:
    one, two = aged(tmp_path / "one", b"1"), aged(tmp_path / "two", b"2")
    sha256_file(one)
    cache.write_bytes(cache.read_bytes()[:-20])
    sha256_file(two)
    sha256_files([one, two])
    assert sorted(read) == ["one", "one", "two"]


@pytest.mark.parametrize("kind", ["file instead of the folder", "folder instead of the file", "read only"])
def test_a_cache_folder_that_cannot_be_used_is_no_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "file instead of the folder":
        cache.parent.write_text("x")
    elif kind == "folder instead of the file":
        cache.mkdir(parents=True)
    else:
        monkeypatch.setenv("WLORA_MERGE_CACHE", "/proc/self/cache")
    file = aged(tmp_path / "file", b"abc")
    assert sha256_file(file) == sha256_file(file) == sha(b"abc")
    assert path_of(sha(b"abc")) is None


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WLORA_MERGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert room._cache_file() == tmp_path / "xdg" / "wlora_merge" / "digests.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert room._cache_file() == tmp_path / ".cache" / "wlora_merge" / "digests.jsonl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert room._cache_file() == tmp_path / ".cache" / "wlora_merge" / "digests.jsonl"


def test_several_processes_may_write_the_cache_at_once(tmp_path: Path, cache: Path) -> None:
    code = """
import sys; from pathlib import Path; from wlora_merge.io.digests import *
for file in sorted(Path(sys.argv[1]).iterdir()): sha256_file(file)
"""
    for writer in range(3):
        for number in range(60):
            aged(tmp_path / f"w{writer}" / str(number), f"{writer} {number}".encode())
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, tmp_path / f"w{writer}"], cwd=ROOT) for writer in range(3)]
    assert [process.wait(timeout=30) for process in processes] == [0, 0, 0]
    for writer in range(3):
        for number in range(60):
            assert path_of(sha(f"{writer} {number}".encode())) == tmp_path / f"w{writer}" / str(number)
    assert cache.stat().st_mode & 0o077 == 0


def test_the_cache_stays_bounded_and_keeps_the_newest(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_CACHE_BYTES", 4000)
    for number in range(60):
        sha256_file(aged(tmp_path / str(number), str(number).encode()))
        assert cache.stat().st_size < 5000
    assert path_of(sha(b"59")) == tmp_path / "59"
    assert path_of(sha(b"0")) is None
    assert os.listdir(cache.parent) == ["digests.jsonl"]


# The hub cache


def hub_file(tmp_path: Path, digest: str, repo: str = "models--org--name") -> Path:
    aged(tmp_path / "hub" / repo / "blobs" / digest, b"content")
    link = tmp_path / "hub" / repo / "snapshots" / "rev" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"../../blobs/{digest}")
    return link


def test_a_hub_blob_says_its_digest_and_is_not_read(tmp_path: Path, read: list[str]) -> None:
    link = hub_file(tmp_path, "a" * 64)
    assert sha256_file(link) == "a" * 64
    assert read == []
    assert path_of("a" * 64) == link


def test_a_fresh_digest_of_a_hub_blob_is_that_of_its_bytes_and_is_believed_from_then_on(tmp_path: Path) -> None:
    link = hub_file(tmp_path, "a" * 64)
    assert sha256_file(link, fresh=True) == sha(b"content")
    assert sha256_file(link) == sha(b"content")


@pytest.mark.parametrize(("digest", "repo"), [("b" * 40, "models--o--n"), ("b" * 64, "my"), ("B" * 64, "models--o--n")])
def test_a_name_that_only_looks_like_a_hub_blob_is_not_believed(tmp_path: Path, digest: str, repo: str) -> None:
    assert sha256_file(hub_file(tmp_path, digest, repo)) == sha(b"content")


# Several files, and the way back


def test_several_files_are_hashed_once_each_and_in_order(tmp_path: Path, read: list[str]) -> None:
    files = [aged(tmp_path / str(number), bytes([number]) * 100_000) for number in range(20)]
    found = sha256_files([*files, files[0]])
    assert list(found) == files
    assert list(found.values()) == [sha(bytes([number]) * 100_000) for number in range(20)]
    assert len(read) == 20
    assert sha256_files([]) == {}


def test_one_bad_file_among_several_is_named_and_the_others_are_not_waited_for(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(64 << 30)  # a hole; half a minute to hash
    start = time.monotonic()
    with pytest.raises(WloraMergeError, match="missing: cannot be read"):
        sha256_files([tmp_path / "missing", large])
    assert time.monotonic() - start < 5


def test_the_path_of_a_digest_is_forgotten_when_the_file_changes(tmp_path: Path) -> None:
    one, two = aged(tmp_path / "one", b"abc"), aged(tmp_path / "two", b"abc")
    assert path_of(sha(b"abc")) is None
    sha256_files([one])
    sha256_files([two])
    assert path_of(sha(b"abc")) == two
    two.unlink()
    assert path_of(sha(b"abc")) == one
    one.write_bytes(b"abd")
    assert path_of(sha(b"abc")) is None
