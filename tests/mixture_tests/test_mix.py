"""The mix workflow: weights given or uniform, and heads that adapters carry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import assert_equal_but_for_rounding, make_adapter, peft_sum, tiny_bert, tiny_llama

from wlora_merge.adapters.deltas import TensorDelta
from wlora_merge.errors import AdapterError, MixtureError, UnsupportedError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A BERT base that has a classifier, and two adapters that saved their own."""
    from transformers import BertForSequenceClassification

    root = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert().config)
    model.save_pretrained(root / "base")
    folders = []
    for i in range(2):
        folder = root / f"a{i}"
        make_adapter(
            model, folder, i, r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"
        )
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in [n for n in tensors if "classifier" in n]:
            tensors[name] = torch.randn_like(tensors[name])
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        folders.append(folder)
    return root / "base", folders


def head_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {k.removeprefix("base_model.model."): v for k, v in tensors.items() if "classifier" in k}


# ------------------------------------------------------------------------------------------------------- weights


def test_without_weights_a_mixture_is_uniform_over_all_modules(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    mixture = mix(base, folders)
    assert list(mixture.groups) == ["all"]
    assert mixture.normalize == "all"
    assert torch.equal(mixture.mixture_weights, torch.zeros(1, 3).softmax(-1))
    assert torch.equal(mixture.wlora_weights, torch.zeros(1, 3))
    assert len(mixture.groups["all"]) == 14


def test_weights_given_are_the_weights(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", weights=[2, -0.5, 0.1])
    mixture = Mixture.load(tmp_path / "m")
    assert mixture.normalize == "none"
    assert torch.equal(mixture.mixture_weights, torch.tensor([[2, -0.5, 0.1]]))
    assert torch.equal(mixture.wlora_weights, mixture.mixture_weights)


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 2.0, 3.0, 4.0], [float("nan"), 0, 1], [float("inf"), 0, 1], [-float("inf"), 0, 1]]
)
def test_weights_that_are_not_one_finite_number_per_adapter_are_refused(
    llama_zoo: Callable[..., Any], tmp_path: Path, weights: list[float]
) -> None:
    base, folders = llama_zoo()
    with pytest.raises(AdapterError, match=f"got {len(weights)} weights .* for 3 adapters"):
        mix(base, folders, tmp_path / "m", weights=weights)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"normalize": "none"}, "normalize is 'none', expected all or present"),
        ({"normalize": "some"}, "normalize is 'some', expected all or present"),
        ({"normalize": "all", "weights": [1, 1, 1]}, "weights that are given are used as they are"),
        ({"task": "causal-ml"}, "task is 'causal-ml', expected one of .*did you mean 'causal-lm'"),
        ({"delta_scale": float("nan")}, "delta_scale is nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    llama_zoo: Callable[..., Any], options: dict[str, Any], what: str
) -> None:
    base, folders = llama_zoo()
    with pytest.raises(MixtureError, match=what):
        mix(base, folders, **options)


