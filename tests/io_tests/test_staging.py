"""All or nothing: what ``out`` holds after every way in which a run can end."""

from __future__ import annotations

import errno
import os
import random
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.staging import GENERATIONS, HOLD, ROUNDS, child, killed, names, old_content, started
from support.staging import tmpfs as tmpfs

from wlora_merge.errors import OutputError, WloraMergeWarning
from wlora_merge.io import staging as room
from wlora_merge.io.staging import staged

# How a run ends well


def test_a_clean_exit_puts_the_folder_in_place_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as staging:
        assert staging.path.parent == tmp_path
        assert staging.path.name.startswith(".out.wlora-staging-")
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "file").write_text("new")
        assert not out.exists()
        assert staging.swap is None
    assert staging.swap == "rename"
    assert (out / "sub" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_new_folder_has_ordinary_permissions_and_a_replaced_one_keeps_its_own(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "new"):
            pass
        (tmp_path / "private").mkdir(0o700)
        with staged(tmp_path / "private"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700


def test_an_empty_folder_is_replaced_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as staging:
        (staging.path / "file").touch()
    assert staging.swap == "rename"
    assert names(tmp_path / "out") == ["file"]


def test_force_exchanges_old_and_new_in_one_step(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("RENAME_EXCHANGE is promised on Linux")
    out = old_content(tmp_path / "out")
    with staged(out, force=True) as staging:
        (staging.path / "new").touch()
        assert names(out) == ["old"]
    assert staging.swap == "exchange"
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_force_takes_two_renames_where_the_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_exchange", lambda one, other: False)
    out = old_content(tmp_path / "out")
    with staged(out, force=True) as staging:
        (staging.path / "new").touch()
    assert staging.swap == "two renames"
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_exchange_that_the_system_refuses_changes_nothing(tmp_path: Path) -> None:
    old_content(tmp_path / "one")
    assert room._exchange(tmp_path / "one", tmp_path / "missing") is False
    assert names(tmp_path) == ["one"]


def test_a_link_to_a_folder_is_followed_and_kept(tmp_path: Path) -> None:
    real = old_content(tmp_path / "real")
    (tmp_path / "latest").symlink_to("real")
    with staged(tmp_path / "latest", force=True) as staging:
        (staging.path / "new").touch()
    assert (tmp_path / "latest").is_symlink()
    assert names(real) == ["new"]
    assert names(tmp_path) == ["latest", "real"]


def test_a_dangling_link_leads_to_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "latest").symlink_to("store/run")
    with staged(tmp_path / "latest"):
        pass
    assert (tmp_path / "store" / "run").is_dir()
    assert (tmp_path / "latest").is_symlink()


def test_missing_parents_are_made_and_go_again_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged(tmp_path / "a" / "b" / "out"):
        raise KeyError("a bug")
    assert names(tmp_path) == []
    with staged(tmp_path / "a" / "b" / "out"):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_a_name_near_the_limit_of_the_file_system_works(tmp_path: Path) -> None:
    with staged(tmp_path / ("x" * 255)):
        pass
    assert names(tmp_path) == ["x" * 255]


def test_files_and_folders_are_flushed_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = room._sync, os.rename
    monkeypatch.setattr(room, "_sync", lambda path: (events.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), rename(a, b)))
    with staged(tmp_path / "out") as staging:
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "file").touch()
    expected = ["sync file", "sync sub", f"sync {staging.path.name}", "rename out", f"sync {tmp_path.name}"]
    assert events == expected


def test_a_parent_that_was_made_is_flushed_with_the_folder_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    sync = room._sync
    monkeypatch.setattr(room, "_sync", lambda path: (flushed.append(path), sync(path)))
    with staged(tmp_path / "a" / "b" / "out"):
        assert {tmp_path, tmp_path / "a"} <= set(flushed)


# How a run ends badly


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
@pytest.mark.parametrize("force", [False, True])
def test_after_any_exception_out_is_as_before_and_the_exception_goes_on(
    tmp_path: Path, error: BaseException, force: bool
) -> None:
    out = old_content(tmp_path / "out") if force else tmp_path / "out"

    def fail() -> None:
        with staged(out, force=force) as staging:
            (staging.path / "file").write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert names(tmp_path) == (["out"] if force else [])
    assert not force or (out / "old").read_text() == "old"


