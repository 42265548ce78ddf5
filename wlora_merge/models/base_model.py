"""A Hugging Face checkpoint folder, read lazily: its config, and where each of its tensors lies.

The index is the authority: shard files that it does not name are ignored. Opening a base reads headers only; the folder is
never opened for writing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import PARAMETER, SCALE_PARAMETER
from ..errors import BaseModelError, UnsupportedError, WloraMergeError
from ..io.digests import sha256_files
from ..io.hub import BASE_PATTERNS, Source, resolve_source
from ..io.safetensors_file import Entry, Header, read_header, read_tensor
from ..io.untrusted import find_file, is_plain_file_name, read_json
from ..text import short
from .files import CHAT_TEMPLATES, INDEX, SINGLE, TOKENIZER_FILES, carried_files
from .names import MODULE_TENSORS, NameResolver
from .quantization import quantized_format
from .tied_embeddings import config_parts, may_be_tied

if TYPE_CHECKING:
    import torch

    from .module_tree import ModuleTree
    from .vocabulary import Vocabulary

ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT calls an adapter's config."""
SIDES = (
    "hidden_size", "intermediate_size", "vocab_size", "d_model", "d_ff", "n_embd", "n_inner", "ffn_dim", "num_labels",
)  # fmt: skip
"""Keys of a config that are a side of a tensor."""


