"""The tokenizer that lies beside an adapter: its files, and which tokens it has. It knows no weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, BaseModelError, UnsupportedError, WloraMergeWarning
from ..io.hub import resolve_source
from ..io.untrusted import find_file, read_json
from ..models.base_model import BaseModel
from ..models.files import TOKENIZER_FILES
from .adapter import Adapter


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
    files = tokenizer_beside(adapter)
    folder = adapter.source.folder
    if "tokenizer_config.json" not in files:
        raise UnsupportedError(
            f"{asked} {adapter.name}: {folder} has no tokenizer (tokenizer_config.json): save the one that the adapter was trained "
            "with there: tokenizer.save_pretrained(folder)."
        )
    largest = max(tokens(files), default=-1)
    if rows is not None and largest >= rows:
        raise AdapterError(
            f"{folder}: its tokenizer has a token {largest}, and its embeddings have {rows} rows: it is not the tokenizer that this "
            "adapter was trained with, or --resize-vocab brings its rows."
        )
    return files


def tokenizer_beside(adapter: Adapter) -> dict[str, Path]:
    """File name -> path of the tokenizer beside an adapter; of one of the hub it is fetched, as that was not needed before."""
    source = adapter.source
    if source.hub_id:
        source = resolve_source(
            f"{source.hub_id}@{source.revision}" if source.revision else source.hub_id, TOKENIZER_FILES
        )
    return {
        name: path for name in TOKENIZER_FILES if (path := find_file(source.folder, name, AdapterError)) is not None
    }


def tokens(files: Mapping[str, Path]) -> dict[int, Any]:
    """Id -> content of the tokens of a tokenizer, as far as its files are tables of them."""
    return dict(_vocabulary(files)) | dict(_added(files))


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
