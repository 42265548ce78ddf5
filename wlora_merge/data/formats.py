"""One data file as rows: JSONL, JSON, CSV, TSV, Parquet, Arrow or text; the texts also compressed.

This room knows formats of files. It knows neither tasks nor what a column means. Text formats are read here with the
standard library. The readers behind `datasets.load_dataset` guess types: a sentence "NA" becomes nothing, a label
"01" becomes 1, a column `created_at` a date. They write a cache, expand `*` and `[` in paths, and cannot say which line is
wrong. Nothing here loads a pickle.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import DataError, UnsupportedError
from ..io.untrusted import read_bytes
from ..text import first_line, human_bytes, short

if TYPE_CHECKING:
    import datasets

Rows: TypeAlias = "list[dict[str, Any]] | datasets.Dataset"

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
TEXTS = (".txt",)


def _zstd(stream: io.BytesIO) -> Any:
    import pyarrow  # type: ignore[import-untyped]

    return pyarrow.CompressedInputStream(stream, "zstd")


def _zip(stream: io.BytesIO) -> Any:
    """The one file of an archive.

    Raises:
        OSError: it is none, or holds several, or one that is encrypted.
    """
    try:
        archive = zipfile.ZipFile(stream)
        names = [one.filename for one in archive.infolist() if not one.is_dir()]
        if len(names) != 1:
            raise OSError(f"it holds {len(names)} files, expected one")
        return archive.open(names[0])
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise OSError(str(error)) from error


_OPENERS: dict[str, Callable[[io.BytesIO], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd, ".zip": _zip,
}  # fmt: skip
MAX_DATA_BYTES = 1 << 30
"""Of one data file, and of what a compressed or Parquet file expands to. Of the latter: its values as they would lie in memory,
8 bytes each beside them."""


@dataclass(frozen=True)
class Table:
    """What was read.

    Attributes:
        name: how to call the source in an error.
        columns: the names found.
        rows: one {column: value} for each row; a `datasets.Dataset` where the file has types of its own.
        where: index of a row -> how to call that row in an error ("x.csv, line 3").
        sha256: of the file read, or of the names and digests of several; None for a hub data set and rows in memory.
        folder: what relative paths in the rows are relative to; None for what is no local file.
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
        """The first values of a column that holds text, in lists and objects too; of any other, which is not decoded, none."""
        if isinstance(self.rows, list):
            return [row.get(column) for row in self.rows[:count]]
        from datasets.features.features import require_decoding

        feature = self.rows.features[column]
        text = "'string'" in repr(feature) and not require_decoding(feature)
        return list(self.rows.select_columns([column])[:count][column]) if text else []


def kind_of(path: PurePath) -> str:
    """The suffix that says what a file holds, without that of a compression: `.jsonl` of `x.jsonl.gz`."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in _OPENERS else suffix


def read_file(path: Path, name: str | None = None) -> Table:
    """Read one file by its suffix.

    Args:
        path: the file.
        name: how to call it, and what has its suffix; None: its path.

    Raises:
        DataError: it is empty, is not what its suffix says, or holds bytes that are no text; with the line.
        UnsupportedError: a suffix that is not known.
    """
    readers: dict[str, Callable[[str, bytes], Table]] = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _read_text,
        ".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow,
    }  # fmt: skip
    called = name or str(path)
    reader = readers.get(kind_of(PurePath(called)))
    if reader is None:
        raise UnsupportedError(
            f"{called} is of a kind that is not read; use one of {', '.join(readers)}, also with {', '.join(_OPENERS)} behind it, "
            "or a folder."
        )
    stored = read_bytes_of(path)
    data = _unpacked(called, stored)
    if not data.strip():
        raise DataError(f"{called} is empty.")
    folder = None if name else path.parent
    return replace(reader(called, data), sha256=hashlib.sha256(stored).hexdigest(), folder=folder)


def read_bytes_of(path: Path) -> bytes:
    """All bytes of a file of at most `MAX_DATA_BYTES`, or a `DataError` that says why not."""
    return read_bytes(path, DataError, MAX_DATA_BYTES)


def _unpacked(name: str, data: bytes) -> bytes:
    """What a compressed file holds; any other as it is."""
    opener = _OPENERS.get(PurePath(name).suffix.lower())
    if opener is None:
        return data
    try:
        with opener(io.BytesIO(data)) as stream:
            expanded: bytes = stream.read(MAX_DATA_BYTES + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} cannot be unpacked ({first_line(error)}): fetch it again.") from error
    if len(expanded) > MAX_DATA_BYTES:
        raise _too_large(name)
    return expanded


def decode(name: str, data: bytes) -> str:
    """The text in UTF-8, or in UTF-16 or UTF-32 as its first bytes say; or a `DataError` that names the line."""
    encoding = json.detect_encoding(data)  # by a mark, or by where the zeros of an ASCII character lie
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        hint = " (for example: iconv -f latin1 -t utf-8)" if encoding.startswith("utf-8") else ""
        raise DataError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not {encoding.removesuffix('-sig').upper()}; convert the file "
            f"to UTF-8{hint}."
        ) from error
    if not text.strip():
        raise DataError(f"{name} is empty.")
    if "\0" in text:
        raise DataError(f"{name}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL; not a text file.")
    return text


def _table_of(name: str, rows: Rows, columns: Sequence[str], lines: Sequence[int] | None = None) -> Table:
    def where(index: int) -> str:
        return f"{name}, line {lines[index]}" if lines else f"{name}, example {index + 1}"

    return Table(name, tuple(columns), rows, where, None, None)


def names_in(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns that rows have, in the order in which they come."""
    return tuple(dict.fromkeys(name for row in rows for name in row))


