"""The new adapter: a LoRA that a fit trains from zero beside the adapters it was given, and the PEFT folder that it becomes.

Where a task is far from all that the given adapters know, no weights of theirs reach it. A LoRA that starts from their
composition does (recipes/bench_fit/README.md has the figures). It enters the mixture as one more adapter, with weight 1 in
every group, so that nothing behind the fit treats it in a way of its own. The given adapters stay frozen.

This room knows the attached model and PEFT's two files; who writes them to disk is the mixture.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..adapters.config import plain_config
from ..adapters.keys import PEFT_PREFIX
from ..adapters.layouts import Layout
from ..constants import NEW_ADAPTER, NEW_FOLDER
from ..errors import UnsupportedError
from ..models.names import NUMERIC_PART
from .attachment import Attachment, attachment_of
from .groups import make_groups
from .mixture import InputRef, Mixture

ALPHA_OVER_R = 2.0
"""lora_alpha / r: the scaling of the new adapter."""
LAYOUTS = (Layout.LINEAR, Layout.CONV1D)


class NewLora(nn.Module):
    """delta_scale · scaling · (x @ lora_A.T) @ lora_B.T, trained: lora_A [r, in], lora_B [out, r], float32.

    It starts as PEFT's LoRA does: lora_A uniform within ±1/sqrt(in), lora_B zero (`peft.tuners.lora.layer.reset_lora_parameters`).
    """

    def __init__(self, layer: nn.Module, attachment: Attachment, r: int, generator: torch.Generator) -> None:
        super().__init__()
        self.kind, self.attachment = layout_of(layer), attachment
        wide, out = _sizes(layer)
        device, bound = attachment.weights.device, 1 / math.sqrt(wide)
        if isinstance(weight := layer.weight, torch.Tensor):
            device = weight.device
        lora_A = torch.empty(r, wide).uniform_(-bound, bound, generator=generator)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.to(device)), nn.Parameter(torch.zeros(out, r, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The change of the module's output [..., out], given its input [..., in]."""
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)
        return F.linear(F.linear(x, self.lora_A) * (self.attachment.delta_scale * ALPHA_OVER_R), self.lora_B)


def layout_of(layer: nn.Module) -> Layout:
    """How the layer holds its weight."""
    return Layout.LINEAR if isinstance(layer, nn.Linear) else Layout.CONV1D


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, or of GPT-2's Conv1D, which holds its weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)


def add_new_delta(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    """The forward hook of a target module, after the mixture's own."""
    x = args[0] if args else next(iter(kwargs.values()))
    change: torch.Tensor = layer.wlora_new(x)  # type: ignore[operator]
    return output + change.to(output.dtype)


def new_targets(model: nn.Module, *, everywhere: bool = False) -> list[str]:
    """Names of the linear layers that the given adapters change through factors: a new adapter has the same.

    They stand in the model's own order, in which a seed draws them.

    Args:
        model: an attached model.
        everywhere: also each other linear layer of the model's blocks, as PEFT's `all-linear` takes.
    """
    attachment = attachment_of(model)
    stacked = {name: attachment.stacked(name) for name in attachment.layers}
    own = {name for name, lora in stacked.items() if lora.lora_A is not None and lora.layout in LAYOUTS}
    trained = {name.rpartition(".")[0] for name in attachment.head}
    kind = type(attachment.layers[next(iter(sorted(own)))]) if own else nn.Linear
    every = {
        name
        for name, layer in model.named_modules()
        if everywhere and own and type(layer) is kind and _in_block(name) and name not in trained
    }
    return [name for name, _ in model.named_modules() if name in own | every]


def _in_block(name: str) -> bool:
    """Whether a module lies in one of a model's numbered blocks."""
    return any(NUMERIC_PART.fullmatch(part) for part in name.split("."))


def place_new(model: nn.Module, r: int, seed: int, *, everywhere: bool = False) -> list[nn.Parameter]:
    """Put a new adapter of rank r on an attached model, in the place of one that is there; 0 leaves none.

    Args:
        model: the PyTorch model.
        r: the rank; 0 takes the new adapter away.
        seed: of lora_A; the same seed gives the same start on every process.
        everywhere: on each linear layer of the model's blocks; else on those that the given adapters change.

    Returns:
        Its parameters, lora_A and lora_B of each module in turn.

    Raises:
        UnsupportedError: the given adapters change no linear layer.
    """
    attachment = attachment_of(model)
    attachment.remove_new()
    if not r:
        return []
    targets = new_targets(model, everywhere=everywhere)
    if not targets:
        raise UnsupportedError(
            "a new adapter is trained on the linear layers that the given adapters change, and they change none: leave "
            "--new-adapter out."
        )
    generator = torch.Generator().manual_seed(seed)
    for name in targets:
        layer = model.get_submodule(name)
        attachment.hang_new(name, layer, NewLora(layer, attachment, r, generator))
    return new_parameters(model)


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of each module in turn, of the model's new adapter; none where it has none."""
    return [factor for lora in attachment_of(model).new.values() for factor in lora.parameters()]


def new_files(model: nn.Module, base_name: str) -> dict[str, bytes]:
    """The model's new adapter as the two files that PEFT's `save_pretrained` writes; empty where it has none."""
    from safetensors.torch import save

    placed = attachment_of(model).new
    if not placed:
        return {}
    tensors = {
        f"{PEFT_PREFIX}{name}.{part}.weight": factor.detach().cpu().contiguous()
        for name, lora in placed.items()
        for part, factor in lora.named_parameters()
    }
    r = len(next(iter(placed.values())).lora_A)
    config = plain_config(
        r=r,
        lora_alpha=round(ALPHA_OVER_R * r),
        target_modules=sorted(placed),
        base_name=base_name,
        fan_in_fan_out=any(lora.kind is Layout.CONV1D for lora in placed.values()),
    )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {CONFIG_FILE: text.encode(), WEIGHTS_FILE: save(tensors, {"format": "pt"})}


def add_new(mixture: Mixture, files: dict[str, bytes], modules: Sequence[str]) -> None:
    """Make a mixture one of the given adapters and of a new one, whose weight is 1 in every group.

    The weights become free ones: what they were after the softmax, and 1. A group that the new adapter alone changes has zeros
    for the others.

    Args:
        mixture: what the given adapters make.
        files: of the new adapter.
        modules: those that it changes, as the base's files name them.
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    mixture.adapters = [*mixture.adapters, InputRef(NEW_FOLDER, None, digests, _free_name(mixture.adapter_names))]
    weights, known = mixture.mixture_weights, dict(zip(mixture.groups, mixture.mixture_weights, strict=True))
    every = [*(module for group in mixture.groups.values() for module in group), *modules]
    mixture.groups = make_groups(every, mixture.granularity)
    weights = torch.stack([known.get(name, torch.zeros(weights.shape[1])) for name in mixture.groups])
    mixture.mixture_weights = torch.cat([weights, torch.ones(len(weights), 1)], dim=1)
    mixture.wlora_weights, mixture.normalize = mixture.mixture_weights.clone(), "none"
    mixture.new_files = files


def _free_name(taken: Sequence[str]) -> str:
    numbered = (f"{NEW_ADAPTER}-{number}" for number in range(2, len(taken) + 3))
    return next(name for name in (NEW_ADAPTER, *numbered) if name not in taken)
