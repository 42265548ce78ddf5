"""One data file as rows: JSONL, JSON, CSV, TSV, Parquet or text.

This room knows formats of files. It knows neither tasks nor what a column means. Text formats are read here with the
standard library: the readers behind `datasets.load_dataset` guess types (a sentence "NA" becomes nothing, a label
"01" becomes 1, a column `created_at` a date), write a cache, expand `*` and `[` in paths, and cannot say which line is
wrong. Nothing here loads a pickle.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import DataError, UnsupportedError
from ..io.untrusted import read_bytes
from ..text import first_line, human_bytes

if TYPE_CHECKING:
    import datasets

Rows: TypeAlias = "list[dict[str, Any]] | datasets.Dataset"

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt",)
MAX_DATA_BYTES = 1 << 30
"""Of one data file, and of what a Parquet file expands to: its values as they would lie in memory, 8 bytes each beside them."""


@dataclass(frozen=True)
class Table:
    """What was read.

    Attributes:
        name: how to call the source in an error.
        columns: the names found.
        rows: one {column: value} for each row; a `datasets.Dataset` where the file has types of its own.
        where: index of a row -> how to call that row in an error ("x.csv, line 3").
        sha256: of the file read, or of the names and digests of several; None for a hub data set.
        folder: what relative paths in the rows are relative to; None for a hub data set.
    """

    name: str
    columns: tuple[str, ...]
    rows: Rows
    where: Callable[[int], str]
    sha256: str | None
    folder: Path | None

    def values(self, column: str) -> list[Any]:
        """All values of one column; class numbers come as their class names, images as {path, bytes}.

        Raises:
            DataError: a value that its own type does not decode.
        """
        if isinstance(self.rows, list):
            return [row.get(column) for row in self.rows]
        try:
            return _plain_values(self.rows, column)
        except Exception as error:  # decoders of sound, video, JSON and others, which a file may name, raise all kinds
            raise DataError(f"{self.name}: column {column!r} cannot be decoded ({first_line(error)}).") from error

    def first(self, column: str, count: int = 20) -> list[Any]:
        """The first values of a column of text or lists of text; of any other, which is not decoded, none."""
        if isinstance(self.rows, list):
            return [row.get(column) for row in self.rows[:count]]
        feature = self.rows.features[column]
        while hasattr(feature, "feature"):  # a list's
            feature = feature.feature
        text = "string" in str(getattr(feature, "dtype", ""))
        return list(self.rows.select_columns([column])[:count][column]) if text else []


def read_file(path: Path) -> Table:
    """Read one file by its suffix.

    Raises:
        DataError: it is empty, is not what its suffix says, or holds bytes that are not UTF-8; with the line.
        UnsupportedError: a suffix that is not known.
    """
    readers: dict[str, Callable[[Path, bytes], Table]] = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text,
        ".parquet": _parquet,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UnsupportedError(f"{path} is of a kind that is not read; use one of {', '.join(readers)} or a folder.")
    data = read_bytes_of(path)
    if not data.strip():
        raise DataError(f"{path} is empty.")
    return reader(path, data)


def read_bytes_of(path: Path) -> bytes:
    """All bytes of a file of at most `MAX_DATA_BYTES`, or a `DataError` that says why not."""
    return read_bytes(path, DataError, MAX_DATA_BYTES)


def decode(path: Path, data: bytes) -> str:
    """UTF-8 with or without its mark, or a `DataError` that names the line."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file "
            f"(for example: iconv -f latin1 -t utf-8)."
        ) from error


def _table(path: Path, data: bytes, rows: list[dict[str, Any]], lines: Sequence[int] | None = None) -> Table:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))

    def where(index: int) -> str:
        return f"{path}, line {lines[index]}" if lines else f"{path}, example {index + 1}"

    return Table(str(path), columns, rows, where, hashlib.sha256(data).hexdigest(), path.parent)


def _json_lines(path: Path, data: bytes) -> Table:
    rows, lines = [], []
    for number, line in enumerate(decode(path, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}){_no_array(line)}.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: expected an object {{...}}, got {type(row).__name__}{_no_array(line)}."
            )
        rows.append(row)
        lines.append(number)
    return _table(path, data, rows, lines)


def _no_array(line: str) -> str:
    return "; name a file that is one JSON array .json" if line.lstrip().startswith("[") else ""


