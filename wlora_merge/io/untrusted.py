"""The files of an input folder, opened so that nothing hostile can come of it.

A folder from elsewhere may hold links to anywhere, pipes that never end, and tables of any size. This room finds a file by its
plain name, inside its folder, and parses JSON of a bounded length; it knows nothing of models.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PurePath
from typing import Any

from ..errors import WloraMergeError
from ..text import human_bytes

MAX_TABLE_BYTES = 32 << 20
"""Of a JSON or YAML file, or a card; the largest index on the hub has 9 MB. Parsed, it takes at most some 30 times as much."""


def find_file(folder: Path, name: str | Path, error: type[WloraMergeError]) -> Path | None:
    """`folder/name` if it is a regular file that lies in the folder; None where there is nothing of that name.

    A link may lead to another file of the folder, or from a snapshot of the hub's cache to that repository's blobs.

    Raises:
        error: a link that leaves the folder or leads nowhere, or what is not a file.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if home not in real.parents and not _is_blob_of(real, home):
        raise error(
            f"{path}: is a link to {real}, outside its folder, which is not followed: put the file itself there."
        )
    if not path.exists():
        raise error(f"{path}: is a link to {real}, which is not there: fetch the file again.")
    if not path.is_file():
        raise error(f"{path}: is a folder or a device, expected a file.")
    return path


def _is_blob_of(real: Path, home: Path) -> bool:
    """Whether a file is a blob of the cached repository (`models--org--name/{blobs,snapshots}`) that home is a snapshot of."""
    repository = next((p.parent for p in (home, *home.parents) if p.name == "snapshots"), None)
    return repository is not None and real.parent == repository / "blobs"


def read_bytes(path: Path, error: type[WloraMergeError], limit: int = MAX_TABLE_BYTES) -> bytes:
    """All bytes of a regular file of at most `limit` bytes.

    Raises:
        error: it cannot be read, is not a regular file, is longer, or changes while it is read.
    """
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a pipe nobody writes to would wait for ever
        with open(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path}: is not a regular file.")
            # not limit + 1: read allocates what it is asked for
            data = stream.read(found.st_size + 1) if found.st_size <= limit else b""
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror or failure}).") from failure
    if max(len(data), found.st_size) > limit:
        raise error(f"{path}: is longer than {human_bytes(limit)}, the most that is read of such a file.")
    if len(data) != found.st_size:
        raise error(f"{path}: changed while it was read; run this again when nothing writes to it.")
    return data


def parse_yaml(text: str) -> Any:
    """What a YAML text says, by safe load: nothing in it is executed.

    Raises:
        ValueError: it is not YAML, or a table has a key twice, of which the last would win.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            """A table whose keys stand in it once."""
            node = super().compose_mapping_node(anchor)
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in set(keys) if keys.count(key) > 1]:
                raise ValueError(
                    f"the key {min(twice)[1]!r} stands twice in one table, line {node.start_mark.line + 1}"
                )
            return node

    try:
        return Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as failure:
        # PyYAML lets the errors of its scalars through: `!!bool maybe`, `!!int ""`, `!!timestamp x`, 2026-13-45
        raise ValueError(" ".join(str(failure).split()) or type(failure).__name__) from failure


def read_json(path: Path, error: type[WloraMergeError], expected: str = "a table") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: it cannot be read, is too long, is not valid JSON, or holds another thing than an object.
    """
    data = read_bytes(path, error)
    try:
        table = json.loads(data)
        if b"\\u" in data:
            json.dumps(
                table, ensure_ascii=False
            ).encode()  # half of a surrogate pair: UnicodeEncodeError is a ValueError
    except (ValueError, RecursionError) as failure:
        raise error(f"{path}: is not valid JSON ({failure}).") from failure
    if not isinstance(table, dict):
        raise error(f"{path}: holds a {type(table).__name__}, expected {expected}.")
    return table


def is_plain_file_name(name: object) -> bool:
    """True for the name of a file in its own folder: no separator, no `..`, no drive, nothing hidden."""
    return isinstance(name, str) and bool(name) and not name.startswith(".") and not re.search(r"[/\\:\0]", name)


def is_hidden(path: PurePath) -> bool:
    """Whether a relative path is that of a hidden file, or lies in a hidden folder."""
    return any(part.startswith(".") for part in path.parts)


def is_utf8(text: str) -> bool:
    """Whether a name can be written as UTF-8: one that a file system has in other bytes has halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
