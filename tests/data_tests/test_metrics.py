"""Numbers from logits and labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wlora_merge.constants import MULTI, REGRESSION
from wlora_merge.data.labels import LabelSet
from wlora_merge.data.metrics import token_sums
from wlora_merge.data.tasks import get_task


def test_token_sums_equal_the_loss_and_accuracy_counted_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator)
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, -100]])
    labels[0, 1] = logits[0, 1].argmax()
    labels[0, 2] = logits[0, 2].argmin()
    sums = token_sums(logits, labels)
    loss = torch.nn.functional.cross_entropy(logits[0, 1:3], labels[0, 1:3], reduction="sum")
    torch.testing.assert_close(sums, torch.tensor([[loss.item(), 1.0, 2.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("labels", "logits", "wanted", "expected"),
    [
        (LabelSet(("a", "b")), [[1, 0], [1, 0], [0, 1]], [0, 1, 1], {"accuracy": 2 / 3}),
        (LabelSet(("a", "b"), MULTI), [[0.3, -0.2], [0.1, 1]], [[1, 0], [0, 1]], {"f1": 0.8, "accuracy": 0.5}),
        (LabelSet((), REGRESSION), [[1], [2], [3]], [2, 4, 6], {"mse": 14 / 3, "pearson": 1.0}),
        (LabelSet((), REGRESSION), [[1], [2], [3]], [6, 4, 2], {"mse": 10.0, "pearson": -1.0}),
        (LabelSet((), REGRESSION, 7.0, 2.0), [[1], [2], [3]], [6, 4, 2], {"mse": 40.0, "pearson": -1.0}),
        (LabelSet((), REGRESSION), [[1], [1]], [2, 4], {"mse": 5.0, "pearson": 0.0}),
    ],
)
def test_classification_metrics(labels: LabelSet, logits: Any, wanted: Any, expected: dict[str, float]) -> None:
    metric = get_task("text-classification").metric(labels)
    predicted = SimpleNamespace(predictions=np.array(logits, np.float32), label_ids=np.array(wanted))
    assert metric.compute(predicted) == pytest.approx(expected)  # type: ignore[arg-type]
    assert metric.higher_is_better == (labels.problem_type != REGRESSION)
