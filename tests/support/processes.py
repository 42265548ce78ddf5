"""Several processes, as a launcher starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "datasets", "onnx", "onnxruntime", "scipy", "accelerate")
_TELL = """
import sys
from wlora_merge.cli.main import main
try:
    main()
finally:
    print("heavy:", *set({heavy}) & set(sys.modules), file=sys.stderr)
"""


def heavy_imports(words: Sequence[str], folder: Path, code: int = 0) -> set[str]:
    """The packages that take long to import and that a command has imported.

    Args:
        words: its words, without the program's name.
        folder: the working directory.
        code: the exit code that it must have.
    """
    program = [sys.executable, "-c", _TELL.format(heavy=HEAVY), *words]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("heavy:"), done.stderr
    return set(told.split()[1:])


def launch(code: str, port: int, **environment: str) -> list[subprocess.Popen[str]]:
    """Two ranks, as torchrun starts them."""
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
