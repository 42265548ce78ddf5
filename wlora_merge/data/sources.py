"""Where examples come from: one file, a folder of tables, texts or images, a hub data set, a URL, or rows in memory.

This room knows folders, splits and the hub. It knows neither tasks nor what a column means, and runs no code that comes
with data. Only a hub data set and a URL use the network or write a cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import DataError, UnsupportedError
from ..io.hub import is_here
from ..io.untrusted import is_hidden, is_plain_file_name, read_json
from ..text import first_line, redacted
from .formats import TABLES, TEXTS, Table, decode, kind_of, names_in, read_bytes_of, read_file

if TYPE_CHECKING:
    import datasets
    import pandas

Source: TypeAlias = "str | Path | datasets.Dataset | datasets.DatasetDict | pandas.DataFrame | list[dict[str, Any]]"
"""What examples are read from: a path, a hub id, a URL, or rows in memory."""

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TRAIN = "train"
_SPLITS = {TRAIN: TRAIN, "training": TRAIN, "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "test": "test", "eval": "test"}  # fmt: skip
_URL = re.compile(r"(?:hf|https?)://\S+")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""The files in which `datasets.save_to_disk` names the Arrow files of a data set, and the splits of several."""
_DATA_SET_ID = re.compile(r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)?(?::[^/\\]+)?")
# the builders of `datasets` that read plain data; others run decoders, need further packages, or (once) read pickles
_HUB_BUILDERS = ("parquet", "json", "csv", "text", "arrow", "imagefolder")


def name_of(source: Source) -> str:
    """How to call a source: a path, id or URL as it is given; rows in memory by their class."""
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"


def read_source(source: Source, *, split: str | None = None, default_splits: Sequence[str] = (TRAIN,)) -> Table:
    """Read a local file or folder or rows in memory, or download a hub data set or the file of a URL.

    Args:
        source: a path; a hub id with an optional configuration, `owner/name[:config]`; a URL with hf:// or https://; or rows.
        split: which split of a folder or hub data set; None: the first of `default_splits` that there is, or the only one.
        default_splits: the splits to look for, in this order, where none is named.

    Raises:
        DataError: nothing is there, it cannot be read, or the split is missing or not clear.
        UnsupportedError: a format that is not read.
    """
    if not isinstance(source, str | Path):
        return _in_memory(source, split, default_splits)
    path = Path(source)
    if is_here(path):
        path = path.expanduser()
    elif _URL.fullmatch(str(source)):
        _refuse_split(name_of(source), split)
        return _fetched(str(source))
    elif kind_of(path) in TABLES + TEXTS or not _DATA_SET_ID.fullmatch(str(source)):
        raise DataError(f"{redacted(str(source))} does not exist.")
    else:
        return _hub(str(source), split, default_splits)
    if path.is_dir():
        return _folder(path, split, default_splits)
    if path.is_file():
        _refuse_split(str(path), split)
        return read_file(path)
    raise DataError(f"{path} is a pipe or a device; give a file or a folder.")


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise DataError(f"{redacted(name)} is one table and has no split {split!r}; leave the split out.")


def _in_memory(rows: Any, split: str | None, default_splits: Sequence[str]) -> Table:
    """The rows of a `datasets.Dataset`, of one split of a `DatasetDict`, of a pandas frame, or of a list of dicts."""
    import datasets
    import pandas

    name = name_of(rows)
    if isinstance(rows, datasets.DatasetDict):
        rows, split = rows[_clear_split(name, {key: key for key in rows}, split, default_splits)], None
    _refuse_split(name, split)
    if isinstance(rows, pandas.DataFrame):
        try:
            rows = datasets.Dataset.from_pandas(rows, preserve_index=False)
        except (ValueError, TypeError, OSError, AttributeError) as error:  # pyarrow's are ValueErrors and TypeErrors
            raise DataError(
                f"{name} has a column without a type of its own ({first_line(error)}): give a list of dicts."
            ) from error
    columns: Sequence[str]
    if isinstance(rows, datasets.Dataset):
        rows = rows.with_format(None)
        columns = rows.column_names
    elif isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        rows = [{str(key): _in_python(value) for key, value in row.items()} for row in rows]
        columns = names_in(rows)
    else:
        raise DataError(
            f"{name} is not read: expected a path, a hub id, a datasets.Dataset, a pandas.DataFrame or a list of dicts."
        )
    return Table(name, tuple(columns), rows, lambda i: f"{name}, example {i + 1}", None, None)


