"""Scores and their standard errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wlora_merge.constants import SINGLE
from wlora_merge.data.labels import LabelSet
from wlora_merge.data.metrics import Metric, classification_metric
from wlora_merge.training.scoring import Judged, pool, score


def test_the_standard_error_does_not_depend_on_the_order_of_the_examples() -> None:

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) // 500
    right = torch.rand(1000, generator=generator) < 0.3 + 0.4 * labels
    logits = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float()
    order = torch.randperm(1000, generator=generator)
    metric = classification_metric(LabelSet(("a", "b"), SINGLE))
    for rows in (torch.arange(1000), order):
        found = score(Judged(logits[rows], labels[rows], 1.0, 1000), metric)
        assert found.standard_error == pytest.approx((found.value * (1 - found.value) / 1000) ** 0.5, rel=0.25)


def test_a_score_has_the_jackknife_error_which_for_a_mean_is_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    logits = torch.zeros(40, 2)
    logits[torch.arange(40), torch.tensor(right).long()] = 1.0
    halves = [
        Judged(logits[part], torch.ones(len(logits[part]), dtype=torch.long), 1.0, 20)
        for part in (slice(20), slice(20, 40))
    ]
    found = score(pool(halves), Metric("accuracy", True, accuracy))
    assert found.value == pytest.approx(right.mean())
    assert found.standard_error == pytest.approx(right.std(ddof=1) / np.sqrt(40))
    assert found.ahead_of(found) == (0.0, 0.0)


def test_the_loss_of_pooled_folds_is_the_mean_over_their_examples() -> None:
    folds = [Judged(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), loss, n) for n, loss in ((1, 1.0), (3, 4.0))]
    assert pool(folds).loss == pytest.approx(3.25)
