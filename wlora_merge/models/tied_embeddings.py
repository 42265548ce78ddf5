"""Tied tensors: what a model uses under several names, and what an export needs once adapters change one of them.

A checkpoint with tied embeddings stores one tensor, and the model uses it at its input and at its output. An adapter on one
side changes that side alone, so the two are no longer equal: an export then writes both and says so in its config. Which
names are one tensor is asked of the model class itself (`tied_weights_keys`), built without memory.

Source: `transformers.PreTrainedModel.tie_weights`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import BaseModelError, UnsupportedError
from .names import NUMERIC_PART, NameResolver

if TYPE_CHECKING:
    from torch import nn

    from ..io.safetensors_file import Entry
    from .base_model import BaseModel
    from .module_tree import ModuleTree

KEY = "tie_word_embeddings"


class Ties:
    """The ties of a module tree as they are once its files are loaded: of two stored tensors that differ, neither is tied.

    `groups` has for each tied name all names of its tensor, `apart` the pairs that the class ties and the files have apart.
    """

    def __init__(self, tree: ModuleTree) -> None:
        self.tree = tree
        self.names = NameResolver(tree.tensors)
        self.apart: dict[str, str] = {}
        self.groups: dict[str, frozenset[str]] = {}
        for name, source in tree.tied.items():
            if _differ(tree.stored(name), tree.stored(source)):
                self.apart[name] = source
                continue
            group = self.groups.get(name, frozenset({name})) | self.groups.get(source, frozenset({source}))
            self.groups |= dict.fromkeys(group, group)

    def of(self, name: str) -> frozenset[str]:
        """All names of the tensor that the model, or the files, call so; empty where that is its only one."""
        found = self.names.find(name)
        group = self.groups.get(found or "", frozenset())
        return group or self.groups.get(self.tree.rename(name)[0], group)

    def source(self, name: str) -> Entry | None:
        """The tensor of the files that the model uses under this name, which the files do not have it under."""
        found = self.names.find(name)
        stored = (self.tree.stored(other) for other in sorted(self.groups.get(found or "", ())))
        return next((entry for entry in stored if entry is not None), None)


def config_parts(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configs of a model's parts, as a multimodal one has them for text and for images."""
    return [value for value in config.values() if isinstance(value, dict) and "model_type" in value]


def may_be_tied(config: Mapping[str, Any], name: str) -> bool:
    """False where no class ties a stored tensor: asking the class costs seconds, and most changes need no answer.

    No decoder and no encoder without parts ties what lies in a numbered layer; a test asks every class of transformers. A part that
    does not say whether it ties has the default of its class.
    """
    parts = config_parts(config)
    whole = not parts and config.get("is_encoder_decoder") is not True
    if whole and any(NUMERIC_PART.fullmatch(part) for part in name.split(".")):
        return False
    return any(table.get(KEY) is not False for table in (config, *parts))


@dataclass(frozen=True)
class Untied:
    """What an export has because tied tensors are no longer equal; false where all are.

    `tensors` are those that it has beside the base's: name -> the base's tensor that it was tied to. `pairs` are the names of
    tensors that were one, `config` the keys that say that they are no longer tied.
    """

    tensors: dict[str, Entry] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether the config changes."""
        return bool(self.config)


def untied(base: BaseModel, changed: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Untied:
    """What an export must have and say, as it has tensors apart that its model class ties.

    Args:
        base: the opened base.
        changed: name -> shape of each tensor that the adapters or a head change; a name as the files have it or, where they lack the
            tensor, the model.
        config: the config keys that the task changes; another architecture may have no output embedding.

    Raises:
        UnsupportedError: the class of the model is not known, or it computes otherwise where they differ.
    """
    suspects = [name for name, shape in changed.items() if _may_have_a_twin(base, name, shape)]
    if not suspects and not _may_be_stored_twice(base):
        return Untied()
    tree = _tree_of(base, config)
    if tree is None:
        _refuse_unknown(base, suspects)
        return Untied()
    ties = tree.ties
    split = {ties.groups[name] for name in _in_tree(base, tree, suspects) if name in ties.groups}
    keys = _untied_keys(tree, base.config | dict(config))
    if not keys or not (split or ties.apart):
        return Untied()
    names = frozenset().union(*split, ties.apart)
    if not _can_untie(base, tree, base.config | dict(config), keys, names):
        if split:
            raise UnsupportedError(
                f"{base.folder}: an adapter changes one of {', '.join(sorted(min(split, key=min)))}, which are one tensor, and a "
                f"{type(tree.model).__name__} computes otherwise where they differ: leave this adapter out."
            )
        return Untied()
    tensors = {}
    for name in sorted(ties.groups):
        if not tree.holds(name):
            source = ties.source(name)
            if source is None:
                raise UnsupportedError(
                    f"{base.folder}: tensor {name!r} is tied to one that the files hold in several parts, and an adapter changes one "
                    "of its tied tensors: leave this adapter out."
                )
            tensors[name] = source
    pairs = {**{name: entry.name for name, entry in tensors.items()}, **ties.apart}
    pairs |= {name: source for name, source in tree.tied.items() if name not in pairs and source not in pairs}
    return Untied(tensors, pairs, keys)


def stored_apart(base: BaseModel) -> dict[str, str]:
    """Pairs of tensors that a base's config and class tie, and that its files hold with different numbers."""
    if not _may_be_stored_twice(base) or base.tree is None:
        return {}
    ties, keys = base.tree.ties, _untied_keys(base.tree, base.config)
    return ties.apart if ties.apart and keys and _can_untie(base, base.tree, base.config, keys, ties.apart) else {}