def _in_python(value: Any) -> Any:
    """The value of an array or a number of NumPy or torch as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def _fetched(url: str) -> Table:
    """The table in the file of a URL, through the cache of `datasets`."""
    import datasets

    name = redacted(url.partition("?")[0])
    try:
        with _without_bars():
            path = datasets.DownloadManager().download(url)
    except ImportError as error:
        raise UnsupportedError(f"{name} needs aiohttp, which is not installed: pip install aiohttp.") from error
    except Exception as error:  # the libraries of HTTP and of the hub raise all kinds
        raise DataError(f"{name} cannot be fetched: {redacted(first_line(error))}.") from error
    return read_file(Path(str(path)), name)


def _folder(folder: Path, split: str | None, default_splits: Sequence[str]) -> Table:
    """Tables of one kind, one after another; or texts or images, whose class is the folder that they lie in."""
    if (folder / _SAVED_SPLITS).is_file():
        return _saved_splits(folder, split, default_splits)
    if (folder / _SAVED).is_file():
        _refuse_split(str(folder), split)
        return _saved(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path.relative_to(folder)))
    if saved := next((path.parent for path in files if path.name in (_SAVED, _SAVED_SPLITS)), None):
        raise DataError(f"{folder} holds a data set that save_to_disk wrote: name its own folder, {saved}.")
    kinds = {kind: [path for path in files if kind_of(path) in kind] for kind in (TABLES, TEXTS, IMAGES)}
    present = {kind: paths for kind, paths in kinds.items() if paths}
    if not present:
        raise DataError(f"{folder} holds no data files: expected tables, texts or images.")
    if len(present) > 1:
        examples = ", ".join(str(paths[0].relative_to(folder)) for paths in present.values())
        raise DataError(f"{folder} holds several kinds of data ({examples}); name one file, or a folder of one kind.")
    ((kind, paths),) = present.items()
    paths = _of_split(folder, paths, kind, split, default_splits)
    return _joined(folder, [read_file(path) for path in paths]) if kind == TABLES else _documents(folder, paths, kind)


def _saved_splits(folder: Path, split: str | None, default_splits: Sequence[str]) -> Table:
    """One split of a `DatasetDict` that `save_to_disk` wrote."""
    splits = read_json(folder / _SAVED_SPLITS, DataError).get("splits")
    if not isinstance(splits, list) or not splits or not all(map(is_plain_file_name, splits)):
        raise DataError(
            f"{folder / _SAVED_SPLITS}: expected the names of the splits under 'splits'; save the data set again."
        )
    return _saved(folder / _clear_split(str(folder), {name: name for name in splits}, split, default_splits))


def _saved(folder: Path) -> Table:
    """A `Dataset` that `save_to_disk` wrote; caches that lie beside its files are none of it."""
    files = read_json(folder / _SAVED, DataError).get("_data_files")
    names: list[Any] = [f.get("filename") for f in files if isinstance(f, dict)] if isinstance(files, list) else []
    if not names or not all(map(is_plain_file_name, names)):
        raise DataError(
            f"{folder / _SAVED}: expected the names of the files under '_data_files'; save the data set again."
        )
    return _joined(folder, [read_file(folder / name) for name in names])


def _of_split(
    folder: Path, paths: list[Path], kind: tuple[str, ...], split: str | None, default_splits: Sequence[str]
) -> list[Path]:
    """The files of one split; all of them, where none was asked for and there are no splits."""
    by_split: dict[str | None, list[Path]] = {}
    for path in paths:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if None in by_split and kind != TABLES:  # then `train` is a class, beside `car`
        by_split = {None: paths}
    if split is None and list(by_split) == [None]:
        return paths
    shown = {name: str(paths[0].relative_to(folder)) for name, paths in by_split.items()}
    return by_split[_clear_split(str(folder), shown, split, default_splits)]


def _clear_split(name: str, found: Mapping[Any, str], split: str | None, default_splits: Sequence[str]) -> str:
    """The split asked for; else the first default that was found, or the only split.

    Args:
        name: of the source.
        found: {split: how a message shows it}; None as a split: what is of none.
        split: asked for.
        default_splits: in the order in which they are looked for.

    Raises:
        DataError: it is missing, or not clear.
    """
    if split is not None:
        wanted = next((alias for alias in (split, _SPLITS.get(split)) if alias in found), None)
    elif None in found:
        wanted = None
    else:
        spelled = {_SPLITS.get(key, key): key for key in found}
        only = next(iter(found)) if len(found) == 1 else None
        wanted = next((spelled[default] for default in default_splits if default in spelled), only)
    if wanted is None:
        raise DataError(
            f"{name}: no split {split or default_splits[0]!r}, or none that is clear (it has {', '.join(found.values())}); name a "
            "split, or one file."
        )
    return wanted


def _split_of(path: Path) -> str | None:
    """The split that the top folder, or a table's own name, spells: `train/cat/1.png`, `test-0-of-1.parquet`."""
    top = path.parts[0].lower()
    if len(path.parts) > 1 and top in _SPLITS:
        return _SPLITS[top]
    words = re.split(r"[-_. ]", path.stem.lower()) if kind_of(path) in TABLES else []
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _joined(folder: Path, tables: list[Table]) -> Table:
    """Tables of the same columns, one after another."""
    import datasets

    first, rows = tables[0], [table.rows for table in tables]
    for table in tables:
        if set(table.columns) != set(first.columns):
            raise DataError(f"{table.name} has columns {table.columns}, but {first.name} has {first.columns}.")
    places = [(table, index) for table in tables for index in range(len(table.rows))]
    lists = [part for part in rows if isinstance(part, list)]
    if lists and len(lists) < len(rows):
        raise DataError(f"{folder} mixes Parquet or Arrow with text formats; name one file.")
    joined = [row for part in lists for row in part] if lists else datasets.concatenate_datasets(rows)
    digest = _digest_of_many([(Path(table.name), str(table.sha256)) for table in tables], folder)
    return Table(str(folder), first.columns, joined, lambda i: places[i][0].where(places[i][1]), digest, folder)


