"""The answer of a report: the best candidate, its lead and how sure that is; SciPy's intervals are the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.cards import mixture

from wlora_merge.exporters.report_answer import answer


def said(metrics: dict[str, Any], **changes: Any) -> str:
    return " ".join(answer(mixture(metrics=metrics, **changes)))


def fitted(accuracies: dict[str, float], kept: str, examples: int = 20, **more: Any) -> dict[str, Any]:
    error = {name: math.sqrt(a * (1 - a) / examples) if examples else 0.0 for name, a in accuracies.items()}
    table = {name: {"loss": 1 - a, "accuracy": a, "accuracy_se": error[name]} for name, a in accuracies.items()}
    held = {"examples": examples, "of": examples, "folds": 4 if examples else 0}
    return {
        "metric": "accuracy", "higher_is_better": True, "candidates": table, "kept": kept, "held_out": held, **more,
    }  # fmt: skip


def test_the_best_is_named_with_its_lead_over_the_next_and_the_interval_is_newcombes() -> None:
    stats = pytest.importorskip("scipy.stats")
    text = said(fitted({"base": 0.3, "a": 0.6, "learned": 0.9}, "learned"))
    assert text.startswith("learned is the best of 3 candidates on 20 held-out examples (4 folds): accuracy 0.9000 ± ")
    assert "Kept is learned. a comes next, 0.3000 behind." in text
    high, low = (stats.binomtest(k, 20).proportion_ci(method="wilson") for k in (18, 12))
    expected = 0.3 - math.hypot(0.9 - high.low, low.high - 0.6), 0.3 + math.hypot(high.high - 0.9, 0.6 - low.low)
    assert f"{expected[0]:.2f} to {expected[1]:.2f}, lies above 0: it is unlikely to be chance" in text


def test_where_another_is_kept_the_lead_is_over_that_one() -> None:
    text = said(fitted({"base": 0.85, "a": 0.9, "learned": 0.8}, "learned"))
    assert text.startswith("a is the best of 3")
    assert "Kept is learned, 0.1000 behind." in text
    assert "comes next" not in text
    assert "holds 0: chance alone may have made it" in text


def test_those_that_are_equally_good_are_named_together_and_the_loss_is_told() -> None:
    metrics = fitted({"base": 0.4, "a": 0.5, "learned": 0.5}, "learned")
    metrics["candidates"]["learned"]["loss"] = 0.9
    text = said(metrics)
    assert text.startswith("a and learned are the best of 3 candidates on")
    assert "Kept is learned; a has the lower loss. base comes next, 0.1000 behind." in text
    metrics["kept"] = "a"
    assert "Kept is a. base comes" in said(metrics)
    metrics["candidates"].pop("base")
    assert "interval" not in said(metrics)
    alike = fitted({f"n{i}": 0.5 for i in range(60)}, "n7")
    assert said(alike).startswith("n0 and n1 and 58 others are the best of 60 candidates")
    assert said(alike).endswith("Kept is n7.")


def test_all_right_and_all_wrong_is_sure_on_as_many_examples_as_a_sign_test_needs() -> None:
    stats = pytest.importorskip("scipy.stats")
    for examples in (1, 2, 5, 6, 20):
        text = said(fitted({"a": 0.0, "learned": 1.0}, "learned", examples=examples))
        sure = bool(stats.binomtest(examples, examples).pvalue < 0.05)
        assert ("unlikely to be chance" in text) is sure
        assert (f"On {examples} example" in text) is not sure
        assert "± 0.0000" not in text


def test_a_metric_of_which_less_is_better_and_a_normal_interval() -> None:
    rows = {"a": {"loss": 2.0, "loss_se": 0.03}, "learned": {"loss": 1.5, "loss_se": 0.04}}
    text = said(
        {
            "metric": "loss",
            "higher_is_better": False,
            "candidates": rows,
            "kept": "learned",
            "held_out": {"examples": 9},
        }
    )
    assert text.startswith("learned is the best of 2 candidates on 9 held-out examples: loss 1.5000 ± 0.0400")
    assert f"{0.5 - 1.959964 * 0.05:.2f} to {0.5 + 1.959964 * 0.05:.2f}, lies above 0" in text


def test_without_standard_errors_nothing_is_said_to_be_sure() -> None:
    rows = {"a": {"loss": 2.0}, "learned": {"loss": 1.5}}
    text = said({"candidates": rows, "kept": "learned", "held_out": {"examples": 9, "from": {"name": "e"}}})
    assert "on 9 evaluation examples: loss 1.5000. Kept is learned." in text
    assert text.endswith("How sure that is cannot be said: there are no standard errors.")


def test_scores_on_the_shots_themselves_flatter_and_have_no_interval() -> None:
    text = said(fitted({"a": 0.5, "learned": 1.0}, "learned", examples=0))
    assert "on the shots themselves, which flatters each of them: accuracy 1.0000" in text
    assert "interval" not in text


def test_what_is_kept_without_a_score_is_said() -> None:
    text = said(fitted({"base": 0.5, "a": 0.75}, "learned"))
    assert "What is kept, learned, was not judged itself. a" not in text
    assert "What is kept, learned, was not judged itself. base comes next, 0.2500 behind." in text


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"candidates": {}},
        {"candidates": {"a": {"loss": math.nan}}, "kept": "a"},
        {"candidates": {"a": {"loss": 1.0}}, "metric": "accuracy", "higher_is_better": True},
    ],
)
def test_where_no_candidate_has_a_score_nothing_was_estimated(metrics: dict[str, Any]) -> None:
    assert said(metrics).startswith("Nothing was estimated: this mixture comes from no fit.")
    of_a_fit = {"data": {"name": "d"}, "fit": {}}
    assert said(metrics, data=of_a_fit).startswith("Nothing was estimated: no candidate of the fit was judged.")


@pytest.mark.parametrize("examples", [-5, 0, 1, 10**9])
@pytest.mark.parametrize("value", [-1.0, 1.5, 1e300, math.inf, math.nan])
def test_numbers_that_no_fit_writes_are_told_as_they_are(value: float, examples: int) -> None:
    rows = {"a": {"loss": math.nan, "accuracy": value, "accuracy_se": math.inf}, "b": {"accuracy": 0.5}}
    metrics = {"metric": "accuracy", "candidates": rows, "kept": "b", "held_out": {"examples": examples}}
    text = said(metrics)
    assert ("of 2 candidates" in text) is math.isfinite(value)
    assert "Kept is b" in text
