"""What a command imports, seen in a fresh interpreter."""

from __future__ import annotations

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
