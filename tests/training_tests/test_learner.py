"""How a fit trains: heads on activations computed once, several processes, checkpointing, quantized bases, stopping."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load
from sklearn.linear_model import LogisticRegression
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.language_models import fitted_lm
from support.language_models import llamas as llamas
from support.models import make_adapter, tiny_bert
from support.processes import free_port, launch
from support.shots import WORDS, others, save_tokenizer

import wlora_merge
import wlora_merge.training.learner as training
from wlora_merge.constants import NEW_FOLDER
from wlora_merge.data.examples import read_examples
from wlora_merge.data.tasks import get_task
from wlora_merge.errors import MixtureError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training import preparation, run


@pytest.mark.parametrize("pooling", ["mean", "cls", "model"])
def test_a_solved_head_is_scikit_learn_s_on_what_the_export_computes(zoo: Zoo, tmp_path: Path, pooling: str) -> None:
    mixture = fitted(zoo, tmp_path / "m", method="uniform", pooling=pooling, folds=0)
    export(tmp_path / "m", "dense", tmp_path / "dense")
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "dense")
    rows = [line.rsplit(",", 1) for line in zoo[2].read_text().splitlines()[1:]]
    inputs = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)
    wanted = [model.config.label2id[label] for _, label in rows]
    seen: list[torch.Tensor] = []
    layer = model.bert.pooler.dense if pooling != "model" else model.classifier
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    features = seen[0].double().numpy()
    features = features / np.sqrt((features**2).sum(1).mean())
    theirs = LogisticRegression(C=10.0, tol=1e-12, max_iter=20000).fit(features, wanted)
    np.testing.assert_allclose(logits.softmax(1).numpy(), theirs.predict_proba(features), atol=1e-4)
    assert mixture.metrics["chosen"] == {**mixture.metrics["chosen"], "pooling": pooling, "l2": 0.1}
    assert mixture.pooling == ("mean" if pooling == "mean" else None)


@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
def test_where_every_token_is_judged_the_head_is_solved_too(task: str, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model = transformers.BertModel.from_pretrained(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, scale=0.4, target_modules=["query"]) for i in range(2)]
    lines = [
        {"tokens": [f"w{i}", f"w{i + 1}", "w7"], "tags": ["X" if i % 2 else "Y", "O", "O"]}
        if task == "token-classification"
        else {
            "question": f"w{i}", "context": f"w{i + 1} w{i + 2} w9",
            "answers": {"text": [f"w{i + 2}"], "answer_start": [len(f"w{i + 1} ")]},
        }
        for i in range(10, 22)
    ]  # fmt: skip
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixture = wlora_merge.fit(
        tmp_path / "base", folders, tmp_path / "shots.jsonl", task, tmp_path / "m", method="uniform", folds=2, l2=0.5
    )
    assert mixture.metrics["chosen"]["l2"] == 0.5
    export(tmp_path / "m", "dense", tmp_path / "dense")
    kind = "TokenClassification" if task == "token-classification" else "QuestionAnswering"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "dense").eval().double()
    head = model.classifier if task == "token-classification" else model.qa_outputs
    job = get_task(task)
    tokenizer = job.load_processor(tmp_path / "dense")
    examples = read_examples(tmp_path / "shots.jsonl", task=task)
    encoded = job.encode(examples, tokenizer, labels=job.labels(examples))
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    total = sum(model(**job.collator(tokenizer)([row])).loss * job.items(row) for row in encoded)
    scale = float(torch.cat([part[0] for part in seen]).square().sum(-1).mean())
    if task == "token-classification":  # the norm of what the loss counts
        counted = [part[0][torch.tensor(row["labels"]) != -100] for part, row in zip(seen, encoded, strict=True)]
        scale = float(torch.cat(counted).square().sum(-1).mean())
    slope = torch.autograd.grad(total + 0.25 * scale * head.weight.square().sum(), [head.weight, head.bias])
    assert max(float(part.abs().max()) for part in slope) < 1e-4
    checked = verify(tmp_path / "dense", base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-5


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
        f"'text-classification', {str(tmp_path / 'two')!r}, folds=2, max_steps=4, new_adapter=0, pooling='cls', device='cpu', "
        "resume=True)"
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


def test_packed_examples_give_the_same_weights_and_a_model_that_mixes_them_is_refused(
    llamas: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    loss = training.Learner.loss

    def seen(self: Any, rows: list[int]) -> torch.Tensor:
        shapes.append(tuple(self._inputs(rows, self.pack)["input_ids"].shape))
        return loss(self, rows)

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
        kept[self.run.options.gradient_checkpointing] = sum(sizes)
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


def test_a_time_budget_drops_folds_first_and_then_stops(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MixtureError, match="max_minutes"):
        fitted(zoo, tmp_path / "out", max_minutes=1e-9)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys.modules["wlora_merge.training.stages"], "FOLD_SHARE", -1.0)
    mixture = fitted(zoo, max_minutes=10)
    assert mixture.metrics["note"].startswith("Not estimated: no time was left for base; uniform")


@pytest.fixture
def a_second_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for the fit's budget that goes on by a second when it is looked at, however fast the machine is."""
    looks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(looks)))
    for module in (preparation, run):
        monkeypatch.setattr(module, "time", clock)


@pytest.mark.usefixtures("a_second_a_look")
def test_a_time_budget_leaves_time_to_train_what_is_kept(llamas: Zoo, zoo: Zoo, tmp_path: Path) -> None:
    held = others(llamas[2], tmp_path)
    seen: list[tuple[str, int]] = []
    stopped = fitted_lm(
        llamas,
        eval_data=held,
        max_steps=10**6,
        max_minutes=1,
        progress=lambda name, step, *_: seen.append((name, step)),
    )
    steps = [step for name, step in seen if name == "learned"]
    assert steps == list(range(1, len(steps) + 1))  # once, and what was judged is kept
    assert f"Stopped after {steps[-1]} of 1000000 steps, for want of time." in stopped.metrics["note"]
    assert "learned" in stopped.metrics["candidates"]
    assert stopped.metrics["chosen"]["steps"] == steps[-1]
    assert bool(stopped.wlora_weights.any())
    halves = fitted(zoo, folds=0, interpolation=0.5, max_steps=10**6, max_minutes=1)
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
