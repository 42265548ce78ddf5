"""Rotary positions of every kind in a graph, behind the lengths at which their frequencies change, against PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.onnx_models import TEXT, VOCABULARY, make_dense

from wlora_merge.data.tasks import get_task
from wlora_merge.errors import VerifyError
from wlora_merge.onnx.convert import check_onnx, run_probe, write_onnx
from wlora_merge.onnx.rope import lengths_that_matter, stateless_rope
from wlora_merge.onnx.session import next_scores, open_graphs

pytest.importorskip("onnxruntime")
Traced = Callable[[str], tuple[Path, Path]]
SHORT = 12  # the length that the model was trained for
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": SHORT,
    },
    "longrope": {
        "factor": 4.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": SHORT,
    },
}  # fmt: skip


def config_of(kind: str) -> Any:
    rope = {"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]}
    longest = SHORT if "original_max_position_embeddings" not in rope else 4 * SHORT
    sizes = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": longest}
    return transformers.LlamaConfig(**TEXT, **sizes, rope_parameters=rope)  # type: ignore[arg-type]


def fresh(dense: Path) -> Any:
    """A model that has seen no longer sequence yet."""
    return transformers.LlamaForCausalLM.from_pretrained(dense).eval()


def ids_of(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """A function: kind -> (a model's folder, its ONNX export)."""

    @functools.cache
    def make(kind: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(kind)
        dense, out = make_dense(root / "dense", "LlamaForCausalLM", config_of(kind)), root / "out"
        out.mkdir()
        write_onnx(dense, out, task="causal-lm", cached_as=kind)
        return dense, out

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_pytorchs_outputs_at_lengths_beyond_those_of_training(kind: str, traced: Traced) -> None:
    dense, out = traced(kind)
    for length in (1, SHORT - 1, SHORT, SHORT + 1, 2 * SHORT, 4 * SHORT - 3):
        ids = ids_of(length, batch=2)
        with torch.no_grad():
            expected = fresh(dense)(input_ids=ids).logits
        torch.testing.assert_close(run_probe(out, {"input_ids": ids})["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_generation_that_grows_beyond_them_is_pytorchs(kind: str, traced: Traced) -> None:
    dense, out = traced(kind)
    prompt = ids_of(SHORT - 4)
    expected = fresh(dense).generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[0]
    feed = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    feed["position_ids"] = torch.arange(prompt.shape[1])[None]
    steps = next_scores(open_graphs(out), {k: v.numpy() for k, v in feed.items()}, 0)
    got = [int(next(steps).argmax())]
    while len(got) < 12:
        got.append(int(steps.send(got[-1]).argmax()))
    assert [*prompt[0].tolist(), *got] == expected.tolist()


def test_frequencies_of_one_length_at_all_lengths_do_not_pass_the_check(tmp_path: Path) -> None:
    """The graph of a model without dynamic NTK, beside a config that says it has it."""
    dense = make_dense(tmp_path / "dense", "LlamaForCausalLM", config_of("dynamic"))
    plain = config_of("dynamic")
    plain.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    other, out = make_dense(tmp_path / "plain", "LlamaForCausalLM", plain), tmp_path / "out"
    out.mkdir()
    write_onnx(other, out, task="causal-lm")
    with pytest.raises(VerifyError, match=f"sequence {SHORT + 3}"):
        check_onnx(out, dense, task="causal-lm")


def test_an_encoder_with_a_kind_for_each_type_of_layer_is_exported(tmp_path: Path) -> None:
    default = {"rope_type": "default", "rope_theta": 1e4}
    ropes = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "sliding_attention": default,
    }
    config = transformers.ModernBertConfig(
        **(TEXT | {"num_hidden_layers": 2}), vocab_size=VOCABULARY, max_position_embeddings=SHORT, pad_token_id=0,
        rope_parameters=ropes,
        layer_types=["full_attention", "sliding_attention"], local_attention=8,
    )  # fmt: skip
    dense, out = make_dense(tmp_path / "dense", "ModernBertForSequenceClassification", config), tmp_path / "out"
    out.mkdir()
    write_onnx(dense, out, task="text-classification")
    ids = ids_of(2 * SHORT)
    model = get_task("text-classification").auto_class().from_pretrained(dense).eval()
    assert lengths_that_matter(model) == {SHORT}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(run_probe(out, {"input_ids": ids})["logits"], expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = transformers.LlamaForCausalLM(config_of("dynamic")).eval()
    rotary = model.model.rotary_emb
    with stateless_rope(model):
        assert "forward" in vars(rotary)
    assert "forward" not in vars(rotary)
    assert lengths_that_matter(transformers.LlamaForCausalLM(config_of("yarn"))) == set()
