"""Several processes, as a launcher starts them: forks of one that has imported the libraries, which takes it seconds.

What is said of a fresh interpreter (which modules it has, its hashes, the console script itself) wants `subprocess` instead.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest

IMPORTED = [
    "accelerate", "datasets", "peft", "pyarrow.parquet", "rich.console", "torch", "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "wlora_merge.cli.inspect_tables",
    "wlora_merge.cli.main", "wlora_merge.cli.run", "wlora_merge.exporters.export", "wlora_merge.mixture.attach",
    "wlora_merge.training.comparison", "wlora_merge.training.fit", "wlora_merge.training.model",
]  # fmt: skip
"""Modules that a fork has already. The server leaves out in silence what cannot be imported: test_distributed.py asks for each."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTED)


class Fork:
    """A process that runs a function of a module, used as a `subprocess.Popen` with pipes is.

    Args:
        run: the function; it ends the process as a program ends, by returning, raising or leaving.
        arguments: what it is given.
        environment: all environment variables.
    """

    def __init__(self, run: Callable[..., object], *arguments: object, environment: Mapping[str, str]) -> None:
        self._said = [tempfile.NamedTemporaryFile("r", errors="replace") for _ in ("stdout", "stderr")]  # noqa: SIM115
        begin = ([file.name for file in self._said], dict(environment), os.getcwd(), run, *arguments)
        self._process = _FORKS.Process(target=_begin, args=begin)
        with pytest.MonkeyPatch.context() as patch:  # read once, by the process that is forked
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("MALLOC_ARENA_MAX", "2")
            ensure_running()
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def kill(self, number: int | None = None) -> None:
        """Send it a signal, SIGKILL unless told."""
        if number is None:
            self._process.kill()
        elif self._process.exitcode is None and self._process.pid is not None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended; its stdout and stderr.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds, and has been killed.
        """
        self._process.join(timeout)
        if late := self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        out, errors = (Path(file.name).read_text("utf-8", "replace") for file in self._said)
        for file in self._said:
            file.close()
        if late:
            raise TimeoutError(f"still running after {timeout} s: {out}{errors}")
        return out, errors


def _begin(
    said: list[str], environment: dict[str, str], folder: str, run: Callable[..., object], *arguments: Any
) -> None:
    for number, name in enumerate(said, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    run(*arguments)


def _program(code: str) -> None:
    sys.argv[:] = ["-c"]
    exec(code, {"__name__": "__main__"})


def start(code: str, **environment: str) -> Fork:
    """A process that runs a program's text."""
    return Fork(_program, code, environment=os.environ | environment)


def launch(code: str, port: int, **environment: str) -> list[Fork]:
    """Two ranks, as torchrun starts them."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | environment
    return [start(code, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
