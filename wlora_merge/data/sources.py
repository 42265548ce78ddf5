"""Where examples come from: one file, a folder of tables, texts or images, or a hub data set.

This room knows folders, splits and the hub. It knows neither tasks nor what a column means, and runs no code that comes
with data. Only a hub data set uses the network or writes a cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError, UnsupportedError
from ..io.hub import is_here
from ..io.untrusted import is_hidden
from ..text import first_line, redacted
from .formats import TABLES, TEXTS, Table, decode, read_bytes_of, read_file

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TRAIN = "train"
_SPLITS = {TRAIN: TRAIN, "training": TRAIN, "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "test": "test", "eval": "test"}  # fmt: skip
_DATA_SET_ID = re.compile(r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)?(?::[^/\\]+)?")
# the builders of `datasets` that read plain data; others run decoders, need further packages, or (once) read pickles
_HUB_BUILDERS = ("parquet", "json", "csv", "text", "arrow", "imagefolder")


def read_source(source: str | Path, *, split: str | None = None, default_splits: Sequence[str] = (TRAIN,)) -> Table:
    """Read a local file or folder, or download a hub data set.

    Args:
        source: a path, or a hub id with an optional configuration, `owner/name[:config]`.
        split: which split of a folder or hub data set; None: the first of `default_splits` that there is, or the only one.
        default_splits: the splits to look for, in this order, where none is named.

    Raises:
        DataError: nothing is there, it cannot be read, or the split is missing or not clear.
        UnsupportedError: a format that is not read.
    """
    path = Path(source)
    if is_here(path):
        path = path.expanduser()
    elif path.suffix.lower() in TABLES + TEXTS or not _DATA_SET_ID.fullmatch(str(source)):
        raise DataError(f"{redacted(str(source))} does not exist.")
    else:
        return _hub(str(source), split, default_splits)
    if path.is_dir():
        return _folder(path, split, default_splits)
    if path.is_file():
        if split is not None:
            raise DataError(f"{path} is one file and has no split {split!r}; leave the split out.")
        return read_file(path)
    raise DataError(f"{path} is a pipe or a device; give a file or a folder.")


def _folder(folder: Path, split: str | None, default_splits: Sequence[str]) -> Table:
    """Tables of one kind, one after another; or texts or images, whose class is the folder that they lie in."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path.relative_to(folder)))
    kinds = {kind: [path for path in files if path.suffix.lower() in kind] for kind in (TABLES, TEXTS, IMAGES)}
    present = {kind: paths for kind, paths in kinds.items() if paths}
    if not present:
        raise DataError(f"{folder} holds no data files: expected tables, texts or images.")
    if len(present) > 1:
        examples = ", ".join(str(paths[0].relative_to(folder)) for paths in present.values())
        raise DataError(f"{folder} holds several kinds of data ({examples}); name one file, or a folder of one kind.")
    ((kind, paths),) = present.items()
    paths = _of_split(folder, paths, kind, split, default_splits)
    return _joined(folder, [read_file(path) for path in paths]) if kind == TABLES else _documents(folder, paths, kind)


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
    wanted = _wanted(by_split, split, default_splits)
    if wanted is None or wanted not in by_split:
        files = ", ".join(str(paths[0].relative_to(folder)) for paths in by_split.values())
        raise DataError(
            f"{folder}: no split {split or default_splits[0]!r}, or none that is clear (it has {files}); name a split, or one file."
        )
    return by_split[wanted]


def _wanted(found: Collection[str | None], split: str | None, default_splits: Sequence[str]) -> str | None:
    """The split asked for; else the first default that was found, or the only split; None where that is not clear."""
    if split is not None:
        return _SPLITS.get(split, split)
    if None in found:  # files of no split
        return None
    return next((name for name in default_splits if name in found), next(iter(found)) if len(found) == 1 else None)


def _split_of(path: Path) -> str | None:
    """The split that the top folder, or a table's own name, spells: `train/cat/1.png`, `test-0-of-1.parquet`."""
    top = path.parts[0].lower()
    if len(path.parts) > 1 and top in _SPLITS:
        return _SPLITS[top]
    words = re.split(r"[-_. ]", path.stem.lower()) if path.suffix.lower() in TABLES else []
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
        raise DataError(f"{folder} mixes Parquet with text formats; name one file.")
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
            {"text": decode(path, data)} if kind == TEXTS else {"image": str(path.relative_to(folder))}
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
