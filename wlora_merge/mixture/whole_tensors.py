"""Whole tensors that adapters carry, as factors: how a fit trains through them.

A change of a whole matrix is a product of full rank, of the change itself and an identity. So saved heads and embeddings mix in
a fit as any LoRA does, and the attached layer needs not know of them. An export mixes the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter
from ..adapters.deltas import TensorDelta
from ..adapters.factors import Factors
from ..adapters.targets import Find
from ..errors import UnsupportedError
from .live_model import CONVOLUTIONS


def with_whole_tensors(
    adapters: Sequence[Adapter], tensors: Sequence[TensorDelta], layers: Mapping[str, nn.Module], find: Find
) -> list[Adapter]:
    """The adapters with their whole tensors among their modules, as factors of scaling 1, and among their biases.

    Args:
        adapters: N adapters, in mixture order.
        tensors: what `stack_tensors` found on the live model, by its own names.
        layers: the model's modules by name.
        find: the model's tensors.

    Raises:
        UnsupportedError: a tensor whose effect on its layer's output is no product, such as a norm's weight.
    """
    result = [replace(adapter, tensors={}) for adapter in adapters]
    for delta in tensors:
        module, _, leaf = delta.tensor.rpartition(".")
        for n, saved in delta.saved.items():
            adapter = result[n]
            if leaf == "bias":
                result[n] = replace(adapter, biases=adapter.biases | {module: saved})
                continue
            target = find(delta.tensor)
            if target is None or target.read is None or leaf != "weight":
                raise _unsupported(delta.tensor, layers.get(module))
            factors = _factors_of_change(delta.tensor, saved.double() - target.read().cpu().double(), layers[module])
            same = next(
                (name for name in adapter.modules if (t := find(f"{name}.weight")) and t.module == delta.tensor), None
            )
            if same is not None:
                factors = _beside(adapter.modules[same], factors)
            result[n] = replace(adapter, modules=adapter.modules | {same or module: factors})
    return result


def _factors_of_change(name: str, change: torch.Tensor, layer: nn.Module) -> Factors:
    """A change of a layer's weight as lora_B @ lora_A, one of them an identity, whichever is smaller."""
    embedding = isinstance(layer, nn.Embedding)
    if not embedding and not isinstance(layer, (nn.Linear, Conv1D, *CONVOLUTIONS)):
        raise _unsupported(name, layer)
    matrix = change.T if embedding or isinstance(layer, Conv1D) else change.flatten(1)
    out, cols = matrix.shape
    lora_A, lora_B = (matrix, torch.eye(out)) if out <= cols else (torch.eye(cols), matrix)
    if isinstance(layer, CONVOLUTIONS):
        lora_A = lora_A.reshape(-1, *change.shape[1:])
        lora_B = lora_B.reshape(*lora_B.shape, *[1] * (change.dim() - 2))
    return Factors(lora_A.float().contiguous(), lora_B.float().contiguous(), 1.0, embedding)


def _beside(lora: Factors, whole: Factors) -> Factors:
    """The two changes of one module as one."""
    lora_B = (lora.scaling * lora.lora_B.double()).float()
    return replace(
        lora,
        stored_A=torch.cat([lora.lora_A.float(), whole.lora_A]),
        stored_B=torch.cat([lora_B, whole.lora_B], dim=1),
        scaling=1.0,
    )


def _unsupported(name: str, layer: nn.Module | None) -> UnsupportedError:
    return UnsupportedError(
        f"tensor {name!r} is a {type(layer).__name__}'s, which a fit cannot mix as a whole: `wlora-merge mix` and a dense export "
        "can, or say --modules-to-save drop."
    )
