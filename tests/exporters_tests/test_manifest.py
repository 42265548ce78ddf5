"""wlora_merge.json: no local path in it, the same bytes wherever folders lie, and hostile ones refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import make_adapter, tiny_bert
from support.paths import VERSION_1
from transformers import BertForSequenceClassification

from wlora_merge.constants import MANIFEST_FILE as FILE
from wlora_merge.errors import VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.formats import FORMATS
from wlora_merge.exporters.manifest import read_manifest, versions
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture


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
    assert set(manifest.files) == set(files)
    for name, path in files.items():
        data = path.read_bytes()
        assert manifest.files[name].sha256 == hashlib.sha256(data).hexdigest()
        assert manifest.files[name].bytes == len(data)


def test_it_says_what_went_in(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    manifest = read_manifest(make(llama_zoo, tmp_path))
    weights = tmp_path / "base" / "model.safetensors"
    mixture = manifest.mixture
    assert mixture.base_model.source == "base"
    assert mixture.base_model.sha256 == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert [(a.name, a.source) for a in mixture.adapters] == [(f"a{i}", f"a{i}") for i in range(3)]
    assert mixture.weights["all"] == pytest.approx({"a0": 0.5, "a1": 0.3, "a2": 0.2})
    assert (manifest.format, mixture.task) == ("dense", "causal-lm")
    assert set(manifest.versions) == {"python", "wlora-merge", *FORMATS["dense"].packages}


def test_the_mixture_stands_in_it_as_in_mixture_json_but_for_paths_and_the_digits_of_its_weights(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    out = make(llama_zoo, tmp_path)
    told = json.loads((out / FILE).read_text())["mixture"]
    mixture = json.loads((tmp_path / "m" / "mixture.json").read_text())
    assert list(told) == list(mixture)
    for group, row in mixture.pop("weights").items():
        assert told["weights"][group] == pytest.approx(row, abs=1e-9)
    for row in (mixture["base_model"], *mixture["adapters"]):
        row["source"] = Path(row["source"]).name
    del told["weights"]
    assert told == mixture


def test_versions_of_what_is_not_installed_are_said_to_be_so() -> None:
    assert versions(("no-such-package-at-all",))["no-such-package-at-all"] == "not installed"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, *(f'{{"format_version": {n}}}' for n in ("1", "2", "3", "true"))]
)
def test_a_broken_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(VerifyError, match=FILE):
        read_manifest(tmp_path)


def test_a_folder_without_one_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="is not an export"):
        read_manifest(tmp_path)


VALUES: list[Any] = [..., None, 3, "x", [3], [{}], {"x": 3}, {"x": {}}]
KEYS = ["base_model", "adapters", "groups", "weights"]


def refused(folder: Path, text: str, key: str, value: Any) -> str:
    """What is said of a manifest in which a key has another value, or with Ellipsis none."""
    whole = json.loads(text)
    within, _, last = key.rpartition("/")
    table = whole[within] if within else whole
    table[last] = value
    if value is ...:
        del table[last]
    (folder / FILE).write_text(json.dumps(whole))
    with pytest.raises(VerifyError, match=FILE) as error:
        read_manifest(folder)
    return str(error.value)


@pytest.mark.parametrize("key", ["format", "versions", "files", "report", "mixture", *(f"mixture/{k}" for k in KEYS)])
def test_a_key_that_is_missing_or_of_another_type_is_refused(
    llama_zoo: Callable[..., Any], tmp_path: Path, key: str
) -> None:
    out = make(llama_zoo, tmp_path)
    text = (out / FILE).read_text()
    for value in VALUES:
        if key not in ("report", "versions") or not isinstance(value, dict):
            assert "\n" not in refused(out, text, key, value)


@pytest.mark.parametrize("key", ["format", "prefixes", "head", "versions", "files", "report", *KEYS])
def test_of_the_version_before_too(tmp_path: Path, key: str) -> None:
    text = (VERSION_1 / "lora.json").read_text()
    for value in VALUES:
        if key != "versions" or not isinstance(value, dict):
            assert "\n" not in refused(tmp_path, text, key, value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "gguf", "format is 'gguf', expected one of dense, lora, onnx"),
        ("report", {"r": 3}, "lacks report.relative_error"),
        ("report", {"r": "3", "relative_error": 0.0, "energy_kept": 1.0, "modules": {}}, "report.r is '3', expected a"),
        ("options", {"dtype": "int8"}, "options says dtype 'int8', expected one of float32"),
        ("probe", {"input_ids": [[1], [2, 3]]}, "probe.input_ids is neither rows of token ids nor"),
        ("files", {"x": {"sha256": 3, "bytes": 1}}, "files.x.sha256 is 3, expected text"),
        ("mixture/weights", {"all": {"a0": 1.0}}, "its weights are not one number for each group and adapter"),
        ("mixture/delta_scale", float("nan"), "mixture.delta_scale is nan, expected a finite number"),
        ("mixture/format_version", 2, "mixture.format_version is 2, expected 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_what_was_got_and_what_was_expected(
    llama_zoo: Callable[..., Any], tmp_path: Path, key: str, value: Any, said: str
) -> None:
    out = make(llama_zoo, tmp_path, "lora")
    message = refused(out, (out / FILE).read_text(), key, value)
    assert f"{FILE}: {said}" in message
    assert message.endswith(": export again.")


@pytest.mark.parametrize("kind", ["dense", "lora", "onnx"])
def test_a_file_that_the_version_before_wrote_says_the_same(tmp_path: Path, kind: str) -> None:
    old = json.loads((VERSION_1 / f"{kind}.json").read_text())
    (tmp_path / FILE).write_text(json.dumps(old))
    manifest = read_manifest(tmp_path)
    told = manifest.mixture.table()
    for key in ("granularity", "normalize", "delta_scale", "groups", "weights", "task", "config", "metrics", "data"):
        assert told[key] == old[key]
    assert told["base_model"] == {k: old["base_model"][k if k != "source" else "name"] for k in told["base_model"]}
    assert told["adapters"] == old["adapters"]
    assert list(told["prefixes"].values()) == old["prefixes"] == ["", "bert."]
    assert list(told["head"]) == old["head"] == ["classifier.bias", "classifier.weight"]
    assert (manifest.format, manifest.mixture.base_model.source) == (kind, "base")
    assert manifest.report.table() == old["report"]
    assert (manifest.options, manifest.probe, manifest.versions) == (old["options"], old["probe"], old["versions"])
    assert {name: file.model_dump() for name, file in manifest.files.items()} == old["files"]


def as_version_1(table: dict[str, Any]) -> dict[str, Any]:
    """A manifest in the form of format version 1, as the version before wrote it."""
    mixture = table["mixture"]
    old = {key: table[key] for key in ("format", "options", "report", "probe", "versions", "files")} | mixture
    base = dict(mixture["base_model"])
    return old | {
        "format_version": 1,
        "base_model": {"name": base.pop("source"), **base},
        "prefixes": list(mixture["prefixes"].values()),
        "head": sorted(mixture.get("head", {})),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dense", "lora", "onnx"])
def test_an_export_that_the_version_before_wrote_is_verified_in_full(tmp_path: Path, kind: str) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, scale=0.5, target_modules=["query"]) for i in range(2)]
    attach(model, folders, head=["classifier"])
    Mixture.from_model(model).save(tmp_path / "m")
    export(tmp_path / "m", kind, tmp_path / "out")
    old = as_version_1(json.loads((tmp_path / "out" / FILE).read_text()))
    literal = json.loads((VERSION_1 / f"{kind}.json").read_text())
    assert set(old) == set(literal)
    assert {key: type(value) for key, value in old.items()} == {key: type(value) for key, value in literal.items()}
    (tmp_path / "out" / FILE).write_text(json.dumps(old))
    checked = verify(tmp_path / "out", base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders])
    assert not checked.skipped
    assert checked.largest_difference is not None


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "", "a//b", ".hidden"])
def test_a_file_outside_the_folder_is_refused(llama_zoo: Callable[..., Any], tmp_path: Path, name: str) -> None:
    out = make(llama_zoo, tmp_path)
    manifest = json.loads((out / FILE).read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (out / FILE).write_text(json.dumps(manifest))
    with pytest.raises(VerifyError, match="table of files is broken"):
        read_manifest(out)
