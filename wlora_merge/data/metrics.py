"""What a task reports: numbers from logits and labels, as `transformers.Trainer` hands them over.

`Metric.preprocess` runs on the device batch by batch and keeps as little as the numbers need, so the logits of a whole
vocabulary are never gathered; `Metric.compute` sees all batches. This room knows tensors and labels, no files and no
models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..constants import MULTI, REGRESSION
from .labels import LabelSet

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import EvalPrediction

IGNORED = -100  # a label that no loss and no metric counts
MAX_ANSWER_TOKENS = 30
OUTSIDE = "O"


@dataclass(frozen=True)
class Metric:
    """How a task is judged.

    Attributes:
        name: the key of `compute`'s result by which methods are compared.
        higher_is_better: whether a larger value is better.
        compute: for `Trainer(compute_metrics=...)`.
        preprocess: for `Trainer(preprocess_logits_for_metrics=...)`; None keeps the logits as they are.
    """

    name: str
    higher_is_better: bool
    compute: Callable[[EvalPrediction], dict[str, float]]
    preprocess: Callable[[Any, Any], torch.Tensor] | None = None


def classification_metric(labels: LabelSet) -> Metric:
    """Accuracy; micro F1 for multi-label; mean squared error and Pearson's r for a regression."""
    if labels.problem_type == REGRESSION:
        return Metric("mse", False, _regression, _first)
    if labels.problem_type == MULTI:
        return Metric("f1", True, _multi_label, _first)
    return Metric("accuracy", True, _accuracy, _first)


def causal_lm_metric() -> Metric:
    """Of the tokens that carry loss, the mean loss and the share predicted right; of the rows, the share all right."""
    return Metric(
        "accuracy", True, _token_sums, lambda logits, labels: token_sums(_first(logits)[:, :-1], labels[:, 1:])
    )


def seq2seq_metric() -> Metric:
    """The same for a decoder whose output at a position is for the label at that position."""
    return Metric("accuracy", True, _token_sums, lambda logits, labels: token_sums(_first(logits), labels))


def tagging_metric(labels: LabelSet) -> Metric:
    """Token accuracy, and micro F1 over all tags but `O`. Tokens are counted, not whole entities."""
    outside = labels.names.index(OUTSIDE) if OUTSIDE in labels.names else None

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        return _tagging(np.asarray(prediction.predictions), np.asarray(prediction.label_ids), outside)

    return Metric("f1", True, compute, lambda logits, labels: _first(logits).argmax(-1))


def answering_metric() -> Metric:
    """Exact match and F1 of the predicted span with the first answer. Spans are compared as tokens, not as text."""
    return Metric("f1", True, _answering, best_span)


def token_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For each row: sum of the loss, tokens predicted right, tokens counted.

    Args:
        logits: [B, T, V], any float dtype.
        labels: [B, T] int64, -100 where nothing is predicted; aligned with the logits.

    Returns:
        [B, 3] float32.
    """
    import torch

    kept = labels != IGNORED
    chosen, wanted = logits[kept].float(), labels[kept]  # [n, V], [n]: only what counts is widened
    row = kept.nonzero()[:, 0]
    loss = torch.nn.functional.cross_entropy(chosen, wanted, reduction="none")
    each = torch.stack([loss, (chosen.argmax(-1) == wanted).float(), torch.ones_like(loss)], dim=1)
    return torch.zeros(len(labels), 3, device=logits.device).index_add_(0, row, each)


def best_span(logits: Any, labels: Any = None) -> torch.Tensor:
    """The most likely span that does not end before it starts, nor has over `MAX_ANSWER_TOKENS` tokens.

    Args:
        logits: start and end logits, each [B, T].

    Returns:
        [B, 2] int64: first and last token.
    """
    import torch

    start, end = logits[0].float(), logits[1].float()
    length = start.shape[1]
    allowed = torch.ones(length, length, device=start.device).triu().tril(MAX_ANSWER_TOKENS - 1).bool()
    scores = (start[:, :, None] + end[:, None, :]).masked_fill(~allowed, float("-inf"))  # [B, T, T]
    best = scores.flatten(1).argmax(1)
    return torch.stack([best // length, best % length], dim=1)


def _first(logits: Any, labels: Any = None) -> Any:
    """The logits alone: models may give hidden states and caches along with them."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def _multi_label(prediction: EvalPrediction) -> dict[str, float]:
    predicted, wanted = np.asarray(prediction.predictions) > 0, np.asarray(prediction.label_ids) > 0.5
    return {"f1": _f1(predicted, wanted), "accuracy": float((predicted == wanted).all(-1).mean())}


def _regression(prediction: EvalPrediction) -> dict[str, float]:
    predicted = np.asarray(prediction.predictions, np.float64).reshape(-1)
    wanted = np.asarray(prediction.label_ids, np.float64).reshape(-1)
    spread = predicted.std() * wanted.std()
    covariance = ((predicted - predicted.mean()) * (wanted - wanted.mean())).mean()
    return {"mse": float(((predicted - wanted) ** 2).mean()), "pearson": float(covariance / spread) if spread else 0.0}


def _token_sums(prediction: EvalPrediction) -> dict[str, float]:
    rows = np.asarray(prediction.predictions, np.float64)
    rows = rows[rows[:, 2] > 0]
    loss, right, count = rows.sum(0)
    return {
        "loss": float(loss / count),
        "accuracy": float(right / count),
        "exact": float((rows[:, 1] == rows[:, 2]).mean()),
    }


def _tagging(predicted: NDArray[Any], wanted: NDArray[Any], outside: int | None) -> dict[str, float]:
    kept = wanted != IGNORED
    predicted, wanted = predicted[kept], wanted[kept]
    right, none = predicted == wanted, -1 if outside is None else outside
    found, true = (predicted != none).sum(), (wanted != none).sum()
    hits = (right & (wanted != none)).sum()
    return {"f1": float(2 * hits / (found + true)) if found + true else 0.0, "accuracy": float(right.mean())}


def _answering(prediction: EvalPrediction) -> dict[str, float]:
    spans = np.asarray(prediction.predictions)  # [E, 2]
    wanted = np.stack([np.asarray(part) for part in prediction.label_ids], axis=1)  # [E, 2]
    common = np.minimum(spans[:, 1], wanted[:, 1]) - np.maximum(spans[:, 0], wanted[:, 0]) + 1
    sizes = (spans[:, 1] - spans[:, 0] + 1) + (wanted[:, 1] - wanted[:, 0] + 1)
    return {"f1": float((2 * common.clip(min=0) / sizes).mean()), "exact": float((spans == wanted).all(1).mean())}


def _f1(predicted: NDArray[Any], wanted: NDArray[Any]) -> float:
    total = predicted.sum() + wanted.sum()
    return float(2 * (predicted & wanted).sum() / total) if total else 0.0
