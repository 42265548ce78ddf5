"""A fit of a combination that is no weighted sum: PEFT's functions make its model, on which a plain fit finds the same head."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.combinations import METHODS, by_peft
from support.fits import Zoo, difference, fitted
from support.fits import zoo as zoo
from support.language_models import llamas as llamas
from support.models import make_adapter

from wlora_merge.cli.recipe import read_recipe
from wlora_merge.errors import MixtureError, RecipeError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training.fit import fit

WEIGHTS = [0.75, -0.25, 1.125]
TIES: dict[str, Any] = {"method": "ties", "density": 0.4}


def classifier(base: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)


def merged_by_peft(
    zoo: Zoo, folder: Path, weights: Sequence[float], monkeypatch: pytest.MonkeyPatch, **how: Any
) -> dict[str, torch.Tensor]:
    """The base with what PEFT's function makes of the delta weights, written to a folder; its tensors but for the head."""
    base, folders, _ = zoo
    tensors = by_peft(classifier(base), folders, list(weights), monkeypatch, prefix="bert.", **how)
    body = {name.removeprefix("bert."): t.float() for name, t in tensors.items() if name.startswith("bert.")}
    shutil.copytree(base, folder)
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    return body


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("how", METHODS, ids=str)
def test_its_head_is_that_of_a_fit_on_what_pefts_function_merges(
    zoo: Zoo, tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folders, shots = zoo
    body = merged_by_peft(zoo, tmp_path / "merged", WEIGHTS, monkeypatch, **how)
    mixture = fitted(zoo, tmp_path / "m", weights=WEIGHTS, **how, l2=0.1)
    same: dict[str, Any] = {"l2": 0.1, "seed": how.get("seed", 0)}
    plain = fitted((tmp_path / "merged", folders, shots), method="fixed", weights=[0.0, 0.0, 0.0], **same)
    assert mixture.head.keys() == plain.head.keys()
    for name, tensor in mixture.head.items():
        assert torch.allclose(tensor, plain.head[name], rtol=1e-3, atol=1e-4), name
    ours, theirs = (m.metrics["candidates"][kind] for m, kind in ((mixture, how["method"]), (plain, "fixed")))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)

    export(tmp_path / "m", "dense", tmp_path / "d")
    written = load_file(tmp_path / "d" / "model.safetensors")
    for name in set(body) - {"pooler.dense.weight", "pooler.dense.bias"}:  # which is a new one
        tensor = body[name]
        assert torch.allclose(written[f"bert.{name}"], tensor, rtol=2**-22, atol=1e-8), name
    assert difference(zoo, tmp_path / "d", mixture) < 1e-5


def test_without_weights_it_is_as_a_mix_has_it_and_the_others_are_compared(zoo: Zoo, tmp_path: Path) -> None:
    sums = fitted(zoo, method="uniform", l2=0.1)
    for method, weight in (("ties", 1.0), ("magnitude_prune", 1 / 3)):
        mixture = fitted(zoo, tmp_path / method, method=method, density=0.4, l2=0.1)
        assert torch.equal(mixture.mixture_weights, torch.full((1, 3), weight))
        scores = mixture.metrics["candidates"]
        assert list(scores) == ["base", "uniform", "a0", "a1", "a2", method]
        for name, score in sums.metrics["candidates"].items():
            assert scores[name]["loss"] == pytest.approx(score["loss"], rel=1e-3), name
        read = Mixture.load(tmp_path / method)
        assert (read.combination.method, read.combination.density) == (method, 0.4)
        assert read.data["method"] == method
        assert read.data["fit"]["density"] == 0.4


def test_best_may_keep_a_sum_which_is_one_then(zoo: Zoo, tmp_path: Path) -> None:
    mixture = fitted(zoo, tmp_path / "m", **TIES, select="best")
    assert mixture.metrics["kept"] in ("uniform", "a0", "a1", "a2")
    assert mixture.combination.is_linear
    assert mixture.mixture_weights.shape == (1, len(mixture.adapters))
    export(tmp_path / "m", "dense", tmp_path / "d")
    assert difference(zoo, tmp_path / "d", mixture) < 1e-5