def tied_to_input(model: nn.Module, module: nn.Module) -> str | None:
    """The module that takes the rows of an input embedding too, as PEFT has it; None where `module` is not that embedding.

    Source: `peft.utils.other._get_module_names_tied_with_embedding`.
    """
    try:
        if model.get_input_embeddings() is not module:  # type: ignore[operator]
            return None
    except (AttributeError, NotImplementedError):
        return None
    names = {name for name, value in model.named_parameters(remove_duplicate=False) if value is module.weight}
    tied = getattr(model, "all_tied_weights_keys", {})
    return next((name.removesuffix(".weight") for name in sorted(tied) if {name, tied[name]} <= names), None)


def _differ(one: Entry | None, other: Entry | None) -> bool:
    """Whether two stored tensors have other numbers."""
    import torch

    from ..io.safetensors_file import read_tensor

    if one is None or other is None or one == other:
        return False
    return one.shape != other.shape or not torch.equal(read_tensor(one), read_tensor(other))


def _may_have_a_twin(base: BaseModel, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a changed tensor may be tied; one that the files lack has its twin's shape, so one of theirs has that too."""
    if name not in base.entries and not base.added and all(entry.shape != shape for entry in base.entries.values()):
        return False
    return may_be_tied(base.config, name)


def _may_be_stored_twice(base: BaseModel) -> bool:
    """Whether two stored matrices may be one tensor of the model: they have one shape."""
    shapes = [e.shape for e in base.entries.values() if len(e.shape) > 1 and may_be_tied(base.config, e.name)]
    return len(set(shapes)) < len(shapes)


def _in_tree(base: BaseModel, tree: ModuleTree, names: Iterable[str]) -> list[str]:
    """The module tree's names of tensors."""
    found = []
    for name in names:
        entry = base.entries.get(name) or tree.renamed(name)
        found.append(tree.rename(entry.name)[0] if entry else tree.ties.names.find(name) or name)
    return found


def _tree_of(base: BaseModel, config: Mapping[str, Any]) -> ModuleTree | None:
    """The module tree of the class that an export is of; None where transformers has none of that name."""
    import transformers

    from .loading import library_errors
    from .module_tree import ModuleTree, empty_model

    names = config.get("architectures") or base.config.get("architectures") or []
    model_class = getattr(transformers, names[0], None) if len(names) == 1 else None
    if model_class is None:
        return None
    if base.tree is not None and type(base.tree.model) is model_class:
        return base.tree
    with library_errors(f"{base.folder}: no model can be built from its config", BaseModelError):
        return ModuleTree(empty_model(base.folder, model_class), base.entries)


def _refuse_unknown(base: BaseModel, names: Iterable[str]) -> None:
    tables = [base.config, *(value for value in base.config.values() if isinstance(value, dict))]
    sizes = {table.get("vocab_size") for table in tables} - {None}
    for name in names:
        entry = base.entries.get(name)
        if entry is not None and sizes.isdisjoint(entry.shape):
            continue
        raise UnsupportedError(
            f"{base.folder}: an adapter changes {name!r}, which may be a tied embedding, and its config names no model class of "
            f"transformers (architectures: {base.config.get('architectures')}), so the other's name is not known: leave this "
            "adapter out."
        )


def _untied_keys(tree: ModuleTree, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys that say that nothing is tied, of those that do not say it: in the config itself, in each part that says
    something of it, and in that of the text, where transformers 4 and vLLM look."""
    keys: dict[str, Any] = {} if config.get(KEY) is False else {KEY: False}
    whole: Any = tree.model.config
    text = whole.get_text_config(decoder=True)
    for name, part in config.items():
        if (
            isinstance(part, dict)
            and part.get(KEY) is not False
            and (KEY in part or getattr(whole, name, None) is text)
        ):
            keys[name] = part | {KEY: False}
    return keys


def _can_untie(
    base: BaseModel, tree: ModuleTree, config: Mapping[str, Any], keys: Mapping[str, Any], names: Collection[str]
) -> bool:
    """Whether these keys untie the tensors of these names and change nothing else: a T5 also scales its output by them."""
    import torch

    from .loading import library_errors

    make = type(tree.model.config).from_dict  # type: ignore[union-attr]
    with library_errors(f"{base.folder}: no model can be built from its config", BaseModelError):
        before, after = make(dict(config)), make(dict(config) | dict(keys))
        if _without_key(before.to_dict()) != _without_key(after.to_dict()):
            return False
        with torch.device("meta"):
            model = type(tree.model)(after)
    return not set(names) & set(getattr(model, "all_tied_weights_keys", {}))


def _without_key(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _without_key(v) if isinstance(v, dict) else v for k, v in table.items() if k != KEY}
