"""From what a model gave on held-out examples to scores with standard errors, and which of two is better.

Standard errors are the jackknife's over the examples, which holds for any metric: leave a part of the examples out, compute
the metric again (Efron and Stein 1981). The same parts are left out for every candidate, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..data.metrics import Metric

PARTS = 50


@dataclass(frozen=True)
class Score:
    """How a candidate did: its mean loss, the metric's numbers, and the main number with one part of the examples left out."""

    loss: float
    values: dict[str, float]
    name: str
    higher_is_better: bool
    left_out: NDArray[np.float64]

    @property
    def value(self) -> float:
        """The number by which candidates are compared."""
        return self.values[self.name]

    @property
    def standard_error(self) -> float:
        """Of `value`."""
        return _jackknife(self.left_out)

    def row(self) -> dict[str, float]:
        """For mixture.json and tables."""
        return {"loss": self.loss, self.name: self.value, f"{self.name}_se": self.standard_error}

    def key(self) -> tuple[float, float]:
        """Larger is better: the metric, then the loss."""
        return (self.value if self.higher_is_better else -self.value, -self.loss)

    def ahead_of(self, other: Score) -> tuple[float, float]:
        """By how much this one is better in the metric, and the standard error of that difference."""
        sign = 1 if self.higher_is_better else -1
        return sign * (self.value - other.value), _jackknife(self.left_out - other.left_out)


def pool(parts: Sequence[Judged]) -> Judged:
    """Folds as one set of examples."""
    items = sum(part.items for part in parts)
    loss = sum(part.loss * part.items for part in parts) / max(items, 1)
    return Judged(join_batches([p.outputs for p in parts]), join_batches([p.labels for p in parts]), loss, items)


def score(judged: Judged, metric: Metric) -> Score:
    """Compute the metric on all examples, and with each part left out."""
    n = len(_first(judged.labels))
    values = _compute(metric, judged, np.arange(n))
    count = min(n, PARTS)  # every count-th, so that a file sorted by its labels has parts like any other
    parts = [np.arange(first, n, count) for first in range(count)] if n > 1 else []
    left_out = [_compute(metric, judged, np.setdiff1d(np.arange(n), part))[metric.name] for part in parts]
    return Score(values.get("loss", judged.loss), values, metric.name, metric.higher_is_better, np.array(left_out))


def _compute(metric: Metric, judged: Judged, keep: NDArray[np.int_]) -> dict[str, float]:
    prediction = SimpleNamespace(predictions=_take(judged.outputs, keep), label_ids=_take(judged.labels, keep))
    return metric.compute(cast("Any", prediction))


def _take(value: Any, keep: NDArray[np.int_]) -> Any:
    return tuple(_take(part, keep) for part in value) if isinstance(value, tuple | list) else value.numpy()[keep]


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, tuple | list) else value


def _jackknife(left_out: NDArray[np.float64]) -> float:
    n = len(left_out)
    return math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum())) if n > 1 else 0.0


@dataclass(frozen=True)
class Judged:
    """What a model gave on E held-out rows: the metric's inputs (tensors [E, ...] on the CPU), and the mean loss."""

    outputs: Any
    labels: Any
    loss: float
    items: int


def join_batches(parts: Sequence[Any]) -> Any:
    """Batches [E_i, T_i, ...] -> one tensor [E, T, ...], shorter ones padded with -100; tuples part by part."""
    if isinstance(parts[0], tuple):
        return tuple(join_batches([part[i] for part in parts]) for i in range(len(parts[0])))
    if parts[0].ndim < 2 or all(p.shape[1:] == parts[0].shape[1:] for p in parts):
        return torch.cat(list(parts))
    width = max(p.shape[1] for p in parts)
    return torch.cat([nn.functional.pad(p, (0, 0) * (p.ndim - 2) + (0, width - p.shape[1]), value=-100) for p in parts])