def test_an_adapter_of_weight_zero_still_votes(zoo: Zoo, tmp_path: Path) -> None:
    mixture = fitted(zoo, **TIES, weights=[1.0, 0.0, 1.0])
    assert mixture.adapter_names == ["a0", "a1", "a2"]
    pruned = fitted(zoo, method="magnitude_prune", density=0.4, weights=[1.0, 0.0, 1.0])
    assert pruned.adapter_names == ["a0", "a2"]


def test_a_language_model_has_it_without_a_head(llamas: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    base, folders, data = llamas
    how = {"method": "dare_ties", "density": 0.5, "seed": 3}
    fit(base, folders, data, "causal-lm", tmp_path / "m", **how, delta_scale=0.5)
    export(tmp_path / "m", "dense", tmp_path / "d")
    weights = [0.5] * len(folders)
    expected = by_peft(AutoModelForCausalLM.from_pretrained(base), folders, weights, monkeypatch, **how)
    for name, tensor in load_file(tmp_path / "d" / "model.safetensors").items():
        assert torch.allclose(tensor.double(), expected[name], rtol=2**-22, atol=1e-8), name


def test_of_many_it_combines_those_that_screening_keeps(zoo: Zoo) -> None:
    mixture = fitted(zoo, **TIES, keep=2)
    assert mixture.metrics["screening"]["kept"] == mixture.adapter_names
    assert len(mixture.adapter_names) == 2
    assert mixture.combination.method == "ties"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties"}, "method ties prunes the delta weights: say --density"),
        ({"density": 0.5}, "density is of a method that prunes, and method learned does not"),
        ({"method": "magnitude_prune", "density": 0.5, "majority_sign": "total"}, "majority_sign is of ties and dare_ties"),
        ({**TIES, "prune_below": 0.1}, "prune_below is of mixture weights that are summed as they are"),
        ({**TIES, "normalize": "present"}, "normalize is of mixture weights that are summed as they are"),
        ({**TIES, "weights": [1.0, 2.0]}, "weights has 2 numbers, expected one for each of the 3 adapters"),
        ({**TIES, "granularity": "layer"}, "method ties learns no weights by gradients, so granularity would have no effect"),
        ({**TIES, "delta_scale": "learned"}, "method ties learns no weights by gradients, so delta_scale: learned"),
        ({"weights": [1.0, 2.0, 3.0]}, "method learned finds its own weights: leave --weights out"),
        ({**TIES, "weights": [0.0, 0.0, 0.0]}, "weights are all 0, so method ties combines nothing"),
    ],
)  # fmt: skip
def test_what_it_does_not_have_is_refused(zoo: Zoo, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        fitted(zoo, **options)


def test_what_is_no_product_of_two_factors_is_refused_before_the_model_is_loaded(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders, shots = zoo
    dora = make_adapter(
        classifier(base), tmp_path / "d", 7, target_modules=["query"], use_dora=True, task_type="SEQ_CLS"
    )
    monkeypatch.setattr("wlora_merge.training.model.load", None)
    with pytest.raises(UnsupportedError, match="is a DoRA, which scales the base's rows, which ties does not combine"):
        fitted((base, [*folders, dora], shots), **TIES)


def test_a_recipe_is_told_before_its_fit_that_no_lora_has_it(tmp_path: Path) -> None:
    text = "base: b\nadapters: [x/a, x/b]\nfit: {data: d.csv, task: text-classification, method: ties, density: 0.3}\n"
    file = tmp_path / "recipe.yaml"
    file.write_text(text + "exports: [{format: lora, rank: 4}]\n")
    assert read_recipe(file).fit is not None
    file.write_text(text + "exports: [{format: lora}]\n")
    with pytest.raises(RecipeError, match=r"exports\[0\]: ties: its delta weights are no products of two factors"):
        read_recipe(file)
