"""Recipes: read, refused, run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from support.fits import Zoo
from support.fits import zoo as zoo
from support.shots import save_tokenizer

from wlora_merge.cli.main import main
from wlora_merge.cli.recipe import read_recipe
from wlora_merge.cli.run import check_paths, run
from wlora_merge.errors import RecipeError, WloraMergeError
from wlora_merge.io.untrusted import parse_yaml
from wlora_merge.mixture.mixture import Mixture

SOUND = """
base: zoo/base
adapters: {first: zoo/a0, second: zoo/a1}
mix: {task: causal-lm, weights: [0.25, 0.75]}
exports:
  - {format: dense}
  - {format: lora, rank: 3, name: lora-3}
"""


@pytest.fixture
def recipe(llama_zoo: Callable[..., Any], tmp_path: Path) -> Path:
    base, folders = llama_zoo()
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "base").symlink_to(base)
    for i, folder in enumerate(folders):
        (tmp_path / "zoo" / f"a{i}").symlink_to(folder)
    (tmp_path / "job.yaml").write_text(SOUND)
    return tmp_path / "job.yaml"


def test_a_recipe_mixes_exports_and_verifies_into_one_tree(recipe: Path) -> None:
    done = CliRunner().invoke(main, ["run", str(recipe)])
    assert done.exit_code == 0, done.output
    tree = recipe.parent / "job"
    assert {p.name for p in tree.iterdir()} == {"mixture", "dense", "lora-3", "report.html", "figures"}
    mixture = Mixture.load(tree / "mixture")
    assert (mixture.adapter_names, mixture.mixture_weights.tolist()) == (["first", "second"], [[0.25, 0.75]])
    assert json.loads((tree / "lora-3" / "adapter_config.json").read_text())["r"] == 3
    assert (
        CliRunner()
        .invoke(main, ["export", str(tree / "mixture"), "--format", "lora", "--out", str(tree / "x")])
        .exit_code
        == 0
    )


def test_check_writes_nothing_and_set_overrides(recipe: Path) -> None:
    done = CliRunner().invoke(main, ["run", str(recipe), "--check", "--set", "mix.weights=[1.0, 0.0]"])
    assert done.exit_code == 0, done.output
    assert {p.name for p in recipe.parent.iterdir()} == {"job.yaml", "zoo"}
    assert read_recipe(recipe, ["mix.weights=[1.0, 0.0]"]).mix.weights == [1.0, 0.0]  # type: ignore[union-attr]


def test_a_step_that_fails_leaves_no_tree(recipe: Path) -> None:
    job = read_recipe(recipe, ["mix.weights=[1.0]"])
    with pytest.raises(WloraMergeError, match="weights"):
        run(job, recipe.parent / "out", where=recipe.parent)
    assert {p.name for p in recipe.parent.iterdir()} == {"job.yaml", "zoo"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mix.wieghts=[1]", "did you mean 'weights'"),
        ("bse=x", "did you mean 'base'"),
        ("mix.task=causal-ml", "did you mean 'causal-lm'"),
        ("mix.weights=all", "expected list"),
        ("mix.weights=['1', x]", "weights is .*expected list"),
        ("mix.weights=[true, 1]", "weights is .*expected list"),
        ("mix.delta_scale=true", "delta_scale is True, expected float"),
        ("exports=3", "expected a list"),
        ("exports=[{format: dense}, {format: dense}]", "no other has"),
        ("exports=[{format: dense, name: ../up}]", "plain name"),
        ("exports=[{format: gguf}]", "expected one of dense, lora, onnx"),
        ("exports=[{rank: 3}]", "lacks format"),
        ("exports=[{format: onnx, rank: 4}]", r"exports\[0\]: --rank: of --format lora alone, not of onnx"),
        ("exports=[{format: onnx, dtype: bfloat16}]", r"exports\[0\]: --dtype bfloat16 cannot be exported to ONNX"),
        ("exports=[{format: onnx, opset: 8}]", r"exports\[0\]: --opset is 8, expected 17 or more"),
        (
            "exports=[{format: dense}, {format: onnx, name: o, onnx_base: x, quantize: int8}]",
            r"exports\[1\]: --quantize needs",
        ),
        ("fit={data: x, task: causal-lm}", "one of the sections"),
        ("adapters=7", "adapters must be"),
        ("base.deep=1", "no section"),
        ("nonsense", "KEY=VALUE"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("max_steps: -1", "max_steps is -1, expected a number above 0"),
        ("problem_type: regression", "problem_type is of text-classification"),
        ("early_stopping: 2", "early_stopping needs eval_data"),
        ("eval_split: test", "eval_split is of eval_data"),
        ("method: fixed", "method fixed takes the weights that are given"),
    ],
)
def test_options_that_a_fit_would_refuse_are_refused_when_the_recipe_is_read(
    recipe: Path, options: str, message: str
) -> None:
    text = recipe.read_text()
    recipe.write_text(text[: text.index("mix:")] + f"fit: {{data: x.jsonl, task: causal-lm, {options}}}\n")
    with pytest.raises(RecipeError, match=f"fit: {message}"):
        read_recipe(recipe)


def test_null_is_what_leaving_a_key_out_is(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text(
        text[: text.index("mix:")]
        + "fit: {data: x, task: causal-lm, batch_size: null, seed: null, method: null}\nexports: [{format: lora, rank: null}]\n"
    )
    job = read_recipe(recipe)
    assert job.fit is not None
    assert (job.fit.batch_size, job.fit.seed, job.fit.method) == (None, 0, "learned")
    recipe.write_text(text[: text.index("mix:")] + "fit: {data: null, task: causal-lm}\n")
    with pytest.raises(RecipeError, match="data is None, expected str"):
        read_recipe(recipe)


@pytest.mark.parametrize(
    "text", ["", "- a\n- b", "base: [", "!!python/object/apply:os.system ['true']", "\x00", "a: " + "[" * 5000]
)
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: b\nadapters: [x/lora, y/lora]\nmix: {}\nexports: [{format: dense}]", "two adapters are called 'lora'"),
        ("base: b\nadapters: {a: x, a: y}\nmix: {}\nexports: [{format: dense}]", "the key 'a' stands twice in one table, line 2"),
        ("base: b\nadapters: [x]\nmix: {}\nmix: {task: causal-lm}\nexports: [{format: dense}]", "the key 'mix' stands twice"),
    ],
)  # fmt: skip
def test_nothing_that_is_written_twice_is_dropped(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "r.yaml")


def test_a_yaml_merge_is_no_repetition() -> None:
    text = "d: [&a {x: 1, y: 2}]\nouter: {inner: &b {<<: *a, x: 2}}\nc: {<<: *b}\n1: a\n'1': b"
    table = parse_yaml(text)
    assert (table["c"], table[1], table["1"]) == ({"x": 2, "y": 2}, "a", "b")


def test_an_adapter_of_a_list_has_its_name_without_the_revision(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: b\nadapters: [org/one@abc, ./two]\nmix: {}\nexports: [{format: dense}]")
    assert read_recipe(tmp_path / "r.yaml").adapters == {"one": "org/one@abc", "two": "./two"}


@pytest.mark.parametrize("options", [{"new_adapter": 2}, {"method": "best-single", "folds": 2}])
def test_a_run_verifies_what_its_fit_kept_a_new_adapter_or_one_of_those_given(
    recipe: Path, options: dict[str, Any]
) -> None:
    base = recipe.parent / "zoo" / "base"
    shutil.copytree(base.resolve(), recipe.parent / "base")  # which other tests use as it is
    save_tokenizer(recipe.parent / "base")
    (recipe.parent / "shots.jsonl").write_text(
        "".join(f'{{"prompt": "w{i} w2", "completion": " w4"}}\n' for i in range(4))
    )
    job = yaml.safe_load(SOUND) | {
        "base": "base",
        "fit": {"data": "shots.jsonl", "task": "causal-lm", "max_steps": 2, "folds": 0} | options,
    }
    del job["mix"]
    recipe.write_text(yaml.safe_dump(job))
    done = run(read_recipe(recipe), recipe.parent / "tree", where=recipe.parent)
    kept = done.mixture.adapter_names
    assert kept == ["first", "second", "new"] if "new_adapter" in options else len(kept) == 1
    assert {name: checked.skipped for name, checked in done.checked.items()} == {"dense": {}, "lora-3": {}}


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls"])
def test_a_lora_that_the_fits_pooling_would_leave_without_its_head_is_refused_before_the_fit(
    zoo: Zoo, tmp_path: Path, pooling: str
) -> None:
    base, folders, shots = zoo
    table = {
        "base": str(base),
        "adapters": {folder.name: str(folder) for folder in folders},
        "fit": {"data": str(shots), "task": "text-classification", "method": "uniform", "folds": 0, "pooling": pooling},
        "exports": [{"format": "dense"}, {"format": "lora"}],
        "report": False,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(table))
    recipe = read_recipe(file)
    if pooling == "cls":
        check_paths(recipe, tmp_path)
        assert sorted(run(recipe, tmp_path / "tree", where=tmp_path).exports) == ["dense", "lora"]
        return
    for call in (lambda: check_paths(recipe, tmp_path), lambda: run(recipe, tmp_path / "tree", where=tmp_path)):
        with pytest.raises(
            RecipeError, match=rf"exports\[1\]: fit has pooling: {pooling}, so its head may see the mean"
        ):
            call()
    assert not (tmp_path / "tree").exists()
