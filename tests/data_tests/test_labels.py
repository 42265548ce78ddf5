"""Names and order of classes, and what kind of problem they make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wlora_merge.constants import MULTI, REGRESSION, SINGLE
from wlora_merge.data.labels import LabelSet, label_set
from wlora_merge.errors import DataError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b"], LabelSet(("a", "b"))),
        (["10", "9"], LabelSet(("9", "10"))),
        (["01", "1"], LabelSet(("01", "1"))),
        (["-1", "1"], LabelSet(("-1", "1"))),
        (["0.5", "2"], LabelSet((), REGRESSION)),
        ([".5", "1.2E-05", "+3.", "2"], LabelSet((), REGRESSION)),
        ([1.0, 2.5], LabelSet((), REGRESSION)),
        ([["b"], [], ["a", "b"]], LabelSet(("a", "b"), MULTI)),
    ],
)
def test_labels_tell_the_problem(values: list[Any], expected: LabelSet) -> None:
    found = label_set(values)
    assert (found.names, found.problem_type) == (expected.names, expected.problem_type)


def test_a_regressions_mean_and_spread_are_those_of_its_numbers() -> None:
    numbers = [1.5, 2.0, 7.25]
    found = label_set(numbers)
    assert (found.mean, found.spread) == pytest.approx((np.mean(numbers), np.std(numbers)))
    assert label_set([2.5, 2.5]).spread == 1.0


def test_labels_that_could_be_two_things_are_refused_until_the_problem_type_is_given() -> None:
    with pytest.raises(DataError, match="say --problem-type"):
        label_set([1.0, 2.0])
    assert label_set([1.0, 2.0], SINGLE) == LabelSet(("1", "2"))
    assert label_set([1.0, 2.0], REGRESSION).size == 1
    for values, words in (
        ([["0", "1", "1"]], "0/1 vectors"),
        ([["a", "b", "b"]], "repeats"),
        (["a", "a"], "two classes"),
        (["nan", "1.5"], "the label 1.5 is a number with a point, 'nan' is none"),
        ([["0", "1"], ["1", "0"]], "0/1 vectors"),
    ):
        with pytest.raises(DataError, match=words):
            label_set(values)
    with pytest.raises(DataError, match="not a number"):
        label_set(["a", "b"], REGRESSION)
    with pytest.raises(DataError, match="no problem type"):
        label_set(["a", "b"], "binary")
