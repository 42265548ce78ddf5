"""The inputs of a mixture, found again: digests, and inputs that have moved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wlora_merge.errors import MixtureError, WloraMergeError
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import InputRef, Mixture
from wlora_merge.models import base_model


@pytest.fixture
def tree(llama_zoo: Callable[..., Any], tmp_path: Path) -> Path:
    """A folder with base, a0, a1, a2 and the mixture m made of them."""
    base, folders = llama_zoo()
    shutil.copytree(base, tmp_path / "base")
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
    mix(tmp_path / "base", [tmp_path / f.name for f in folders], tmp_path / "m", weights=[1, 2, 3])
    return tmp_path


def change(file: Path) -> None:
    """Another number in the file's last tensor; its size stays."""
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 1
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def test_inputs_are_found_where_they_were(tree: Path) -> None:
    inputs = find_inputs(tree / "m")
    assert inputs.folders == [tree / "base", *(tree / f"a{i}" for i in range(3))]
    assert [a.name for a in inputs.adapters] == ["a0", "a1", "a2"]
    assert {d.module for d in inputs.deltas} == {m for ms in inputs.mixture.groups.values() for m in ms}


@pytest.mark.parametrize(
    ("folder", "file", "what"),
    [("base", "model.safetensors", "base model"), ("a1", "adapter_model.safetensors", "adapter 'a1'")],
)
def test_an_input_of_other_bytes_is_refused_with_its_file_named(tree: Path, folder: str, file: str, what: str) -> None:
    change(tree / folder / file)
    with pytest.raises(MixtureError) as error:
        find_inputs(tree / "m")
    assert str(error.value).startswith(f"{tree / folder / file}: the {what} is not the one")
    assert find_inputs(tree / "m", any_digest=True).deltas


def test_a_base_in_other_shards_is_refused(tree: Path) -> None:
    from support.models import tiny_llama

    shutil.rmtree(tree / "base")
    tiny_llama().save_pretrained(tree / "base", max_shard_size="30KB")
    with pytest.raises(MixtureError, match=r"model-00001-of-\d+.safetensors: the base model is not the one"):
        find_inputs(tree / "m")


def test_inputs_that_have_moved_are_given(tree: Path) -> None:
    (tree / "base").rename(tree / "base2")
    (tree / "a1").rename(tree / "elsewhere")
    inputs = find_inputs(tree / "m", base=tree / "base2", adapters=[f"a1={tree / 'elsewhere'}"])
    assert inputs.folders == [tree / "base2", tree / "a0", tree / "elsewhere", tree / "a2"]
    assert [a.name for a in inputs.adapters] == ["a0", "a1", "a2"]


@pytest.mark.parametrize(("folder", "option"), [("base", "--base PATH"), ("a1", "--adapter a1=PATH")])
def test_an_input_that_is_gone_is_named_with_the_option_that_helps(tree: Path, folder: str, option: str) -> None:
    shutil.rmtree(tree / folder)
    with pytest.raises(MixtureError, match=f"{tree / folder}: .*say {option}"):
        find_inputs(tree / "m")


def test_all_that_is_gone_is_named_at_once(tree: Path) -> None:
    shutil.move(tree / "m", tree / "deep" / "m")
    with pytest.raises(MixtureError, match="say --base PATH --adapter a0=PATH --adapter a2=PATH"):
        find_inputs(tree / "deep" / "m", adapters=[f"a1={tree / 'a1'}"])


def test_a_moved_input_must_be_the_one(tree: Path) -> None:
    with pytest.raises(MixtureError, match="adapter 'a1' is not the one"):
        find_inputs(tree / "m", adapters=[f"a1={tree / 'a0'}"])
    with pytest.raises(WloraMergeError, match="no such folder"):
        find_inputs(tree / "m", base=tree / "none")


@pytest.mark.parametrize("spec", ["x=/a", "/a"])
def test_a_moved_adapter_has_a_name_of_the_mixture(tree: Path, spec: str) -> None:
    with pytest.raises(MixtureError, match="expected NAME=PATH with a NAME of the mixture: a0, a1, a2"):
        find_inputs(tree / "m", adapters=[spec])


def test_a_mixture_of_other_modules_is_refused_when_it_is_read(tree: Path) -> None:
    made = Mixture.load(tree / "m")
    made.groups = {"all": made.groups["all"][1:]}
    inputs = find_inputs(made)
    with pytest.raises(MixtureError, match="belongs to no group of the mixture"):
        [made.weights_of(d) for d in inputs.deltas]


def test_a_module_that_the_base_lacks_is_refused_by_its_name(tree: Path) -> None:
    made = Mixture.load(tree / "m")
    made.groups["all"].append("model.layers.9.q_proj")
    with pytest.raises(MixtureError, match=r"has no module 'model\.layers\.9\.q_proj', which is in group 'all'"):
        find_inputs(made)


def test_a_hub_input_is_opened_at_the_commit_that_was_mixed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(text: Any, patterns: Any) -> Any:
        asked.append(str(text))
        raise WloraMergeError("stop")

    monkeypatch.setattr(base_model, "resolve_source", resolve)
    made = Mixture.load(tree / "m")
    made.base = InputRef("org/base", "c0ffee", made.base.sha256)
    with pytest.raises(WloraMergeError, match="stop"):
        find_inputs(made)
    assert asked == ["org/base@c0ffee"]


def test_deltas_are_those_that_were_mixed(tree: Path) -> None:
    first, second = find_inputs(tree / "m"), find_inputs(Mixture.load(tree / "m"))
    for a, b in zip(first.deltas, second.deltas, strict=True):
        assert torch.equal(first.mixture.gains_of(a), second.mixture.gains_of(b))  # type: ignore[arg-type]
