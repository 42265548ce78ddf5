"""The module tree that Transformers builds on a checkpoint, and where each of its tensors lies in the files.

Transformers 5 renames and fuses tensors while it loads: a ViT's `encoder.layer.0.attention.attention.query` is `layers.0.
attention.q_proj` in the tree, and the experts of a Mixtral, one matrix each in the files, are one parameter. Adapters have the
tree's names, exports the files'. What becomes of what is read from Transformers' own conversion tables: names through its
renaming, fused tensors by sending row numbers through its own conversion. Importing Transformers costs seconds, so this room
is entered only for a name that the files do not have.

Source: `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..io.safetensors_file import Entry
from .loading import bounded, read_config
from .names import MODULE_TENSORS, NameResolver
from .tied_embeddings import Ties

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Part:
    """Rows of one tensor of the files, and which rows of the tree's tensor they are.

    Rows are those of a matrix with the tensor's last dimension as columns, `width`; of a vector that is cut into parts, its numbers.
    `start` is the first one in the file's tensor, `rows` [n] the row of the tree's tensor that each of the n rows from there on is.
    """

    entry: Entry
    start: int
    rows: torch.Tensor
    width: int


@dataclass
class Fused:
    """Tensors of the files that one conversion makes into one or several tensors of the tree."""

    name: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)


class ModuleTree:
    """A model without memory, and the conversions that Transformers applies to names and tensors on the way into it.

    Args:
        model: a model of Transformers.
        entries: the tensors of the files, by name.
        make: config -> such a model; None: the class that the folder's config names.
    """

    def __init__(self, model: nn.Module, entries: dict[str, Entry], make: Callable[[Any], Any] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        self.model, self.entries, self.make = model, entries, make
        self.modules = dict(model.named_modules())
        self.tensors = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        conversions = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._renamings: list[Any] = [c for c in conversions if not isinstance(c, WeightConverter)]
        self._converters: list[Any] = [c for c in conversions if isinstance(c, WeightConverter)]
        self._renamed: dict[str, str] = {}
        self._sources: dict[str, list[str]] = {}
        self._fused: dict[str, Fused] = {}
        for name in sorted(entries, key=dot_natural_key):
            self._place(name)
        self._module_names = NameResolver(name for name in self.modules if name)
        self._tensor_names = NameResolver([*self._renamed, *self._fused])

    def _place(self, name: str) -> None:
        found, pattern = self.rename(name)
        if pattern is None:
            self._renamed[found] = name
            self._sources.setdefault(found, []).append(name)
            return
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        group = self._fused.setdefault(found, Fused(found, converter))
        group.sources.append((name, pattern))
        for other in converter.target_patterns[1:]:
            self._fused[found.replace(converter.target_patterns[0], other)] = group

    def rename(self, name: str) -> tuple[str, str | None]:
        """The tree's name of a tensor of the files, and the source pattern of the conversion that fuses or splits it."""
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self.model, "base_model_prefix", "") or None
        found: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, prefix, dict.fromkeys(self.tensors, True)
        )
        return found

    def saved_names(self, names: Iterable[str]) -> dict[str, str | None]:
        """How `save_pretrained` of this class calls tensors that files call so; None for those that it does not have.

        Of tensors that are tied it saves one. A name that the files lack may be another file's of the same model.

        Source: `transformers.PreTrainedModel.save_pretrained`.
        """
        from transformers.core_model_loading import revert_weight_conversion

        model: Any = self.model
        model._weight_conversions = [c for c in (*self._renamings, *self._converters) if c.was_used()]
        ignored = {*self.tied, *(model._keys_to_ignore_on_save or ())} - {*self.ties.apart}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
        saved = revert_weight_conversion(model, dict(state))
        called, resolver = {id(tensor): name for name, tensor in saved.items()}, NameResolver(saved)
        found: dict[str, str | None] = {}
        for name in names:
            here, pattern = self.rename(name)
            if here in self.tied and not self.holds(self.tied[here]):
                here = self.tied[here]
            found[name] = called.get(id(state[here])) if pattern is None and here in state else resolver.find(name)
        return found

    @property
    def tied(self) -> Mapping[str, str]:
        """Name -> name of another tensor that the model uses for it too, as its class and config say."""
        return getattr(self.model, "all_tied_weights_keys", {})

    @cached_property
    def ties(self) -> Ties:
        """Which of those are one tensor in this model: two that the files hold with different numbers are not."""
        return Ties(self)

    def find_module(self, name: str) -> str | None:
        """A module of the tree by its name, with or without the model prefix."""
        return self._module_names.find(name)

    def renamed(self, name: str) -> Entry | None:
        """The tensor of the files that the tree calls so; None where there is none, or it is fused or split on loading."""
        found = self._tensor_names.find(name)
        return self.entries[self._renamed[found]] if found in self._renamed else None

    def stored(self, name: str) -> Entry | None:
        """The tensor of the files that the tree calls just so."""
        return self.entries[self._renamed[name]] if name in self._renamed else None

    def place(self, name: str) -> str | None:
        """What the tree calls a tensor of the files; None where it has no such tensor, as it is, or makes it of several."""
        found, pattern = self.rename(name)
        return found if pattern is None and found in self.tensors else None

    def stored_modules(self, name: str) -> list[str]:
        """How the files call the module that the tree calls just so: several names where they hold its rows in several tensors.

        It is the name of its weight or, where it has none, of its bias, without that part.

        Raises:
            UnsupportedError: transformers makes its tensor by more than moving rows.
        """
        tensor = next((f"{name}.{part}" for part in MODULE_TENSORS if self.holds(f"{name}.{part}")), None)
        if tensor is None:
            return []
        entries = dict.fromkeys(part.entry.name for part in self.parts(tensor))
        return [entry.removesuffix(tensor.removeprefix(name)) for entry in entries]

    def sources(self, name: str) -> list[str]:
        """The tensors of the files, by name, that the tree calls just so; of several, transformers loads the last."""
        return self._sources.get(name, [])

    def holds(self, name: str) -> bool:
        """Whether the files hold this tensor of the tree, as it is or in parts."""
        return name in self._renamed or name in self._fused

    def parts(self, name: str) -> list[Part]:
        """The tensors of the files that hold the rows of one tensor of the tree; empty where there are none.

        Raises:
            UnsupportedError: the conversion moves more than whole rows.
        """

        found = self._tensor_names.find(name)
        if found is None:
            return []
        if found in self._renamed:
            entry = self.entries[self._renamed[found]]
            return [whole(entry)]
        group, shape = self._fused[found], self.tensors.get(found, ())
        ids = self._trace(group).get(found)
        if ids is None or tuple(ids.shape) != (shape if len(shape) == 1 else (*shape[:-1], 1)):
            raise UnsupportedError(
                f"tensor {found!r}: transformers makes it of {group.sources[0][0]!r} by more than moving rows, which is not folded "
                "yet: leave this adapter out."
            )
        flat, parts, first = ids.flatten(), [], 0
        for source, _ in group.sources:
            entry = self.entries[source]
            there = (flat >= first) & (flat < first + _count(entry))
            if there.any():
                parts += _runs(entry, flat[there] - first, there.nonzero().flatten())
            first += _count(entry)
        return parts

    def _trace(self, group: Fused) -> dict[str, torch.Tensor]:
        """Send the numbers of the files' rows, one column wide, through the conversion: tree name -> row numbers."""
        import torch

        converter, first = copy.deepcopy(group.converter), 0
        for source, pattern in group.sources:
            entry = self.entries[source]
            rows = torch.arange(first, first + _count(entry))
            shape = entry.shape if len(entry.shape) == 1 else (*entry.shape[:-1], 1)
            converter.add_tensor(group.name, source, pattern, rows.reshape(shape))
            first += _count(entry)
        try:
            found = converter.convert(group.name, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # not made for row numbers
            return {}
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}

    def beside_experts(self, names: Collection[str]) -> list[Entry]:
        """The tensors of the files that become experts' parameters of a module for which these ones, too, are read, without them."""
        experts = [n for n in self._fused if len(self.tensors.get(n, ())) == 3]
        sources = {n: {source for source, _ in self._fused[n].sources} for n in experts}
        touched = {n.rpartition(".")[0] for n in experts if not sources[n].isdisjoint(names)}
        found = {source for n in experts if n.rpartition(".")[0] in touched for source in sources[n]}
        return [self.entries[source] for source in sorted(found - set(names))]

    def wrapped_parameters(self, module: str, targets: Iterable[str]) -> list[str]:
        """The parameters of a module that PEFT's `target_parameters` wraps, innermost first.

        Source: `peft.tuners.tuners_utils.BaseTuner._inject_parameters`.
        """
        wanted = list(targets)
        names = [name for name, _ in self.modules[module].named_parameters(recurse=False)]
        return [n for n in names if any(f".{module}.{n}".endswith(f".{target}") for target in wanted)]

    def is_transposed(self, module: str) -> bool:
        """True where a module's expert weights are [experts, in, out], as PEFT asks it."""
        return bool(getattr(self.modules[module], "is_transposed", False))


