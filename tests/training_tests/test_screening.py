"""Screening: gains are derivatives of the shots' loss, and what helps is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.language_models import llamas as llamas
from support.models import EVERY_LINEAR, make_adapter, peft_changes, trained_adapter
from support.shots import save_tokenizer

from wlora_merge.adapters.adapter import load_adapters
from wlora_merge.data.examples import read_examples
from wlora_merge.data.tasks import get_task
from wlora_merge.distributed import Team
from wlora_merge.errors import MixtureError, WloraMergeWarning
from wlora_merge.fit_options import fit_request
from wlora_merge.mixture.attach import attach_loaded, detach
from wlora_merge.mixture.attachment import attachment_of
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.models.base_model import open_base
from wlora_merge.training.fit import fit
from wlora_merge.training.given import Given
from wlora_merge.training.preparation import prepare
from wlora_merge.training.resume import FitState
from wlora_merge.training.screening import module_gains, score_of, weight_gradients
from wlora_merge.training.solver import left_out_objective

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": EVERY_LINEAR},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 4}},
    "dora": {"target_modules": ["v_proj", "o_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
}


def learner_of(base: Path, folders: Sequence[Path], data: Path, task: str, **options: Any) -> Any:
    """The base in float64 with its task, nothing attached; its examples, and the adapters."""
    asked = fit_request({"data": str(data), "task": task, "delta_scale": 0.0, **options})
    adapters, opened = load_adapters(folders), open_base(base)
    given = Given(get_task(task), asked, asked.options, opened, adapters[:1], (data, None))
    shots = read_examples(data, task=task, columns=None, split=None)
    learner = prepare(given, shots, None, given.task.labels(shots), Team(), FitState(None, "", resume=False)).learner
    detach(learner.model).double()
    return learner, opened, adapters


def slope(learner: Any, changes: dict[str, torch.Tensor], loss: Callable[[], float], step: float = 1e-3) -> float:
    """The derivative of the loss along a change of the weights, by central differences; the model's norms are float32 anyway."""
    parameters = dict(learner.model.named_parameters())
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, change in changes.items():
                parameters[name] += sign * step * change
            values.append(loss())
            for name, change in changes.items():
                parameters[name] -= sign * step * change
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gain_is_minus_the_slope_of_a_language_models_loss_along_what_peft_merges(
    llamas: Zoo, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    base, _, data = llamas
    model = AutoModelForCausalLM.from_pretrained(base)
    folder = make_adapter(model, tmp_path / kind, 5, scale=0.3, r=3, **KINDS[kind])
    learner, opened, adapters = learner_of(base, [folder], data, "causal-lm")
    rows = range(learner.shots)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(learner.loss([row]).double()) * learner.items([row]) for row in rows) / learner.items(rows)

    found = module_gains(learner, opened, adapters, rows)[kind]
    largest = max(map(abs, found.values()))
    changes = peft_changes(model, folder)
    assert {f"{name}.weight" for name in found} == set(changes)
    for name, change in changes.items():
        expected = -slope(learner, {name: change}, loss)
        assert found[name.removesuffix(".weight")] == pytest.approx(expected, rel=2e-2, abs=2e-3 * largest), name
    assert all(not p.requires_grad and p.grad is None for p in learner.model.parameters())


def test_a_gain_under_a_solved_head_is_minus_the_slope_of_its_leave_one_out_loss(zoo: Zoo) -> None:
    from transformers import AutoModelForSequenceClassification

    base, folders, data = zoo
    learner, opened, adapters = learner_of(base, folders[:1], data, "text-classification", pooling="cls")
    rows, solved = range(learner.shots), learner.solved

    def loss() -> float:
        features = solved.features(rows)
        wide = torch.stack([features[row] for row in rows])
        return float(left_out_objective(wide, solved.targets(rows), classes=True))

    found = module_gains(learner, opened, adapters, rows)[adapters[0].name]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    changes = {name: change for name, change in peft_changes(model, folders[0]).items() if "encoder" in name}
    expected = {name: -slope(learner, {name: change}, loss) for name, change in changes.items()}
    assert len(found) == len(expected) == 4
    for name, gain in found.items():
        own = next(value for key, value in expected.items() if key.endswith(f"{name}.weight"))
        assert gain == pytest.approx(own, rel=2e-2, abs=2e-3 * max(map(abs, found.values())))


