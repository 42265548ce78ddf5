"""A dense folder as an ONNX export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wlora_merge.onnx.convert import write_onnx


def onnx_of(dense: Path, out: Path, task: str = "causal-lm", **options: Any) -> Path:
    """A traced export of a model folder; the file."""
    out.mkdir(parents=True)
    write_onnx(dense, out, task=task, **options)
    return out / "onnx" / "model.onnx"
