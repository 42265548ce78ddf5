"""Which columns a task needs, and which column of a data file is which.

A data file calls its columns as it likes; a task knows them by one name each (`text`, `label`, ...). This room guesses
by convention, takes the user's word over any guess, and refuses wherever two readings are possible. It knows strings
only: no files, no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError
from ..text import nearest


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


FORMS: Mapping[str, tuple[Form, ...]] = {
    "causal-lm": (Form(("text",)), Form(("prompt", "completion")), Form(("messages",))),
    "seq2seq-lm": (Form(("source", "target")),),
    "text-classification": (Form(("text", "label"), ("text_pair",)),),
    "token-classification": (Form(("tokens", "tags")),),
    "question-answering": (Form(("question", "context", "answers")),),
    "image-classification": (Form(("image", "label")),),
}

_LABEL = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "target",
    "sentiment",
    "output",
    "fine_label",
    "coarse_label",
)
_COMPLETION = ("completion", "response", "output", "target", "answer")
CONVENTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "causal-lm": {
        "text": ("text", "content", "document"),
        "prompt": ("prompt", "instruction", "input", "question"),
        "completion": _COMPLETION,
        "messages": ("messages", "conversation", "conversations"),
    },
    "seq2seq-lm": {
        "source": ("source", "input", "text", "document", "article", "question", "dialogue"),
        "target": ("target", "summary", "highlights", "completion", "response", "output", "answer"),
    },
    "text-classification": {
        "text": ("text", "sentence", "content", "input", "question", "sentence1", "premise", "question1"),
        "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
        "label": _LABEL,
    },
    "token-classification": {
        "tokens": ("tokens", "words"),
        "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels"),
    },
    "question-answering": {
        "question": ("question",),
        "context": ("context", "passage"),
        "answers": ("answers",),
    },
    "image-classification": {"image": ("image", "img", "picture"), "label": _LABEL},
}
_PASSAGES = ("context", "passage", "paragraph", "article", "document", "choices", "options", "history", "dialogue")
_MORE_TEXT: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("text-classification", "text"): (
        *_PASSAGES, "title", "body", "headline", "instruction", "prompt", "answer", "response", "completion",
    ),
    ("causal-lm", "text"): (*_COMPLETION, "summary", "highlights"),
    ("causal-lm", "prompt"): (*_PASSAGES, "system", "system_prompt"),
    ("seq2seq-lm", "source"): (*_PASSAGES, "instruction", "prompt"),
}  # fmt: skip
"""(task, its column): what other columns are called that often hold a part of the same example."""
PARTS = {"text-classification": "text", "causal-lm": "prompt", "seq2seq-lm": "source"}
"""The column of a task whose text may stand in several columns of a file; a document, all text, may have a title beside it."""


def choose_columns(
    task: str, found: Sequence[str], given: Mapping[str, str] | None = None, *, source: str = "the data"
) -> dict[str, str]:
    """Map the columns that `task` needs to columns that were found.

    Args:
        task: a task name, a key of `FORMS`.
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
    forms = [form for form in FORMS[task] if set(given) <= set(form.columns)]
    if not forms:
        raise DataError(f"{task} takes {_forms(task)}, not {' together with '.join(given)}.")
    candidates = {name: _candidates(task, name, found, given) for form in forms for name in form.columns}
    complete = [form for form in forms if all(candidates[name] for name in form.required)]
    if not complete:
        raise DataError(_missing(task, found, forms, candidates, source))
    if len(complete) > 1:
        readings = " or as ".join(str(form) for form in complete)
        raise DataError(
            f"{source} can be read as {readings} (columns found: {_list(found)}); say which, for example with "
            f"--column {complete[0].required[0]}={candidates[complete[0].required[0]][0]}."
        )
    chosen = _only(complete[0], candidates, source)
    _check_unused(task, found, chosen, given, source)
    return chosen


def _check_unused(
    task: str, found: Sequence[str], chosen: Mapping[str, str], given: Mapping[str, str], source: str
) -> None:
    """Refuse to leave out, by a guess, what is probably a part of the examples."""
    for name, column in chosen.items():
        beside = [
            c for c in found if c.strip().casefold() in _MORE_TEXT.get((task, name), ()) and c not in chosen.values()
        ]
        if beside and name not in given:
            raise DataError(
                f"{source}: {_list(beside)} may be a part of the examples, which {column!r} as {name!r} would leave out; say with "
                f"--column {name}={column} that it is none,{_as_pair(task, column, beside[0])} or put both into one column."
            )


def _as_pair(task: str, column: str, other: str) -> str:
    pair = task == "text-classification"
    return f" or with --column text={column} --column text_pair={other} that both are," if pair else ""


def _candidates(task: str, name: str, found: Sequence[str], given: Mapping[str, str]) -> list[str]:
    if name in given:
        return [given[name]]
    wanted, taken = CONVENTIONS[task][name], set(given.values())
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


def _check_given(task: str, found: Sequence[str], given: Mapping[str, str], source: str) -> None:
    known = list(CONVENTIONS[task])
    for name, column in given.items():
        if name not in known:
            raise DataError(f"{task} has no column {name!r}; its columns are {_list(known)}{nearest(name, known)}.")
        if column not in found:
            raise DataError(f"{source} has no column {column!r}; it has {_list(found)}{nearest(column, found)}.")


def _missing(
    task: str, found: Sequence[str], forms: Sequence[Form], candidates: Mapping[str, list[str]], source: str
) -> str:
    closest = min(forms, key=lambda form: sum(not candidates[name] for name in form.required))
    missing = [name for name in closest.required if not candidates[name]]
    options = " ".join(f"--column {name}=NAME" for name in missing)
    return (
        f"{source} has no column for {_list(missing)}: columns found are {_list(found)}, {task} needs {_forms(task)}. "
        f"Name the column with {options}."
    )


def _forms(task: str) -> str:
    return ", or ".join(str(form) for form in FORMS[task])


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
