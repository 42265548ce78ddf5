"""Tied embeddings: what a model uses under two names, and the second tensor that it needs once adapters change one of them.

A checkpoint with tied embeddings stores one tensor, and the model uses it at its input and at its output. An adapter on one
side changes that side alone, so the two are no longer equal: an export then writes both and says so in its config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from .base_model import BaseModel

if TYPE_CHECKING:
    from ..io.safetensors_file import Entry

KEY = "tie_word_embeddings"


def untied(base: BaseModel, changed: Iterable[str], config: Mapping[str, Any]) -> dict[str, Entry]:
    """Tensor name that the export must have beside the base's own -> the tensor that it was tied to.

    Args:
        base: the opened base.
        changed: names of the tensors that the adapters or a head change.
        config: the config keys that the task changes; another architecture may have no output embedding.

    Returns:
        Nothing where no tied tensor changes. Names come from the model class itself, built without memory.

    Raises:
        UnsupportedError: the class of the model is not known.
    """
    if not any(_is_tied(base, name) for name in changed):
        return {}
    found = {}
    for name, source in _tied_names(base, config).items():
        entry = base.find_tensor(source)
        if entry is not None and base.find_tensor(name) is None:
            found[name] = entry
    return found


def _is_tied(base: BaseModel, name: str) -> bool:
    """Whether a tensor is one of the tied ones, by the files' name of it or, as a head's, by the model's."""
    if not base.tied or name in base.tied or base.find_tied(name) is not None:
        return bool(base.tied)
    entry = base.find_tensor(name)
    return entry is not None and entry.name in base.tied


def _tied_names(base: BaseModel, config: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> the parameter that transformers ties it to."""
    import transformers

    from .module_tree import ModuleTree, empty_model

    names = config.get("architectures") or base.config.get("architectures") or []
    model_class = getattr(transformers, names[0], None) if len(names) == 1 else None
    if model_class is None:
        raise UnsupportedError(
            f"{base.folder}: an adapter changes one of its tied embeddings, and its config names no model class of transformers "
            f"(architectures: {names}), so the other's name is not known: leave this adapter out."
        )
    if base.tree is not None and type(base.tree.model) is model_class:
        return dict(base.tree.tied)
    return dict(ModuleTree(empty_model(base.folder, model_class), {}).tied)


def twin_of(base: BaseModel, tensor: str) -> str | None:
    """The module that uses the base's tensor as its own weight too, by the name that the model gives it."""
    for name, source in _tied_names(base, {}).items():
        entry = base.find_tensor(source)
        if entry is not None and entry.name == tensor and name.endswith(".weight"):
            return name.removesuffix(".weight")
    return None


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys that say that embeddings are no longer tied: in each table that says something of it."""
    changes: dict[str, Any] = {KEY: False}
    for name, table in config.items():
        if isinstance(table, dict) and KEY in table:
            changes[name] = table | {KEY: False}
    return changes
