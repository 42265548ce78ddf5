"""Examples: rows with the columns of a task, checked, in one form whatever file they came from.

This room knows which values a column may hold, and nothing of models, tokenizers or tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..constants import REGRESSION
from ..errors import DataError, UnsupportedError, WloraMergeWarning
from ..io.untrusted import is_utf8
from ..text import nearest
from .columns import choose_columns
from .formats import Table, read_bytes_of
from .labels import LabelSet, class_name, words_of
from .sources import TRAIN, read_source
from .tasks import FIT_TASKS

if TYPE_CHECKING:
    import datasets

Label: TypeAlias = "str | float | list[str]"
_TEXT = ("text", "text_pair", "prompt", "completion", "source", "target", "question", "context")
EVAL_SPLITS = ("validation", "test")
"""What evaluation data are by default, of a folder or hub data set with splits."""
_LIST = re.compile(r"\[(?:['\"].*|.*,.*|\s*|[\d.]+(?:\s+[\d.]+)+\s*)\]", re.DOTALL)
_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Examples:
    """Rows of one task under their canonical column names.

    A `label` is a string (a class; whole numbers and booleans are spelled out), a float, or a list of strings; `tags`
    are strings; `messages` are {role, content} in order; `answers` are {text: [...], answer_start: [...]}; an `image`
    is decoded when its row is read.

    Attributes:
        rows: a `datasets.Dataset` with exactly the columns that are keys of `columns`.
        task: the task that they are for.
        columns: {canonical name: name in the file}.
        unused: names of the file's other columns.
        source: the path or hub id as it was given.
        sha256: of the local file or files; of a hub data set, of its values.
    """

    rows: datasets.Dataset
    task: str
    columns: Mapping[str, str]
    source: str
    sha256: str
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[index]
        return row

    def column(self, name: str) -> list[Any]:
        """All values of one canonical column, [len(self)]."""
        return list(self.rows[name])

    def where(self, number: int) -> str:
        """How messages name the example of a number, from 1."""
        return f"example {number} of {self.source}"

    def classes(self, labels: LabelSet | None) -> list[tuple[str, ...]]:
        """The classes or tags of each row, [len(self)]; of a task that has none, one that is called "".

        What a language model is to write is a class where different rows repeat it, twice each on average: a few-shot classification.
        """
        if "tags" in self.columns:
            return [tuple(sorted(set(tags))) for tags in self.column("tags")]
        if written := next((name for name in ("completion", "target", "messages") if name in self.columns), None):
            texts = [v if isinstance(v, str) else str(v[-1]["content"]) for v in self.column(written)]
            repeated = 2 * len(set(texts)) <= len(set(self.twins))
            return [(text if repeated else "",) for text in texts]
        if "label" not in self.columns or labels is None or labels.problem_type == REGRESSION:
            return [("",)] * len(self)
        values = self.column("label")
        return [tuple(value) if isinstance(value, list) else (class_name(value),) for value in values]

    def with_label_names(self, labels: LabelSet | None) -> Examples:
        """These, and after them one example of each of their classes that is the class's name, as words.

        Raises:
            DataError: rows that are no single texts of classes, or a name that is no words.
        """
        import datasets

        option = "leave --label-names out"
        pairs = "text_pair" in self.columns
        if pairs or labels is None or labels.problem_type == REGRESSION:
            found = "pairs of texts" if pairs else "a regression"
            raise DataError(f"{self.source} is {found}, of which a label's name is no example: {option}.")
        names = sorted({name for row in self.classes(labels) for name in row})
        try:
            texts = [words_of(name) for name in names]
        except DataError as error:
            raise DataError(f"{self.source}: {error}: {option}.") from error
        lists = isinstance(self.column("label")[0], list)
        table = {"text": texts, "label": [[name] for name in names] if lists else names}
        added = datasets.Dataset.from_dict(table, features=self.rows.features)
        return replace(self, rows=datasets.concatenate_datasets([self.rows, added]))

    @cached_property
    def twins(self) -> list[int]:
        """For each row the first that is equal to it, [len(self)]; rows with images are not compared."""
        if "image" in self.columns:
            return list(range(len(self)))
        first: dict[str, int] = {}
        keys = [json.dumps(row, default=str) for row in zip(*map(self.column, self.columns), strict=True)]
        return [first.setdefault(key, index) for index, key in enumerate(keys)]


def read_examples(
    source: str | Path,
    *,
    task: str,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    default_splits: Sequence[str] = (TRAIN,),
) -> Examples:
    """Read and check the examples of a task.

    Args:
        source: a JSONL, JSON, CSV, TSV, Parquet or text file; a folder of them; a folder of texts or images with one
            folder for each class; or a hub id, `owner/name[:config]`. Only the last uses the network.
        task: a task name.
        columns: {canonical column: column in the file}, where the names do not follow the conventions or are not clear.
        split: which split of a folder or hub data set; None: the first of `default_splits` that there is, or the only one.
        default_splits: the splits to look for, in this order, where none is named.

    Raises:
        DataError: nothing to read, or a column or a value is missing or wrong; the message names the file and the line.
        UnsupportedError: a task that reads no data, or a format that is not read.
    """
    if task not in FIT_TASKS:
        raise UnsupportedError(f"task {task!r} reads no examples{nearest(task, FIT_TASKS)}.")
    kind = FIT_TASKS[task]
    table = read_source(source, split=split, default_splits=default_splits)
    if not len(table.rows):
        raise DataError(f"{table.name} holds no examples.")
    chosen = choose_columns(kind, table.columns, columns, source=table.name)
    checked = {name: _checked(table, name, column) for name, column in chosen.items() if name != "image"}
    _check_lengths(table, checked)
    rows, digest = _dataset(table, chosen, checked)
    if digest is None:
        digest = _digest_of_values(checked, table.values(chosen["image"]) if "image" in chosen else ())
    unused = tuple(name for name in table.columns if name not in chosen.values())
    if kind.spread_column in chosen and kind.spread_column not in (columns or {}):
        _tell_unused(table, chosen, unused)
    return Examples(rows, task, chosen, str(source), digest, unused)


def _tell_unused(table: Table, chosen: Mapping[str, str], unused: Sequence[str]) -> None:
    """Warn of text that a guess of the columns leaves out."""
    texts = [name for name in unused if any(map(_is_prose, table.first(name)))]
    if texts:
        read = ", ".join(f"{column!r} is read as {name}" for name, column in chosen.items())
        warnings.warn(
            f"{table.name}: {read}; {', '.join(map(repr, texts))} hold text too and are not used: if they belong to the examples, "
            "name the columns with --column.",
            WloraMergeWarning,
            stacklevel=3,
        )


def _is_prose(value: Any) -> bool:
    """Whether a value is more than one word, or holds such."""
    return any(map(_is_prose, value)) if isinstance(value, list) else isinstance(value, str) and len(value.split()) > 1


def _digest_of_values(checked: Mapping[str, list[Any]], images: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256(json.dumps(checked, sort_keys=True).encode())
    for image in images:
        digest.update(hashlib.sha256(image["bytes"] or read_bytes_of(Path(image["path"]))).digest())
    return digest.hexdigest()


def _dataset(
    table: Table, chosen: Mapping[str, str], checked: Mapping[str, list[Any]]
) -> tuple[datasets.Dataset, str | None]:
    import datasets

    if "image" not in chosen:
        return datasets.Dataset.from_dict(dict(checked)), table.sha256
    images, digest = _images(table, chosen["image"])
    for name, values in checked.items():
        images = images.add_column(name, values)
    return images, digest


def _images(table: Table, column: str) -> tuple[datasets.Dataset, str | None]:
    """One lazily decoded column, `image`, and the digest with that of the images. Paths are relative to the file."""
    import datasets

    try:
        import PIL.Image
    except ImportError as error:
        raise UnsupportedError("images need Pillow, which is not installed: pip install pillow.") from error
    if not isinstance(table.rows, list):
        if not isinstance(table.rows.features[column], datasets.Image):
            raise DataError(f"{table.name}: column {column!r} holds {table.rows.features[column]}, not images.")
        return table.rows.select_columns([column]).rename_column(column, "image"), table.sha256
    paths, digest = [], hashlib.sha256(str(table.sha256).encode())
    for index, value in enumerate(table.values(column)):
        if not isinstance(value, str) or not value:
            raise DataError(f"{table.where(index)}: column {column!r} has no path of an image.")
        data = read_bytes_of((table.folder or Path()) / value)  # an absolute path stays what it is
        try:
            PIL.Image.open(io.BytesIO(data)).close()
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise DataError(f"{table.where(index)}: {value} cannot be read as an image.") from error
        digest.update(hashlib.sha256(data).digest())
        paths.append(str((table.folder or Path()) / value))
    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image()), digest.hexdigest()


def _checked(table: Table, name: str, column: str) -> list[Any]:
    """The values of one column in canonical form, or a `DataError` that names the row."""
    values = table.values(column)
    if name == "label":
        return _labels(table, column, values)
    check: Callable[[Any], Any] = _text if name in _TEXT else {
        "tokens": _strings, "tags": _tags, "messages": _messages, "answers": _answers,
    }[name]  # fmt: skip
    checked = []
    for index, value in enumerate(values):
        try:
            checked.append(check(value))
        except _WrongError as error:
            lists = name not in _TEXT and isinstance(value, str)
            hint = "; where the values are lists, use JSONL or Parquet" if lists else ""
            raise DataError(f"{table.where(index)}: column {column!r} {error}{hint}.") from error
    return checked


class _WrongError(Exception):
    """What is wrong with one value; never leaves this room."""


def _text(value: Any) -> str:
    if value is None:
        raise _WrongError("has no value")
    if not isinstance(value, str):
        raise _WrongError(f"holds {_kind(value)}, not text")
    if not value.strip():
        raise _WrongError("is empty")
    if not is_utf8(value):
        raise _WrongError("holds half of a surrogate pair")
    return value


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise _WrongError("must be a list of strings that is not empty" if value is not None else "has no value")
    return [_text(item) for item in value]


def _tags(value: Any) -> list[str]:
    return _strings([str(v) if type(v) is int else v for v in value] if isinstance(value, list) else value)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _WrongError("must be a list of {role, content} that is not empty")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or _present(message) != {
            "role",
            "content",
        }:
            raise _WrongError("must hold messages with exactly `role` and `content`")
        if message["role"] not in _ROLES:
            raise _WrongError(f"has the role {message['role']!r}; roles are {', '.join(_ROLES)}")
        messages.append({"role": message["role"], "content": _text(message["content"])})
    if not any(message["role"] == "assistant" for message in messages):
        raise _WrongError("has no turn of the assistant, so there is nothing to learn from")
    return messages


def _present(message: Mapping[str, Any]) -> set[str]:
    return {name for name, value in message.items() if value is not None}


def _answers(value: Any) -> dict[str, list[Any]]:
    """SQuAD form; no texts at all means that the question has no answer."""
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
        raise _WrongError("must be {text: [...], answer_start: [...]}")
    texts, starts = list(value["text"] or []), list(value["answer_start"] or [])
    if len(texts) != len(starts) or any(type(start) is not int or start < 0 for start in starts):
        raise _WrongError("must have one whole number in `answer_start` for each `text`")
    return {"text": [_text(text) for text in texts], "answer_start": starts}


def _labels(table: Table, column: str, values: list[Any]) -> list[Label]:
    """Strings, floats or lists of strings, the same for all rows."""
    numeric = any(isinstance(value, float) for value in values)
    checked: list[Label] = []
    for index, value in enumerate(values):
        try:
            checked.append(_label(value, numeric))
        except _WrongError as error:
            raise DataError(f"{table.where(index)}: column {column!r} {error}.") from error
        if _kind(value) != _kind(values[0]):
            raise DataError(
                f"{table.where(index)}: column {column!r} holds {_kind(value)}, the first example {_kind(values[0])}."
            )
    return checked


def _label(value: Any, numeric: bool) -> Label:
    if isinstance(value, list):
        return [str(_label(item, False)) for item in value]
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float) and numeric:
        if not math.isfinite(value):
            raise _WrongError("is not a finite number")
        return float(value)
    if isinstance(value, str) and _LIST.fullmatch(value.strip()):
        raise _WrongError(f"holds the text {value!r}, which looks like a list; write lists as JSONL or Parquet")
    return str(value) if isinstance(value, int) else _text(value)


def _check_lengths(table: Table, checked: Mapping[str, list[Any]]) -> None:
    for index, (tokens, tags) in enumerate(zip(checked.get("tokens", ()), checked.get("tags", ()), strict=True)):
        if len(tokens) != len(tags):
            raise DataError(f"{table.where(index)}: {len(tokens)} tokens but {len(tags)} tags.")
    for index, (context, answers) in enumerate(
        zip(checked.get("context", ()), checked.get("answers", ()), strict=True)
    ):
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if context[start : start + len(text)] != text:
                raise DataError(f"{table.where(index)}: the answer {text!r} is not at character {start}.")


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
