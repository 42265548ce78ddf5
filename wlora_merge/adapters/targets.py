"""Which module or tensor of a base an adapter's name means.

A Find answers by name; this room's are over a base's files, `live_model.py` has those over a model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError
from ..io.safetensors_file import FLOATING
from ..models.base_model import BaseModel
from ..models.names import NUMERIC_PART
from ..models.quantization import WEIGHT_SUFFIXES
from ..models.tied_embeddings import tied_to_input
from ..text import nearest
from .adapter import Adapter
from .conventions import other_names
from .experts import WRAPPER, find_expert, renamed_parameter

if TYPE_CHECKING:
    import torch

    from ..models.module_tree import ModuleTree


@dataclass(frozen=True)
class Target:
    """A target module as its owner knows it: its name there, and the shape of its weight.

    `tied` says that the model uses the weight in so many places that no file can have one of them apart; `read` gives the weight,
    or the whole tensor. `twin` names the module that has the same tensor or, of a module, that takes an input embedding's rows too;
    `is_embedding` says whether it looks rows up. `tree` is the module tree, where that knows the module and
    the files hold its rows in other tensors. `stored` is the file's tensor of a tied weight.
    """

    module: str
    shape: tuple[int, ...]
    tied: bool = False
    read: Callable[[], torch.Tensor] | None = field(default=None, compare=False)
    twin: Callable[[], str | None] | None = field(default=None, compare=False)
    is_embedding: Callable[[], bool] = field(default=lambda: True, compare=False)
    tree: ModuleTree | None = field(default=None, compare=False)
    stored: str = field(default="", compare=False)


ATTENTION = "in_proj_weight"
"""What torch's MultiheadAttention has for a weight: query, key and value in one [3 · embed_dim, embed_dim]."""

OTHER_VOCABULARY = (
    "a vocabulary is never resized unasked: say `wlora-merge mix --resize-vocab NAME`, the adapter whose tokens and tokenizer the "
    "export is to have; for a fit resize the base first (model.resize_token_embeddings), save it with the tokenizer, and give that."
)
"""What to do about an adapter whose embeddings have another number of rows than the base's."""

Find = Callable[[str], "Target | None"]
"""The target of an adapter's module (or whole tensor) by the name that the adapter gives it; None when there is none."""


@dataclass(frozen=True)
class Known:
    """A Find that also gives the names of the modules that there are, for a message."""

    find: Find
    names: Callable[[], Collection[str]]

    def __call__(self, name: str) -> Target | None:
        """The target of that name."""
        return self.find(name)


def remembered(find: Find) -> Find:
    """A Find that looks for each name once: many adapters have the same target modules."""
    found = cache(find)
    return Known(found, find.names) if isinstance(find, Known) else found


@dataclass(frozen=True)
class BaseModules:
    """Finds target modules in a base's files."""

    base: BaseModel

    def __call__(self, module: str) -> Target | None:
        """The target module of that name."""
        base, find_whole = self.base, tensors_of(self.base)
        entry = base.find_tensor(f"{module}.weight")
        if base.quantized and (entry is None or entry.dtype not in FLOATING):
            return _packed(base, module)
        target = find_whole(f"{module}.weight")
        if target is not None and len(target.shape) == 3 and _is_of_experts(base, module):
            return Target(module, (), tree=base.tree)
        if target is not None:
            rows = partial(_tied_to_input, base, module)
            is_embedding = partial(_is_embedding, base, module)
            return replace(target, module=target.module.removesuffix(".weight"), twin=rows, is_embedding=is_embedding)
        target = find_whole(f"{module}.{ATTENTION}")
        if target is not None:
            return target
        known = base.find_in_tree(module.replace(WRAPPER, ""))
        if known is None:
            return Target(module, (), tree=base.tree) if base.tree and find_expert(module, base.tree) else None
        return Target(module, (), f"{known[1]}.weight" in known[0].ties.groups, tree=known[0])

    def names(self) -> set[str]:
        """What the files and the model's classes call the modules that have a weight."""
        tensors = [*self.base.entries, *(name for tree in self.base.trees for name in tree.tensors)]
        return {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}


def modules_of(base: BaseModel) -> Find:
    """Finds target modules in a base's files."""
    found = BaseModules(base)
    return Known(found, found.names)


def _packed(base: BaseModel, module: str) -> Target | None:
    """A target module whose weight is packed: its name as the files have it, its shape from the module tree."""
    for suffix in WEIGHT_SUFFIXES:
        entry = base.find_tensor(f"{module}.{suffix}")
        known = base.find_in_tree(module) if entry else None
        if entry and known:
            return Target(entry.name.removesuffix(f".{suffix}"), known[0].tensors[f"{known[1]}.weight"])
        if entry:
            raise UnsupportedError(
                f"{base.folder}: this base is quantized ({base.quantized}), and transformers does not know the shape of {module!r}: "
                "give the original 16-bit base."
            )
    return None