def test_a_check_that_fails_keeps_out_as_it_was(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        raise OutputError(f"{sorted(os.listdir(folder))} is not right")

    with pytest.raises(OutputError, match=r"\['file'\] is not right"), staged(tmp_path / "out", check=check) as staging:
        (staging.path / "file").touch()
    assert names(tmp_path) == []


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_exchange", lambda one, other: False)
    out, rename = old_content(tmp_path / "out"), os.rename

    def fail_into_place(source: Path, target: Path) -> None:
        if "staging" in Path(source).name:
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(OutputError, match="Input/output error"), staged(out, force=True):
        pass
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_what_appears_at_out_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="something else was put there"), staged(out):
        old_content(out)
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmpfs: Path) -> None:
    old_content(tmpfs / "out")
    with (
        pytest.raises(OutputError, match=r"out: No space left on device while .* free now\); free some space") as error,
        staged(tmpfs / "out", force=True) as staging,
    ):
        (staging.path / "file").write_bytes(bytes(2 << 20))
    assert isinstance(error.value.__cause__, OSError)
    assert names(tmpfs) == ["out"]
    assert names(tmpfs / "out") == ["old"]


def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OutputError, match="File too large"), staged(tmp_path / "out") as staging:
            (staging.path / "file").write_bytes(bytes(1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"free, expected 1125\.9 TB and 16\.8 MB to spare"):
        staged(tmp_path / "deep" / "out", needed_bytes=1 << 50).__enter__()
    assert names(tmp_path) == []


def test_the_space_that_must_be_to_spare_is_counted_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = (1 << 30) - room._SPACE_MARGIN
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(OutputError, match="to spare"):
        staged(tmp_path / "out", needed_bytes=enough + 1).__enter__()
    with staged(tmp_path / "out", needed_bytes=enough):
        pass
    assert names(tmp_path) == ["out"]


def test_an_error_in_reading_an_input_is_not_called_one_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out"):
        (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="No such file"), staged(tmp_path / "out") as staging:
        (staging.path / "missing" / "file").touch()
    assert names(tmp_path) == []


def test_a_parent_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"File exists \(.*/file\)"), staged(tmp_path / "file" / "out"):
        pass
    if not os.path.isdir("/proc/self"):
        pytest.skip("no folder here that even root cannot write to")
    with pytest.raises(OutputError, match=r"/proc/self/out: .* parent folder can be written to"):
        staged(Path("/proc/self/out")).__enter__()


def test_a_leftover_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_content(tmp_path / "out")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(room.shutil, "rmtree", refuse)
    with pytest.warns(WloraMergeWarning, match="leftover of .* not removed"), staged(out, force=True) as staging:
        (staging.path / "new").touch()
    assert names(out) == ["new"]


