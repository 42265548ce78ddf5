"""What commands import, seen in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "datasets", "onnx", "onnxruntime", "scipy", "accelerate")
_TELL = f"""
import json, sys
from wlora_merge.cli.main import main
for sys.argv[1:] in json.loads(sys.argv[1]):
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    print("told:", json.dumps([code, sorted(set({HEAVY}) & set(sys.modules))]), file=sys.stderr)
"""


def heavy_imports(lines: Sequence[Sequence[str]], folder: Path) -> list[tuple[int, set[str]]]:
    """Run commands one after the other, as the first that one interpreter runs imports all that it needs.

    Args:
        lines: the words of each command, without the program's name.
        folder: the working directory.

    Returns:
        For each command, its exit code, and the packages that take long to import and are there after it: what it imported, where
        those before it imported none.
    """
    program = [sys.executable, "-c", _TELL, json.dumps([list(words) for words in lines])]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=True)
    told = [json.loads(line[6:]) for line in done.stderr.splitlines() if line.startswith("told: ")]
    assert len(told) == len(lines), done.stderr
    return [(code, set(modules)) for code, modules in told]