def _documents(folder: Path, paths: list[Path], kind: tuple[str, ...]) -> Table:
    """Texts or images, each with its class where the folders are classes."""
    # below the split's own folder, the first folder is the class
    skip = 1 if all(len(p.relative_to(folder).parts) > 1 and _split_of(p.relative_to(folder)) for p in paths) else 0
    classes = [path.relative_to(folder).parts[skip:-1] for path in paths]
    if any(len(parts) > 1 for parts in classes) or len({len(parts) for parts in classes}) > 1:
        raise DataError(f"{folder}: expected one folder for each class with the files in it, or no folders.")
    if any(classes):
        _refuse_empty_classes(paths, "texts" if kind == TEXTS else "images")
    rows: list[dict[str, Any]] = []
    digests: list[tuple[Path, str]] = []
    for path, parts in zip(paths, classes, strict=True):
        data = read_bytes_of(path)
        digests.append((path, hashlib.sha256(data).hexdigest()))
        row: dict[str, Any] = (
            {"text": decode(str(path), data)} if kind == TEXTS else {"image": str(path.relative_to(folder))}
        )
        rows.append(row | ({"label": parts[0]} if parts else {}))
    digest = _digest_of_many(digests, folder)
    return Table(str(folder), tuple(rows[0]), rows, lambda i: str(paths[i]), digest, folder)


def _refuse_empty_classes(paths: Sequence[Path], what: str) -> None:
    """Refuse a folder beside those of the classes that holds none of the files."""
    used = {path.parent for path in paths}
    for top in sorted({folder.parent for folder in used}):
        for other in sorted(path for path in top.iterdir() if path.is_dir() and path not in used):
            if not is_hidden(Path(other.name)) and not other.name.startswith("__"):
                raise DataError(
                    f"{other}: a folder beside those of the classes, and it holds no {what}: put some in, or remove it."
                )


def _digest_of_many(digests: Sequence[tuple[Path, str]], folder: Path) -> str:
    """One digest for several files: of their digests and their names below `folder`, in order."""
    lines = "".join(f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in digests)
    return hashlib.sha256(lines.encode()).hexdigest()


def _hub(name: str, split: str | None, default_splits: Sequence[str]) -> Table:
    import datasets

    identifier, _, config = name.partition(":")
    try:
        with _without_bars():
            builder = datasets.load_dataset_builder(identifier, config or None)
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in _HUB_BUILDERS:
                raise UnsupportedError(f"hub data set {name} is of kind {kind!r}, not {', '.join(_HUB_BUILDERS)}.")
            builder.download_and_prepare()
            splits = list(builder.info.splits or {})
            only = splits[0] if len(splits) == 1 else default_splits[0]
            chosen = split or next((s for s in default_splits if s in splits), only)
            rows = builder.as_dataset(split=chosen)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name} is neither a local file nor a hub data set that can be read: {redacted(first_line(error))}."
        ) from error
    return Table(name, tuple(rows.column_names), rows, lambda i: f"{name} ({chosen}), example {i + 1}", None, None)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`, which are one switch for the whole process."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
