"""Which column of a data file is which column of a task.

A data file calls its columns as it likes; a task knows them by one name each (`text`, `label`, ...). This file guesses by the
task's conventions, takes the user's word over any guess, and refuses wherever two readings are possible. It knows strings only: no
files, no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DataError
from ..text import nearest

if TYPE_CHECKING:
    from .task import Task


@dataclass(frozen=True)
class Form:
    """One way to lay out the examples of a task: the columns that it must have, and those that it may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All of its columns, the required ones first."""
        return self.required + self.optional

    def __str__(self) -> str:
        optional = "".join(f" [+ {name}]" for name in self.optional)
        return " + ".join(self.required) + optional


LABEL_NAMES = (
    "label", "labels", "category", "class", "intent", "target", "sentiment", "output", "fine_label", "coarse_label",
)  # fmt: skip
COMPLETION_NAMES = ("completion", "response", "output", "target", "answer")
PASSAGE_NAMES = (
    "context", "passage", "paragraph", "article", "document", "choices", "options", "history", "dialogue",
)  # fmt: skip
"""What files call a label, an answer, and a text to read; words that several tasks share."""
_ANSWER_NAMES = {
    *LABEL_NAMES, *COMPLETION_NAMES, "answers", "solution", "chosen", "rejected", "gold", "reference", "references", "summary",
    "highlights", "tags", "score", "rating",
}  # fmt: skip
_BOTH = {"text": ("text", "text_pair"), "prompt": ("instruction", "input"), "source": ("instruction", "input")}
"""{column: the two columns that hold its text and another's}."""


def choose_columns(
    task: Task, found: Sequence[str], given: Mapping[str, str] | None = None, *, source: str = "the data"
) -> dict[str, str]:
    """Map the columns that `task` needs to columns that were found.

    Args:
        task: one that reads examples.
        found: the column names of the data, as they are.
        given: {column of the task: column found}, the user's word.
        source: how to call the data in an error.

    Returns:
        {column of the task: column found} for one of the task's forms; an optional column only where it is found.

    Raises:
        DataError: a name in `given` is unknown, a needed column is missing, or more than one reading is possible.
    """
    given = dict(given or {})
    _check_given(task, found, given, source)
    forms = [form for form in task.forms if set(given) <= set(form.columns)]
    if not forms:
        raise DataError(f"{task.name} takes {_forms(task)}, not {' together with '.join(given)}.")
    candidates = {name: _candidates(task, name, found, given) for form in forms for name in form.columns}
    complete = [form for form in forms if all(candidates[name] for name in form.required)]
    if not complete:
        raise DataError(_missing(task, found, forms, candidates, source))
    complete = [form for form in complete if not any(_covers(other, form, candidates) for other in complete)]
    if len(complete) > 1:
        readings = " or as ".join(str(form) for form in complete)
        raise DataError(
            f"{source} can be read as {readings} (columns found: {_list(found)}); say which, for example with "
            f"--column {complete[0].required[0]}={candidates[complete[0].required[0]][0]}."
        )
    chosen = _only(complete[0], candidates, source)
    _check_unused(task, found, chosen, given, source)
    return chosen


def looks_like_answer(column: str) -> bool:
    """Whether files often call so what is to be predicted."""
    return column.strip().casefold() in _ANSWER_NAMES


def _covers(form: Form, other: Form, candidates: Mapping[str, list[str]]) -> bool:
    """Whether a form needs more columns than another, and leaves none of its candidates out: `instruction` with an `input`."""
    its, others = ({c for name in f.required for c in candidates[name]} for f in (form, other))
    return others <= its and len(form.required) > len(other.required)


def _check_unused(
    task: Task, found: Sequence[str], chosen: Mapping[str, str], given: Mapping[str, str], source: str
) -> None:
    """Refuse to leave out, by a guess, what is probably a part of the examples."""
    for name, column in chosen.items():
        more = task.more_text.get(name, ())
        beside = [c for c in found if c.strip().casefold() in more and c not in chosen.values()]
        if beside and name not in given:
            raise DataError(
                f"{source}: {_list(beside)} may be a part of the examples, which {column!r} as {name!r} would leave out; say with "
                f"--column {name}={column} that it is none,{_as_pair(task, name, column, beside[0])} or put both into one column."
            )


def _as_pair(task: Task, name: str, column: str, other: str) -> str:
    first, second = _BOTH.get(name, ("", ""))
    if second not in task.conventions:
        return ""
    return f" or with --column {first}={column} --column {second}={other} that both are,"


def _candidates(task: Task, name: str, found: Sequence[str], given: Mapping[str, str]) -> list[str]:
    if name in given:
        return [given[name]]
    wanted, taken = task.conventions[name], set(given.values())
    return [column for column in found if column not in taken and column.strip().casefold() in wanted]


def _only(form: Form, candidates: Mapping[str, list[str]], source: str) -> dict[str, str]:
    for name in form.columns:
        if len(candidates[name]) > 1:
            raise DataError(
                f"{source} has several columns that could be {name!r}: {_list(candidates[name])}; say which, for example with "
                f"--column {name}={candidates[name][0]}, which leaves the other out."
            )
    chosen = {name: candidates[name][0] for name in form.columns if candidates[name]}
    for name, column in chosen.items():
        twins = [other for other, its in chosen.items() if its == column and other != name]
        if twins:
            raise DataError(f"{source}: column {column!r} cannot be both {name!r} and {twins[0]!r}.")
    return chosen


def _check_given(task: Task, found: Sequence[str], given: Mapping[str, str], source: str) -> None:
    known = list(task.conventions)
    for name, column in given.items():
        if name not in known:
            raise DataError(
                f"{task.name} has no column {name!r}; its columns are {_list(known)}{nearest(name, known)}."
            )
        if column not in found:
            raise DataError(f"{source} has no column {column!r}; it has {_list(found)}{nearest(column, found)}.")


def _missing(
    task: Task, found: Sequence[str], forms: Sequence[Form], candidates: Mapping[str, list[str]], source: str
) -> str:
    lacks = {form: [name for name in form.required if not candidates[name]] for form in forms}
    closest = min(forms, key=lambda form: (len(lacks[form]) == len(form.required), len(lacks[form])))
    missing = lacks[closest]
    options = " ".join(f"--column {name}=NAME" for name in missing)
    return (
        f"{source} has no column for {_list(missing)}: columns found are {_list(found)}, {task.name} needs {_forms(task)}. "
        f"Name the column with {options}."
    )


def _forms(task: Task) -> str:
    return ", or ".join(str(form) for form in task.forms)


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
