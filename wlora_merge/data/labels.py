"""The labels of a task: their names, their order, and what kind of problem they make.

This room turns label values into a `LabelSet` and back into the config keys that hold them. It knows neither files nor
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from ..constants import MULTI, PROBLEM_TYPES, REGRESSION, SINGLE
from ..errors import DataError

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MADE_UP = re.compile(r"(?:label|class)[ _-]?[0-9]+", re.IGNORECASE)
_WHOLE = re.compile(r"0|-?[1-9][0-9]*")


@dataclass(frozen=True)
class LabelSet:
    """What a head predicts.

    Attributes:
        names: the class names, whole numbers in numeric order and other names sorted; empty for a regression.
        problem_type: one of `PROBLEM_TYPES`, as a transformers config spells it.
        mean, spread: of a regression, the mean and standard deviation of the numbers: it is fitted to (number - mean) / spread, so
            that their unit does not matter.
    """

    names: tuple[str, ...]
    problem_type: str = SINGLE
    mean: float = 0.0
    spread: float = 1.0

    @property
    def size(self) -> int:
        """How many outputs the head has: one for each class, one for a regression."""
        return len(self.names) or 1

    def index(self, name: str, where: str = "an example") -> int:
        """The number of a class, or a `DataError` that names `where`."""
        if name not in self.names:
            raise DataError(f"{where} has the label {name!r}, which is not one of {', '.join(map(repr, self.names))}.")
        return self.names.index(name)


def order_names(values: Iterable[str]) -> tuple[str, ...]:
    """Distinct names: in numeric order if all are whole numbers, else sorted."""
    names = set(values)
    return tuple(sorted(names, key=int) if all(_WHOLE.fullmatch(name) for name in names) else sorted(names))


def label_set(values: Sequence[Any], problem_type: str | None = None) -> LabelSet:
    """The labels of a classification or regression.

    Args:
        values: [E] strings, floats, or lists of strings.
        problem_type: one of `PROBLEM_TYPES`; None: lists are multi-label, numbers with fractions a regression, all else
            single-label.

    Raises:
        DataError: fewer than two classes, values that do not fit the problem type, or values that fit two.
    """
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise DataError(f"no problem type {problem_type!r}; use one of {', '.join(PROBLEM_TYPES)}.")
    lists = any(isinstance(value, list) for value in values)
    kind = problem_type or (MULTI if lists else _single_or_regression(values))
    if lists != (kind == MULTI):
        raise DataError(
            f"{kind} needs {'lists of names' if kind == MULTI else 'one value for each example'} as labels."
        )
    if kind == REGRESSION:
        numbers = [to_number(value) for value in values]
        return LabelSet((), REGRESSION, fmean(numbers), pstdev(numbers) or 1.0)
    names = order_names(_class_names(values))
    if len(names) < 2:
        raise DataError(
            f"a classification needs two classes or more; the only label is {', '.join(names) or 'missing'}."
        )
    return LabelSet(names, kind)


def class_name(value: str | float) -> str:
    """The name of a class that was given as text or as a number: 2.0 is `2`."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def spelling(name: str) -> str:
    """What two spellings of one class have in common: `NOT_SPAM` and `not spam`, `LABEL_0` and `0`."""
    plain = re.sub(r"[\s_-]+", "_", name.strip().casefold())
    return plain.removeprefix("label_") if _MADE_UP.fullmatch(name) else plain


def words_of(name: str) -> str:
    """The name of a class as words, `card_not-working` as `card not working`; a `DataError` where it has none."""
    words = " ".join(_WORD.findall(name))
    if _MADE_UP.fullmatch(name) or not any(character.isalpha() for character in words):
        raise DataError(f"the label {name!r} says nothing in words")
    return words


def to_number(value: Any, where: str = "an example") -> float:
    """The target of a regression, or a `DataError` that names `where`."""
    if not _NUMBER.fullmatch(str(value)):
        raise DataError(f"{where} has the label {value!r}, which is not a number, so this is not a regression.")
    return float(value)


def _class_names(values: Sequence[Any]) -> list[str]:
    lists = [value for value in values if isinstance(value, list)]
    if len({len(value) for value in lists}) == 1 and len(lists[0]) > 1 and {x for v in lists for x in v} == {"0", "1"}:
        raise DataError(f"the label lists, as {lists[0]}, are 0/1 vectors; give the names of the classes that apply.")
    for value in values:
        if isinstance(value, list) and len(set(value)) < len(value):
            raise DataError(
                f"the label list {value} repeats a value; give the names of the classes that apply, not a 0/1 vector."
            )
    return [name for value in values for name in (value if isinstance(value, list) else [class_name(value)])]


def _single_or_regression(values: Sequence[Any]) -> str:
    """Numbers with fractions are a regression; whole numbers written as 1.0 could be either, so they are refused."""
    texts = [str(value) for value in values]
    points = [text for text in texts if _NUMBER.fullmatch(text) and not text.lstrip("+-").isdigit()]
    points = points if any("." in text for text in points) or len(points) == len(texts) else []  # 1e5 may be a name
    if not points:
        return SINGLE
    if odd := [text for text in texts if not _NUMBER.fullmatch(text)]:
        raise DataError(
            f"the label {points[0]} is a number with a point, {odd[0]!r} is none: mend it, or say --problem-type {SINGLE} if both "
            "are names of classes."
        )
    if any(not float(text).is_integer() for text in texts):
        return REGRESSION
    raise DataError(
        f"the labels are whole numbers with a point ({values[0]}): write classes as 1, or say --problem-type {SINGLE} or "
        f"{REGRESSION}."
    )
