"""Traced graphs without weights, kept in the user's cache folder, so that a model is traced once for all mixtures on its base.

An entry stands under a key of all that a graph depends on: the config, what the model is made of, the task, dtype, opset, pooling,
and the versions of all that traces. No number of a weight is in a key, nor in an entry. An entry that is damaged, not
this user's, or of another key is never used (see `io.cache`). Must not know how a graph is traced.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..io.cache import Sealed, read_sealed, remove_sealed, sealed_files, write_sealed
from .skeleton import Skeleton
from .weights import Weight

KIND = "graphs"
"""The folder of the entries in the cache folder."""
PACKAGES = ("wlora-merge", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")
Skeletons = dict[str, Skeleton]
"""Graphs by name, in the order of an export's files."""


@dataclass(frozen=True)
class TraceKey:
    """All that a traced graph depends on, and, apart from it, what a person calls the base.

    Attributes:
        facts: a table that JSON can hold.
        base: the base's name; two bases of one config and structure have one graph.
    """

    facts: Mapping[str, Any]
    base: str

    @property
    def name(self) -> str:
        """The name of the entry."""
        return hashlib.sha256(_json(self.facts)).hexdigest()


def trace_key(
    dense: Path, structure: Mapping[str, Any], *, task: str, dtype: str, opset: int, pooling: str | None, base: str
) -> TraceKey:
    """The key of a graph.

    Args:
        dense: the model folder; its config belongs to the key.
        structure: what `weights.structure_of` says of the model.
        task: the name of its task.
        dtype: of the graph's weights.
        opset: of the graph.
        pooling: what the head sees in place of the first token.
        base: what the list of entries calls the base.
    """
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    facts = {
        "config": config,
        "structure": structure,
        "task": task,
        "dtype": dtype,
        "opset": opset,
        "pooling": pooling,
        "python": list(sys.version_info[:2]),
        "versions": {name: version(name) for name in PACKAGES},
        "code": _code(),
    }
    return TraceKey(json.loads(_json(facts)), base)


def read_graphs(key: TraceKey) -> Skeletons | None:
    """The graphs of a key; None where they are not there, or the entry is not to be trusted."""
    content = read_sealed(KIND, key.name)
    table = None if content is None else _table(content)
    if table is None or table["key"] != key.facts:
        return None
    try:
        return {name: _skeleton(row) for name, row in table["graphs"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _skeleton(row: Mapping[str, Any]) -> Skeleton:
    weights = {
        key: Weight(str(name), None if axes is None else tuple(map(int, axes)))
        for key, (name, axes) in row["weights"].items()
    }
    return Skeleton(base64.b64decode(row["graph"], validate=True), weights)


def keep_graphs(key: TraceKey, graphs: Skeletons) -> None:
    """Keep the graphs of a key, in the place of what stands there."""
    rows = {
        name: {
            "graph": base64.b64encode(skeleton.graph).decode(),
            "weights": {key: [weight.name, weight.axes] for key, weight in skeleton.weights.items()},
        }
        for name, skeleton in graphs.items()
    }
    write_sealed(KIND, key.name, _json({"base": key.base, "key": key.facts, "graphs": rows}))


def forget_graphs(key: TraceKey | None = None) -> None:
    """Remove the entry of a key, or all.

    Raises:
        OSError: a file may not be removed.
    """
    remove_sealed(KIND, None if key is None else key.name)


@dataclass(frozen=True)
class KeptGraphs:
    """An entry, for a person: `sound` is false where it would not be used.

    Attributes:
        base: what the base was called when it was traced.
        task: of the graph.
        dtype: of its weights.
        opset: of the graph.
        file: the entry's own, with its size and date of last use.
        sound: whether it can be trusted.
    """

    base: str
    task: str
    dtype: str
    opset: int | None
    file: Sealed
    sound: bool


def kept_graphs() -> list[KeptGraphs]:
    """All entries, the last used first."""
    found = []
    for file in sealed_files(KIND):
        table = None if file.content is None else _table(file.content)
        key = table["key"] if table else {}
        base = str(table["base"]) if table else ""
        found.append(
            KeptGraphs(
                base, str(key.get("task", "")), str(key.get("dtype", "")), key.get("opset"), file, table is not None
            )
        )
    return found


def _json(table: Any) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()


def _table(content: bytes) -> dict[str, Any] | None:
    """The table of an entry; None where a version that wrote other tables has left it."""
    try:
        table = json.loads(content)
    except ValueError:
        return None
    return table if isinstance(table, dict) and {*table} == {"base", "key", "graphs"} else None


@cache
def _code() -> str:
    """The sha256 of the code that loads, traces and tidies: an installation from a working copy keeps its version."""
    digest = hashlib.sha256()
    for room in ("onnx", "models"):
        for file in sorted((Path(__file__).parents[1] / room).glob("*.py")):
            digest.update(f"{room}/{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()
