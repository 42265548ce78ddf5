"""Mixtures whose head sees pooled tokens, and what PEFT's merge and float64 say that they compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from support.models import make_adapter, peft_sum

from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.models.base_model import open_base

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}
DEBERTA = SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
IDS = torch.tensor([[5, 6, 7, 8, 9, 11], [9, 4, 5, 1, 1, 1], [31, 1, 1, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
TANH = 2.0**-11


class Family(NamedTuple):
    """An encoder: its config's settings, the square layer of its head, whether that has a tanh, and two targets of a LoRA."""

    settings: dict[str, Any]
    square: str
    tanh: bool
    targets: list[str]


FAMILIES = {
    "Bert": Family(SIZES, "bert.pooler.dense", True, ["query", "value"]),
    "Roberta": Family(SIZES | {"layer_norm_eps": 1e-5}, "classifier.dense", True, ["query", "value"]),
    "XLMRoberta": Family(SIZES | {"layer_norm_eps": 1e-5}, "classifier.dense", True, ["query", "value"]),
    "Electra": Family(SIZES | {"embedding_size": 16}, "classifier.dense", False, ["query", "value"]),
    "DistilBert": Family(DISTIL, "pre_classifier", False, ["q_lin", "v_lin"]),
    "MPNet": Family(SIZES, "classifier.dense", True, ["attn.q", "attn.v"]),
    "DebertaV2": Family(DEBERTA, "pooler.dense", False, ["query_proj", "value_proj"]),
}
FOUR = ["Bert", "Roberta", "XLMRoberta", "Electra", "DistilBert"]
"""Those whose pooling is one more layer."""


class Pooled(NamedTuple):
    """A mixture, the adapters' folders, its model in float64 without a head, and what the linear head on the pooled vector is."""

    mixture: Mixture
    adapters: list[Path]
    merged: Any
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """What `verify` takes."""
        return {"base": self.mixture.base.source, "adapters": [f"{folder.name}={folder}" for folder in self.adapters]}

    def logits(self, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> torch.Tensor:
        """The head on the layer norm of the pooled tokens, float64."""
        with torch.no_grad():
            tokens = self.merged.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = [row[: kept.sum()] for row, kept in zip(tokens, mask, strict=True)]
        vectors = torch.stack([row.mean(0) if self.mixture.pooling == "mean" else row[-1] for row in rows])
        vectors = vectors - vectors.mean(1, keepdim=True)
        return vectors / vectors.pow(2).mean(1, keepdim=True).sqrt() @ self.weight.T + self.bias


def model_of(family: str, **changes: Any) -> Any:
    """A tiny random classifier, its layer norms not all alike."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family].settings | changes), num_labels=3)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.mul_(3)
    return model


def served_head(family: str, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """A linear head W, b as the class's own square layer in its linear range and its last layer."""
    square, hidden = FAMILIES[family].square, weight.shape[1]
    out = "classifier.out_proj" if square == "classifier.dense" else "classifier"
    if FAMILIES[family].tanh:
        inner, shift, weight = TANH * torch.eye(hidden), 0.0, weight / TANH
    else:
        inner, shift = torch.eye(hidden), 2.0 ** torch.tensor(hidden**0.5 + 8).log2().ceil().item()
    head = {
        f"{square}.weight": inner,
        f"{square}.bias": torch.full((hidden,), shift),
        f"{out}.weight": weight,
        f"{out}.bias": bias - shift * weight.sum(1),
    }
    return dict(sorted(head.items()))  # as a mixture's folder gives it


def pooled(
    family: str,
    root: Path,
    pooling: str = "mean",
    *,
    prefix: bool = False,
    dtype: torch.dtype = torch.float32,
    weights: tuple[float, float] = (0.75, 0.5),
    layers: int = 2,
) -> Pooled:
    """A mixture of two adapters on a tiny base, with a head on the pooled tokens.

    `layers`: of the base; `prefix`: the base's files put `bert.` before the names of its body.
    """
    model = model_of(family, **{"n_layers" if family == "DistilBert" else "num_hidden_layers": layers})
    model.to(dtype)
    (model if prefix else model.base_model).save_pretrained(root / "base", max_shard_size="30kB")
    model.float()
    adapters = [
        make_adapter(model, root / name, seed, r=2, target_modules=FAMILIES[family].targets)
        for seed, name in enumerate("ab")
    ]
    made = mix(root / "base", adapters, weights=list(weights), task="text-classification")
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(3, 32, generator=generator) / 4, torch.randn(3, generator=generator)
    made.head = served_head(family, weight, bias)
    made.head_tensors = open_base(root / "base").stored_names(made.head)
    made.pooling = pooling
    made.config = {"id2label": {"0": "x", "1": "y", "2": "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    merged = copy.deepcopy(model).double()
    merged.load_state_dict(peft_sum(model, adapters, list(weights)))
    return Pooled(made, adapters, merged, weight.double(), bias.double())
