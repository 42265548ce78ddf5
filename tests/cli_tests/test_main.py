"""The program: exit codes, and errors as one sentence."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run
from support.commands import zoo as zoo

from wlora_merge.cli.terminal import shown_log


def test_a_ctrl_c_during_the_imports_exits_130_without_a_traceback() -> None:
    code = (
        "import sys\nfrom wlora_merge.__main__ import main\n"
        "assert not {'click', 'wlora_merge.cli.main', 'importlib.metadata'} & set(sys.modules)\n"
        "class Stop:\n    def find_spec(self, name, *_):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Stopped.\n")


def test_bitsandbytes_is_quiet_at_the_command_line() -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with shown_log(quiet=False):
        assert not log.isEnabledFor(logging.WARNING)
    assert log.isEnabledFor(logging.WARNING)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", [("inspect",), ("inspect", "--json"), ("--help",)])
def test_a_full_stdout_is_one_sentence(zoo: tuple[Path, list[Path]], words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "wlora_merge", *words, *map(str, zoo[1] if "inspect" in words else [])]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: what there is to say cannot be written to stdout: No space left on device.\n"


def test_debug_keeps_the_traceback(tmp_path: Path) -> None:
    done = run("--debug", "verify", tmp_path)
    assert done.exit_code == 1
    assert not isinstance(done.exception, SystemExit)
