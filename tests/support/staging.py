"""Programs that stage folders, started, stopped and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

ROUNDS = int(os.environ.get("WLORA_MERGE_TRUST_ROUNDS", "12"))


PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from wlora_merge.io import staging as room
from wlora_merge.errors import OutputError
from wlora_merge.io.signals import terminate_as_exit
from wlora_merge.io.staging import staged
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
out = Path(sys.argv[1])
"""


# replaces out by generation after generation, each in five files that must agree
GENERATIONS = """
for generation in range(int(sys.argv[2]), 10**9):
    with staged(out, force=True) as staging:
        for part in range(5):
            (staging.path / str(part)).write_text(str(generation) * 200)
    print("placed", flush=True)
"""


HOLD = """
with terminate_as_exit(), staged(out, force=True) as staging:
    (staging.path / "half").write_text("half")
    print("staged", flush=True)
    time.sleep(60)
"""


def child(code: str, *args: object, before: str = "") -> subprocess.Popen[str]:
    program = textwrap.dedent(PRELUDE) + before + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def started(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]


def killed(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> int:
    process.send_signal(number)
    process.communicate(timeout=20)
    return process.returncode


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def old_content(out: Path) -> Path:
    out.mkdir()
    (out / "old").write_text("old")
    return out


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
