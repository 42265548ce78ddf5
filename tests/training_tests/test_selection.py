"""Which candidate is kept, for scores that are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.scripted import contender

from wlora_merge.training import selection
from wlora_merge.training.comparison import Comparison
from wlora_merge.training.scoring import Score


def compared(scores: dict[str, Score] | None = None) -> Comparison:
    return Comparison({contender(label): score for label, score in (scores or {}).items()})


def chosen(method: str, select: str, scores: dict[str, Score], names: list[str]) -> str:
    return selection.chosen(method, select, compared(scores), names).label


def rivals(kept: str, scores: dict[str, Score], others: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    better, good = selection.rivals(contender(kept), compared(scores), list(map(contender, others)))
    return {who.label: lead for who, lead in better.items()}, {who.label: lead for who, lead in good.items()}


def made_score(value: float, loss: float = 1.0, left_out: tuple[float, ...] = (0.5, 0.5)) -> Score:
    return Score(loss, {"accuracy": value}, "accuracy", True, np.array(left_out))


def test_select_best_keeps_a_simpler_candidate_where_it_did_better() -> None:
    scores = {
        "base": made_score(0.99),
        "uniform": made_score(0.9),
        "a": made_score(0.9, 0.5),
        "learned": made_score(0.8),
    }
    assert chosen("learned", "method", scores, ["a"]) == "learned"
    assert chosen("learned", "best", scores, ["a"]) == "a"
    assert chosen("auto", "method", scores, ["a"]) == "a"
    assert chosen("learned", "best", {}, ["a"]) == "learned"


def test_select_best_keeps_a_simpler_candidate_that_is_as_good_and_none_that_is_worse() -> None:
    def kept(value: float, loss: float, method: str = "learned") -> str:
        scores = {
            "base": made_score(0.99),
            "uniform": made_score(value, loss, (value, value + 0.1)),
        }  # an error of 0.05
        return chosen(method, "best", scores | {method: made_score(0.8), "a": made_score(0.1)}, ["a"])

    for method in ("learned", "search", "fixed"):
        assert kept(0.76, 1.2, method) == "uniform"
        assert kept(0.74, 1.0, method) == kept(0.76, 1.3, method) == method
    scores = {"uniform": made_score(0.80), "a": made_score(0.79, left_out=(0.79, 0.89))}
    assert chosen("uniform", "best", scores, ["a"]) == "uniform"
    assert chosen("best-single", "best", scores, ["a"]) == "uniform"


def test_what_was_not_judged_is_kept_only_where_nothing_was() -> None:
    """Time may have ended before the learned mixture was judged."""
    judged = {"base": made_score(0.9), "uniform": made_score(0.5), "a": made_score(0.6)}
    assert chosen("auto", "method", judged, ["a"]) == "a"
    assert chosen("learned", "best", judged, ["a"]) == "a"
    assert chosen("learned", "method", judged, ["a"]) == "learned"
    base = {"base": made_score(0.9)}
    assert chosen("auto", "method", base, ["a"]) == chosen("learned", "best", base, ["a"]) == "learned"


def test_where_the_metric_is_an_error_the_lowest_is_the_best() -> None:
    def of(error: float) -> Score:
        return Score(1.0, {"mse": error}, "mse", False, np.array([error, error + 0.1]))

    scores = {"base": of(9.0), "uniform": of(2.0), "a": of(3.0), "learned": of(1.0)}
    assert chosen("auto", "method", scores, ["a"]) == "learned"
    assert chosen("best-single", "best", scores, ["a"]) == "uniform"
    assert scores["learned"].ahead_of(scores["a"])[0] == pytest.approx(2.0)
    better, _ = rivals("a", scores, ["uniform"])
    assert better["uniform"][0] == pytest.approx(1.0)


def test_rivals_are_better_in_the_metric_or_within_an_error_and_never_with_a_far_larger_loss() -> None:
    def of(value: float, loss: float) -> Score:  # the error of a difference: 0.05 where one is under 0.9
        return made_score(value, loss, (value, value + (0.1 if value < 0.9 else 0.0)))

    scores = {"learned": of(0.9, 0.07), "a": of(0.95, 0.06), "b": of(0.9, 0.09), "c": of(0.9, 2.34), "d": of(0.88, 0.1)}
    scores |= {"e": of(0.5, 0.05)}
    better, good = rivals("learned", scores, ["e", "d", "c", "b", "a", "learned", "gone"])
    assert better == {"a": (pytest.approx(0.05), pytest.approx(0.0))}
    assert list(good) == ["b", "d"]
    assert good["d"] == (pytest.approx(-0.02), pytest.approx(0.05))
    assert rivals("gone", scores, ["a"]) == ({}, {})
