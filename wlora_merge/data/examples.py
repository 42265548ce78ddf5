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
from ..text import nearest, short
from .columns import choose_columns, looks_like_answer
from .formats import Table, read_bytes_of
from .labels import LabelSet, class_name, words_of
from .sources import TRAIN, Source, name_of, read_source
from .tasks import FIT_TASKS

if TYPE_CHECKING:
    import datasets

Label: TypeAlias = "str | float | list[str]"
_TEXT = ("text", "text_pair", "prompt", "instruction", "completion", "source", "target", "question", "context")
EVAL_SPLITS = ("validation", "test")
"""What evaluation data are by default, of a folder or hub data set with splits."""
_LIST = re.compile(r"\[(?:['\"].*|.*,.*|\s*|[\d.]+(?:\s+[\d.]+)+\s*)\]", re.DOTALL)
_ROLES = ("system", "user", "assistant", "tool", "developer")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_OF_MESSAGES = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""What a message may hold beside `role` and `content`; chat templates read it."""


@dataclass(frozen=True)
class Examples:
    """Rows of one task under their canonical column names.

    A `label` is a string, a float, or a list of strings. A string is a class without spaces around it; whole numbers and booleans
    are spelled out. `tags` are strings. `answers` are {text: [...], answer_start: [...]}. An `image` is decoded when its row is read.
    `messages` and `tools` are JSON texts of lists, as the keys of their objects differ from row to row; `input`, `system` and
    `tools` may be empty.

    Attributes:
        rows: a `datasets.Dataset` with exactly the columns that are keys of `columns`.
        task: the task that they are for.
        columns: {canonical name: name in the file}.
        unused: names of the file's other columns.
        source: the path, hub id or URL as it was given; of rows in memory, their class.
        sha256: of the file or files; of a hub data set and of rows in memory, of the values.
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
            texts = self.column(written)
            if written == "messages":
                texts = [json.loads(text)[-1]["content"] for text in texts]
            repeated = 2 * len(set(texts)) <= len(set(self.twins))
            return [(text if repeated else "",) for text in texts]
        if "label" not in self.columns or labels is None or labels.problem_type == REGRESSION:
            return [("",)] * len(self)
        values = self.column("label")
        return [tuple(value) if isinstance(value, list) else (class_name(value),) for value in values]

    def label_names(self, labels: LabelSet | None) -> Examples:
        """One example of each of their classes: the class's name, as words.

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
        rows = datasets.Dataset.from_dict(table, features=self.rows.features)
        return replace(self, rows=rows, source=f"{self.source} (names of its labels)")

    @cached_property
    def keys(self) -> list[str]:
        """For each row a text that equal rows share, of whatever file, [len(self)]; of images it has the bytes' digests."""
        names = sorted(self.columns)
        columns = [_digests(self.rows) if name == "image" else self.column(name) for name in names]
        return [json.dumps(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

    def tell_shots(self, shots: Examples) -> None:
        """Warn of how many of these evaluation examples are among the shots, wherever they stand there.

        Raises:
            DataError: all of them are.
        """
        known = set(shots.keys)
        among = sum(key in known for key in self.keys)
        if among == len(self):
            raise DataError(
                f"{self.source}: all {among} examples are among the very shots ({shots.source}), and say nothing of a model "
                "that was trained on them: give other examples, or leave --eval-data out."
            )
        if among:
            warnings.warn(
                f"{self.source}: {among} of {len(self)} examples are among the shots ({shots.source}), so that the figures "
                "are better than on new ones: take them out.",
                WloraMergeWarning,
                stacklevel=3,
            )

    @cached_property
    def twins(self) -> list[int]:
        """For each row the first that is equal to it, [len(self)]."""
        first: dict[str, int] = {}
        return [first.setdefault(key, index) for index, key in enumerate(self.keys)]


def read_examples(
    source: Source,
    *,
    task: str,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    default_splits: Sequence[str] = (TRAIN,),
) -> Examples:
    """Read and check the examples of a task.

    Args:
        source: a JSONL, JSON, CSV, TSV, Parquet, Arrow or text file. A folder of them, of `save_to_disk`, or of texts or images with
            one folder for each class. A hub id, `owner/name[:config]`, or a URL, which alone use the network. Or a
            `datasets.Dataset` or `DatasetDict`, a pandas frame or a list of dicts.
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
    _check_together(table, checked)
    rows, digest = _dataset(table, chosen, checked)
    if digest is None:
        digest = _digest_of_values(checked, rows if "image" in chosen else None)
    unused = tuple(name for name in table.columns if name not in chosen.values())
    if not columns:
        _tell_unused(table, chosen, [name for name in unused if looks_like_answer(name)], "look like answers")
    if any(name in chosen and name not in (columns or {}) for name in kind.spread_columns):
        texts = [name for name in unused if any(map(_is_prose, table.first(name)))]
        _tell_unused(table, chosen, texts, "hold text too")
    return Examples(rows, task, chosen, name_of(source), digest, unused)


def _tell_unused(table: Table, chosen: Mapping[str, str], left_out: Sequence[str], why: str) -> None:
    """Warn of columns that a guess leaves out, and that may belong to the examples."""
    if left_out:
        read = ", ".join(f"{column!r} is read as {name}" for name, column in chosen.items())
        warnings.warn(
            f"{table.name}: {read}; {', '.join(map(repr, left_out))} {why} and are not used: if they belong to the examples, "
            "name the columns with --column.",
            WloraMergeWarning,
            stacklevel=3,
        )


def _is_prose(value: Any) -> bool:
    """Whether a value is more than one word, or holds such."""
    if isinstance(value, list | dict):
        return any(map(_is_prose, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and len(value.split()) > 1


def _digest_of_values(checked: Mapping[str, list[Any]], images: datasets.Dataset | None) -> str:
    digest = hashlib.sha256(json.dumps(checked, sort_keys=True).encode())
    for image in _digests(images) if images is not None else ():
        digest.update(bytes.fromhex(image))
    return digest.hexdigest()


def _digests(rows: datasets.Dataset) -> list[str]:
    """The digest of each image, as it is stored."""
    import datasets

    images = rows.cast_column("image", datasets.Image(decode=False))["image"]
    return [hashlib.sha256(image["bytes"] or read_bytes_of(Path(image["path"]))).hexdigest() for image in images]


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
        "input": _text_or_nothing, "system": _text_or_nothing, "tools": _tools,
    }[name]  # fmt: skip
    checked = []
    for index, value in enumerate(values):
        try:
            checked.append(check(value))
        except _WrongError as error:
            lists = name not in (*_TEXT, "input", "system", "tools") and isinstance(value, str)
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


def _text_or_nothing(value: Any) -> str:
    return _text(value) if value not in (None, "") else ""


def _messages(value: Any) -> str:
    """Messages of {role, content}, or of ShareGPT's {from, value}, as JSON."""
    if not isinstance(value, list) or not value:
        raise _WrongError("must be a list of {role, content} that is not empty")
    messages = [_message(message) for message in value]
    if not any(message["role"] == "assistant" for message in messages):
        raise _WrongError("has no turn of the assistant, so there is nothing to learn from")
    return _as_json(messages)


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _WrongError("must hold messages with `role` and `content`")
    message = {name: part for name, part in value.items() if part is not None}
    if {"from", "value"} <= set(message) and not {"role", "content"} & set(message):
        told = message.pop("from")
        message = {"role": _SHAREGPT_ROLES.get(told, told), "content": message.pop("value"), **message}
    if "role" not in message or not {"content", "tool_calls"} & set(message):
        raise _WrongError("must hold messages with `role` and `content`")
    if unknown := set(message) - {"role", "content", *_OF_MESSAGES}:
        raise _WrongError(f"has a message with {min(unknown)!r}, which is not read: leave it out")
    if message["role"] not in _ROLES:
        raise _WrongError(f"has the role {message['role']!r}; roles are {', '.join((*_ROLES, *_SHAREGPT_ROLES))}")
    needed = message["role"] != "tool" and "tool_calls" not in message
    content = _joined_parts(message.get("content", ""))
    return {**message, "content": _text(content) if needed else _text_or_nothing(content)}


def _joined_parts(content: Any) -> Any:
    """Content in parts [{type: text, text}] as one text: one part after another, as chat templates that know parts write them."""
    if not isinstance(content, list):
        return content
    parts = [{k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {} for part in content]
    for part in parts:
        if set(part) != {"type", "text"} or part["type"] != "text" or not isinstance(part["text"], str):
            kind = part.get("type", "none")
            raise _WrongError(
                f"has a message with a part of type {short(kind)}: of content in parts, {{type: text, text}} alone is read"
            )
    return "".join(part["text"] for part in parts)


def _tools(value: Any) -> str:
    """Tools as JSON: a list of objects, or such a list as JSON; nothing where there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _WrongError(f"holds text that is not JSON ({error})") from error
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise _WrongError("must be a list of objects, one for each tool")
    return _as_json(value) if value else ""


def _as_json(value: Any) -> str:
    try:
        return _text(json.dumps(value, ensure_ascii=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise _WrongError(f"holds what is not JSON ({error})") from error


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
    return str(value) if isinstance(value, int) else _text(value).strip()


def _check_together(table: Table, checked: Mapping[str, list[Any]]) -> None:
    """Refuse rows whose columns do not go together."""
    for index, (system, messages) in enumerate(
        zip(checked.get("system", ()), checked.get("messages", ()), strict=False)
    ):
        if system and json.loads(messages)[0]["role"] in ("system", "developer"):
            raise DataError(
                f"{table.where(index)}: has a system prompt in a column of its own and in its messages: keep one."
            )
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
