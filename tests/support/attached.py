"""Tiny models with adapters attached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.models import make_adapter, tiny_llama
from transformers import (
    AutoModelForCausalLM,
)

from wlora_merge.mixture.attach import attach

IDS = torch.tensor([[5, 17, 3, 80, 41, 2], [9, 9, 60, 1, 7, 33]])


def attached(llama_zoo: Callable[..., Any], **options: Any) -> tuple[Any, Path]:
    base, folders = llama_zoo()
    return attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folders, **options), base


def randomized(model: Any, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    model.wlora_weights.data.normal_()
    return model


def attached_llama(tmp_path: Path, **options: Any) -> Any:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj", "v_proj"]) for i in range(2)]
    return attach(model, folders, **options)
