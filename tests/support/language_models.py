"""A tiny Llama with adapters and prompts, and a fit of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.fits import Zoo
from support.fits import zoo as zoo
from support.models import EVERY_LINEAR, make_adapter, tiny_llama
from support.shots import WORDS, save_tokenizer

import wlora_merge
from wlora_merge.mixture.mixture import Mixture

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
