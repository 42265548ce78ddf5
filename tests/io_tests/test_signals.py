"""Signals that end a run unwind it, and wait while it tidies up."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.staging import HOLD, child, killed, names, old_content, started

from wlora_merge.io.signals import terminate_as_exit


def test_sigterm_cleans_up_and_exits_with_143(tmp_path: Path) -> None:
    out = old_content(tmp_path / "out")
    process = child(HOLD, out)
    started(process)
    assert killed(process, signal.SIGTERM) == 143
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old"]


def test_signals_that_follow_each_other_do_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    slow = "import shutil; rmtree = shutil.rmtree\n"
    slow += "def wait(path): print('clearing', flush=True); time.sleep(0.3); rmtree(path)\nshutil.rmtree = wait\n"
    process = child(HOLD, tmp_path / "out", before=slow)
    started(process)
    process.send_signal(signal.SIGINT)
    started(process)
    assert killed(process, signal.SIGTERM) == 143
    assert names(tmp_path) == []


def test_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, terminate_as_exit():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
