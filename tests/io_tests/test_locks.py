"""Of two runs to one folder one wins."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from support.staging import HOLD, child, killed, names, started

from wlora_merge.errors import OutputError, WloraMergeWarning
from wlora_merge.io import staging as room
from wlora_merge.io.staging import staged


def test_of_two_runs_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = child(HOLD, out)
    started(process)
    message = rf"out: another run \(process {process.pid}\) is writing to it; wait until it has ended"
    with pytest.raises(OutputError, match=message), staged(out):
        pass
    assert len(names(tmp_path)) == 2, "the winner's staging must not be touched"
    killed(process)
    with staged(out):
        pass


def test_many_runs_at_once_never_share_the_lock(tmp_path: Path) -> None:
    code = """
    wins, stop = 0, time.monotonic() + 1
    while time.monotonic() < stop + (0 if wins else 15):  # a busy machine may give a process no turn in a second
        try:
            with staged(out, force=True) as staging:
                os.mkdir(sys.argv[2])
                (staging.path / "file").touch()
                os.rmdir(sys.argv[2])
                wins += 1
        except OutputError as error:
            assert "another run" in str(error), error
    print(wins)
    """
    processes = [child(code, tmp_path / "out", tmp_path / "inside") for _ in range(3)]
    for process in processes:
        wins, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert int(wins) > 0
    assert names(tmp_path) == ["out"]


def test_without_file_locks_it_warns_and_keeps_the_leftovers_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(room.fcntl, "flock", refuse)
    (tmp_path / ".out.wlora-staging-1-00000000").mkdir()
    with pytest.warns(WloraMergeWarning, match="no file locks"), staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.wlora-staging-1-00000000", "out"]
