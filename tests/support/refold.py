"""A dense folder as an ONNX export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from wlora_merge.models.config_spellings import older_spellings
from wlora_merge.onnx.convert import write_onnx


def onnx_of(dense: Path, out: Path, task: str = "causal-lm", **options: Any) -> Path:
    """An ONNX export of a model folder; the file.

    Its config has the keys that an export adds, so that the graph which was traced for a mixture of it, if one was, is filled.
    """
    dense = shutil.copytree(dense, out.with_name(f"{out.name}-dense"))
    config = json.loads((dense / "config.json").read_text())
    config |= older_spellings(config) | ({"dtype": options["dtype"]} if "dtype" in options else {})
    (dense / "config.json").write_text(json.dumps(config))
    out.mkdir(parents=True)
    write_onnx(dense, out, task=task, cached_as=dense.name, **options)
    return out / "onnx" / "model.onnx"
