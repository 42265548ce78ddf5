"""What a task reports: numbers from logits and labels, as `transformers.Trainer` hands them over.

`Metric.preprocess` runs on the device batch by batch and keeps as little as the numbers need, so the logits of a whole
vocabulary are never gathered; `Metric.compute` sees all batches. Metrics of one task alone stand in its own file. This file knows
tensors and labels, no files and no models; numpy and torch are imported where they compute, as the help of `fit` lists the tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..constants import MULTI, REGRESSION
from .labels import LabelSet

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import EvalPrediction

IGNORED = -100  # a label that no loss and no metric counts


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
    """Accuracy; micro F1 for multi-label; for a regression Pearson's r, and the mean squared error in the labels' own unit."""
    if labels.problem_type == REGRESSION:
        return Metric("mse", False, partial(_regression, spread=labels.spread), first_output)
    if labels.problem_type == MULTI:
        return Metric("f1", True, _multi_label, first_output)
    return choice_metric()


def choice_metric() -> Metric:
    """Of the rows, the share whose class has the largest logit."""
    return Metric("accuracy", True, _accuracy, first_output)


def causal_lm_metric() -> Metric:
    """Of the tokens that carry loss, the mean loss and the share predicted right; of the rows, the share all right."""
    return Metric(
        "accuracy", True, _token_sums, lambda logits, labels: token_sums(first_output(logits)[:, :-1], labels[:, 1:])
    )


def seq2seq_metric() -> Metric:
    """The same for a decoder whose output at a position is for the label at that position."""
    return Metric("accuracy", True, _token_sums, lambda logits, labels: token_sums(first_output(logits), labels))


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


def first_output(logits: Any, labels: Any = None) -> Any:
    """The logits alone: models may give hidden states and caches along with them."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    import numpy as np

    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def _multi_label(prediction: EvalPrediction) -> dict[str, float]:
    import numpy as np

    predicted, wanted = np.asarray(prediction.predictions) > 0, np.asarray(prediction.label_ids) > 0.5
    return {"f1": _f1(predicted, wanted), "accuracy": float((predicted == wanted).all(-1).mean())}


def _regression(prediction: EvalPrediction, spread: float) -> dict[str, float]:
    import numpy as np

    predicted = np.asarray(prediction.predictions, np.float64).reshape(-1)
    wanted = np.asarray(prediction.label_ids, np.float64).reshape(-1)
    product = predicted.std() * wanted.std()
    covariance = ((predicted - predicted.mean()) * (wanted - wanted.mean())).mean()
    error = float((((predicted - wanted) * spread) ** 2).mean())
    return {"mse": error, "pearson": float(covariance / product) if product else 0.0}


def _token_sums(prediction: EvalPrediction) -> dict[str, float]:
    import numpy as np

    rows = np.asarray(prediction.predictions, np.float64)
    rows = rows[rows[:, 2] > 0]
    loss, right, count = rows.sum(0)
    return {
        "loss": float(loss / count),
        "accuracy": float(right / count),
        "exact": float((rows[:, 1] == rows[:, 2]).mean()),
    }


def _f1(predicted: NDArray[Any], wanted: NDArray[Any]) -> float:
    total = predicted.sum() + wanted.sum()
    return float(2 * (predicted & wanted).sum() / total) if total else 0.0
