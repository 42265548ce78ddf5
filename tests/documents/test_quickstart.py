"""The quickstart's parts, on a zoo that is hardly trained: folders that the libraries load, and a table with every row."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.paths import ROOT

RECIPE = ROOT / "recipes" / "quickstart"
pytest.importorskip("sklearn", reason="the quickstart extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT among themselves


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The recipe's files; a script's folder is on the path, so it is here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        import compare
        import digits
        import processes
        import zoo

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the recipe does
        yield SimpleNamespace(compare=compare, digits=digits, processes=processes, zoo=zoo)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def settings(recipe: Any) -> Any:
    return recipe.zoo.Settings(base_steps=3, base_batch_size=8, adapter_steps=2, adapter_batch_size=8, r=2)


@pytest.fixture(scope="module")
def made(recipe: Any, settings: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return get_zoo(recipe, tmp_path_factory.mktemp("quickstart"), settings)


def get_zoo(recipe: Any, out: Path, settings: Any, **options: Any) -> Any:
    return recipe.zoo.get_zoo(out, settings, recipe.processes.Here(), Console(file=io.StringIO()), **options)


def test_base_and_adapters_load_with_the_libraries_of_their_kind(recipe: Any, made: Any) -> None:
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model, info = AutoModelForImageClassification.from_pretrained(made.base, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    assert AutoImageProcessor.from_pretrained(made.base).size["height"] == recipe.digits.SIZE
    assert len(made.adapters) >= 4
    for name, folder in made.adapters.items():
        peft = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(made.base), folder)
        assert peft.peft_config["default"].modules_to_save is None, name
        assert any(bool(p.any()) for n, p in peft.named_parameters() if "lora_B" in n), name


def test_a_complete_zoo_is_reused_and_any_other_is_made_again(recipe: Any, made: Any, settings: Any) -> None:
    out, weights = made.base.parent.parent, made.base / "model.safetensors"
    before, first = weights.stat().st_mtime_ns, weights.read_bytes()
    assert get_zoo(recipe, out, settings) == made
    assert weights.stat().st_mtime_ns == before
    (made.base.parent / "zoo.json").unlink()
    assert get_zoo(recipe, out, settings) == made
    assert weights.stat().st_mtime_ns != before
    assert weights.read_bytes() == first  # the same seed, the same bytes
    assert [path.name for path in out.iterdir()] == ["zoo"]


def test_a_zoo_that_fails_leaves_the_old_one(
    recipe: Any, made: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(recipe.zoo, "train_adapter", fail)
    out, note = made.base.parent.parent, (made.base.parent / "zoo.json").read_bytes()
    with pytest.raises(RuntimeError, match="power cut"):
        get_zoo(recipe, out, replace(settings, seed=1))
    assert (made.base.parent / "zoo.json").read_bytes() == note
    assert [path.name for path in out.iterdir()] == ["zoo"]


def test_pictures_written_and_read_are_the_pixels_that_the_zoo_was_trained_on(
    recipe: Any, made: Any, tmp_path: Path
) -> None:
    from wlora_merge.data.examples import read_examples
    from wlora_merge.data.tasks import get_task

    _, pool, _ = recipe.digits.read_digits()
    shots = pool.shots(2, seed=0).shifted(recipe.digits.blurred)
    recipe.digits.write_pictures(shots, tmp_path / "shots")
    pixels, labels = recipe.zoo.tensors(shots, made.base)
    task = get_task("image-classification")
    examples = read_examples(tmp_path / "shots", task=task.name)
    encoded = task.encode(examples, task.load_processor(made.base), labels=task.labels(examples))
    assert [item["labels"] for item in encoded] == labels.tolist()
    assert torch.equal(torch.stack([item["pixel_values"] for item in encoded]), pixels)


def test_the_parts_share_no_image_and_shots_are_drawn_per_class(recipe: Any) -> None:
    parts = recipe.digits.read_digits()
    assert [len(part.labels) for part in parts] == [900, 300, 597]
    shots = parts[1].shots(3, seed=1)
    assert np.bincount(shots.labels).tolist() == [3] * 10
    assert np.array_equal(shots.images, parts[1].shots(3, seed=1).images)
    assert not np.array_equal(shots.images, parts[1].shots(3, seed=2).images)


def test_shifts_keep_shape_and_type(recipe: Any) -> None:
    images = recipe.digits.read_digits()[0].images[:5]
    shifts = [*recipe.digits.UPSTREAM.values(), *recipe.digits.DOWNSTREAM.values()]
    for shifted in (shift(images) for shift in shifts):
        assert (shifted.shape, shifted.dtype) == (images.shape, np.uint8)
        assert not np.array_equal(shifted, images)


def test_every_method_is_measured_and_shown(recipe: Any, made: Any, settings: Any) -> None:
    compare, shots = recipe.compare, [1]
    quiet, few = Console(file=io.StringIO()), compare.FewShot(steps=1, scratch_steps=1)
    planned = [trial for trial in compare.trials(shots, seeds=2) if trial.shift == "rotated further"]
    results = compare.measure(made, settings, few, planned, recipe.processes.Here(), quiet)
    assert {method for method, _, _ in results} == set(compare.METHODS)
    assert {len(values) for (_, _, per_class), values in results.items() if per_class} == {2}
    page = Console(file=io.StringIO(), width=80)
    page.print(compare.results_table(results, shots))
    text = page.file.getvalue()
    for method in compare.METHODS:
        assert method in text


def test_the_table_fits_eighty_columns(recipe: Any) -> None:
    compare = recipe.compare
    results = {(t.method, t.shift, t.per_class): [0.0, 100.0] for t in compare.trials([1, 3], seeds=1)}
    page = Console(file=io.StringIO(), width=80)
    page.print(compare.results_table(results, [1, 3]))
    text = page.file.getvalue()
    assert "…" not in text
    assert text.count("50 ± 71") == 6 * len(compare.METHODS)


@pytest.fixture
def offline(recipe: Any, made: Any, tmp_path: Path) -> Path:
    """What `make quickstart` leaves: a zoo, here hardly trained, and shots."""
    shutil.copytree(made.base.parent, tmp_path / "quickstart-out" / "zoo")
    _, pool, _ = recipe.digits.read_digits()
    recipe.digits.write_pictures(pool.shots(2, seed=0), tmp_path / "quickstart-out" / "shots")
    return tmp_path


@pytest.mark.skipif(not os.environ.get("WLORA_MERGE_LONG"), reason="takes half a minute: set WLORA_MERGE_LONG=1")
def test_the_notebook_runs_offline_on_the_zoo(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("WLORA_MERGE_ZOO", str(offline / "quickstart-out"))
    notebook = nbformat.read(RECIPE.parent / "opt-350m.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(offline)}}).execute()
    assert (offline / "served" / "report.html").is_file()
    assert "largest_difference" in notebook.cells[-1].outputs[-1]["data"]["text/plain"]


def test_the_quickstart_recipe_runs_offline_on_the_zoo(offline: Path) -> None:
    from click.testing import CliRunner

    from wlora_merge.cli.main import main

    (offline / "recipes").mkdir()
    job = offline / "recipes" / "quickstart.yaml"
    job.write_text((RECIPE.parent / "quickstart.yaml").read_text())
    quick = ["--set", "fit.max_steps=2", "--set", "fit.folds=0"]
    done = CliRunner().invoke(main, ["run", str(job), "--out", str(offline / "build"), *quick])
    assert done.exit_code == 0, done.output
    assert {p.name for p in (offline / "build").iterdir()} >= {"mixture", "dense", "lora-16", "onnx", "report.html"}
