"""A mixture from hub ids, and the card of an export of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from wlora_merge.exporters.formats import FORMATS
from wlora_merge.exporters.model_card import CardFacts, write_card
from wlora_merge.exporters.serving import Exported
from wlora_merge.mixture.mixture import InputRef, Mixture


def mixture(sources: tuple[str, ...] = ("org/a", "org/b"), **changes: Any) -> Mixture:
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    options: dict[str, Any] = {
        "base": InputRef("org/base", None, {}),
        "adapters": [InputRef(s, None, {}, Path(s).name) for s in sources],
        "granularity": "module",
        "normalize": "all",
        "delta_scale": 1.0,
        "groups": {"q": ["q"], "k": ["k"]},
        "mixture_weights": weights,
        "wlora_weights": weights.log(),
        "task": "causal-lm",
    }
    return Mixture(**(options | changes))


def card(
    folder: Path,
    made: Mixture,
    kind: str = "dense",
    base_name: str = "org/base",
    folders: tuple[Path, ...] = (),
    **more: Any,
) -> ModelCard:
    more.setdefault("exported", Exported(kind, made.task, "LlamaForCausalLM" if made.task == "causal-lm" else ""))
    write_card(folder, CardFacts(made, FORMATS[kind], base_name, folders, **more))
    return ModelCard.load(folder / "README.md")
