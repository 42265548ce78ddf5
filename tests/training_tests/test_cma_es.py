"""The search without gradients."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.shots import others

from wlora_merge.errors import MixtureError
from wlora_merge.mixture.attachment import attachment_of
from wlora_merge.training.cma_es import minimize
from wlora_merge.training.learner import Learner
from wlora_merge.training.resume import FitState
from wlora_merge.training.scoring import Judged


def test_a_search_is_made_once_and_ends_with_its_time(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = minimize
    monkeypatch.setattr("wlora_merge.training.comparison.minimize", lambda *a, **k: seen.append(1) or real(*a, **k))
    held = others(zoo[2], tmp_path)
    fitted(zoo, method="search", folds=0, eval_data=held, max_steps=1)
    assert seen == [1]
    judged: list[int] = []
    judge = Learner.judge
    monkeypatch.setattr(Learner, "judge", lambda self, *a, **k: judged.append(1) or judge(self, *a, **k))
    with pytest.raises(MixtureError, match="max_minutes left no time"):
        fitted(zoo, method="search", folds=0, max_minutes=1e-9, max_steps=1)
    assert judged == []


def test_a_search_that_time_cut_says_where_it_stopped_and_is_not_taken_for_done(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        ends = False

        def monotonic(self) -> float:
            return 310.0 if self.ends else 0.0  # of ten minutes

    clock, judge, judged, finished = Clock(), Learner.judge, list[int](), list[str]()

    def ending(self: Learner, *args: Any, **options: Any) -> Judged:
        judged.append(1)
        clock.ends = len(judged) >= 7
        return judge(self, *args, **options)

    for module in ("preparation", "run"):
        monkeypatch.setattr(sys.modules[f"wlora_merge.training.{module}"], "time", clock)
    monkeypatch.setattr(Learner, "judge", ending)
    monkeypatch.setattr(FitState, "finish", lambda self, key, value: finished.append(key))
    options = {"method": "search", "folds": 0, "max_minutes": 10, "max_steps": 1}
    alone = fitted(zoo, **options).metrics
    assert "The search stopped after 7 of 40 evaluations, for want of time." in alone["note"]
    judged.clear()
    clock.ends = False
    held = fitted(zoo, eval_data=others(zoo[2], tmp_path), **options).metrics
    assert held["kept"] == "search"
    assert list(held["candidates"]) == ["base", "uniform", "a0", "a1", "a2", "search"]
    assert "The search stopped after 7 of 40 evaluations, for want of time." in held["note"]
    assert not any(key.endswith("row") for key in finished)


def test_a_search_is_pulled_towards_small_weights_and_stays_within_its_bound(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "search", "normalize": "none", "folds": 0, "max_steps": 1}
    judge, largest = Learner.judge, list[float]()
    monkeypatch.setattr(Learner, "judge", lambda self, *a, **k: replace(judge(self, *a, **k), loss=1.0))
    assert float(fitted(zoo, **options).mixture_weights.abs().sum()) < 0.9  # it starts at a third each

    def steep(self: Learner, *args: Any, **more: Any) -> Judged:
        weights = attachment_of(self.model).weights
        largest.append(float(weights.abs().max()))
        return replace(judge(self, *args, **more), loss=-10 * float(weights.sum()))

    monkeypatch.setattr(Learner, "judge", steep)
    fitted(zoo, **options)
    assert max(largest) == 1.5


def test_cma_es_finds_the_minimum_of_a_rotated_ellipsoid() -> None:
    rng = np.random.default_rng(1)
    Q, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    target = np.array([0.3, -0.7, 1.1, 0.2])
    calls: list[int] = []

    def loss(x: Any) -> float:
        calls.append(1)
        return float((np.array([1.0, 3.0, 10.0, 30.0]) * (Q @ (np.asarray(x) - target)) ** 2).sum())

    found = minimize(loss, [0.0] * 4, sigma=0.5, evaluations=600, seed=0)
    assert np.allclose(found, target, atol=1e-3)
    assert len(calls) == 600
    assert found == minimize(loss, [0.0] * 4, sigma=0.5, evaluations=600, seed=0)
