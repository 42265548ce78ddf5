"""A base with a vocabulary of another size: which of its tensors follow the vocabulary, and the base with more or fewer rows.

Both are asked of the model class itself: its own `resize_token_embeddings` runs on a copy without memory. So a class that also
resizes a bias (BART) or a second table (Gemma 3n) does it here too. It knows no adapters: the rows that come anew are given.

Source: `transformers.PreTrainedModel.resize_token_embeddings`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..io.safetensors_file import Entry, Header, build_header, byte_length
from ..text import first_line
from .base_model import BaseModel
from .loading import quiet
from .module_tree import ModuleTree

if TYPE_CHECKING:
    import torch
    from torch import nn

KEY = "vocab_size"


@dataclass
class Vocabulary:
    """A base's vocabulary at another size: `rows` of the input embedding, and `model`, resized and without memory."""

    base: BaseModel
    tree: ModuleTree
    rows: int
    model: nn.Module

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The model's names of the tensors that follow the vocabulary -> their shape at this size."""
        found = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        return {name: shape for name, shape in found.items() if shape != self.tree.tensors.get(name)}

    def stored(self, name: str) -> Entry | None:
        """The base's tensor that holds a tensor of that name: its own, or the one that it is tied to."""
        return self.tree.stored(name) or self.tree.ties.source(name)

    def name_of(self, name: str) -> str | None:
        """The model's name of a tensor of another spelling; None where that does not follow the vocabulary."""
        entry = self.base.find_tensor(name)
        found = self.tree.rename(entry.name)[0] if entry is not None else self.tree.ties.names.find(name)
        return found if found in self.shapes else None

    @property
    def config(self) -> dict[str, Any]:
        """The config keys that change with the size."""
        before, after = (model.config.to_dict() for model in (self.tree.model, self.model))  # type: ignore[operator,union-attr]
        changes = _changed_keys(self.base.config, before, after)
        return changes | ({KEY: self.rows} if self.base.config.get(KEY) == self.rows_before else {})

    @property
    def rows_before(self) -> int:
        """Rows of the base's own input embedding."""
        return int(self.tree.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def vocabulary(base: BaseModel, rows: int | None = None) -> Vocabulary:
    """The base's vocabulary at another size.

    Args:
        base: the opened base.
        rows: of its input embedding; None: one more than it has, which tells which tensors follow it.

    Raises:
        UnsupportedError: transformers has no class for the base, or the class has no vocabulary that can be resized.
    """
    if base.tree is None:
        raise UnsupportedError(
            f"{base.folder}: transformers has no class for this base, so which tensors grow with its vocabulary is not known."
        )
    model: Any = copy.deepcopy(base.tree.model)
    try:
        size = rows if rows is not None else int(model.get_input_embeddings().weight.shape[0]) + 1
        with quiet():
            model.resize_token_embeddings(size, mean_resizing=False)
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"{base.folder}: a {type(model).__name__} has no vocabulary that can be resized ({first_line(error)})."
        ) from error
    return Vocabulary(base, base.tree, size, model)


def with_vocabulary(made: Vocabulary, added: Mapping[str, torch.Tensor]) -> BaseModel:
    """The base at a vocabulary's size: tensors that shrink lose their last rows, those that grow have `added` rows behind theirs.

    Args:
        made: the vocabulary.
        added: rows [k, ...] by the name of the base's tensor or, of one that is no longer tied, the model's.
    """
    base = made.base
    cut = {}
    for name, shape in made.shapes.items():
        entry = made.tree.stored(name)
        if entry is not None and byte_length(entry.dtype, shape) < entry.nbytes:
            cut[entry.name] = replace(entry, shape=shape, end=entry.start + byte_length(entry.dtype, shape))
    result = copy.copy(base)
    result.entries = base.entries | cut
    result.headers = {file: _cut_header(header, base, cut) for file, header in base.headers.items()}
    result.added, result.vocabulary = dict(added), made
    result.tree = ModuleTree(made.model, result.entries)
    return result


def _cut_header(header: Header, base: BaseModel, cut: Mapping[str, Entry]) -> Header:
    """A file's header with the smaller tensors in it; the same one where it has none of them."""
    own = {name: entry for name, entry in cut.items() if header.entries.get(name) is base.entries[name]}
    if not own:
        return header
    entries = header.entries | own
    raw = build_header({e.name: (e.dtype, e.shape) for e in entries.values()}, header.metadata)
    return replace(header, entries=entries, raw=raw)


def _changed_keys(raw: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config's file that differ between two configs; a part that the file does not have has its keys beside it."""
    changes: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if old == value:
            continue
        if not isinstance(value, dict) or not isinstance(old, dict):
            changes[key] = value
        elif isinstance(raw.get(key), dict):
            changes[key] = raw[key] | _changed_keys(raw[key], old, value)
        else:
            changes |= _changed_keys(raw, old, value)
    return changes