def _json_lines(name: str, data: bytes) -> Table:
    rows, lines = [], []
    for number, line in enumerate(decode(name, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {number}: not JSON ({error}){_no_array(line)}.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{name}, line {number}: expected an object {{...}}, got {type(row).__name__}{_no_array(line)}."
            )
        rows.append(row)
        lines.append(number)
    return _table_of(name, rows, names_in(rows), lines)


def _parsed(text: str) -> Any:
    """A JSON value; a `ValueError` where an object has a key twice, of which the last would win."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"an object has the key {next(n for n in names if names.count(n) > 1)!r} twice")
        return row

    return json.loads(text, object_pairs_hook=unique)


def _no_array(line: str) -> str:
    return "; name a file that is one JSON array .json" if line.lstrip().startswith("[") else ""


def _json(name: str, data: bytes) -> Table:
    """A list of objects, an object one of whose values is such a list, an object of columns, or JSON lines under another name."""
    text = decode(name, data)
    try:
        content = _parsed(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "Extra data" in str(error):
            return _json_lines(name, data)
        raise DataError(f"{name} is not JSON: {error}.") from error
    if isinstance(content, dict):
        content = _rows_of_object(name, content)
    if not _is_rows(content):
        raise DataError(f"{name}: expected a list of objects [{{...}}, ...], got {type(content).__name__}.")
    return _table_of(name, content, names_in(content))


def _rows_of_object(name: str, content: dict[str, Any]) -> Any:
    """The rows in a JSON object: under one of its keys, or with a column under each (lists, or {row: value} as pandas writes)."""
    lists = {key: value for key, value in content.items() if _is_rows(value)}
    dicts = all(isinstance(values, dict) for values in content.values())
    columns = {key: list(values.values()) for key, values in content.items()} if dicts else content
    if len(columns) > len(lists) and all(isinstance(values, list) for values in columns.values()):
        sizes = {key: len(values) for key, values in columns.items()}
        if len(set(sizes.values())) == 1:
            return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if not lists:
            told = ", ".join(f"{key!r} {size}" for key, size in sizes.items())
            raise DataError(f"{name}: expected columns of one length, got {told} values.")
    if len(lists) > 1:
        raise DataError(f"{name} holds several lists of examples: {', '.join(lists)}; keep one of them in a file.")
    return next(iter(lists.values()), content)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


Lines: TypeAlias = "list[tuple[int, list[str]]]"
"""The fields of each line that is not blank, with the number of the line."""


def _csv(name: str, data: bytes) -> Table:
    """Fields with commas between them, quoted where they need it. Spaces after commas are left out where the header has them."""
    text = decode(name, data)
    _, header = _fields(name, text.strip().partition("\n")[0])[0]
    spaced = any(column.startswith(" ") for column in header)
    return _of_lines(name, _fields(name, text, strict=True, skipinitialspace=spaced))


def _tsv(name: str, data: bytes) -> Table:
    """Fields with tabs between them, as they are; unquoted where a program that quotes fields has written the file.

    Raises:
        DataError: both readings give rows, which differ, and it was no such program; with the line.
    """
    text = decode(name, data)
    plain = _fields(name, text, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        quoted = _fields(name, text, delimiter="\t", strict=True)
    except DataError:
        return _of_lines(name, plain)
    if quoted == plain or not _is_even(quoted):
        return _of_lines(name, plain)
    if not _is_even(plain) or (len(quoted) == len(plain) and _is_as_written(text, quoted)):
        return _of_lines(name, quoted)
    line, fields = next(one for one, other in zip(plain, quoted, strict=False) if one != other)
    field = next(field for field in fields if field.startswith('"'))
    raise DataError(
        f"{name}, line {line}: the field {short(field)} begins with a quote, which may stand around a field, as in CSV, or be a part "
        "of it: write the file as .jsonl, or as .csv."
    )


def _fields(name: str, text: str, **dialect: Any) -> Lines:
    """What the csv module reads in a text, or a `DataError` with the line where it cannot."""
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    limit = csv.field_size_limit(max(len(text), 1))  # else 128 KiB
    found, start = [], 1
    try:
        for record in reader:
            if record:
                found.append((start, record))
            start = reader.line_num + 1
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            what = "a field begins with a quote, and no quote ends it"
        else:
            what = f"a field begins with a quote, and text follows the quote that ends it, on line {reader.line_num}"
        raise DataError(
            f"{name}, line {start}: {what}; write a quote within such a field twice, or use JSONL."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return found


def _is_even(lines: Lines) -> bool:
    return len({len(fields) for _, fields in lines}) == 1


def _is_as_written(text: str, lines: Lines) -> bool:
    """Whether the csv module, and pandas with it, would write these fields as this text."""
    end = "\r\n" if "\r\n" in text else "\n"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        written = io.StringIO()
        csv.writer(written, delimiter="\t", quoting=quoting, lineterminator=end).writerows(f for _, f in lines)
        if written.getvalue().rstrip(end) == text.rstrip(end):
            return True
    return False


def _of_lines(name: str, lines: Lines) -> Table:
    """A table of fields, the first line of which names the columns."""
    (_, first), *others = lines
    header = _header(name, first)
    for line, fields in others:
        if len(fields) != len(header):
            raise DataError(f"{name}, line {line}: the header has {len(header)} fields, this line {len(fields)}.")
    rows = [dict(zip(header, fields, strict=True)) for _, fields in others]
    return _table_of(name, rows, header, [line for line, _ in others])


def _header(name: str, record: Sequence[str]) -> list[str]:
    twice = sorted({name for name in record if record.count(name) > 1})
    if twice:
        raise DataError(f"{name}: the header names {', '.join(map(repr, twice))} twice.")
    if len(record) == 1 and any(other in record[0] for other in ";\t|,"):
        raise DataError(
            f"{name}: the header is the one field {record[0]!r}; separate fields by commas (.csv) or tabs (.tsv)."
        )
    return list(record)


def _read_text(name: str, data: bytes) -> Table:
    """One example for each line that is not blank."""
    lines = enumerate(decode(name, data).replace("\r\n", "\n").split("\n"), start=1)
    kept = [(n, line) for n, line in lines if line.strip()]
    return _table_of(name, [{"text": line} for _, line in kept], ("text",), [number for number, _ in kept])


def _parquet(name: str, data: bytes) -> Table:
    import datasets
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        if _expands_beyond(data, MAX_DATA_BYTES):
            raise _too_large(name)
        rows = datasets.Dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{name} cannot be read as Parquet: {first_line(error)}.") from error
    return _table_of(name, rows, rows.column_names)


def _arrow(name: str, data: bytes) -> Table:
    """An Arrow file or stream, as `datasets` and Feather write them."""
    import datasets
    import pyarrow

    try:
        if data.startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(pyarrow.BufferReader(data))
            stored = map(reader.get_batch, range(reader.num_record_batches))
        else:
            stored = reader = pyarrow.ipc.open_stream(pyarrow.BufferReader(data))
        batches, size = [], 0
        for batch in stored:
            batch.validate(full=True)  # or offsets that lead outside of a buffer are followed
            batches.append(batch)
            size += sum(_expanded(column) for column in batch.columns)
            if size > MAX_DATA_BYTES:
                raise _too_large(name)
        rows = datasets.Dataset(pyarrow.Table.from_batches(batches, reader.schema))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{name} cannot be read as Arrow: {first_line(error)}.") from error
    return _table_of(name, rows, rows.column_names)


def _too_large(name: str) -> DataError:
    return DataError(
        f"{name}: expands to more than {human_bytes(MAX_DATA_BYTES)}, the most that is read: keep fewer rows or columns."
    )


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
        return list(rows.cast_column(column, datasets.Image(decode=False))[column])
    values = [_without_fillers(value) for value in rows[column]]
    inner = getattr(feature, "feature", None)
    if isinstance(feature, datasets.ClassLabel):
        return [_class_name(feature, value) for value in values]
    if isinstance(inner, datasets.ClassLabel):
        return [None if many is None else [_class_name(inner, value) for value in many] for many in values]
    return values


def _without_fillers(value: Any) -> Any:
    """Objects without the keys of other rows' objects, which Arrow gives them all with no value."""
    if isinstance(value, list):
        return [_without_fillers(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_fillers(part) for key, part in value.items() if part is not None}
    return value


def _class_name(feature: datasets.ClassLabel, number: int | None) -> str | None:
    """The name of a class; None where there is none, or where it is withheld (-1, as in test splits on the hub)."""
    return None if number is None or number < 0 else str(feature.int2str(number))
