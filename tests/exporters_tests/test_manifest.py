"""wlora_merge.json: no local path in it, the same bytes wherever folders lie, and hostile ones refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wlora_merge.errors import VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.manifest import FILE, PACKAGES, read_manifest, versions
from wlora_merge.mixture.mix import mix


def make(llama_zoo: Callable[..., Any], root: Path, kind: str = "dense") -> Path:
    """A tree of its own with base, adapters, mixture and export."""
    base, folders = llama_zoo()
    shutil.copytree(base, root / "base")
    for folder in folders:
        shutil.copytree(folder, root / folder.name)
    mix(root / "base", [root / f.name for f in folders], root / "m", weights=[0.5, 0.3, 0.2], task="causal-lm")
    export(root / "m", kind, root / "out")
    return root / "out"


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_the_same_inputs_give_the_same_bytes_wherever_the_folders_lie(
    llama_zoo: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    first, second = make(llama_zoo, tmp_path / "first", kind), make(llama_zoo, tmp_path / "a" / "b" / "second", kind)
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for k, v in value.items() for s in [k, *strings(v)]]
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_no_local_path_stands_in_it(llama_zoo: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    out = make(llama_zoo, tmp_path, kind)
    found = strings(json.loads((out / FILE).read_text()))
    assert found
    assert not [s for s in found if s.startswith(("/", ".", "~")) or str(tmp_path) in s]
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_it_lists_every_file_with_its_sha256_and_size(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    out = make(llama_zoo, tmp_path)
    manifest = read_manifest(out)
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file() and p.name != FILE}
    assert set(manifest["files"]) == set(files)
    for name, path in files.items():
        data = path.read_bytes()
        assert manifest["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_it_says_what_went_in(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    manifest = read_manifest(make(llama_zoo, tmp_path))
    weights = tmp_path / "base" / "model.safetensors"
    assert manifest["base_model"]["name"] == "base"
    assert manifest["base_model"]["sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert [(a["name"], a["source"]) for a in manifest["adapters"]] == [(f"a{i}", f"a{i}") for i in range(3)]
    assert manifest["weights"]["all"] == pytest.approx({"a0": 0.5, "a1": 0.3, "a2": 0.2})
    assert (manifest["format"], manifest["task"]) == ("dense", "causal-lm")
    assert set(manifest["versions"]) == {"python", "wlora-merge", *PACKAGES["dense"]}


def test_versions_of_what_is_not_installed_are_said_to_be_so() -> None:
    assert versions(("no-such-package-at-all",))["no-such-package-at-all"] == "not installed"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 2}', "[" * 100_000])
def test_a_broken_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(VerifyError, match=FILE):
        read_manifest(tmp_path)


def test_a_folder_without_one_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="is not an export"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("key", ["format", "base_model", "adapters", "groups", "weights", "versions", "files"])
def test_a_key_that_is_missing_or_of_another_type_is_refused(
    llama_zoo: Callable[..., Any], tmp_path: Path, key: str
) -> None:
    out = make(llama_zoo, tmp_path)
    whole = read_manifest(out)
    for value in (..., None, 3, "x", [3], [{}], {"x": 3}, {"x": {}}):
        if key in ("groups", "weights", "versions") and isinstance(value, dict):
            continue
        changed = whole | {key: value} if value is not ... else {k: v for k, v in whole.items() if k != key}
        (out / FILE).write_text(json.dumps(changed))
        with pytest.raises(VerifyError, match=FILE):
            read_manifest(out)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "", "a//b", ".hidden"])
def test_a_file_outside_the_folder_is_refused(llama_zoo: Callable[..., Any], tmp_path: Path, name: str) -> None:
    out = make(llama_zoo, tmp_path)
    manifest = read_manifest(out)
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (out / FILE).write_text(json.dumps(manifest))
    with pytest.raises(VerifyError, match="table of files is broken"):
        read_manifest(out)
