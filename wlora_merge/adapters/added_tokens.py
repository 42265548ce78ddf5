"""A base with a larger vocabulary: the rows that one adapter adds to its embeddings, and that adapter's tokenizer.

An adapter that was trained with added tokens carries the embeddings whole, with more rows than the base's. The base has no
such rows, so they are no deltas: they are taken from the adapter that the user names (`--resize-vocab NAME`), and stand behind
the base's own. On the base so resized every adapter mixes as ever: the base's rows, and other adapters' values of the added
ones, are deltas; an adapter of the base's own vocabulary changes no added row.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterError, BaseModelError, UnsupportedError, WloraMergeWarning
from ..io.hub import resolve_source
from ..io.safetensors_file import Entry
from ..io.tensors import equal
from ..io.untrusted import find_file, read_json
from ..models.base_model import BaseModel
from ..models.files import TOKENIZER_FILES
from ..models.names import NameResolver
from .adapter import Adapter

KEY = "vocab_size"


def resized(base: BaseModel, adapters: Sequence[Adapter], name: str | None) -> BaseModel:
    """The base with the rows that adapter `name` adds to its embeddings, and with that adapter's tokenizer.

    Which tensors grow is told by the model class itself, built without memory for both sizes of the vocabulary.

    Args:
        base: the opened base model.
        adapters: N adapters, in mixture order.
        name: of one of the adapters; None gives the base as it is.

    Raises:
        AdapterError: no adapter has that name, it adds no token, or its tokenizer has more tokens than its embeddings.
        UnsupportedError: it lacks the added rows of a tensor that grows, or has no tokenizer.
    """
    if name is None:
        return base
    adapter = next((a for a in adapters if a.name == name), None)
    if adapter is None:
        raise AdapterError(f"--resize-vocab {name}: expected one of {', '.join(a.name for a in adapters)}.")
    old, new = _sizes(base, adapter)
    result = copy.copy(base)
    result.added = {}
    saved = NameResolver(adapter.tensors)
    for tensor, shape in sorted(_grown(base, old, new).items(), key=lambda item: base.find_tensor(item[0]) is None):
        found, own = _saved_name(adapter, saved, tensor, shape, new - old), base.find_tensor(tensor)
        rows, source = adapter.tensors[found][old:], own or _tied(base, tensor)
        if source is None:
            raise UnsupportedError(f"--resize-vocab {name}: {base.folder} has no tensor {tensor!r} to add rows to.")
        same = result.added.get(source.name)
        if own is not None or same is None or not equal(same, rows):
            result.added[own.name if own else tensor] = rows
    result.tokenizer = tokenizer_files(adapter, new, "--resize-vocab")
    return result


def _tied(base: BaseModel, name: str) -> Entry | None:
    """The tensor of the files that is tied to one that they lack: asked of the class, whatever a mixture knows of its own names."""
    return base.tree.ties.source(name) if base.tree is not None else None


def _saved_name(adapter: Adapter, saved: NameResolver, tensor: str, shape: tuple[int, ...], added: int) -> str:
    """How the adapter calls its own tensor of that name, which must have the shape with the added rows."""
    found = saved.find(tensor)
    if found is None or tuple(adapter.tensors[found].shape) != shape:
        raise UnsupportedError(
            f"--resize-vocab {adapter.name}: {adapter.where} adds {added} tokens, and lacks tensor {tensor!r} {list(shape)}, so that "
            "its rows for them are not known: train with modules_to_save for all embeddings."
        )
    return found


def resized_config(base: BaseModel) -> dict[str, Any]:
    """The config keys that change with the vocabulary; empty where it is the base's own."""
    if not base.added:
        return {}
    rows = next(iter(base.added.values()))
    old = next(base.entries[name].shape[0] for name in base.added if name in base.entries)
    new = old + len(rows)
    tables = {k: v | {KEY: new} for k, v in base.config.items() if isinstance(v, dict) and v.get(KEY) == old}
    return tables | ({KEY: new} if base.config.get(KEY) == old or not tables else {})


