"""Whether a model keeps examples apart that stand end to end in one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import MixtureError
from ..fit_options import FitOptions

PACKED_TOLERANCE = {None: 1e-4, "bf16": 2e-2, "4bit": 2e-2, "8bit": 1e-1}
"""By how much, relative to it, the loss of packed examples may differ: by rounding alone. 8bit chooses its outliers in the batch, and
its loss is off by 4e-2 on SmolLM2."""
PACKED_INFLUENCE = {"8bit": 1e-1}
"""The same of what the example before it may change in an example's logits: nothing, else 1e-4."""
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def refuse_packing(
    model: nn.Module, rows: Sequence[dict[str, Any]], padded: Collate, packed: Collate, options: FitOptions
) -> None:
    """Refuse a model for which an example in a packed row is not what it is alone: its layers mix what stands in one row.

    Args:
        model: a causal language model.
        rows: one or two encoded examples.
        padded: collates examples, each in a row of its own.
        packed: collates examples end to end.
        options: of the fit: how the base is loaded says how near is the same.

    Raises:
        MixtureError: it mixes them.
    """
    device = next(model.parameters()).device
    first = rows[0] | {"input_ids": rows[0]["input_ids"][::-1]}
    with torch.no_grad():
        apart, together, other = (
            model(**{name: value.to(device) for name, value in collate(list(part)).items()})
            for collate, part in ((padded, rows), (packed, rows), (packed, [first, *rows[1:]]))
        )
    kind = options.quantize or ("bf16" if options.precision == "bf16" else None)
    same = math.isclose(float(apart.loss), float(together.loss), rel_tol=PACKED_TOLERANCE[kind])
    if len(rows) > 1:  # nor may what stands before an example change it
        length = len(rows[-1]["input_ids"])
        one, two = (result.logits[0, -length:].float() for result in (together, other))
        same = same and bool((one - two).abs().max() <= PACKED_INFLUENCE.get(kind or "", 1e-4) * one.abs().max())
    if not same:
        raise MixtureError(
            f"packing: two examples in one row do not give what each gives alone: {type(model).__name__} does not keep "
            "packed examples apart, so leave --packing out."
        )
