"""Tokenizers that lie beside adapters: their files and their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import make_adapter, tiny_llama
from support.tokenizers import WORDS, tokenizer

from wlora_merge.adapters.adapter import Adapter, load_adapter
from wlora_merge.adapters.tokenizers import tokenizer_beside, tokenizer_files, tokens
from wlora_merge.errors import AdapterError, UnsupportedError


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return load_adapter(make_adapter(tiny_llama(), tmp_path / "a", 0, r=2, target_modules=["q_proj"]))


def test_tokens_are_those_of_the_vocabulary_and_those_added(adapter: Adapter) -> None:
    assert tokens(tokenizer_beside(adapter)) == {}
    made = tokenizer()
    made.add_tokens(["<new>"])
    made.save_pretrained(adapter.source.folder)
    assert tokens(tokenizer_beside(adapter)) == dict(enumerate([*WORDS, "<new>"]))


def test_a_tokenizer_must_be_there_and_have_no_token_without_a_row(adapter: Adapter) -> None:
    with pytest.raises(UnsupportedError, match=r"--tokenizer-from a: .* has no tokenizer"):
        tokenizer_files(adapter, 99, "--tokenizer-from")
    tokenizer().save_pretrained(adapter.source.folder)
    assert "tokenizer.json" in tokenizer_files(adapter, len(WORDS), "--tokenizer-from")
    with pytest.raises(AdapterError, match=rf"has a token {len(WORDS) - 1}, and its embeddings have 5 rows"):
        tokenizer_files(adapter, 5, "--tokenizer-from")
