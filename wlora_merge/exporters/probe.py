"""The inputs on which an export is compared with its mixture, and what a model gives on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..data.tasks import get_task
from ..errors import VerifyError, WloraMergeError
from ..models.loading import library_errors
from ..progress import Meter

if TYPE_CHECKING:
    import torch
    from torch import nn

PROBE_ELEMENTS = 16_000_000
"""Most numbers that a probe gives by shape."""


def make_probe(config: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Inputs on which an export is compared with its mixture, small and the same everywhere; empty where none is known.

    Token ids come from a linear congruential generator over the vocabulary; pixels, given by shape, from torch's seed 0.
    """
    if "image_size" in config and "num_channels" in config:
        probe = _image_probe(config)
    elif not _takes_sounds(config):
        probe = _token_probe(config, get_task(task))
    else:
        probe = {}
    return probe if all(map(is_probe, probe.values())) else {}


def _takes_sounds(config: Mapping[str, Any]) -> bool:
    return "conv_dim" in config or bool(config.get("num_mel_bins") and config.get("model_type") != "whisper")


def _image_probe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels of two images; of a video, nothing."""
    if "num_frames" in config:
        return {}
    size = config["image_size"]
    sizes = size if isinstance(size, list) else [size, size]
    return {"pixel_values": {"shape": [2, config["num_channels"], *sizes], "seed": 0}}


def _token_probe(config: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Two rows of tokens, for the decoder four of each too; of Whisper, the sounds that it decodes."""
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return {}
    state, ids = 1, []
    for _ in range(24):
        state = (1103515245 * state + 12345) % 2**31
        ids.append(state % vocabulary)
    own = config.get("decoder_vocab_size")
    written = [i % own if isinstance(own, int) and own > 0 else i for i in ids]
    decoded = {"decoder_input_ids": [written[4:8], written[16:20]]}
    if config.get("model_type") == "whisper":
        sizes = [config.get("num_mel_bins"), 2 * config.get("max_source_positions", 0)]
        return {"input_features": {"shape": [2, *sizes], "seed": 0}, **decoded}
    rows = [ids[:12], ids[12:]]
    if task.needs_pad_token and config.get("pad_token_id") is None:  # a decoder then takes no batch
        rows = rows[:1]
    decodes = task.is_encoder_decoder or (config.get("is_encoder_decoder") is True and task.is_body)
    return {"input_ids": rows, **(decoded if decodes else {})}


def is_probe(value: Any) -> bool:
    """Whether it is a table {shape, seed} or rows of token ids, as `probe.make_probe` makes them, of a bounded size."""
    if isinstance(value, dict):
        shape = value.get("shape")
        numbers: list[Any] = [*shape, value.get("seed")] if isinstance(shape, list) else [None]
        return all(type(n) is int and 0 <= n < 2**31 for n in numbers) and math.prod(numbers[:-1]) <= PROBE_ELEMENTS
    rows = value if isinstance(value, list) and all(isinstance(row, list) for row in value) else [[None]]
    return len({len(row) for row in rows}) == 1 and all(type(n) is int and 0 <= n < 2**63 for row in rows for n in row)


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


def outputs_of(
    model: nn.Module, probe: Mapping[str, Any], error: type[WloraMergeError] = VerifyError
) -> dict[str, torch.Tensor]:
    """The model's floating outputs on the probe (logits, start_logits, last_hidden_state, ...).

    Raises:
        error: the model does not run on it.
    """
    import torch

    Meter("comparing outputs")
    with torch.no_grad(), library_errors("the model does not run on the probe", error):
        dtype = next(model.parameters()).dtype
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in probe_tensors(probe).items()}
        result = model(**inputs, return_dict=True)
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
