"""How a fit trains: heads on activations computed once, several processes, checkpointing, quantized bases, stopping."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from conftest import EVERY_LINEAR, make_adapter, tiny_llama
from safetensors.torch import load
from test_candidates import Zoo, fitted
from test_candidates import zoo as zoo
from test_fit import WORDS, others, save_tokenizer
from test_ranks import free_port, launch

import wlora_merge
import wlora_merge.training.learner as training
from wlora_merge.constants import NEW_FOLDER
from wlora_merge.errors import MixtureError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.fit_options import fit_options
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training.loop import _distance

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": " " + " ".join(["w7"] * (1 + i % 5))} for i in range(7)]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A tiny Llama, two adapters, and seven shots whose completions differ in length."""
    root = tmp_path_factory.mktemp("llamas")
    model = tiny_llama(vocab_size=len(WORDS), hidden_size=64, intermediate_size=128)
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    folders = [
        make_adapter(model, root / f"a{i}", i, scale=0.3, r=3, target_modules=EVERY_LINEAR[: 4 + i]) for i in range(2)
    ]
    (root / "shots.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return root / "base", folders, root / "shots.jsonl"


def fitted_lm(llamas: Zoo, out: Path | None = None, **options: Any) -> Mixture:
    """Of the given adapters alone, unless `new_adapter` says otherwise."""
    base, folders, shots = llamas
    settings = {"folds": 0, "max_steps": 4, "batch_size": 3, "granularity": "module", "new_adapter": 0}
    return wlora_merge.fit(base, folders, shots, "causal-lm", out, **(settings | options))


def test_a_head_trained_on_activations_computed_once_is_the_one_trained_through_the_model(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = fitted(zoo, method="uniform", max_steps=12)
    monkeypatch.setattr(training.Learner, "features", lambda self, candidate: None)
    slow = fitted(zoo, method="uniform", max_steps=12)
    for name in fast.head:
        assert torch.allclose(fast.head[name], slow.head[name], atol=1e-6)
    for name, row in fast.metrics["candidates"].items():
        assert row == pytest.approx(slow.metrics["candidates"][name], abs=1e-5)


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


def test_the_first_step_moves_the_head_by_its_own_learning_rate(zoo: Zoo) -> None:
    still, moved = (
        fitted(zoo, method="uniform", folds=0, max_steps=1, head_learning_rate=rate).head["classifier.weight"]
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
        learner = SimpleNamespace(options=fit_options({"batch_size": 3, "seed": seed}))
        return [batch for (batch,) in training.Learner.batches(learner, range(10, 17), 6)]  # type: ignore[arg-type]

    steps = batches(5)
    assert [len(batch) for batch in steps] == [3, 3, 1] * 2
    epochs = [[row for batch in steps[i : i + 3] for row in batch] for i in (0, 3)]
    assert all(sorted(epoch) == list(range(10, 17)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert list(range(10, 17)) not in epochs
    assert batches(5) == steps != batches(6)


def test_a_check_predicts_as_many_judgements_as_the_fit_of_a_language_model_makes(
    llamas: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wlora_merge.cli.costs import _trainings
    from wlora_merge.cli.recipe import FitRecipe
    from wlora_merge.data.examples import read_examples

    judge, judged = training.Learner.judge, list[int]()

    def counted(self: Any, rows: Any, *features: Any) -> Any:
        judged.append(len(rows))
        return judge(self, rows, *features)

    monkeypatch.setattr(training.Learner, "judge", counted)
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(row | {"prompt": f"{row['prompt']} w9"}) for row in ROWS))
    for given in ({}, {"eval_data": str(held)}):
        judged.clear()
        fitted_lm(llamas, folds=3, max_steps=None, new_adapter=None, **given)
        examples, recipe = (
            read_examples(llamas[2], task="causal-lm"),
            FitRecipe(data="shots.jsonl", task="causal-lm", **given),
        )
        *_, passes = _trainings(fit_options({"granularity": "module"}), recipe, examples, None, ["a0", "a1"], False)
        assert sum(judged) == passes * len(ROWS)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_give_the_result_of_one(llamas: Zoo, tmp_path: Path, sharded: bool) -> None:
    base, folders, shots = llamas
    one = fitted_lm(llamas, new_adapter=None)
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch.distributed.fsdp as fsdp; shards, real = [], fsdp.fully_shard\n"
        "fsdp.fully_shard = lambda module, **how: (shards.append(module), real(module, **how))[1]\n"
        f"import wlora_merge; wlora_merge.fit({str(base)!r}, {[str(f) for f in folders]!r}, {str(shots)!r}, 'causal-lm', "
        f"{str(tmp_path / 'two')!r}, folds=0, max_steps=4, batch_size=3, granularity='module', device='cpu')\n"
        f"assert len(shards) == {3 if sharded else 0}, shards"  # two blocks and the model
    )
    environment = {"ACCELERATE_USE_FSDP": "true"} if sharded else {}
    for rank in launch(code, free_port(), **environment):
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors
    two = Mixture.load(tmp_path / "two")
    assert float(two.wlora_weights.abs().max()) > 0.05
    assert torch.allclose(one.wlora_weights, two.wlora_weights, atol=1e-5)
    factors = load(one.new_files["adapter_model.safetensors"])
    again = load((tmp_path / "two" / NEW_FOLDER / "adapter_model.safetensors").read_bytes())
    assert len(factors) > 2
    for name, factor in factors.items():
        assert torch.allclose(factor, again[name], atol=1e-5), name
    assert not (tmp_path / "two.fit-state").exists()


DIES = """
import os, wlora_merge.training.resume as state
real, count = state.FitState.finish, [0]
def finish(self, key, value):
    real(self, key, value)
    count[0] += 1
    if count[0] == 8: os._exit(9)
state.FitState.finish = finish
"""


def test_a_fit_of_two_processes_that_was_killed_is_resumed_by_two(zoo: Zoo, tmp_path: Path) -> None:
    base, folders, shots = zoo
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        f"import wlora_merge; wlora_merge.fit({str(base)!r}, {[str(f) for f in folders]!r}, {str(shots)!r}, "
        f"'text-classification', {str(tmp_path / 'two')!r}, folds=2, max_steps=4, new_adapter=0, device='cpu', resume=True)"
    )
    ranks = launch(DIES + code, free_port())
    said = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [9, 9], said
    assert (tmp_path / "two.fit-state").is_file()
    for rank in launch(code, free_port()):
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors
    one, two = fitted(zoo), Mixture.load(tmp_path / "two")
    assert torch.allclose(one.wlora_weights, two.wlora_weights, atol=1e-5)


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


def test_packed_examples_give_the_same_weights_and_a_model_that_mixes_them_is_refused(
    llamas: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    loss = training.Learner.loss

    def seen(self: Any, rows: list[int], features: Any = None) -> torch.Tensor:
        shapes.append(tuple(self._inputs(rows, self.pack)["input_ids"].shape))
        return loss(self, rows, features)

    plain = fitted_lm(llamas)
    monkeypatch.setattr(training.Learner, "loss", seen)
    packed = fitted_lm(llamas, packing=True)
    assert {rows for rows, _ in shapes} == {1}
    assert torch.allclose(packed.wlora_weights, plain.wlora_weights, atol=1e-5)
    for rounded in ({"quantize": "4bit"}, {"precision": "bf16"}):
        fitted_lm(llamas, packing=True, max_steps=1, **rounded)
    base, folders, shots = llamas
    with pytest.raises(MixtureError, match="packing is of causal-lm, not of seq2seq-lm"):
        wlora_merge.fit(base, folders, shots, "seq2seq-lm", packing=True)
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=len(WORDS), hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)  # counts its positions itself
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj"]) for i in range(2)]
    with pytest.raises(
        MixtureError, match="OPTForCausalLM does not keep packed examples apart, so leave --packing out"
    ):
        fitted_lm((tmp_path / "base", folders, shots), packing=True)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(llamas: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[bool, int] = {}
    loss = training.Learner.loss

    def counted(self: Any, *args: Any) -> torch.Tensor:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            result = loss(self, *args)
        kept[self.options.gradient_checkpointing] = sum(sizes)
        return result

    monkeypatch.setattr(training.Learner, "loss", counted)
    for checkpointing in (False, True):
        fitted_lm(llamas, gradient_checkpointing=checkpointing, max_steps=1)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_fit_on_a_quantized_base_exports_over_the_whole_one(llamas: Zoo, tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    base, folders, _ = llamas
    exact = fitted_lm(llamas)
    mixture = fitted_lm(llamas, tmp_path / "m", quantize=bits)
    assert bool(mixture.wlora_weights.any())
    assert not torch.equal(mixture.wlora_weights, exact.wlora_weights)
    assert torch.allclose(mixture.wlora_weights, exact.wlora_weights, atol=0.15)
    judged = fitted_lm(
        llamas, quantize=bits, folds=2, settings=1, normalize="all", pull=0.0
    )  # trained after passes without gradients
    assert torch.equal(judged.wlora_weights, mixture.wlora_weights)
    export(tmp_path / "m", "dense", tmp_path / "dense")
    checked = verify(tmp_path / "dense", base=base, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-5


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


def test_a_time_budget_drops_folds_first_and_then_stops(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MixtureError, match="max_minutes"):
        fitted(zoo, tmp_path / "out", max_minutes=1e-9)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys.modules["wlora_merge.training.fit"], "FOLD_SHARE", -1.0)
    mixture = fitted(zoo, max_minutes=10)
    assert mixture.metrics["note"].startswith("Not estimated: no time was left for base; uniform")


def test_a_time_budget_leaves_time_to_train_what_is_kept(llamas: Zoo, zoo: Zoo, tmp_path: Path) -> None:
    held = others(llamas[2], tmp_path)
    seen: list[tuple[str, int]] = []
    stopped = fitted_lm(
        llamas,
        eval_data=held,
        max_steps=10**6,
        max_minutes=0.1,
        progress=lambda name, step, *_: seen.append((name, step)),
    )
    steps = [step for name, step in seen if name == "learned"]
    assert steps == list(range(1, len(steps) + 1))  # once, and what was judged is kept
    assert f"Stopped after {steps[-1]} of 1000000 steps, for want of time." in stopped.metrics["note"]
    assert "learned" in stopped.metrics["candidates"]
    assert stopped.metrics["chosen"]["steps"] == steps[-1]
    assert bool(stopped.wlora_weights.any())
    halves = fitted(zoo, folds=0, interpolation=0.5, max_steps=10**6, max_minutes=0.05)
    assert "Stopped after " in halves.metrics["note"]
    assert bool((halves.wlora_weights - 1 / 3).any())
    unjudged = fitted(zoo, folds=0, eval_data=others(zoo[2], tmp_path), method="uniform", max_minutes=10, max_steps=1)
    assert unjudged.metrics["kept"] == "uniform"
    with pytest.raises(MixtureError, match="no time to judge a single adapter"):
        fitted(zoo, method="best-single", max_minutes=1e-9)


def test_progress_has_the_loss_and_the_current_weights(llamas: Zoo) -> None:
    seen: list[tuple[Any, ...]] = []
    mixture = fitted_lm(llamas, progress=lambda *row: seen.append(row))
    assert [row[:3] for row in seen] == [("learned", step, 4) for step in (1, 2, 3, 4)]
    mean = dict(zip(("a0", "a1"), mixture.mixture_weights.mean(0).tolist(), strict=True))
    assert seen[-1][4] == pytest.approx(mean)


def test_report_to_logs_the_final_training_with_accelerates_trackers(
    llamas: Zoo, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import tracking

    logged: list[tuple[int, dict[str, float]]] = []

    started: list[bool] = []

    class Memory(tracking.GeneralTracker):  # type: ignore[misc]
        def start(self) -> None:  # accelerate opens its files here
            started.append(True)

        name = "memory"
        requires_logging_directory = False
        tracker: ClassVar[None] = None

        def __init__(self, run_name: str) -> None:
            super().__init__(_blank=True)

        def log(self, values: dict[str, float], step: int, **_: Any) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "memory", Memory)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["memory"])
    fitted_lm(llamas, report_to="memory", device="cpu")
    assert [step for step, _ in logged] == [1, 2, 3, 4, -1]
    assert started == [True]
    assert set(logged[0][1]) == {"loss", "weight/a0", "weight/a1"}
    logged.clear()
    fitted(zoo, folds=0, interpolation=0.5, report_to="memory", device="cpu")  # whose head is trained before it
    assert [step for step, _ in logged] == [1, 2, 3, 4, -1]
    logged.clear()
    mixture = fitted_lm(llamas, eval_data=others(llamas[2], tmp_path), report_to="memory", device="cpu")
    assert [step for step, _ in logged] == [1, 2, 3, 4, -1]
    mean = dict(zip(("weight/a0", "weight/a1"), mixture.mixture_weights.mean(0).tolist(), strict=True))
    assert logged[3][1] == pytest.approx(mean | {"loss": mixture.metrics["history"]["learned"][-1][1]})
    with pytest.raises(UnsupportedError, match=r"finds no such tracker.*memory"):
        fitted_lm(
            llamas, report_to="nothing", device="cpu", progress=lambda *_: pytest.fail("trained before it refused")
        )


def test_three_examples_of_a_language_model_are_not_held_out_and_the_note_says_how_many_would_be(
    llamas: Zoo, tmp_path: Path
) -> None:
    base, folders, _ = llamas
    shots = tmp_path / "three.jsonl"
    shots.write_text("".join(json.dumps({"prompt": f"w{i}", "completion": f" w{i + 9}"}) + "\n" for i in range(3)))
    mixture = wlora_merge.fit(base, folders, shots, "causal-lm", max_steps=1)
    assert mixture.metrics["note"] == (
        "Not estimated: nothing was held out. Give --eval-data, or 4 different examples or more."
    )
    assert mixture.metrics["chosen"]["new_adapter"] == 0
