"""Hierarchical logits: a row for the whole model, one for each layer, one for each module, and their sum in each group.

    wlora_weights[g] = start[g] + all[0] + layer[layer of g] + module[g]

The optimizer moves the levels; what all modules agree on is learned by all of them at once, and a module alone moves little
(Adam gives each level the same step, and the shared ones add up). A level that has as many rows as the next finer one is left out.
"""

from __future__ import annotations

import torch
from torch import nn

from .layers import Attachment
from .names import GRANULARITIES, group_of

COARSE_TO_FINE = tuple(reversed(GRANULARITIES))


class Levels:
    """The levels of one attached model's weights; `parameters` are what to optimize."""

    def __init__(self, attachment: Attachment) -> None:
        self.weights = attachment.weights
        self.start = self.weights.detach().clone()
        self.index: list[torch.Tensor] = []
        self.parameters: list[nn.Parameter] = []
        first = [modules[0] for modules in attachment.groups.values()]
        sizes = set[int]()
        for level in COARSE_TO_FINE[: COARSE_TO_FINE.index(attachment.granularity) + 1]:
            names = [group_of(module, level) for module in first]
            rows = {name: i for i, name in enumerate(dict.fromkeys(names))}
            if len(rows) in sizes:
                continue
            sizes.add(len(rows))
            self.index.append(torch.tensor([rows[name] for name in names], device=self.weights.device))
            self.parameters.append(nn.Parameter(self.weights.new_zeros(len(rows), self.weights.shape[1])))

    def take_gradient(self) -> None:
        """Each level's gradient: the sum of `wlora_weights`' over the groups that share a row."""
        gradient = self.weights.grad
        for parameter, index in zip(self.parameters, self.index, strict=True):
            parameter.grad = (
                torch.zeros_like(parameter).index_add_(0, index, gradient) if gradient is not None else None
            )

    def write(self) -> None:
        """wlora_weights = start + the sum of the levels."""
        with torch.no_grad():
            total = self.start.clone()
            for parameter, index in zip(self.parameters, self.index, strict=True):
                total += parameter[index]
            self.weights.copy_(total)
