"""A base at another size of its vocabulary, against what transformers' own resizing gives and saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_bert, tiny_llama
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ResNetConfig,
    ResNetModel,
)

from wlora_merge.errors import UnsupportedError
from wlora_merge.models.base_model import open_base
from wlora_merge.models.vocabulary import vocabulary, with_vocabulary


def llava() -> Any:
    """A model whose text config has the vocabulary, and whose vision config does not."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


@pytest.mark.parametrize("rows", [50, 70])
@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_bert, llava])
def test_the_tensors_and_the_config_are_those_that_transformers_saves(make: Any, rows: int, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base")
    made = vocabulary(base, rows)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    expected = open_base(tmp_path / "resized")
    own = {name: entry for name, entry in base.entries.items() if entry.shape != expected.entries[name].shape}
    added = {
        name: expected.read(name)[len(base.read(name)) :]
        for name, entry in own.items()
        if entry.shape[0] < expected.entries[name].shape[0]
    }
    result = with_vocabulary(made, added)
    for name, entry in result.entries.items():
        assert result.shape_of(name, entry) == expected.entries[name].shape
        assert torch.equal(result.read_whole(name, entry), expected.read(name))
    config = base.config | made.config
    versions = ("transformers_version", "architectures")
    assert {k: v for k, v in config.items() if k not in versions} == {
        k: v for k, v in json.loads((tmp_path / "resized" / "config.json").read_text()).items() if k not in versions
    }
    assert base.vocabulary is None
    assert base.entries == open_base(tmp_path / "base").entries


def test_a_part_that_the_file_has_not_apart_is_told_beside_the_other_keys(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path)
    base = open_base(tmp_path)
    made = vocabulary(base, 70)
    base.config = {k: v for k, v in base.config.items() if k != "text_config"} | {"vocab_size": 64}
    assert made.config == {"vocab_size": 70}


def test_a_base_without_a_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path / "vision")
    with pytest.raises(UnsupportedError, match=r"vision: a ResNetModel has no vocabulary that can be resized"):
        vocabulary(open_base(tmp_path / "vision"))
    tiny_llama().save_pretrained(tmp_path / "own")
    file = tmp_path / "own" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "unheard-of"}))
    with pytest.raises(UnsupportedError, match="transformers has no class for this base"):
        vocabulary(open_base(tmp_path / "own"))
