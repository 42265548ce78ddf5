"""Many adapters at once: every PEFT folder below a folder, or those that a text file lists.

It knows where adapters lie and what to call them. It opens none.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import AdapterError, WloraMergeError
from ..io.hub import HUB_ID, is_here, seen_from
from ..io.untrusted import read_bytes
from ..text import short
from .adapter import CONFIG_FILE, default_name, refuse_same_names, split_adapter_spec
from .keys import check_adapter_name

MAX_LIST_BYTES = 1 << 20


def find_adapters(path: str | Path) -> list[tuple[str, str]]:
    """The adapters of a folder or of a list, as `mix` and `fit` take them.

    Args:
        path: a folder, of which every PEFT folder below it counts, itself too, but none below a hidden folder (`.cache`); or a text
            file with one `[NAME=]PATH_OR_ID` on a line. In it, blank lines and what stands behind a `#` say nothing, and paths are
            relative to its folder.

    Returns:
        (name, PATH_OR_ID) of each: in the order of the list; of a folder in natural order (task2 before task10). An adapter of a
        folder is called as its own folder, or where another has that name too, as the path below the folder, with dots.

    Raises:
        AdapterError: there is no such folder or list, or no adapter in it; a line that names none; two adapters of the same name.
    """
    where = Path(path).expanduser()
    if not is_here(where):
        raise AdapterError(
            f"{path}: no such folder or file: give a folder with adapters in it, or a text file with one [NAME=]PATH_OR_ID on a line."
        )
    found = _below(where) if where.is_dir() else _adapters_in_list(where)
    refuse_same_names(name for name, _ in found)
    return found


def _below(root: Path) -> list[tuple[str, str]]:
    parts = sorted(_peft_folders(root, ()), key=_natural_key)
    if not parts:
        raise AdapterError(f"{root}: no PEFT folder lies in it (one that has an {CONFIG_FILE}): give another.")
    own = Path(os.path.abspath(root)).name
    last = [part[-1] if part else own for part in parts]
    often = Counter(last)
    names = [name if often[name] == 1 else ".".join(part) or name for name, part in zip(last, parts, strict=True)]
    return [(name, str(root.joinpath(*part))) for name, part in zip(names, parts, strict=True)]


def _natural_key(parts: tuple[str, ...]) -> list[tuple[int, str]]:
    """A sort key that puts task2 before task10."""
    pieces = re.split(r"([0-9]{1,18})", "/".join(parts))  # every other one is a number
    return [(int(piece), "") if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]


def _peft_folders(root: Path, parts: tuple[str, ...], above: frozenset[str] = frozenset()) -> Iterator[tuple[str, ...]]:
    """The parts of the paths of PEFT folders below a folder; links are followed, but not in a circle."""
    real = os.path.realpath(root.joinpath(*parts))
    if real in above:
        return
    try:
        entries = list(os.scandir(real))
    except OSError as error:
        raise AdapterError(f"{root.joinpath(*parts)}: cannot be read ({error.strerror}).") from error
    if any(entry.name == CONFIG_FILE for entry in entries):
        yield parts
    for entry in entries:
        if not entry.name.startswith(".") and entry.is_dir():
            yield from _peft_folders(root, (*parts, entry.name), above | {real})


def _adapters_in_list(file: Path) -> list[tuple[str, str]]:
    try:
        text = read_bytes(file, AdapterError, MAX_LIST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(
            f"{file}: is no text ({error.reason} at byte {error.start}): expected one [NAME=]PATH_OR_ID on a line."
        ) from error
    found = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        said = line if line.lstrip().startswith("#") else line.partition(" #")[0]
        if (said := said.strip()) and not said.startswith("#"):
            found.append(_of_line(said, f"{file}, line {number}", file.parent))
    if not found:
        raise AdapterError(f"{file}: lists no adapter: expected one [NAME=]PATH_OR_ID on a line.")
    return found


def _of_line(line: str, where: str, folder: Path) -> tuple[str, str]:
    name, path = split_adapter_spec(line, folder)
    path = seen_from(path.strip(), folder) if path.strip() else ""
    if not path or (not is_here(path) and (path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path))):
        raise AdapterError(
            f"{where}: {short(line)} names neither a folder nor a hub id (org/name): expected [NAME=]PATH_OR_ID, with a path that is "
            "relative to the list."
        )
    try:
        return check_adapter_name(default_name(path) if name is None else name.strip()), path
    except WloraMergeError as error:
        raise AdapterError(f"{where}: {error}") from error
