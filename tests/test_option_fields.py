"""An option as a field: its types, choices and ranges, and what a wrong value is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wlora_merge.errors import MixtureError
from wlora_merge.option_fields import ABOVE_0, COUNT, REQUIRED, SHARE, Topic, checked, flag_of, option, refuse


@dataclass(frozen=True, kw_only=True)
class Some:
    """Options of every kind."""

    name: str = option(REQUIRED, Topic.INPUTS, "A name.")
    kind: str | None = option(None, Topic.MIXED, "A word.", choices=("one", "two"))
    count: int | None = option(None, Topic.MIXED, "How many.", bounds=COUNT, flag="--number")
    rate: float = option(0.5, Topic.MIXED, "How fast.", bounds=ABOVE_0)
    share: float | None = option(None, Topic.MIXED, "How much.", bounds=SHARE)
    scale: float | str | None = option(None, Topic.MIXED, "How large.", choices=("learned",))
    row: Sequence[float] | None = option(None, Topic.MIXED, "Weights.")
    start: str | Sequence[float] | None = option(None, Topic.MIXED, "A row, or a file.")
    table: dict[str, str] | None = option(None, Topic.INPUTS, "Texts.")
    fast: bool = option(False, Topic.MIXED, "No wait.")


def some(**given: Any) -> Some:
    found: Some = checked(Some, {"name": "n", **given}, "some", MixtureError)
    return found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nmae": "x"}, "some has no option 'nmae'; did you mean 'name'?."),
        ({"name": 3}, "name is 3, expected a text."),
        ({"kind": "on"}, "kind is 'on', expected one of one, two; did you mean 'one'?."),
        ({"kind": 1}, "kind is 1, expected one of one, two."),
        ({"count": 0}, "count is 0, expected a number above 0."),
        ({"count": 2.0}, "count is 2.0, expected a whole number."),
        ({"count": True}, "count is True, expected a whole number."),
        ({"rate": 0}, "rate is 0, expected a number above 0."),
        ({"rate": float("inf")}, "rate is inf, expected a number above 0."),
        ({"rate": "warm"}, "rate is 'warm', expected a number."),
        ({"share": 1.5}, "share is 1.5, expected a share above 0 and at most 1."),
        ({"scale": "big"}, "scale is 'big', expected a number, or learned."),
        ({"scale": ""}, "scale is '', expected a number, or learned."),
        ({"scale": [1.0]}, "scale is [1.0], expected a number, or learned."),
        ({"scale": float("nan")}, "scale is nan, expected a finite number, or learned."),
        ({"row": "1,2"}, "row is '1,2', expected a list of numbers."),
        ({"row": [1, True]}, "row is [1, True], expected a list of numbers."),
        ({"row": [1.0, float("nan")]}, "row are 1.0, nan, expected finite numbers."),
        ({"start": 7}, "start is 7, expected a text, or a list of numbers."),
        ({"table": {"a": 1}}, "table is {'a': 1}, expected a table of texts."),
        ({"fast": 1}, "fast is 1, expected true or false."),
    ],
)
def test_a_value_of_another_type_choice_or_range_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MixtureError) as caught:
        some(**given)
    assert str(caught.value) == message


def test_values_of_numpy_and_paths_are_plain_and_none_keeps_the_default() -> None:
    found = some(
        count=np.int64(3),
        rate=np.float32(0.25),
        row=np.array([0.5, 0.5]),
        start=Path("a") / "b",
        fast=np.True_,
        kind=None,
    )
    assert dataclasses.asdict(found) == {
        "name": "n", "kind": None, "count": 3, "rate": 0.25, "share": None, "scale": None, "row": [0.5, 0.5], "start": "a/b",
        "table": None, "fast": True,
    }  # fmt: skip
    assert (type(found.count), type(found.rate), type(found.fast)) == (int, float, bool)
    assert (some(scale="learned").scale, some(scale=-2).scale, some(share=1).share) == ("learned", -2, 1)


def test_the_first_rule_that_holds_is_the_sentence() -> None:
    rules = [
        (lambda o: o.fast and o.count, "{o.name} is fast, and {found} are many."),
        (lambda o: o.fast, "{o.name} is fast."),
    ]
    refuse(rules, MixtureError, some())
    with pytest.raises(MixtureError, match=r"^n is fast\.$"):
        refuse(rules, MixtureError, some(fast=True))
    with pytest.raises(MixtureError, match=r"^n is fast, and 4 are many\.$"):
        refuse(rules, MixtureError, some(fast=True, count=4))


def test_a_flag_is_the_name_with_hyphens_or_what_the_field_says() -> None:
    assert [flag_of(Some, name) for name in ("count", "name", "not_there")] == ["--number", "--name", "--not-there"]