def warn_of_end(base: BaseModel) -> None:
    """Say so where the new tokenizer ends a text with another token than the base's config says: generation would not stop there."""
    file = base.tokenizer.get("tokenizer_config.json")
    if file is None:
        return
    table = read_json(file, AdapterError)
    end = table.get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    found = [number for number, content in _added(base.tokenizer) if content == text]
    generation = find_file(base.folder, "generation_config.json", BaseModelError)
    parts = [base.config, *(v for v in base.config.values() if isinstance(v, dict))]
    parts += [read_json(generation, BaseModelError)] if generation else []
    told = [part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None]
    known = [number for value in told for number in (value if isinstance(value, list) else [value])]
    if found and known and found[0] not in known:
        warnings.warn(
            f"{file}: the tokenizer ends a text with {text!r} ({found[0]}), the base's config says {known}: set eos_token_id in "
            "the export's config.json and generation_config.json, or generation does not stop.",
            WloraMergeWarning,
            stacklevel=3,
        )


def _sizes(base: BaseModel, adapter: Adapter) -> tuple[int, int]:
    """Rows of the base's embeddings, and of the adapter's."""
    found = set()
    for name, tensor in adapter.tensors.items():
        entry = base.find_tensor(name) or _tied(base, name)
        if entry is not None and entry.shape[1:] == tuple(tensor.shape[1:]) and len(tensor) > entry.shape[0]:
            found.add((entry.shape[0], len(tensor)))
    if len(found) != 1:
        what = (
            "no embedding with more rows than the base's" if not found else f"tensors of several sizes: {sorted(found)}"
        )
        raise AdapterError(f"--resize-vocab {adapter.name}: {adapter.where} carries {what}.")
    return found.pop()


def _grown(base: BaseModel, old: int, new: int) -> dict[str, tuple[int, ...]]:
    """The tree's tensors whose shape follows the vocabulary -> their shape with `new` tokens."""
    import torch

    if base.tree is None:
        raise UnsupportedError(
            f"{base.folder}: transformers has no class for this base, so which tensors grow with its vocabulary is not known."
        )
    config = copy.deepcopy(base.tree.model.config)
    for table in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))):
        if getattr(table, KEY, None) == old:
            setattr(table, KEY, new)
    with torch.device("meta"):
        model = type(base.tree.model)(config)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if shape != base.tree.tensors.get(name)}


def tokenizer_files(adapter: Adapter, rows: int | None, asked: str) -> dict[str, Path]:
    """File name -> path of the tokenizer that lies in the adapter's folder.

    Args:
        adapter: whose tokenizer is wanted.
        rows: of the model's embedding; None where they are not known.
        asked: the option that wants it.

    Raises:
        UnsupportedError: it has none.
        AdapterError: it has a token that the embedding has no row for.
    """
    source = adapter.source
    if source.hub_id:  # what was fetched of it is the adapter alone
        source = resolve_source(
            f"{source.hub_id}@{source.revision}" if source.revision else source.hub_id, TOKENIZER_FILES
        )
    folder = source.folder
    files = {name: path for name in TOKENIZER_FILES if (path := find_file(folder, name, AdapterError)) is not None}
    if "tokenizer_config.json" not in files:
        raise UnsupportedError(
            f"{asked} {adapter.name}: {folder} has no tokenizer (tokenizer_config.json): save the one that the adapter was trained "
            "with there: tokenizer.save_pretrained(folder)."
        )
    largest = max((number for number, _ in [*_added(files), *_vocabulary(files)]), default=-1)
    if rows is not None and largest >= rows:
        raise AdapterError(
            f"{folder}: its tokenizer has a token {largest}, and its embeddings have {rows} rows: it is not the tokenizer that this "
            "adapter was trained with, or --resize-vocab brings its rows."
        )
    return files


def _vocabulary(files: Mapping[str, Path]) -> list[tuple[int, str]]:
    """Ids and contents of a tokenizer's own tokens, where its file is a table of them."""
    model = read_json(files["tokenizer.json"], AdapterError).get("model") if "tokenizer.json" in files else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    rows = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return [(number, content) for content, number in rows if isinstance(number, int)]


def _added(files: Mapping[str, Path]) -> list[tuple[int, Any]]:
    """Ids and contents of the tokens that were added to a tokenizer."""
    found: list[tuple[int, Any]] = []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        table = read_json(files[name], AdapterError) if name in files else {}
        rows = [row for row in table.get("added_tokens") or [] if isinstance(row, dict)]
        found += [(row["id"], row.get("content")) for row in rows if isinstance(row.get("id"), int)]
        rows_by_id = table.get("added_tokens_decoder") or {}
        found += [
            (int(key), row.get("content"))
            for key, row in rows_by_id.items()
            if key.isdecimal() and isinstance(row, dict)
        ]
    return found
