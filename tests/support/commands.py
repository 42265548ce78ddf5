"""The command line run on a tiny zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from wlora_merge.cli.main import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def zoo(llama_zoo: Callable[..., Any]) -> tuple[Path, list[Path]]:
    base, folders = llama_zoo()
    return base, folders


def inputs(base: Path, folders: Sequence[Path]) -> list[object]:
    return ["--base", base, *(x for f in folders for x in ("--adapter", f))]


def copied(folder: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(folder, to)
    return to


def refused(result: Result, out: Path, *words: str) -> None:
    """One clear sentence, exit 1, nothing left behind."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    message = result.stderr.strip()
    assert message.startswith("Error: ")
    assert "Traceback" not in message
    for word in words:
        assert word in message, message
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.wlora*"))


def adapter_options(folders: Sequence[Path]) -> list[object]:
    return [x for f in folders for x in ("--adapter", f"{f.name}={f}")]


KEY = "base_model.model.model.layers.1.self_attn.q_proj"


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
