"""Which module or tensor of a base an adapter's name means.

A Find answers by name; this room's are over a base's files, `live_model.py` has those over a model in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError
from ..io.safetensors_file import FLOATING
from ..models.base_model import BaseModel
from ..models.quantization import WEIGHT_SUFFIXES
from ..models.tied_embeddings import twin_of
from .adapter import Adapter
from .experts import WRAPPER

if TYPE_CHECKING:
    import torch

    from ..models.module_tree import ModuleTree


@dataclass(frozen=True)
class Target:
    """A target module as its owner knows it: its name there, and the shape of its weight.

    `tied` says that the model also uses the weight as another embedding, and cannot use two; `read` gives the weight, or the
    whole tensor; `twin` names the module that uses a tied weight too. `tree` is the module tree, where that knows the module and
    the files hold its rows in other tensors. Of its rows the last `added` are those of a larger vocabulary;
    `stored` is the file's tensor of a tied weight.
    """

    module: str
    shape: tuple[int, ...]
    tied: bool = False
    read: Callable[[], torch.Tensor] | None = field(default=None, compare=False)
    twin: Callable[[], str | None] | None = field(default=None, compare=False)
    tree: ModuleTree | None = field(default=None, compare=False)
    added: int = 0
    stored: str = field(default="", compare=False)


ATTENTION = "in_proj_weight"
"""What torch's MultiheadAttention has for a weight: query, key and value in one [3 · embed_dim, embed_dim]."""

Find = Callable[[str], "Target | None"]
"""The target of an adapter's module (or whole tensor) by the name that the adapter gives it; None when there is none."""


def modules_of(base: BaseModel) -> Find:
    """Finds target modules in a base's files."""

    def find(module: str) -> Target | None:
        """The target module of that name."""
        entry = base.find_tensor(f"{module}.weight")
        if base.quantized and (entry is None or entry.dtype not in FLOATING):
            return _packed(base, module)
        target = find_whole(f"{module}.weight")
        if target is not None:
            return replace(target, module=target.module.removesuffix(".weight"))
        target = find_whole(f"{module}.{ATTENTION}")
        if target is not None:
            return target
        known = base.tree.find_module(module.replace(WRAPPER, "")) if base.tree is not None else None
        if base.tree is None or known is None:
            return None
        tied = bool(base.config.get("is_encoder_decoder")) and f"{known}.weight" in base.tree.tied
        return Target(module, (), tied, tree=base.tree)

    find_whole = tensors_of(base)
    return find


def _packed(base: BaseModel, module: str) -> Target | None:
    """A target module whose weight is packed: its name as the files have it, its shape from the module tree."""
    for suffix in WEIGHT_SUFFIXES:
        entry = base.find_tensor(f"{module}.{suffix}")
        found = base.tree.find_module(module) if entry and base.tree else None
        if entry and base.tree and found:
            return Target(entry.name.removesuffix(f".{suffix}"), base.tree.tensors[f"{found}.weight"])
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
        tied = entry.name in base.tied and bool(base.config.get("is_encoder_decoder"))
        twin = partial(twin_of, base, entry.name) if own and entry.name in base.tied else None
        called = own.name if own else name
        rows, read = base.added_rows(called, entry), partial(base.read, entry.name)
        shape, added = entry.shape, 0
        if rows is not None:
            shape, added = (entry.shape[0] + len(rows), *entry.shape[1:]), len(rows)
            read = partial(_with_rows, base, entry.name, rows)
        return Target(called, shape, tied, read, twin, added=added, stored=entry.name)

    return find


def _with_rows(base: BaseModel, name: str, rows: torch.Tensor) -> torch.Tensor:
    import torch

    own = base.read(name)
    return torch.cat([own, rows.to(own.dtype)])


def target_of(adapter: Adapter, name: str, find: Find) -> Target:
    """The target module (or whole tensor) of this name.

    Raises:
        AdapterError: the base has none.
        UnsupportedError: an embedding that an encoder-decoder uses in several places.
    """
    target = find(name)
    if target is None:
        raise foreign(adapter, name)
    refuse_tied(adapter, name, target)
    return target


def foreign(adapter: Adapter, name: str) -> AdapterError:
    """What to raise for a target module that the base has not."""
    return AdapterError(
        f"{adapter.where}: its target module {name!r} is not in the base model: this adapter was trained on another base."
    )


def refuse_tied(adapter: Adapter, name: str, target: Target) -> None:
    """Refuse a change of an embedding that an encoder-decoder uses in several places."""
    if target.tied:
        raise UnsupportedError(
            f"{adapter.where}: it changes {name!r}, which this encoder-decoder uses in several places "
            "(tie_word_embeddings) and computes otherwise when they differ: leave this adapter out."
        )
