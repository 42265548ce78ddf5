"""Mixtures without inputs, and broken files of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wlora_merge.adapters.deltas import ModuleDelta
from wlora_merge.adapters.factors import Factors
from wlora_merge.adapters.layouts import Layout
from wlora_merge.errors import MixtureError
from wlora_merge.mixture.mixture import InputRef, Mixture

GROUPS = {"model.layers.0": ["model.layers.0.q", "model.layers.0.k"], "lm_head": ["lm_head"]}


def made(**changes: Any) -> Mixture:
    torch.manual_seed(0)
    logits = torch.randn(2, 3)
    options: dict[str, Any] = {
        "base": InputRef("org/base", "c0ffee", {"model.safetensors": "0" * 64}),
        "adapters": [InputRef(f"org/{n}", None, {"adapter_model.safetensors": "1" * 64}, n) for n in "abc"],
        "granularity": "layer",
        "normalize": "all",
        "delta_scale": 0.1 + 0.2,
        "groups": copy.deepcopy(GROUPS),
        "mixture_weights": logits.softmax(-1),
        "wlora_weights": logits,
        "task": "text-classification",
        "config": {"id2label": {"0": "é", "1": "b"}},
        "metrics": {"candidates": {"base": {"loss": 1.5}, "learned": {"loss": 0.1}}, "note": "n"},
        "head": {"classifier.weight": torch.randn(2, 4), "classifier.bias": torch.randn(2).bfloat16()},
        "modules_to_save": "a",
        "data": {"shots": 8},
        "prefixes": ("", "bert."),
    }
    return Mixture(**(options | changes))


def same(a: Mixture, b: Mixture) -> bool:
    tensors = ("mixture_weights", "wlora_weights")
    plain = {k: v for k, v in vars(a).items() if k not in (*tensors, "head")}
    return (
        plain == {k: v for k, v in vars(b).items() if k not in (*tensors, "head")}
        and all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors)
        and a.head.keys() == b.head.keys()
        and all(torch.equal(a.head[k], b.head[k]) and a.head[k].dtype == b.head[k].dtype for k in a.head)
    )


def delta(module: str, adapters: list[int]) -> ModuleDelta:
    R = len(adapters)
    return ModuleDelta(
        module,
        Layout.LINEAR,
        (4, 4),
        (Factors(torch.ones(1, 4), torch.ones(4, 1), 2.0, embedding=False),) * R,
        tuple(adapters),
        3,
    )


def edit(folder: Path, path: str, value: Any) -> None:
    """Set (or with Ellipsis delete) what a dotted path names in mixture.json."""
    made().save(folder)
    table = json.loads((folder / "mixture.json").read_text())
    at, keys = table, path.split("/")
    for key in keys[:-1]:
        at = at[int(key)] if isinstance(at, list) else at[key]
    last: Any = int(keys[-1]) if isinstance(at, list) else keys[-1]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    (folder / "mixture.json").write_text(json.dumps(table))


def refused(folder: Path) -> str:
    with pytest.raises(MixtureError) as error:
        Mixture.load(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message