# Killed


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = child(HOLD, out)
    started(process)
    killed(process)
    assert len(names(tmp_path)) == 2  # its staging folder and its lock file
    (tmp_path / ".out2.wlora-staging-1-00000000").mkdir()  # another output's
    with staged(out):
        assert len(names(tmp_path)) == 3
    assert names(tmp_path) == [".out2.wlora-staging-1-00000000", "out"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_content(tmp_path / ".out.wlora-old-1-00000000")
    with pytest.raises(OutputError, match="is not empty"), staged(out):
        pass
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old"]


# replaces out once per step of a run, and kills that run at that step: Python's audit events are its system calls
EVERY_STEP = """
import itertools, signal
def run(step):
    count = itertools.count(1)
    def kill(event, arguments):
        if event.startswith(("os.", "open", "shutil.", "fcntl.", "ctypes.")) and next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(kill)
    with staged(out, force=True) as staging:
        for part in range(3):
            (staging.path / str(part)).write_text("new")
def content():
    return [(out / str(part)).read_text() for part in range(3)] if out.exists() else []
def tidied():
    try:
        with staged(out, force=True):
            raise KeyError
    except KeyError:
        assert os.listdir(out.parent) == ["out"], os.listdir(out.parent)
for step in itertools.count(1):
    with staged(out, force=True) as staging:
        for part in range(3):
            (staging.path / str(part)).write_text("old")
    if not (pid := os.fork()):
        run(step)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
    found = content()
    tidied()
    assert found in (content(), []) and content() in (["old"] * 3, ["new"] * 3), (step, found, content())
    print(step, found[0] if found else "absent", content()[0])
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_every_step_leaves_the_old_folder_or_the_new_one(tmp_path: Path, exchange: bool) -> None:
    before = "" if exchange else "room._exchange = lambda one, other: False\n"
    output, errors = (process := child(EVERY_STEP, tmp_path / "out", before=before)).communicate(timeout=60)
    assert process.returncode == 0, errors
    seen = [line.split()[1:] for line in output.splitlines()]
    assert len(seen) > 20
    assert (["absent", "old"] in seen) is not exchange, "only two renames leave a gap, and the next run mends it"
    assert ["old", "old"] in seen
    assert ["new", "new"] in seen
    print(f"{len(seen)} steps killed at, 0 lost anything")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_moment_leaves_one_whole_generation(tmp_path: Path, exchange: bool) -> None:
    """WLORA_MERGE_TRUST_ROUNDS sets the number of kills; prints what each way of swapping saw."""
    out, seed = tmp_path / "out", random.Random(7)
    before = "" if exchange else "room._exchange = lambda one, other: False\n"
    absent = leftovers = 0
    for number in range(ROUNDS):
        process = child(GENERATIONS, out, number * 10**6, before=before)
        started(process)
        time.sleep(seed.uniform(0, 0.05))
        killed(process)
        if not out.exists():
            assert not exchange, "an exchange never leaves a gap"
            absent += 1
            with pytest.raises(OutputError, match="is not empty"), staged(out):  # restores before it refuses
                pass
        leftovers += len(names(tmp_path)) > 1
        contents = {(out / str(part)).read_text() for part in range(5)}
        assert len(contents) == 1, f"round {number}: a mixture of generations"
        assert int(contents.pop()[: len(str(number * 10**6))]) >= number
        with pytest.raises(KeyError), staged(out, force=True):
            raise KeyError
        assert names(tmp_path) == ["out"], f"round {number}: leftovers"
    print(f"{ROUNDS} kills: {leftovers} left something to clear, {absent} left a gap that was mended, 0 lost anything")


# Two at once


def test_a_forked_worker_that_leaves_the_block_does_not_tidy_up_after_its_parent(tmp_path: Path) -> None:
    code = """
    with staged(out) as staging:
        if os.fork() == 0:
            raise SystemExit(0)
        os.wait()
        (staging.path / "file").touch()
        assert len(os.listdir(out.parent)) == 2
    """
    process = child(code, tmp_path / "out")
    assert process.communicate(timeout=20)[1] == ""
    assert names(tmp_path / "out") == ["file"]


# What is refused


def test_a_folder_that_is_not_empty_needs_force(tmp_path: Path) -> None:
    out = old_content(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out: is not empty; .* --force"), staged(out):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"), staged(tmp_path / "out", force=force):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_a_mount_point_and_a_folder_that_holds_one_are_refused(tmpfs: Path) -> None:
    with pytest.raises(OutputError, match=r"is a mount point, .* use one inside, as .*/disk/export"), staged(tmpfs):
        pass
    with pytest.raises(OutputError, match="holds the mount point"), staged(tmpfs.parent, force=True):
        pass
    with staged(tmpfs / "export"):
        pass
    assert names(tmpfs) == ["export"]


def test_a_bind_mount_of_the_same_file_system_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a place with spaces"
    target.mkdir()
    (tmp_path / "source").mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "source", target], capture_output=True).returncode:
        pytest.skip("a bind mount is refused here")
    try:
        with pytest.raises(OutputError, match="is a mount point"), staged(target):
            pass
    finally:
        subprocess.run(["umount", target], check=True)


def test_the_current_folder_the_home_folder_and_what_holds_them_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for out in (".", "..", tmp_path, "/"):
        with pytest.raises(OutputError, match="is or holds the current folder"), staged(Path(out), force=True):
            pass
    with pytest.raises(OutputError, match="is or holds your home folder"), staged(tmp_path / "home", force=True):
        pass
    with staged(Path("out")):
        pass
    assert names(tmp_path / "work" / "here") == ["out"]


def test_a_removed_current_folder_does_not_matter_to_an_absolute_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with staged(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="out"), staged(Path("out")):
        pass


@pytest.mark.parametrize("out", ["base", "base/inner/out", "link", "link/out"])
def test_an_out_in_an_input_is_refused_through_links_too(tmp_path: Path, out: str) -> None:
    base = tmp_path / "base"
    (base / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(OutputError, match=r"in \(or is\) the input"), staged(tmp_path / out, force=True, inputs=[base]):
        pass
    assert names(base) == ["inner"]


def test_an_out_that_holds_an_input_is_refused_through_links_too(tmp_path: Path) -> None:
    out, base, hub = tmp_path / "out", tmp_path / "out" / "base", tmp_path / "snapshot"
    base.mkdir(parents=True)
    hub.mkdir()
    (base / "blob").touch()
    (hub / "model.safetensors").symlink_to("../out/base/blob")
    (tmp_path / "link").symlink_to("out/base")
    for source in (base, base / "blob", tmp_path / "link", hub):
        with pytest.raises(OutputError, match="holds the input"), staged(out, force=True, inputs=[source]):
            pass
    assert names(base) == ["blob"]


def test_inputs_beside_out_or_missing_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out-base").mkdir()
    with staged(tmp_path / "out", inputs=[tmp_path / "out-base", tmp_path / "missing"]):
        pass
    assert names(tmp_path) == ["out", "out-base"]


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OutputError, match="out"), staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_has_the_ordinary_permissions_whatever_wrote_it(tmp_path: Path, umask: int) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        with staged(tmp_path / "out") as staging:
            (staging.path / "inner").mkdir()
            save_file(
                {"x": torch.ones(1)}, staging.path / "inner" / "x.safetensors"
            )  # which makes files for their owner alone
            (staging.path / "plain").write_text("x")
            (staging.path / "program").touch(0o777)
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}
