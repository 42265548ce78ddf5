"""TIES, DARE and pruning as PEFT's own functions make them of dense delta weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from support.models import peft_changes

METHODS: list[dict[str, Any]] = [
    {"method": "ties", "density": 0.2},
    {"method": "ties", "density": 1.0},
    {"method": "ties", "density": 0.5, "majority_sign": "frequency"},
    {"method": "magnitude_prune", "density": 0.3},
    {"method": "dare_linear", "density": 0.4, "seed": 3},
    {"method": "dare_ties", "density": 0.4, "seed": 3},
    {"method": "dare_ties", "density": 0.6, "majority_sign": "frequency"},
]


def mask(seed: int, adapter: str, module: str, shape: torch.Size, density: float) -> torch.Tensor:
    """Which numbers DARE keeps, from the definition: place n has the n-th draw of one Philox stream."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{adapter}\0{module}".encode()).digest()[:16], "big")
    draws = np.random.Philox(key=key).random_raw(shape.numel()).reshape(shape)
    return torch.from_numpy((draws >> np.uint64(11)) < np.uint64(density * 2**53))


def by_peft(
    model: Any, folders: list[Path], weights: list[float], monkeypatch: pytest.MonkeyPatch, prefix: str = "", **how: Any
) -> dict[str, torch.Tensor]:
    """The model's tensors in float64, and what PEFT's function of the method makes of each adapter's dense delta weight.

    `prefix` is what the names of the model have before those of the base's files, by which numbers are drawn.
    """
    changes = [peft_changes(model, folder) for folder in folders]
    tensors = {name: tensor.double() for name, tensor in model.state_dict().items()}
    more = {"majority_sign_method": how["majority_sign"]} if "majority_sign" in how else {}
    for name in {name for change in changes for name in change}:
        present = [n for n, change in enumerate(changes) if name in change]
        masks = iter(
            mask(
                how.get("seed", 0),
                folders[n].name,
                name.removeprefix(prefix).removesuffix(".weight"),
                tensors[name].shape,
                how["density"],
            )
            for n in present
        )
        monkeypatch.setattr(torch, "bernoulli", lambda full, masks=masks: next(masks).to(full.dtype))
        function = getattr(merge_utils, how["method"])
        given = [changes[n][name] for n in present]
        tensors[name] = tensors[name] + function(
            given, torch.tensor([weights[n] for n in present], dtype=torch.float64), how["density"], **more
        )
        monkeypatch.undo()
    return tensors
