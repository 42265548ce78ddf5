"""One training: its steps are AdamW's, its batches the seed's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.language_models import ROWS, fitted_lm
from support.language_models import llamas as llamas
from support.models import make_adapter, tiny_llama
from support.shots import others

import wlora_merge
import wlora_merge.training.learner as training
from wlora_merge.errors import MixtureError
from wlora_merge.fit_options import fit_options
from wlora_merge.training.candidates import Situation
from wlora_merge.training.loop import _distance


def test_the_fit_is_adamw_on_the_mean_token_loss_as_a_loop_written_by_hand(llamas: Zoo) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, folders, _ = llamas
    options = {"granularity": "global", "normalize": "all", "batch_size": 7, "max_steps": 5}
    found = fitted_lm(llamas, **options)
    model = wlora_merge.attach(AutoModelForCausalLM.from_pretrained(base).eval(), folders, granularity="global")
    tokenizer = AutoTokenizer.from_pretrained(base)
    optimizer = torch.optim.AdamW([model.wlora_weights], lr=0.05, weight_decay=0)
    for _ in range(5):
        losses, count = torch.zeros(()), 0
        for row in ROWS:
            prompt = tokenizer(row["prompt"], return_tensors="pt").input_ids
            ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
            labels = ids[0, prompt.shape[1] :]
            logits = model(ids).logits[0, prompt.shape[1] - 1 : -1]
            losses = losses + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            count += len(labels)
        optimizer.zero_grad()
        (losses / count).backward()
        optimizer.step()
    assert torch.allclose(found.wlora_weights, model.wlora_weights.detach(), atol=1e-4)


@pytest.mark.parametrize(("normalize", "rate"), [("none", 0.02), ("all", 0.05)])
def test_the_first_step_moves_every_weight_by_the_learning_rate(llamas: Zoo, normalize: str, rate: float) -> None:
    mixture = fitted_lm(llamas, normalize=normalize, granularity="global", max_steps=1)
    moved = (mixture.wlora_weights - (0.5 if normalize == "none" else 0)).abs()
    assert torch.allclose(moved, torch.full_like(moved, rate), rtol=1e-3)


def test_the_first_step_moves_a_head_of_several_layers_by_its_own_learning_rate(zoo: Zoo, tmp_path: Path) -> None:
    """The base has no pooler, and the class reads one: the head is two layers, which no solver takes."""
    base, *rest = zoo
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    given = {"method": "uniform", "folds": 0, "max_steps": 1, "pooling": "model"}
    still, moved = (
        fitted((tmp_path / "base", *rest), head_learning_rate=rate, **given).head["classifier.weight"]  # type: ignore[arg-type]
        for rate in (1e-9, 0.03)
    )
    assert float((moved - still).abs().max()) == pytest.approx(0.03, rel=1e-3)


def test_the_pull_is_towards_uniform_weights_at_the_temperature_of_the_mixture(tmp_path: Path) -> None:
    model = tiny_llama()
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj"]) for i in range(2)]
    wlora_merge.attach(model, folders, granularity="global", temperature=2.0)
    model.wlora_weights.data = torch.tensor([[2.0, 0.0]])
    weights = torch.tensor([1.0, 0.0]).softmax(-1)
    assert _distance(model).item() == pytest.approx(2 * float((weights - 0.5).square().sum()))


def test_every_epoch_has_every_row_once_in_an_order_that_only_the_seed_decides() -> None:
    def batches(seed: int) -> list[list[int]]:
        run = SimpleNamespace(options=fit_options({"batch_size": 3, "seed": seed}))
        learner = SimpleNamespace(run=run, situation=Situation(head=True, enough=True))
        return [batch for (batch,) in training.Learner.batches(learner, range(10, 17), 6)]  # type: ignore[arg-type]

    steps = batches(5)
    assert [len(batch) for batch in steps] == [3, 3, 1] * 2
    epochs = [[row for batch in steps[i : i + 3] for row in batch] for i in (0, 3)]
    assert all(sorted(epoch) == list(range(10, 17)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert list(range(10, 17)) not in epochs
    assert batches(5) == steps != batches(6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_gives_the_weights_of_float32_but_for_its_rounding(llamas: Zoo, precision: str) -> None:
    options = {"batch_size": 7, "granularity": "global", "normalize": "all"}
    exact, mixed = (fitted_lm(llamas, precision=p, **options).wlora_weights for p in ("float32", precision))
    assert not torch.equal(mixed, exact)
    assert torch.allclose(mixed, exact, rtol=0.1)


def test_a_step_whose_gradients_overflow_in_fp16_is_left_out_and_the_loss_scaled_by_less(
    llamas: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"precision": "fp16", "batch_size": 7, "granularity": "global", "normalize": "all"}
    whole = fitted_lm(llamas, max_steps=3, **options).wlora_weights
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    assert torch.allclose(fitted_lm(llamas, max_steps=4, **options).wlora_weights, whole, rtol=0.1)
    with pytest.raises(MixtureError, match=r"none of its steps .* fp16"):
        fitted_lm(llamas, max_steps=1, **options)


def test_gradient_checkpointing_and_accumulation_give_the_same_weights(llamas: Zoo) -> None:
    plain = fitted_lm(llamas)
    assert torch.allclose(fitted_lm(llamas, gradient_checkpointing=True).wlora_weights, plain.wlora_weights, atol=1e-6)
    whole = fitted_lm(llamas, batch_size=7)
    parts = fitted_lm(llamas, batch_size=4, gradient_accumulation_steps=2)
    assert torch.allclose(whole.wlora_weights, parts.wlora_weights, atol=1e-4)


def test_early_stopping_goes_back_to_the_best_step(llamas: Zoo, tmp_path: Path) -> None:
    options = {"eval_data": others(llamas[2], tmp_path), "learning_rate": 3.0, "max_steps": 30}
    made: list[int] = []
    stopped = fitted_lm(
        llamas, early_stopping=2, progress=lambda name, step, *_: made.append(step) if name == "learned" else None, **options
    )  # fmt: skip
    steps = stopped.metrics["chosen"]["steps"]
    assert max(made) == steps + 2 * 3 < 30  # it judges after every tenth of the steps
    assert (
        f"The weights are those of step {steps} of 30, where the loss on the evaluation data was lowest."
        in stopped.metrics["note"]
    )
    assert (
        "The weights are those"
        not in fitted_lm(llamas, early_stopping=50, **(options | {"max_steps": 3})).metrics["note"]
    )
    again = fitted_lm(llamas, **(options | {"max_steps": steps}))
    assert torch.allclose(stopped.wlora_weights, again.wlora_weights, atol=1e-6)
    rows = [m.metrics["candidates"]["learned"]["loss"] for m in (stopped, again, fitted_lm(llamas, **options))]
    assert rows[0] == pytest.approx(rows[1], abs=1e-6)
    assert rows[0] <= rows[2]
    with pytest.raises(MixtureError, match="needs eval_data"):
        fitted_lm(llamas, early_stopping=2)