def test_a_trained_bias_counts(llamas: Zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llamas[0])
    config = model.config
    config.attention_bias = True
    with_bias = type(model)(config)
    with_bias.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folder = trained_adapter(with_bias, tmp_path / "a", target_modules=["q_proj", "v_proj"], bias="lora_only")
    learner, opened, adapters = learner_of(tmp_path / "base", [folder], llamas[2], "causal-lm")
    rows = range(learner.shots)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(learner.loss([row]).double()) * learner.items([row]) for row in rows) / learner.items(rows)

    found = sum(module_gains(learner, opened, adapters, rows)["a"].values())
    changes = peft_changes(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    assert any(name.endswith(".bias") for name in changes)
    assert found == pytest.approx(-slope(learner, changes, loss), rel=2e-2)


def test_a_quantized_base_gives_the_gains_of_the_weights_attached_to_it(llamas: Zoo) -> None:
    pytest.importorskip("bitsandbytes")
    base, folders, data = llamas
    asked = fit_request({"data": str(data), "task": "causal-lm", "delta_scale": 0.0, "quantize": "4bit"})
    adapters, opened = load_adapters(folders), open_base(base)
    given = Given(get_task("causal-lm"), asked, asked.options, opened, adapters[:1], (data, None))
    shots = read_examples(data, task="causal-lm", columns=None, split=None)
    learner = prepare(given, shots, None, given.task.labels(shots), Team(), FitState(None, "", resume=False)).learner
    detach(learner.model)
    rows = range(learner.shots)
    found = module_gains(learner, opened, adapters, rows)
    attach_loaded(learner.model, adapters, opened, granularity="module", normalize="none")
    attachment = attachment_of(learner.model)
    with torch.no_grad():
        attachment.weights.zero_()
    learner.backward(rows)
    assert attachment.weights.grad is not None
    for group, modules in attachment.groups.items():
        for n, adapter in enumerate(adapters):
            expected = -float(attachment.weights.grad[attachment.row[modules[0]], n])
            assert found[adapter.name].get(modules[0], 0.0) == pytest.approx(expected, rel=1e-3, abs=1e-5), group


def helpful(llamas: Zoo, tmp_path: Path) -> dict[str, Path]:
    """Two adapters that go down the gradient of the shots' loss, two that go up, four random ones, all of one norm."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base, folders, data = llamas
    learner, _, _ = learner_of(base, folders[:1], data, "causal-lm")
    modules = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    with weight_gradients(learner.model, modules) as gradients:
        learner.backward(range(learner.shots))
        slopes = {name: gradients[f"{name}.weight"].grad.clone().float() for name in modules}  # type: ignore[union-attr]
    model, made = AutoModelForCausalLM.from_pretrained(base), {}
    for name, sign in {
        "down-1": -1,
        "down-2": -1,
        "up-1": 1,
        "up-2": 1,
        **{f"random-{i}": 0 for i in range(4)},
    }.items():
        folder = make_adapter(model, tmp_path / name, len(made), r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])
        tensors = load_file(folder / "adapter_model.safetensors")
        for module, slope_of in slopes.items():
            u, s, vt = torch.linalg.svd(slope_of, full_matrices=False)
            a, b = (f"base_model.model.{module}.lora_{part}.weight" for part in "AB")
            part = slice(0, 2) if name.endswith("1") else slice(1, 3)
            if sign:
                tensors[a], tensors[b] = vt[part].contiguous(), (sign * u[:, part] * s[part]).contiguous()
            tensors[b] = tensors[b] / (tensors[b] @ tensors[a]).norm()
        save_file(tensors, folder / "adapter_model.safetensors")
        made[name] = folder
    return made


def test_a_fit_keeps_what_lowers_the_loss_of_the_shots(llamas: Zoo, tmp_path: Path) -> None:
    base, _, data = llamas
    folders = helpful(llamas, tmp_path)
    mixture = fit(base, list(folders.values()), data, "causal-lm", keep=2, folds=0, method="uniform")
    assert mixture.adapter_names == ["down-1", "down-2"]
    screening = mixture.metrics["screening"]
    assert screening["kept"] == ["down-1", "down-2"]
    assert set(screening["scores"]) == set(folders)
    assert (
        min(screening["scores"][n] for n in ("down-1", "down-2"))
        > 0
        > max(screening["scores"][n] for n in ("up-1", "up-2"))
    )
    assert "2 of 8 adapters were kept (down-1, down-2)" in mixture.metrics["note"]
    assert set(mixture.data["adapters"]) == set(folders)
    mixture.save(tmp_path / "mixture")
    assert Mixture.load(tmp_path / "mixture").metrics == mixture.metrics


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2.0),
        ([-3.0, -3.0], -(2.0**0.5)),
        ([5.0], 1.0),
        ([1e-200, 1e-200], 2.0**0.5),
        ([4.0, -3.0], 0.2),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
    ],
)
def test_a_score_says_how_far_modules_agree_and_nothing_of_size(gains: list[float], expected: float) -> None:
    assert score_of(gains) == pytest.approx(expected)
    assert score_of([1e6 * gain for gain in gains]) == pytest.approx(expected)


def test_a_larger_adapter_is_no_better_for_its_size(llamas: Zoo, tmp_path: Path) -> None:
    """Two random adapters of a thousand times the norm gain more than those that go down the gradient in every module."""
    from safetensors.torch import load_file, save_file

    base, _, data = llamas
    folders = helpful(llamas, tmp_path)
    options: dict[str, Any] = {"keep": 2, "folds": 0, "method": "uniform"}
    scores = fit(base, list(folders.values()), data, "causal-lm", **options).metrics["screening"]["scores"]
    for name in folders:
        if name.startswith("random"):
            file = folders[name] / "adapter_model.safetensors"
            tensors = load_file(file)
            save_file({key: 1000 * value if "lora_B" in key else value for key, value in tensors.items()}, file)
    screening = fit(base, list(folders.values()), data, "causal-lm", **options).metrics["screening"]
    assert screening["kept"] == ["down-1", "down-2"]
    assert screening["scores"] == pytest.approx(scores, rel=1e-3)


def test_a_screened_mixture_is_not_doubled_as_its_shots_chose_it(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folders, data = zoo
    options: dict[str, Any] = {"pooling": "mean", "new_adapter": 0, "folds": 0, "label_names": False}
    monkeypatch.setattr("wlora_merge.training.learner.START_SCALES", (2.0,))
    every = fit(base, folders, data, "text-classification", **options)
    assert every.mixture_weights.sum(-1).flatten().tolist() == pytest.approx([2.0] * len(every.mixture_weights))
    screened = fit(base, folders, data, "text-classification", keep=2, **options)
    sums = screened.mixture_weights.sum(-1).flatten().tolist()
    assert set(map(round, sums)) <= {0, 1}


def test_up_to_sixteen_adapters_are_all_mixed(zoo: Zoo) -> None:
    assert "screening" not in fitted(zoo, method="uniform").metrics


def test_of_more_than_sixteen_sixteen_are_kept(zoo: Zoo) -> None:
    base, folders, data = zoo
    with pytest.warns(WloraMergeWarning, match="counts double"):
        mixture = fit(
            base, [(f"n{i}", folders[i % 3]) for i in range(17)], data, "text-classification", method="uniform", folds=0
        )
    assert len(mixture.adapters) == len(mixture.metrics["screening"]["kept"]) == 16


def test_an_adapter_that_the_fit_cannot_do_without_is_kept(llamas: Zoo, tmp_path: Path) -> None:
    base, _, data = llamas
    folders = helpful(llamas, tmp_path)
    mixture = fit(
        base, list(folders.values()), data, "causal-lm", keep=2, folds=0, method="uniform", modules_to_save="up-1"
    )
    assert mixture.metrics["screening"]["kept"] == ["down-1", "up-1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 1}, "keep is 1, expected a number of at least 2"),
        ({"keep": 2, "method": "fixed", "weights": [1, 0, 0]}, "keep chooses among the adapters"),
        ({"keep": 2, "initial_logits": [1, 0, 0]}, "keep chooses among the adapters"),
    ],
)
def test_a_keep_that_cannot_be_is_refused(zoo: Zoo, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MixtureError, match=said):
        fitted(zoo, **options)


@pytest.mark.parametrize("pooling", ["model", "cls"])
def test_a_head_that_is_trained_or_solved_on_the_base_comes_before_the_gains(zoo: Zoo, pooling: str) -> None:
    base, folders, data = zoo
    mixture = fit(
        base, folders, data, "text-classification", keep=2, method="uniform", folds=0, max_steps=3, pooling=pooling
    )
    scores = mixture.metrics["screening"]["scores"]
    assert len(scores) == 3
    assert all(scores.values())
