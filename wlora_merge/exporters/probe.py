"""The inputs on which an export is compared with its mixture, and what a model gives on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..data.tasks import get_task
from ..errors import VerifyError
from ..models.loading import library_errors
from ..progress import Meter
from .manifest import is_probe

if TYPE_CHECKING:
    import torch
    from torch import nn


def make_probe(config: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Inputs on which an export is compared with its mixture, small and the same everywhere; empty where none is known.

    Token ids come from a linear congruential generator over the vocabulary; pixels, given by shape, from torch's seed 0.
    """
    probe = _probe(config, get_task(task))
    return probe if all(is_probe(name, value) for name, value in probe.items()) else {}


def _probe(config: Mapping[str, Any], task: Task) -> dict[str, Any]:
    if "image_size" in config and "num_channels" in config:
        size = config["image_size"]
        sizes = size if isinstance(size, list) else [size, size]
        frames = "num_frames" in config  # of a video
        return {} if frames else {"pixel_values": {"shape": [2, config["num_channels"], *sizes], "seed": 0}}
    if "conv_dim" in config or (config.get("num_mel_bins") and config.get("model_type") != "whisper"):
        return {}  # of sounds
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return {}
    state, ids = 1, []
    for _ in range(24):
        state = (1103515245 * state + 12345) % 2**31
        ids.append(state % vocabulary)
    if config.get("model_type") == "whisper":
        sizes = [config.get("num_mel_bins"), 2 * config.get("max_source_positions", 0)]
        return {"input_features": {"shape": [2, *sizes], "seed": 0}, "decoder_input_ids": [ids[4:8], ids[16:20]]}
    rows = [ids[:12], ids[12:]]
    if task.needs_pad_token and config.get("pad_token_id") is None:  # a decoder then takes no batch
        rows = rows[:1]
    decodes = task.is_encoder_decoder or (config.get("is_encoder_decoder") is True and task.is_body)
    return {"input_ids": rows} | ({"decoder_input_ids": [ids[4:8], ids[16:20]]} if decodes else {})


def probe_tensors(probe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The probe as the model's keyword arguments."""
    import torch

    tensors = {}
    for name, value in probe.items():
        if isinstance(value, dict):
            tensors[name] = torch.randn(value["shape"], generator=torch.Generator().manual_seed(value["seed"]))
        else:
            tensors[name] = torch.tensor(value)
    return tensors


def outputs_of(model: nn.Module, probe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's floating outputs on the probe (logits, start_logits, last_hidden_state, ...)."""
    import torch

    Meter("comparing outputs")
    with torch.no_grad(), library_errors("the model does not run on the probe", VerifyError):
        result = model(**probe_tensors(probe), return_dict=True)
    wanted = (
        "logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output", "token_embeddings",
        "sentence_embedding", "text_embeds", "image_embeds",
    )  # fmt: skip
    found = {name: result[name].float() for name in wanted if name in result and isinstance(result[name], torch.Tensor)}
    if "logits" in found or "start_logits" in found:
        found.pop("last_hidden_state", None)
    return found


def difference_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest value expected."""
    return float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