@dataclass
class BaseModel:
    """An opened base: `headers` by file name in the index's order, `entries` by tensor name.

    Where it has a vocabulary of another size, `vocabulary` says so. `added` holds the rows [k, ...] that stand behind a tensor's own,
    by the tensor's name. `tokenizer` holds the files (name -> path) that take the place of its tokenizer's. `known` has a model's
    names of tensors that a mixture has recorded -> their names in the files, None for those that are not there. `mixture` has the
    parameters of a mixture that a checkpoint of an attached model holds: no tensors of the base, and never exported.
    """

    source: Source
    config: dict[str, Any]
    headers: dict[str, Header]
    index: dict[str, Any] | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    tokenizer: dict[str, Path] = field(default_factory=dict)
    known: dict[str, str | None] = field(default_factory=dict)
    mixture: dict[str, Entry] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    _loaded: dict[Any, ModuleTree] = field(default_factory=dict, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """The local folder."""
        return self.source.folder

    @property
    def model_type(self) -> str:
        """The config's `model_type`, or an empty string."""
        return str(self.config.get("model_type") or "")

    @cached_property
    def _names(self) -> NameResolver:
        return NameResolver(self.entries)

    @cached_property
    def quantized(self) -> str | None:
        """The format that the weights are quantized in; None for plain floating point."""
        return quantized_format(self.config, self.entries.values())

    @cached_property
    def tree(self) -> ModuleTree | None:
        """The module tree that Transformers builds on this base; asking for it imports Transformers."""
        from .module_tree import build_tree

        return build_tree(self.folder, self.entries)

    @cached_property
    def body_prefix(self) -> str:
        """What the files put before the names of the model's body (`model.`, `bert.`); empty where they put nothing."""
        import transformers

        cls = getattr(transformers, str((self.config.get("architectures") or [""])[0]), None)
        prefix = f"{getattr(cls, 'base_model_prefix', '')}."
        return prefix if prefix != "." and any(name.startswith(prefix) for name in self.entries) else ""

    @cached_property
    def part_trees(self) -> list[ModuleTree]:
        """Those of the classes that load a part of a multimodal base alone, as tasks do; asking for them imports Transformers."""
        from .module_tree import build_part_trees

        return (
            build_part_trees(self.folder, self.entries) if self.tree is not None and config_parts(self.config) else []
        )

    @property
    def trees(self) -> list[ModuleTree]:
        """The module trees of all classes that load this base: its own first; empty where Transformers knows none."""
        return [self.tree, *self.part_trees] if self.tree is not None else []

    def tree_for(self, auto: Any | None, modules: Collection[str]) -> ModuleTree | None:
        """The module tree of the model that `auto` loads.

        Args:
            auto: one of transformers' auto classes; None: nobody says it, so it is the first class that has all these modules under
                just these names, else the base's own.
            modules: names of modules.

        Raises:
            UnsupportedError: the model needs code of its own, or a type that this transformers does not know.
        """
        from .loading import class_for
        from .module_tree import ModuleTree, empty_model

        if auto is None or self.tree is None:
            return next((tree for tree in self.trees if all(name in tree.modules for name in modules)), self.tree)
        cls, _ = class_for(self.folder, auto, or_named=True)
        own = type(self.tree.model)
        if own in (cls, getattr(cls, "_model_mapping", {}).get(type(self.tree.model.config), None)):
            return self.tree
        if cls not in self._loaded:
            make = getattr(cls, "from_config", cls)
            self._loaded[cls] = ModuleTree(empty_model(self.folder, make), self.entries, make)
        return self._loaded[cls]

    def find_tensor(self, name: str) -> Entry | None:
        """The tensor that a model built on this base calls so.

        It is looked for in this order:

        - as the files spell it
        - of a multimodal base, whose parts have like names, as a class has it that loads the base or a part of it
        - with or without a leading part (the model prefix)
        - renamed on loading
        - as a class renames an older spelling

        Raises:
            WloraMergeError: several tensors fit.
        """
        if name not in self.entries and name not in self.known and config_parts(self.config):
            found = {source for tree in self.trees for source in tree.sources(name)}
            if found:
                return self.entries[_only(name, found)]
        own = self._names.find(name) or self.known.get(name)
        if own in self.entries:
            return self.entries[own]
        if name in self.known or self.tree is None:
            return None
        fits = (tree.renamed(name) or tree.stored(tree.rename(name)[0]) for tree in self.trees)
        renamed = {entry.name for entry in fits if entry is not None}
        return self.entries[_only(name, renamed)] if renamed else None

    def find_in_tree(self, module: str) -> tuple[ModuleTree, str] | None:
        """A class's module tree that has a module of this name, and its name there: just so if one has, or with another prefix."""
        exact = next(((tree, module) for tree in self.trees if module in tree.modules), None)
        near = ((tree, found) for tree in self.trees if (found := tree.find_module(module)))
        return exact or next(near, None)

    def stored_names(self, names: Iterable[str]) -> dict[str, str | None]:
        """How a model's tensors are called -> how the files call them; None for those that are not there."""
        return {name: entry.name if (entry := self.find_tensor(name)) else None for name in names}

    def find_module(self, name: str) -> str | None:
        """How the files call a model's module: the name of its weight or, where it has none, of its bias, without that part."""
        for part in MODULE_TENSORS:
            entry = self.find_tensor(f"{name}.{part}")
            if entry is not None:
                return entry.name.removesuffix(f".{part}")
        tied = self.find_tied(f"{name}.weight")
        return self.name_in_model(f"{name}.weight").removesuffix(".weight") if tied is not None else None

    def find_modules(self, name: str) -> list[str]:
        """As `find_module`, and of a module whose rows the files hold in other tensors the names of all of these.

        Raises:
            UnsupportedError: transformers makes its tensor by more than moving rows.
        """
        own = self.find_module(name)
        found = self.find_in_tree(name) if own is None else None
        return [own] if own is not None else found[0].stored_modules(found[1]) if found is not None else []

    def find_tied(self, name: str) -> Entry | None:
        """The tensor that the model uses for `name` too, where the files lack that."""
        if name in self.known or self.tree is None:
            return None
        return self.tree.ties.source(name)

    def name_in_model(self, name: str) -> str:
        """How the model itself calls a tensor that the files lack."""
        found = self.tree.ties.names.find(name) if self.tree is not None else None
        return found or name

    def ties_of(self, name: str) -> frozenset[str]:
        """All names that the model has for the tensor `name`, as the files or the model call it; empty where it has one."""
        if not may_be_tied(self.config, name) or self.tree is None:
            return frozenset()
        return self.tree.ties.of(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its name in the files, in its own dtype."""
        return read_tensor(self.entries[name])

    def added_rows(self, name: str, entry: Entry) -> torch.Tensor | None:
        """The rows that stand behind those of `entry`, where the model calls the tensor `name`; None where none do."""
        return self.added.get(name, self.added.get(entry.name))

    def shape_of(self, name: str, entry: Entry) -> tuple[int, ...]:
        """The shape of the tensor that the model calls `name` and that `entry` holds, with its added rows."""
        rows = self.added_rows(name, entry)
        if rows is None:
            return entry.shape
        grown, shape = _vocabulary_dim(entry.shape), list(entry.shape)
        shape[grown] += rows.shape[grown]
        return tuple(shape)

    def read_whole(self, name: str, entry: Entry) -> torch.Tensor:
        """The same tensor's numbers, in the dtype of the file."""
        import torch

        own, rows = read_tensor(entry), self.added_rows(name, entry)
        return own if rows is None else torch.cat([own, rows.to(own.dtype)], _vocabulary_dim(entry.shape))

    def sha256(self) -> dict[str, str]:
        """Weight file name -> sha256; computed once and remembered."""
        digests = sha256_files([self.folder / name for name in self.headers])
        return {name: digests[self.folder / name] for name in self.headers}

    def carried_files(self) -> dict[Path, Path]:
        """Everything beside the weights that a server or a tokenizer reads: relative name -> where it lies, in order."""
        own = {name: self.folder / name for name in carried_files(self.folder)}
        if not self.tokenizer:
            return own
        kept = {n: path for n, path in own.items() if str(n) not in TOKENIZER_FILES and n.parts[0] != CHAT_TEMPLATES}
        return kept | {Path(name): path for name, path in self.tokenizer.items()}


def _vocabulary_dim(shape: tuple[int, ...]) -> int:
    """Which dimension of a tensor follows the vocabulary: the first, but of a BART's [1, vocabulary] bias the last."""
    return len(shape) - 1 if shape[0] == 1 else 0


def _only(name: str, found: Collection[str]) -> str:
    """The one tensor that fits a name."""
    if len(found) > 1:
        raise WloraMergeError(f"{name!r} fits several names of the base model: {', '.join(sorted(found))}.")
    return next(iter(found))


def open_base(path_or_id: str | Path, error: type[WloraMergeError] = BaseModelError) -> BaseModel:
    """Open a base model: config, index and headers.

    Args:
        path_or_id: a folder, or a hub id.
        error: raised for a config that describes a far larger model than its files hold.

    Raises:
        BaseModelError: no config, no safetensors weights, an adapter of its own beside them, or an index that does not agree with
            its files.
    """
    source = resolve_source(path_or_id, BASE_PATTERNS)
    folder = source.folder
    config_file = find_file(folder, "config.json", BaseModelError)
    if config_file is None:
        missing = f"{folder}: has no config.json: give the folder of a Hugging Face model."
        raise BaseModelError(_gguf(folder) or missing)
    own = find_file(folder, ADAPTER_CONFIG, BaseModelError)
    if own is not None:
        raise BaseModelError(
            f"{own}: this base has an adapter of its own beside its weights, which transformers adds on loading and a fold leaves "
            "out: move it into a folder of its own, and give that as --adapter too if the other adapters were trained on both."
        )
    config = read_json(config_file, BaseModelError)
    _check_config(config, config_file)
    single = find_file(folder, SINGLE, BaseModelError)  # where both are there, transformers loads this one
    index_file = None if single else find_file(folder, INDEX, BaseModelError)
    if index_file is not None:
        index = read_json(index_file, BaseModelError)
        headers = _open_shards(folder, index)
    elif single is not None:
        index, headers = None, {SINGLE: read_header(single)}
    else:
        raise BaseModelError(_no_weights(folder))
    entries = {name: entry for header in headers.values() for name, entry in header.entries.items()}
    if index is not None:
        # it says where a tensor that lies in two shards is read; what it forgets is loaded all the same
        entries |= {name: headers[file].entries[name] for name, file in index["weight_map"].items()}
    _check_size(config, config_file, entries.values(), error)
    mixture = {name: entries.pop(name) for name in (PARAMETER, SCALE_PARAMETER) if name in entries}
    return BaseModel(source, config, headers, index, entries, mixture=mixture)


def refuse_quantized(base: BaseModel) -> None:
    """Refuse a base whose weights are quantized, naming the format: adding to them would not be exact.

    Raises:
        UnsupportedError: with what to give instead.
    """
    if base.quantized:
        raise UnsupportedError(
            f"{base.folder}: this base is quantized ({base.quantized}), and a fold into it would not be exact: give the original "
            "16-bit base, or export with --format lora."
        )


def refuse_attached(base: BaseModel) -> None:
    """Refuse a checkpoint of a model with adapters attached, whose mixture would be left out.

    Raises:
        UnsupportedError: with what to give instead.
    """
    for entry in base.mixture.values():
        raise UnsupportedError(
            f"{entry.file}: has {entry.name!r}: it is a checkpoint of a model with adapters attached, whose mixture would be lost: "
            "give the base that it was trained on; or load it and call wlora_merge.attach and Mixture.from_model, which take it up."
        )


def _open_shards(folder: Path, index: dict[str, Any]) -> dict[str, Header]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseModelError(f"{folder / INDEX}: has no weight_map.")
    if not isinstance(index.get("metadata") or {}, dict):
        raise BaseModelError(f"{folder / INDEX}: its metadata is not a table.")
    for tensor, file in weight_map.items():
        if not is_plain_file_name(file) or not str(file).endswith(".safetensors"):
            raise BaseModelError(
                f"{folder / INDEX}: tensor {tensor!r} lies in {file!r}, expected a plain .safetensors file name."
            )
    headers = {}
    for file in sorted(set(weight_map.values())):
        shard = find_file(folder, file, BaseModelError)
        if shard is None:
            raise BaseModelError(f"{folder / INDEX}: names the shard {file}, which is not there: fetch it.")
        headers[file] = read_header(shard)
    for tensor, file in weight_map.items():
        if tensor not in headers[file].entries:
            raise BaseModelError(f"{folder / file}: lacks tensor {tensor!r}, which the index places there.")
    return headers


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        return (
            f"{folder}: its weights are pickles ({pickles[0]}), which could run code and are never loaded: convert them where you "
            "trust them, as AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) does of a language model, and "
            "copy the tokenizer's files."
        )
    return _gguf(folder) or (
        f"{folder}: has neither {SINGLE} nor {INDEX}: give a Hugging Face model in safetensors. Pickles of the hub are not fetched: "
        "load such a base with its own class where you trust it, and save_pretrained it into a folder."
    )


def _gguf(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return f"{folder}: its weights are GGUF, a quantized format: give the original 16-bit base in safetensors."
    return ""


def _check_size(config: dict[str, Any], file: Path, entries: Collection[Entry], error: type[WloraMergeError]) -> None:
    """Refuse a config of a far larger model than the files hold, before transformers makes lists as long as it says.

    What is left is told when a model is built; see `loading.bounded`. A side may be 16 times the longest that is there, as packed
    weights have several numbers in one. A table for a part that is not there may have longer ones.
    """
    most = 4 * len(entries) + 100  # layers that share their tensors, as ALBERT's, are few
    longest = 16 * max((side for entry in entries for side in entry.shape), default=0) + 10_000
    for table in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in table.items():
            counts, sides = (
                key.endswith(("_layer", "_layers")),
                key == "num_labels" or (key in SIDES and table is config),
            )
            if type(value) is int and ((counts and value > most) or (sides and value > longest)):
                raise error(
                    f"{file}: describes a model of {key} {short(value)}, and the files hold {len(entries)} tensors, none of them "
                    f"nearly so large: it is not the config of these weights."
                )


def _check_config(config: dict[str, Any], file: Path) -> None:
    """Refuse a config whose keys that are read here have another type than transformers gives them."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise BaseModelError(f"{file}: architectures is not a list of names.")
    for table in (config, *(value for value in config.values() if isinstance(value, dict))):
        size = table.get("vocab_size")
        if size is not None and type(size) is not int:
            raise BaseModelError(f"{file}: vocab_size is {type(size).__name__}, expected a whole number.")
