"""Small exports, and changes to them that their manifests agree with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.models import make_adapter, tiny_llama

from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix


def agree(folder: Path, *files: str) -> None:
    """Make the manifest agree with files that were changed: an attacker, or a broken writer, writes both."""
    manifest = json.loads((folder / "wlora_merge.json").read_text())
    for name in files:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "wlora_merge.json").write_text(json.dumps(manifest))


def change_json(folder: Path, name: str, **changes: Any) -> None:
    table = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(table | changes))
    agree(folder, name)


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, {"format": "pt"})
    agree(folder, name)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """A function: (kind, options of the model) -> an export and the inputs that verify takes."""

    def make(kind: str = "dense", **overrides: Any) -> tuple[Path, dict[str, Any]]:
        dtype, model = overrides.pop("dtype", None), tiny_llama(num_hidden_layers=1, **overrides)
        model.save_pretrained(tmp_path / "base")
        folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
        export(mix(tmp_path / "base", [folder], task="causal-lm"), kind, tmp_path / "out", dtype=dtype)
        return tmp_path / "out", {"base": tmp_path / "base", "adapters": [f"a={folder}"]}

    return make