def tensors_of(base: BaseModel) -> Find:
    """Finds whole tensors in a base's files."""

    def find(name: str) -> Target | None:
        """The whole tensor of that name."""
        own = base.find_tensor(name)
        entry = own or base.find_tied(name)
        if entry is None:
            return None
        called = own.name if own else base.name_in_model(name)
        names = base.ties_of(called)
        shape, read = base.shape_of(called, entry), partial(base.read_whole, called, entry)
        return Target(called, shape, len(names) > 2, read, partial(_other, base, called), stored=entry.name)

    return find


def _other(base: BaseModel, called: str) -> str | None:
    """The module that has the other name of a tensor that has two."""
    names = base.ties_of(called)
    if not names or base.tree is None:
        return None
    entry = base.entries.get(called)
    own = base.tree.rename(called)[0] if entry else called
    other = min(names - {own})
    stored = base.tree.stored(other)
    return (stored.name if stored else other).removesuffix(".weight")


def _tied_to_input(base: BaseModel, module: str) -> str | None:
    known = base.find_in_tree(module)
    if known is None:
        return None
    tree, name = known
    found = tied_to_input(tree.model, tree.modules[name])
    if found is None or tree is base.tree:
        return found
    return base.name_in_model(f"{found}.weight").removesuffix(".weight")


def _is_embedding(base: BaseModel, module: str) -> bool:
    from torch import nn

    known = base.find_in_tree(module)
    return known is None or isinstance(known[0].modules[known[1]], nn.Embedding)


def _is_of_experts(base: BaseModel, module: str) -> bool:
    """Whether a weight of three dimensions is that of all experts, and not a convolution's."""
    from torch import nn

    if base.tree is None:
        return False
    found = base.tree.find_module(module)
    if found is None:
        return renamed_parameter(module, base.tree) is not None
    return not isinstance(base.tree.modules[found], nn.modules.conv._ConvNd)


def in_peft_names(adapter: Adapter, find: Find) -> Adapter:
    """The adapter with PEFT's names for the modules that the base knows by those alone, where its trainer calls them otherwise."""
    named: dict[str, str] = {}
    for name in adapter.modules:
        others = [other for other in other_names(name) if other not in adapter.modules]
        if others and find(name) is None:
            named[name] = next((other for other in others if find(other)), name)
    if not named:
        return adapter
    return replace(adapter, modules={named.get(name, name): factors for name, factors in adapter.modules.items()})


def target_of(adapter: Adapter, name: str, find: Find) -> Target:
    """The target module (or whole tensor) of this name.

    Raises:
        AdapterError: the base has none.
        UnsupportedError: a tensor that the model uses in three places or more.
    """
    target = find(name)
    if target is None:
        raise foreign(adapter, name, find)
    refuse_tied(adapter, name, target)
    return target


def foreign(adapter: Adapter, name: str, find: Find) -> AdapterError:
    """What to raise for a target module that the base has not: the base is another only where it lacks most of them."""
    there = [other for other in adapter.modules if other != name and find(other) is not None]
    said, near = f"{adapter.where}: its target module {name!r} is not in the base model", _near(name, find)
    if 2 * len(there) < len(adapter.modules):
        return AdapterError(f"{said}: this adapter was trained on another base{near}.")
    return AdapterError(
        f"{said}, which has {len(there)} of its {len(adapter.modules)} target modules: neither the files have a tensor "
        f"{name + '.weight'!r} nor the model class such a module{near}: rename it in the adapter, or leave that out."
    )


def _near(name: str, find: Find) -> str:
    """The module of the base whose name is nearest, as a question: of those in the same layer and expert that share one of the last
    two parts of the name, as names of two architectures are near by chance alone."""
    names, last = find.names() if isinstance(find, Known) else (), {*name.split(".")[-2:]}
    return nearest(name, [other for other in names if _numbers(other) == _numbers(name) and last & {*other.split(".")}])


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if NUMERIC_PART.fullmatch(part)]


def refuse_tied(adapter: Adapter, name: str, target: Target) -> None:
    """Refuse a change of a tensor that a model uses in three places or more, as an encoder-decoder its embedding."""
    if target.tied:
        raise UnsupportedError(
            f"{adapter.where}: it changes {name!r}, which this model uses in several places (tie_word_embeddings), and which PEFT "
            "changes in one of them in training and in all of them in a merge: leave this adapter out."
        )
