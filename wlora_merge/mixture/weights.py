"""The maths of mixture weights, for the fit and for the export: softmax, presence, gains.

It knows tensors of numbers. It knows neither adapters nor files.

Source of the method: Asadi et al. 2024, https://arxiv.org/abs/2402.15414.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def mixture_weights(logits: torch.Tensor, normalize: str, temperature: float = 1.0) -> torch.Tensor:
    """Logits [..., N] -> mixture weights [..., N]: softmax(logits / temperature), or the free weights themselves."""
    return logits if normalize == "none" else (logits / temperature).softmax(-1)


def at_module(weights: torch.Tensor, present: torch.Tensor, normalize: str) -> torch.Tensor:
    """Mixture weights [..., N] as modules use them: `present` renormalizes over the adapters that target each [..., N] bool."""
    if normalize != "present":
        return weights
    kept = weights * present
    total = kept.sum(-1, keepdim=True)
    return kept / total.where(total != 0, 1.0)


def gains(
    weights: torch.Tensor, scaling: torch.Tensor, adapter_index: torch.Tensor, delta_scale: float | torch.Tensor
) -> torch.Tensor:
    """gains [R] = delta_scale · mixture weight · scaling, one for each stacked row; differentiable in `weights`.

    Args:
        weights: [N] of one module, or flat those of several.
        scaling: [R].
        adapter_index: [R], which of the weights each row has.
        delta_scale: of the whole delta weight.
    """
    return delta_scale * weights[adapter_index] * scaling


def uniform(n: int) -> list[float]:
    """Mixture weights of uniform composition."""
    return [1.0 / n] * n


def uniform_start(n: int, normalize: str) -> list[float]:
    """Uniform composition as what is trained: free weights of 1/N, or logits of zero."""
    return uniform(n) if normalize == "none" else [0.0] * n