def whole(entry: Entry) -> Part:
    """A tensor of the tree that one tensor of the files is."""
    import torch

    return Part(entry, 0, torch.arange(entry.rows), entry.shape[-1] if entry.shape else 1)


def _count(entry: Entry) -> int:
    """How many rows of a tensor are numbered: of a vector, each of its numbers."""
    return entry.shape[0] if len(entry.shape) == 1 else entry.rows


def _runs(entry: Entry, here: torch.Tensor, there: torch.Tensor) -> list[Part]:
    """Parts of consecutive rows `here` of a tensor of the files, which are the rows `there` of the tree's."""
    order = here.argsort()
    here, there = here[order], there[order]
    ends = ((here[1:] - here[:-1]) != 1).nonzero().flatten() + 1
    bounds = [0, *ends.tolist(), len(here)]
    width = 1 if len(entry.shape) == 1 else entry.shape[-1]
    return [Part(entry, int(here[a]), there[a:b], width) for a, b in pairwise(bounds)]


def build_tree(folder: Path, entries: dict[str, Entry]) -> ModuleTree | None:
    """The module tree of the model that a folder's config names; None where Transformers has no class for it.

    Raises:
        BaseModelError: the config describes a far larger model than the folder's files hold.
    """
    return _tree_or_none(folder, entries, None)