def test_present_renormalizes_at_each_module(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    inputs = find_inputs(mix(base, folders, normalize="present"))
    for delta in inputs.deltas:
        weights = inputs.mixture.weights_of(delta)
        assert float(weights[delta.present].sum()) == pytest.approx(1)
        assert not weights[~delta.present].any()


def test_one_adapter_alone_is_a_mixture(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    assert mix(base, folders[:1]).mixture_weights.tolist() == [[1.0]]


def test_the_same_mix_gives_the_same_bytes(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    for name in "ab":
        mix(base, folders, tmp_path / name, weights=[1, 2, 3], task="causal-lm")
    for file in ("mixture.json", "mixture.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_output_inside_an_input_is_refused(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    with pytest.raises(WloraMergeError):
        mix(base, folders, folders[0] / "m")
    assert not (folders[0] / "m").exists()


def test_an_adapter_of_another_base_leaves_nothing_behind(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    other = make_adapter(tiny_llama(hidden_size=64), tmp_path / "other", 1, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="adapter 'other'"):
        mix(base, [*folders, other], tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --------------------------------------------------------------------------------------------------------- heads


def test_heads_are_refused_unasked(classifiers: tuple[Path, list[Path]]) -> None:
    base, folders = classifiers
    with pytest.raises(UnsupportedError, match=r"classifier\.(bias|weight).*--modules-to-save"):
        mix(base, folders)


def test_adapters_that_change_no_module_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lora" not in k}, folder / "adapter_model.safetensors")
    with pytest.raises(WloraMergeError, match=r"adapter 'a' .*"):
        mix(tmp_path / "base", [folder], tmp_path / "m", modules_to_save="drop")
    assert not (tmp_path / "m").exists()


def test_one_adapters_head_replaces_the_bases(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = classifiers
    mix(base, folders, tmp_path / "m", modules_to_save="a1", task="text-classification")
    export(tmp_path / "m", "dense", tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), head_of(folders[1])
    assert found.keys() == load_file(base / "model.safetensors").keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_heads_are_dropped(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = classifiers
    mix(base, folders, tmp_path / "m", modules_to_save="drop", task="text-classification")
    export(tmp_path / "m", "dense", tmp_path / "out")
    found, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", base))
    assert torch.equal(found["classifier.weight"], expected["classifier.weight"])
    assert torch.equal(found["classifier.bias"], expected["classifier.bias"])


def test_heads_are_mixed_as_deltas_against_the_bases(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = classifiers
    mix(base, folders, tmp_path / "m", weights=[0.75, 0.5], delta_scale=0.5, modules_to_save="mix")
    inputs = find_inputs(tmp_path / "m")
    assert {d.tensor for d in inputs.deltas if isinstance(d, TensorDelta)} == {"classifier.weight", "classifier.bias"}
    export(tmp_path / "m", "dense", tmp_path / "out")
    found, W = (load_file(f / "model.safetensors") for f in (tmp_path / "out", base))
    for name in ("classifier.weight", "classifier.bias"):
        total = W[name].double()
        for weight, folder in zip([0.75, 0.5], folders, strict=True):
            total = total + 0.5 * weight * (head_of(folder)[name].double() - W[name].double())
        assert torch.equal(found[name], total.float())


def test_mixed_heads_cannot_be_one_lora(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = classifiers
    with pytest.raises(UnsupportedError, match="classifier"):
        export(mix(base, folders, modules_to_save="mix"), "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_base_lacks_cannot_be_mixed(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _, folders = classifiers
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"classifier\.bias' is not in the base model, so it cannot be mixed"):
        mix(tmp_path, folders, modules_to_save="mix")


def lora_on_the_head(base: Path, folder: Path) -> tuple[Any, Path]:
    """The classifier, and an adapter with a LoRA on its head."""
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(base)
    return model, make_adapter(model, folder, 1, r=2, target_modules=["query", "classifier"])


def test_a_head_changed_by_a_lora_and_replaced_by_anothers_is_refused(
    classifiers: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, folders = classifiers
    _, lora = lora_on_the_head(base, tmp_path / "lora")
    with pytest.raises(UnsupportedError, match=r"tensor 'classifier\.weight'"):
        mix(base, [folders[0], lora], modules_to_save="a0")
    assert len(mix(base, [folders[0], lora], modules_to_save="drop").groups["all"]) == 3


def test_a_head_changed_by_a_lora_and_carried_whole_by_another_is_the_sum(
    classifiers: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, folders = classifiers
    model, lora = lora_on_the_head(base, tmp_path / "lora")
    pair = [folders[0], lora]
    export(mix(base, pair, weights=[0.75, -0.5], modules_to_save="mix"), "dense", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert_equal_but_for_rounding(got, peft_sum(model, pair, [0.75, -0.5]))


# --------------------------------------------------------------------------- a head that the base has no place for


def headless_zoo(root: Path, labels: int = 5) -> tuple[Path, Path]:
    """A BERT encoder without a classifier, and an adapter that saved one for `labels` labels."""
    from transformers import BertForSequenceClassification

    encoder = tiny_bert()
    encoder.save_pretrained(root / "base")
    encoder.config.num_labels = labels
    options: dict[str, Any] = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    return root / "base", make_adapter(BertForSequenceClassification(encoder.config), root / "a", 1, **options)


def test_a_head_on_a_base_without_one_makes_a_model_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base, folder = headless_zoo(tmp_path)
    mixture = mix(base, [folder], tmp_path / "m", modules_to_save="a", task="text-classification")
    assert mixture.config["architectures"] == ["BertForSequenceClassification"]
    assert mixture.config == Mixture.load(tmp_path / "m").config
    export(tmp_path / "m", "dense", tmp_path / "out")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == 5
    assert torch.equal(model.classifier.weight, head_of(folder)["classifier.weight"])


def test_a_head_for_other_labels_than_the_bases_changes_the_labels(
    classifiers: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    _, folder = headless_zoo(tmp_path)
    config = mix(classifiers[0], [folder], modules_to_save="a", task="text-classification").config
    assert list(config["id2label"].values()) == [f"LABEL_{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("task", "what"),
    [(None, "say --task TASK"), ("question-answering", "has no head with"), ("image-classification", "no image")],
)
def test_a_head_that_no_model_of_the_task_has_is_refused(tmp_path: Path, task: str | None, what: str) -> None:
    base, folder = headless_zoo(tmp_path)
    with pytest.raises(UnsupportedError, match=what):
        mix(base, [folder], tmp_path / "m", modules_to_save="a", task=task)
    assert not (tmp_path / "m").exists()
