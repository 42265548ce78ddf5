"""An option is a field of a dataclass, and its metadata is all that is said of it.

The command line, recipes, their JSON schema and the reference page are made from these fields. This module knows how an option
is declared and checked; it must not know which options there are, and it imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from os import PathLike, fspath
from typing import Any

from .errors import WloraMergeError
from .text import nearest, short

REQUIRED = dataclasses.MISSING
"""The default of an option that must be given."""
Field = dataclasses.Field[Any]
Rule = tuple[Callable[[Any], Any], str]
"""(condition on a record, the sentence if it holds), with `{o.name}` for an option and `{found}` for the condition's value."""


class Topic(Enum):
    """What an option is about: the headings of the help, in their order."""

    INPUTS = "Inputs"
    MIXED = "How they are mixed"
    JUDGED = "How it is judged"
    TRAINED = "How it is trained"
    FORMAT = "Format"
    CHECKED = "What is checked"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: from `low` (above it, where `open`) to `high`; and what a message expects instead."""

    low: float
    too_low: str
    open: bool = False
    high: float = math.inf
    too_high: str = ""

    def __str__(self) -> str:
        low = f"x {'>' if self.open else '≥'} {self.low}"
        return low if math.isinf(self.high) else f"{low}, x ≤ {self.high}"

    def expected(self, value: float) -> str:
        """What is expected in place of a number outside; an empty text for one inside."""
        if not math.isfinite(value) or value < self.low or (self.open and value == self.low):
            return self.too_low
        return self.too_high if value > self.high else ""


ABOVE_0 = Range(0, "a number above 0", open=True)
AT_LEAST_0 = Range(0, "a number of at least 0")
COUNT = Range(1, "a number above 0")
SEVERAL = Range(2, "a number of at least 2")
_SEED = "a whole number from 0 to 2^32 - 1"
SEED = Range(0, _SEED, high=2**32 - 1, too_high=_SEED)
SHARE = Range(0, "a number above 0", open=True, high=1, too_high="a share above 0 and at most 1")


@dataclass(frozen=True)
class Option:
    """What is said of an option besides its name, type and default.

    Args:
        topic: its heading in the help.
        help: what it does, with its unit.
        detail: formulas and limits; shown by the reference page alone.
        choices: the texts that it may be.
        bounds: the numbers that it may be.
        metavar: what the help calls its value.
        flag: its name on the command line, where that is not the field's.
        unit: `bytes`, of a number that the command line takes as 5GB.
        of: the methods, or formats, that know it; all where empty.
        tasks: the tasks that know it; all where empty.
        common: most people need it first: `--help` of a long command shows it, and `--help-all` the others too.
    """

    topic: Topic
    help: str
    detail: str = ""
    choices: tuple[str, ...] = ()
    bounds: Range | None = None
    metavar: str | None = None
    flag: str | None = None
    unit: str = ""
    of: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    common: bool = False


def option(default: Any, topic: Topic, help: str, **facts: Any) -> Any:
    """A field that is an option; the facts are those of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(topic, help, **facts)})


def spec(f: Field) -> Option:
    """What is said of an option."""
    found: Option = f.metadata["option"]
    return found


def flag(f: Field) -> str:
    """The command line's name of an option."""
    return spec(f).flag or f"--{f.name.replace('_', '-')}"


def flag_of(record: type[Any], name: str) -> str:
    """The command line's name of an option of a record, or of one that only the command line has."""
    known = {f.name: flag(f) for f in dataclasses.fields(record)}
    return known.get(name, f"--{name.replace('_', '-')}")


# -------------------------------------------------------------------------------------------------------- checks


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_number, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_number),
    "str": ("a text", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "Sequence[float]": ("a list of numbers", _is_list),
    "dict[str, str]": ("a table of texts", _is_table),
}


def kinds(f: Field) -> list[str]:
    """The types of an option as its annotation spells them, without None."""
    return [kind for kind in str(f.type).split(" | ") if kind != "None"]


def is_of_type(f: Field, value: Any) -> bool:
    """Whether a value other than None is of the option's type."""
    return any(_KINDS[kind][1](value) for kind in kinds(f))


def expected(f: Field) -> str:
    """What a value of the option is, in words: its types and choices."""
    words = {kind: _KINDS[kind][0] for kind in kinds(f)}
    if choices := ", ".join(spec(f).choices):
        words["str"] = choices if len(words) > 1 else f"one of {choices}"
    return ", or ".join(words.values())


def check_value(f: Field, value: Any, called: str, error: type[WloraMergeError]) -> None:
    """Refuse a value other than None that is not of the option's type, choices or range.

    Raises:
        error: with what `called` says, what was got and what was expected.
    """
    choices, bounds = spec(f).choices, spec(f).bounds
    unknown = isinstance(value, str) and bool(choices) and value not in choices
    if unknown or not is_of_type(f, value):
        hint = nearest(value[:80], choices) if unknown else ""
        raise error(f"{called} is {short(value)}, expected {expected(f)}{hint}.")
    if _is_number(value):
        finite = "" if math.isfinite(value) else expected(f).replace("a number", "a finite number")
        if wanted := bounds.expected(value) if bounds else finite:
            raise error(f"{called} is {value}, expected {wanted}.")
    elif isinstance(value, list | tuple) and not all(map(math.isfinite, value)):
        raise error(f"{called} are {', '.join(map(str, value))}, expected finite numbers.")


def checked(
    record: type[Any],
    given: Mapping[str, Any],
    what: str,
    error: type[WloraMergeError],
    called: Callable[[Field], str] = lambda f: f.name,
) -> Any:
    """A record of options by name, as Python, a recipe, a command line or NumPy gives them; None keeps the default.

    Args:
        record: the dataclass.
        given: value of each option that is given.
        what: has these options, in a message.
        error: to raise.
        called: what a message calls an option.

    Raises:
        error: an option that there is not, or a value of another type, choice or range.
    """
    known = {f.name: f for f in dataclasses.fields(record)}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise error(f"{what} has no option {name!r}{nearest(name, known)}.")
        if value is not None:
            values[name] = _in_python(value)
            check_value(known[name], values[name], called(known[name]), error)
    return record(**values)


def _in_python(value: Any) -> Any:
    """NumPy's and torch's values in Python's own types, and a path as text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return fspath(value) if isinstance(value, PathLike) else value


def refuse(rules: Iterable[Rule], error: type[WloraMergeError], record: Any) -> None:
    """Refuse options that exclude each other, or that would have no effect.

    Raises:
        error: the sentence of the first rule whose condition holds.
    """
    for condition, sentence in rules:
        if found := condition(record):
            raise error(sentence.format(o=record, found=found))