def _tree_or_none(folder: Path, entries: dict[str, Entry], make: Callable[[Any], Any] | None) -> ModuleTree | None:
    from huggingface_hub.errors import StrictDataclassError  # of a config with a value that its class does not take

    try:
        return ModuleTree(empty_model(folder, make), entries, make)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, StrictDataclassError):
        return None


def build_part_trees(folder: Path, entries: dict[str, Entry]) -> list[ModuleTree]:
    """The module trees of the classes that load a part of this base alone: a multimodal one's text, as a causal language model.

    Transformers' auto classes name them, and each reads the files by its own renaming; one that reads none of them is left out.

    Raises:
        BaseModelError: the config describes a far larger model than the folder's files hold.
    """
    from transformers.models.auto import modeling_auto

    from .loading import quiet

    with quiet():
        config = read_config(folder)
        autos = [auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")]
        found = {_class_of(auto, type(config)): auto for auto in autos}
        trees = [_tree_or_none(folder, entries, auto.from_config) for cls, auto in found.items() if cls is not None]
    return [tree for tree in trees if tree is not None and any(map(tree.holds, tree.tensors))]


def _class_of(auto: Any, config_class: type) -> Any:
    """The class that an auto class loads for a config, where it is made of a part of the config; else None."""
    try:
        cls = auto._model_mapping[config_class]
        return cls if cls.config_class is not config_class else None
    except (
        KeyError,
        AttributeError,
        TypeError,
        ImportError,
    ):  # another kind of auto class, or a package that is not here
        return None


def empty_model(folder: Path, make: Callable[[Any], Any] | None = None, **changes: Any) -> nn.Module:
    """The model that a folder's config describes, without memory (on torch's meta device).

    Args:
        folder: a model folder.
        make: config -> model; None: the class that the config names, else AutoModel's.
        changes: config keys to change.

    Raises:
        BaseModelError: the config describes a far larger model than the folder's files hold.
    """
    import torch
    import transformers

    config = read_config(folder, **changes)
    named = (getattr(config, "architectures", None) or [""])[0]
    make = make or getattr(transformers, named or "-", None) or transformers.AutoModel.from_config
    with bounded(folder, packed=hasattr(config, "quantization_config")), torch.device("meta"):
        model: nn.Module = make(config)
    return model
