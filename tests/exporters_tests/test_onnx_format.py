"""An ONNX export of a mixture: what it needs of the base, and the names of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.models import make_adapter, tiny_llama
from support.tokenizers import WORDS, tokenizer

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.onnx.session import run_probe

pytest.importorskip("onnxruntime")
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(WORDS),
}  # fmt: skip


def reward_model(folder: Path, pad: str | None = "[pad]") -> list[Path]:
    """A reward model whose config does not say how rows are padded, and an adapter on it."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=1))
    model.save_pretrained(folder / "base")
    made = tokenizer()
    if pad != "[pad]":
        made.pad_token = pad
    made.save_pretrained(folder / "base")
    if pad is None:
        file = folder / "base" / "tokenizer_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    return [make_adapter(model, folder / "a", 1, r=2, target_modules=["q_proj"])]


def test_a_reward_model_takes_its_tokenizers_padding_token(tmp_path: Path) -> None:
    mixture = mix(tmp_path / "base", reward_model(tmp_path), tmp_path / "mixture", weights=[1.0])
    export(mixture, "onnx", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0
    assert "`pad_token_id` is 0, the tokenizer's" in (tmp_path / "out" / "README.md").read_text()
    export(mixture, "dense", tmp_path / "dense")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]])
    with torch.no_grad():  # one row at a time, PyTorch needs no padding
        expected = torch.cat([model(input_ids=row[None]).logits for row in (ids[0], ids[1, :2])])
    got = run_probe(tmp_path / "out", {"input_ids": ids, "attention_mask": (ids != 0).long()})["logits"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert verify(tmp_path / "out")


def test_a_reward_model_without_any_padding_token_is_one_sentence(tmp_path: Path) -> None:
    mixture = mix(tmp_path / "base", reward_model(tmp_path, pad=None), weights=[1.0])
    with pytest.raises(UnsupportedError, match=r"config has no pad_token_id, and its tokenizer none.*set pad_token_id"):
        export(mixture, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_that_is_no_weighted_sum_is_traced_refolded_and_verified(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    adapters = [make_adapter(model, tmp_path / name, i, r=2, target_modules=["q_proj"]) for i, name in enumerate("bcd")]
    mix(tmp_path / "base", adapters, tmp_path / "m", method="ties", density=0.3, task="causal-lm")
    export(tmp_path / "m", "onnx", tmp_path / "traced")
    export(mix(tmp_path / "base", adapters, weights=[0, 0, 0], task="causal-lm"), "onnx", tmp_path / "plain")
    export(tmp_path / "m", "onnx", tmp_path / "refolded", onnx_base=tmp_path / "plain")
    for name in ("traced", "refolded"):
        checked = verify(tmp_path / name, base=tmp_path / "base", adapters=[f"{a.name}={a}" for a in adapters])
        assert not checked.skipped
        assert checked.largest_difference is not None
        assert checked.largest_difference < 1e-5


def test_a_padding_token_without_an_embedding_is_one_sentence(tmp_path: Path) -> None:
    adapters = reward_model(tmp_path, pad="[new]")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert made.pad_token_id == len(WORDS)
    with pytest.raises(UnsupportedError, match=rf"its tokenizer {len(WORDS)}, and no embedding"):
        export(mix(tmp_path / "base", adapters, weights=[1.0]), "onnx", tmp_path / "out")
