"""mixture.json and mixture.safetensors: the same bytes again, and broken ones refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mixtures import edit, made, refused, same
from support.paths import VERSION_1

from wlora_merge.errors import OutputError
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture


@pytest.mark.parametrize(
    "changes",
    [{}, {"normalize": "none"}, {"task": None, "head": {}, "config": {}, "metrics": {}, "modules_to_save": None}],
)
def test_a_mixture_saved_and_loaded_is_bit_identical(tmp_path: Path, changes: dict[str, Any]) -> None:
    mixture = made(**changes)
    mixture.save(tmp_path / "m")
    assert same(Mixture.load(tmp_path / "m"), mixture)


def test_the_same_mixture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        made().save(tmp_path / name)
    Mixture.load(tmp_path / "a").save(tmp_path / "c")
    for file in ("mixture.json", "mixture.safetensors"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_head_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.ones(4, 4)
    made(head={"a.weight": shared, "b.weight": shared, "c.weight": shared.T[:2]}).save(tmp_path / "m")
    assert set(Mixture.load(tmp_path / "m").head) == {"a.weight", "b.weight", "c.weight"}


def test_the_json_is_for_people_and_other_programs(tmp_path: Path) -> None:
    mixture = made()
    mixture.save(tmp_path / "m")
    table = json.loads((tmp_path / "m" / "mixture.json").read_text())
    assert {
        "format_version", "base_model", "adapters", "granularity", "normalize", "delta_scale", "groups", "weights", "task",
        "config", "metrics",
    } <= set(table)  # fmt: skip
    assert set(table["base_model"]) == {"source", "revision", "sha256"}
    assert [set(row) for row in table["adapters"]] == [{"name", "source", "revision", "sha256"}] * 3
    assert table["weights"]["lm_head"] == pytest.approx(
        dict(zip("abc", mixture.mixture_weights[1].tolist(), strict=True))
    )
    assert table["delta_scale"] == 0.1 + 0.2
    tensors = load_file(tmp_path / "m" / "mixture.safetensors")
    assert set(tensors) == {"mixture_weights", "wlora_weights", "head.classifier.weight", "head.classifier.bias"}


def test_a_mixture_and_its_inputs_that_move_together_still_load(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    from wlora_merge.mixture.inputs import find_inputs

    base, folders = llama_zoo()
    shutil.copytree(base, tmp_path / "here" / "base")
    for folder in folders:
        shutil.copytree(folder, tmp_path / "here" / folder.name)
    adapters = [tmp_path / "here" / f.name for f in folders]
    before = mix(tmp_path / "here" / "base", adapters, tmp_path / "here" / "m")
    assert str(tmp_path) not in (tmp_path / "here" / "m" / "mixture.json").read_text()
    (tmp_path / "here").rename(tmp_path / "there")
    after = find_inputs(tmp_path / "there" / "m")
    assert after.base.folder == tmp_path / "there" / "base"
    assert torch.equal(after.mixture.mixture_weights, before.mixture_weights)


def test_a_hub_id_stays_one_though_a_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made().save(tmp_path / "m")
    assert Mixture.load(tmp_path / "m").base.source == "org/base"


def test_a_folder_that_is_not_empty_is_kept_unless_forced(tmp_path: Path) -> None:
    made().save(tmp_path / "m")
    with pytest.raises(OutputError):
        made().save(tmp_path / "m")
    made(task=None).save(tmp_path / "m", force=True)
    assert Mixture.load(tmp_path / "m").task is None


@pytest.mark.parametrize(
    "path",
    [
        "format_version", "base_model", "adapters", "granularity", "normalize", "delta_scale", "groups", "prefixes",
        "base_model/source", "base_model/sha256", "adapters/0/name", "adapters/1/source", "adapters/2/sha256",
        "prefixes/in_file", "prefixes/in_model",
    ],
)  # fmt: skip
def test_a_key_that_is_missing_is_refused_by_name(tmp_path: Path, path: str) -> None:
    edit(tmp_path / "m", path, ...)
    assert path.rpartition("/")[2] in refused(tmp_path / "m")


WRONG: list[Any] = [None, True, 3, 1.5, "x", [], [1], {}, {"x": 1}, float("nan")]


FINE: dict[str, list[Any]] = {
    "delta_scale": [3, 1.5],
    "task": [None],
    "modules_to_save": [None, "x"],
    "base_model/source": ["x"],
    "adapters/0/source": ["x"],
    "base_model/revision": [None, "x"],
    "base_model/sha256": [{}],
    "adapters/0/name": ["x"],
    "config": [None, False, {}, {"x": 1}, []],
    "metrics": [None, {}, {"x": 1}, []],
    "metrics/candidates": [None, {}, []],
    "metrics/candidates/base": [{}, {"x": 1}],
    "metrics/candidates/base/loss": [3, 1.5],
    "groups/model.layers.0/0": ["x"],
    "base_model/sha256/model.safetensors": ["x"],  # which fits no file, and is refused when the inputs are found
    "weights": [None, {}, {"x": 1}, []],
    "data": [None, {}, {"x": 1}, []],
    "prefixes/in_file": ["x"],
}


@pytest.mark.parametrize(
    "path",
    [
        "format_version", "base_model", "base_model/source", "base_model/revision", "base_model/sha256",
        "base_model/sha256/model.safetensors", "adapters", "adapters/0", "adapters/0/name", "adapters/0/source",
        "granularity", "normalize", "delta_scale", "groups", "groups/lm_head", "groups/model.layers.0/0", "task", "config",
        "metrics", "metrics/candidates", "metrics/candidates/base", "metrics/candidates/base/loss", "modules_to_save",
        "prefixes", "prefixes/in_file", "data",
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_and_never_a_traceback(tmp_path: Path, path: str) -> None:
    for i, value in enumerate(WRONG):
        fine = FINE.get(path, [])
        if any(type(value) is type(f) and value == f for f in fine):
            continue
        edit(tmp_path / str(i), path, value)
        refused(tmp_path / str(i))


@pytest.mark.parametrize("groups", [{"all": ["a", "a"], "b": ["c"]}, {"x": ["a"], "y": ["a"]}])
def test_a_module_in_two_groups_or_twice_in_one_is_refused(tmp_path: Path, groups: Any) -> None:
    edit(tmp_path / "m", "groups", groups)
    assert "module 'a' stands twice" in refused(tmp_path / "m")


@pytest.mark.parametrize("groups", [{}, {"x": ["a"]}, {"x": ["a"], "y": ["b"], "z": ["c"]}, {"x": ["a"], "y": []}])
def test_groups_that_do_not_fit_the_weights_are_refused(tmp_path: Path, groups: Any) -> None:
    edit(tmp_path / "m", "groups", groups)
    refused(tmp_path / "m")


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    edit(tmp_path / "m", "adapters/1/name", "a")
    assert "two adapters have the same name" in refused(tmp_path / "m")


def test_a_task_that_is_not_known_is_refused(tmp_path: Path) -> None:
    edit(tmp_path / "m", "task", "causal-ml")
    assert "task is 'causal-ml'" in refused(tmp_path / "m")


def test_the_table_of_weights_only_informs(tmp_path: Path) -> None:
    edit(tmp_path / "m", "weights", {"lm_head": {"a": 9.0}})
    assert torch.equal(Mixture.load(tmp_path / "m").mixture_weights, made().mixture_weights)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000, "\x00"])
def test_a_json_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    made().save(tmp_path / "m")
    (tmp_path / "m" / "mixture.json").write_text(text)
    assert "mixture.json" in refused(tmp_path / "m")


@pytest.mark.parametrize("name", ["mixture.json", "mixture.safetensors"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    made().save(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    assert name in refused(tmp_path / "m")


@pytest.mark.parametrize("name", ["mixture_weights", "wlora_weights"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, 1), torch.ones(()), torch.ones(0, 3), torch.ones(2, 3).double(),
        torch.ones(2, 3).half(), torch.ones(2, 3, dtype=torch.int64), torch.full((2, 3), float("nan")),
        torch.full((2, 3), float("inf")), torch.ones(2, 3, dtype=torch.bool), None,
    ],
)  # fmt: skip
def test_weights_of_another_shape_dtype_or_not_finite_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None
) -> None:
    made().save(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "mixture.safetensors")
    del tensors[name]
    save_file(tensors if tensor is None else tensors | {name: tensor}, tmp_path / "m" / "mixture.safetensors")
    assert name in refused(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("other", torch.ones(1)),
        ("head.x", torch.full((2,), float("nan"))),
        ("head.x", torch.ones(2, dtype=torch.int64)),
    ],
)
def test_a_tensor_that_no_mixture_has_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    made().save(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "mixture.safetensors")
    save_file(tensors | {name: tensor}, tmp_path / "m" / "mixture.safetensors")
    assert name in refused(tmp_path / "m")


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "m")
    file = tmp_path / "m" / "mixture.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert "not a sound safetensors file" in refused(tmp_path / "m")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("metrics", {"note": 3}, "metrics.note is 3, expected text"),
        ("metrics", {"settings": {"x": 1}}, "metrics.settings.x is 1, expected a table"),
        ("metrics", {"history": {"x": [[1]]}}, "metrics.history.x[0] is not a pair of a step and a loss"),
        ("metrics", {"held_out": {"examples": "x"}}, "metrics.held_out.examples is 'x', expected a whole number"),
        ("metrics", {"candidates": {"x": {"loss": 10**400}}}, "metrics.candidates.x.loss is 1000"),
        ("data", {"new_adapter": {"r": 2}}, "lacks data.new_adapter.name"),
        ("data", {"fit": {"weights": ["x"]}, "data": {"name": "x"}}, "data.fit.weights is neither a plain value"),
        ("data", {"fit": {}}, "lacks data.data"),
        ("data", {"adapters": {"x": 3}}, "data.adapters.x is 3, expected text"),
        ("head", {"x": 3}, "head.x is 3, expected text"),
        ("weights", {"lm_head": {"a": None}}, "weights.lm_head.a is null, expected a number"),
        ("groups/model.layers.0/0", 7, "groups['model.layers.0'][0] is 7, expected text"),
        ("adapters/1/name", "a b", "adapters[1].name is 'a b', which no adapter may be called"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_what_was_got_and_what_was_expected(
    tmp_path: Path, path: str, value: Any, said: str
) -> None:
    edit(tmp_path / "m", path, value)
    message = refused(tmp_path / "m")
    assert f"mixture.json: {said}" in message
    assert message.endswith(": make the mixture again.")


def test_what_a_later_version_adds_to_the_record_of_a_fit_is_kept_where_it_stands(tmp_path: Path) -> None:
    for path, value in {"metrics": {"later": 1, "note": "n"}, "data": {"later": [2], "method": "given"}}.items():
        edit(tmp_path / path, path, value)
        mixture = Mixture.load(tmp_path / path)
        assert list(getattr(mixture, path).items()) == list(value.items())
        mixture.save(tmp_path / path, force=True)
        assert json.loads((tmp_path / path / "mixture.json").read_text())[path] == value


def test_a_mixture_that_the_version_before_wrote_loads_and_is_saved_with_the_same_bytes(tmp_path: Path) -> None:
    made(head={}).save(tmp_path / "m")
    old = (VERSION_1 / "mixture.json").read_bytes()
    (tmp_path / "m" / "mixture.json").write_bytes(old)
    exact = json.loads((VERSION_1 / "dense.json").read_text())["weights"]
    weights = torch.tensor([list(row.values()) for row in exact.values()])
    save_file({"mixture_weights": weights, "wlora_weights": weights.clone()}, tmp_path / "m" / "mixture.safetensors")
    mixture = Mixture.load(tmp_path / "m")
    assert mixture.adapter_names == ["a0", "a1", "new"]
    assert mixture.metrics["chosen"]["new_adapter"] == mixture.data["new_adapter"]["r"] == 2
    mixture.save(tmp_path / "m", force=True)
    assert (tmp_path / "m" / "mixture.json").read_bytes() == old
