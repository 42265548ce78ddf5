"""What long work tells of itself, and how it looks at a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from wlora_merge.cli.main import main
from wlora_merge.cli.terminal import amount_of
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.progress import Done, Meter, listening


def test_threads_add_up_and_nobody_hears_what_came_before_or_after() -> None:
    told: list[Done] = []
    silent = Meter("before", 10)
    with listening(told.append):
        meter = Meter("work", 300, 100)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: meter.add(3, 1), range(100)))
        silent.add(10)
    Meter("after").add(1)
    assert told[0] == Done("work", 0, 300, 0, 100)
    assert told[-1] == Done("work", 300, 300, 100, 100)
    assert [done.bytes for done in told] == list(range(0, 301, 3))


def test_an_export_tells_every_byte_and_tensor_and_a_verification_every_file(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", task="causal-lm")
    told: list[Done] = []
    with listening(told.append):
        export(tmp_path / "m", "dense", tmp_path / "d", max_shard_bytes=20_000)
    files = list((tmp_path / "d").glob("*.safetensors"))
    last = [done for done in told if done.what == "writing weights"][-1]
    assert len(files) > 1
    assert last.bytes == last.total_bytes == sum(file.stat().st_size for file in files)
    assert last.items == last.total_items > 10
    told.clear()
    with listening(told.append):
        export(tmp_path / "m", "lora", tmp_path / "l", rank=2)
        verify(tmp_path / "d", base=base, adapters=[f"{f.name}={f}" for f in folders])
    ends = {done.what: done for done in told}
    assert ends["decomposing deltas"].items == ends["decomposing deltas"].total_items > 1
    assert {"loading the model", "comparing outputs"} <= set(ends)
    read = [done for done in told if done.what == "reading files" and done.total_items > len(files)][-1]
    size = sum(f.stat().st_size for f in (tmp_path / "d").rglob("*") if f.is_file() and f.name != "wlora_merge.json")
    assert (read.bytes, read.total_bytes) == (size, size)


def test_amounts_are_in_human_units() -> None:
    assert amount_of(Done("x", 1_200_000_000, 2_200_000_000, 45, 291)) == "1.2 GB of 2.2 GB, 45 of 291 tensors"
    assert amount_of(Done("x", 0, 0, 3, 4, "modules")) == "3 of 4 modules"
    assert amount_of(Done("x")) == ""


def test_at_a_terminal_there_is_a_line_while_it_works_and_the_result_alone_afterwards(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", task="causal-lm")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "wlora_merge", "export", str(tmp_path / "m"), "--format", "dense"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "d")], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    said = b""
    with suppress(OSError):  # how a terminal ends on Linux
        while chunk := os.read(ours, 65536):
            said += chunk
    os.close(ours)
    result = process.communicate()[0].decode()
    assert process.returncode == 0, said
    assert re.search(rb"(reading files|writing weights) .*of .*", said)
    assert re.fullmatch(r"Wrote \S+ \(dense, [\d.]+ kB\)\.\nsha256:\w{64}\n", result)


def test_long_commands_say_how_long_they_took(
    llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = llama_zoo()
    inputs = [word for folder in folders for word in ("--adapter", str(folder))]
    line = ["mix", "--base", str(base), *inputs, "--out"]
    clock = iter(range(0, 10_000, 75))
    monkeypatch.setattr("wlora_merge.cli.main.monotonic", lambda: next(clock))
    assert CliRunner().invoke(main, [*line, str(tmp_path / "loud")]).stderr.endswith("Took 75 s.\n")
    assert not CliRunner().invoke(main, ["--quiet", *line, str(tmp_path / "quiet")]).stderr
