"""Scores of completions against whole sequences that transformers runs one at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fits import Zoo
from support.language_models import fitted_lm
from support.language_models import llamas as llamas
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from wlora_merge import export, mix
from wlora_merge.training.completions import Completions, find_completions, logits_at, next_token_loss

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0}, "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0}, "gpt2": GPT, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "bloom": {},
    "mamba": {},
}  # fmt: skip
OWN_CACHE = {"mamba"}
TOKENS = [(5,), (6, 7), (6, 7, 8), (9, 10)]
PROMPTS = [[1, 20, 21], [1, 30, 31, 32, 33], [1, 40]]


def _row(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, list[int]]:
    return {"input_ids": [*prompt, *completion], "labels": [-100] * len(prompt) + list(completion)}


def _padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)
    return {name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in batch]) for name in batch[0]}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_has_the_log_probability_of_all_of_its_tokens(family: str, shared: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **FAMILIES[family])).eval()
    rows = [_row(prompt, TOKENS[number]) for number, prompt in enumerate(PROMPTS)]
    completions = Completions(model, rows, TOKENS, torch.device("cpu"))
    if shared:
        completions.try_sharing(1e-3)
        assert completions.shares == (family not in OWN_CACHE)
    expected = torch.zeros(len(PROMPTS), len(TOKENS))
    with torch.no_grad():
        scores = completions.scores([2, 0, 1])
        for i, prompt in enumerate(PROMPTS):
            for k, word in enumerate(TOKENS):
                logits = model(torch.tensor([[*prompt, *word]])).logits[0].double().log_softmax(-1)
                expected[i, k] = sum(logits[len(prompt) - 1 + j, token] for j, token in enumerate(word))
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, expected[[2, 0, 1]], rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1
    assert completions.classes([2, 0, 1]).tolist() == [2, 0, 1]


def test_a_prompt_runs_once_for_all_completions_and_gradients_go_through_it() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()
    rows = [_row(prompt, TOKENS[number]) for number, prompt in enumerate(PROMPTS)]
    completions = Completions(model, rows, TOKENS, torch.device("cpu"))
    tokens, gradients = [], []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    for shares in (False, True):
        completions.shares = shares
        tokens.append(0)
        cross_entropy(completions.scores([0, 1, 2]), completions.classes([0, 1, 2])).backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        model.zero_grad()
    assert tokens == [0, 3 * 2 * 7, 0, 3 * 5, 3 * 2 * 2]  # two branches of each prompt: (6, 7) and (9,)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_no_logits_are_computed_that_nothing_looks_at() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    inputs = _padded([_row(prompt, ()) for prompt in PROMPTS])
    at = (torch.tensor([0, 2]), torch.tensor([2, 1]))
    found, _ = logits_at(model, {"input_ids": inputs["input_ids"]}, at)
    assert seen == [(2, 97)]
    assert torch.allclose(found, model(input_ids=inputs["input_ids"]).logits[at], rtol=0, atol=1e-5)


def test_the_loss_of_a_text_is_the_model_s_own() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()
    rows = [_row(PROMPTS[0], TOKENS[1]), _row(PROMPTS[1], TOKENS[2]), _row([], PROMPTS[1])]
    batch = _padded(rows)
    batch["labels"][batch["labels"] == 0] = -100
    loss = next_token_loss(model, batch)
    assert float(loss.detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)


def test_what_repeats_behind_prompts_are_classes() -> None:
    def rows(*completions: tuple[int, ...]) -> list[dict[str, list[int]]]:
        return [_row([1, 9], completion) for completion in completions]

    classes = [("no",), ("yes",), ("no",), ("yes",)]
    shots = rows((5,), (6, 7), (5,), (6, 7))
    assert find_completions(classes, shots) == [(5,), (6, 7)]
    assert find_completions(classes, shots + rows((6, 7))) == [(5,), (6, 7)]
    assert find_completions(classes, shots + rows((8,))) is None  # evaluation data with another completion
    assert find_completions([("",)] * 4, shots) is None
    assert find_completions([("no",)] * 2, rows((5,), (5,))) is None
    assert find_completions(classes, rows((5,), (6, 7), (4,), (6, 7))) is None  # one text, other tokens
    several = {"input_ids": [1, 5, 2, 5], "labels": [-100, 5, -100, 5]}
    assert find_completions([("no",), ("yes",)], [several, *rows((6, 7))]) is None


def _score(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """The log-probability of a completion, by the model's own mean loss."""
    ids, size = tokenizer(prompt + completion).input_ids, len(tokenizer(completion, add_special_tokens=False).input_ids)
    labels = [-100] * (len(ids) - size) + ids[-size:]
    return -size * model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()


def test_a_fit_on_completions_that_repeat_judges_and_trains_the_choice(llamas: Zoo, tmp_path: Path) -> None:
    base, adapters, _ = llamas
    shots = tmp_path / "shots.jsonl"
    words = ["w7", "w8 w9"]
    table = [{"prompt": f"w{1 + i % 2} w{i}", "completion": f" {words[i % 2]}"} for i in range(8)]
    shots.write_text("".join(json.dumps(row) + "\n" for row in table))
    options = {"folds": 2, "max_steps": 30, "batch_size": 8, "new_adapter": 4, "learning_rate": 0.1}
    mixture = fitted_lm((base, adapters, shots), **options, new_adapter_learning_rate=0.02)
    losses = [loss for _, loss in mixture.metrics["history"]["learned, all shots"]]
    export(mix(base, adapters), "dense", tmp_path / "uniform")
    model, tokenizer = (cls.from_pretrained(tmp_path / "uniform") for cls in (AutoModelForCausalLM, AutoTokenizer))
    scores = torch.tensor([[_score(model, tokenizer, row["prompt"], f" {word}") for word in words] for row in table])
    expected = cross_entropy(scores, torch.arange(8) % 2)
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)  # before the first step, of all shots
    assert losses[-1] < 0.7 * losses[0]
    candidates = mixture.metrics["candidates"]
    assert set(candidates["uniform"]) == {"loss", "accuracy", "accuracy_se"}
    assert candidates["uniform"]["accuracy"] * 8 == pytest.approx(round(candidates["uniform"]["accuracy"] * 8))