def _json(path: Path, data: bytes) -> Table:
    """A list of objects, or an object one of whose values is such a list, or JSON lines under another name."""
    text = decode(path, data)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "Extra data" in str(error):
            return _json_lines(path, data)
        raise DataError(f"{path} is not JSON: {error}.") from error
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if _is_rows(value)}
        if len(lists) > 1:
            raise DataError(f"{path} holds several lists of examples: {', '.join(lists)}; keep one of them in a file.")
        content = next(iter(lists.values()), content)
    if not _is_rows(content):
        raise DataError(f"{path}: expected a list of objects [{{...}}, ...], got {type(content).__name__}.")
    return _table(path, data, content)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _csv(path: Path, data: bytes) -> Table:
    text = decode(path, data)
    if "\0" in text:
        raise DataError(f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL; not a text file.")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    rows, lines, header, start = [], [], None, 1
    limit = csv.field_size_limit(max(len(text), 1))  # else 128 KiB
    try:
        for record in reader:
            line, start = start, reader.line_num + 1
            if not record:
                continue
            if header is None:
                header = _header(path, record)
                continue
            if len(record) != len(header):
                raise DataError(f"{path}, line {line}: the header has {len(header)} fields, this line {len(record)}.")
            rows.append(dict(zip(header, record, strict=True)))
            lines.append(line)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    table = _table(path, data, rows, lines)
    return replace(table, columns=tuple(header or ()))


def _header(path: Path, record: Sequence[str]) -> list[str]:
    twice = sorted({name for name in record if record.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header names {', '.join(map(repr, twice))} twice.")
    if len(record) == 1 and any(other in record[0] for other in ";\t|,"):
        raise DataError(
            f"{path}: the header is the one field {record[0]!r}; separate fields by commas (.csv) or tabs (.tsv)."
        )
    return list(record)


def _text(path: Path, data: bytes) -> Table:
    """One example for each line that is not blank."""
    lines = enumerate(decode(path, data).replace("\r\n", "\n").split("\n"), start=1)
    kept = [(n, line) for n, line in lines if line.strip()]
    return _table(path, data, [{"text": line} for _, line in kept], [number for number, _ in kept])


def _parquet(path: Path, data: bytes) -> Table:
    import datasets
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        if _expands_beyond(data, MAX_DATA_BYTES):
            raise DataError(
                f"{path}: expands to more than {human_bytes(MAX_DATA_BYTES)}, the most that is read: keep fewer rows or columns."
            )
        rows = datasets.Dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}.") from error
    table = _table(path, data, [])
    return replace(table, columns=tuple(rows.column_names), rows=rows)


def _expands_beyond(data: bytes, limit: int) -> bool:
    """Whether the values of a Parquet file take more than `limit` bytes; found out within about that many.

    A page is compressed, and a value that is repeated is written once: 2 kB may mean 200 GB. What the footer says of pages and
    numbers of values is looked at first; then the strings are read as numbers into their dictionaries, and their lengths summed.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    footer = ParquetFile(pyarrow.BufferReader(data))
    leaves, groups = [], [footer.metadata.row_group(i) for i in range(footer.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(footer.metadata.num_columns)]
    total, largest = sum(chunk.total_uncompressed_size for chunk in chunks), 0
    for i in range(footer.metadata.num_columns):
        leaf = footer.schema.column(i)
        values = sum(group.column(i).num_values for group in groups)
        largest += values * max(8, leaf.length or 0)
        leaves += [leaf.path] if leaf.physical_type == "BYTE_ARRAY" else []
    if max(total, largest, footer.metadata.num_rows) > limit:
        return True
    file = ParquetFile(pyarrow.BufferReader(data), read_dictionary=leaves, arrow_extensions_enabled=False)
    size = 0
    for batch in file.iter_batches():
        size += sum(_expanded(column) for column in batch.columns)
        if size > limit:
            return True
    return False


def _expanded(array: Any) -> int:
    """Bytes of an Arrow array if each value of a dictionary were written out where it stands."""
    import pyarrow
    import pyarrow.compute as compute  # type: ignore[import-untyped]

    if isinstance(array, pyarrow.DictionaryArray):
        lengths = compute.take(compute.binary_length(array.dictionary), array.indices)
        return 8 * len(array) + int(compute.sum(lengths).as_py() or 0)
    if isinstance(array, pyarrow.StructArray):
        return sum(_expanded(part) for part in array.flatten())
    if pyarrow.types.is_nested(array.type):
        return 8 * len(array) + _expanded(array.flatten())
    return int(array.nbytes)


def _plain_values(rows: datasets.Dataset, column: str) -> list[Any]:
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    values = list(rows[column])
    inner = getattr(feature, "feature", None)
    if isinstance(feature, datasets.ClassLabel):
        return [_class_name(feature, value) for value in values]
    if isinstance(inner, datasets.ClassLabel):
        return [None if many is None else [_class_name(inner, value) for value in many] for many in values]
    return values


def _class_name(feature: datasets.ClassLabel, number: int | None) -> str | None:
    """The name of a class; None where there is none, or where it is withheld (-1, as in test splits on the hub)."""
    return None if number is None or number < 0 else str(feature.int2str(number))
