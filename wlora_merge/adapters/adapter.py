"""A PEFT folder -> Adapter: its factors and whole tensors, every one of them accounted for.

This room reads `adapter_config.json` and the header of `adapter_model.safetensors`, checks them, and knows nothing of the base
model. Its numbers are read when they are used. Nothing is executed and nothing is ignored: a tensor that is not understood is an
error.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import AdapterError, UnsupportedError, WloraMergeError, WloraMergeWarning
from ..io.digests import sha256_file
from ..io.hub import ADAPTER_PATTERNS, Source, is_here, resolve_source
from ..io.safetensors_file import FLOATING, Entry, Header, read_header, read_tensor, tensor_bytes
from ..io.tensors import all_finite
from ..io.untrusted import find_file, read_json
from ..progress import Meter
from .config import check_config
from .conventions import by_expert
from .factors import Factors, Stored, TokenRows, used_ranks
from .keys import PATTERN_SECONDS, check_adapter_name, parse_adapter_key, pattern_value

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.ckpt", "adapter_model.pth")


@dataclass(frozen=True)
class WeightsFile:
    """An adapter's weights file.

    Attributes:
        path: where it lies.
        entries: where each of its tensors lies, by key.
        axes: those of them that are factors -> the axis of their ranks: 0 of lora_A, 1 of lora_B.
    """

    path: Path
    entries: Mapping[str, Entry]
    axes: Mapping[Entry, int]

    @cached_property
    def sha256(self) -> str:
        """Its digest."""
        return sha256_file(self.path)

    @cached_property
    def ranks(self) -> dict[Entry, int]:
        """Which ranks of each factor are not all zero, a bit for each. It reads the file, every number of which must be finite.

        Raises:
            AdapterError: a NaN or an infinity, with the tensor.
        """
        found = {}
        for key, entry in self.entries.items():
            tensor = read_tensor(entry)
            if not all_finite(tensor):
                raise AdapterError(f"{self.path}: tensor {key!r} holds a NaN or an infinity: the adapter is broken.")
            if entry in self.axes:
                found[entry] = used_ranks(tensor, self.axes[entry])
        return found


@dataclass
class Adapter:
    """One PEFT folder, opened: `modules` are its low-rank changes, `tensors` the whole tensors that it carries.

    `biases` holds, by module name, the base's biases as this adapter trained them (`bias="all"` or `"lora_only"`), `token_rows`
    the rows of embeddings (`trainable_token_indices`). `weights` is its file, None for an adapter that has none.
    """

    name: str
    source: Source
    config: dict[str, Any]
    modules: dict[str, Factors]
    tensors: dict[str, Stored] = field(default_factory=dict)
    biases: dict[str, Stored] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    weights: WeightsFile | None = None

    @property
    def is_zero(self) -> bool:
        """True where it has target modules, and the product of each of them is zero."""
        return bool(self.modules) and all(f.is_zero for f in self.modules.values())

    @property
    def sha256(self) -> str:
        """Of its weights file; empty where it has none."""
        return self.weights.sha256 if self.weights is not None else ""

    def check_numbers(self) -> None:
        """Read its file once: its numbers must be finite, and not all zero.

        Raises:
            AdapterError: a NaN or an infinity, with the tensor; or an adapter that changes nothing.
        """
        if self.weights is None:
            return
        for factors in self.modules.values():
            factors.note_ranks(self.weights.ranks)
        parts = self.modules.values()
        beside = self.biases or self.token_rows or any(f.magnitude is not None or f.bias is not None for f in parts)
        if self.is_zero and not beside:  # what is beside can be judged only with the base
            raise AdapterError(f"{self.weights.path}: every delta weight is zero: train this adapter, or leave it out.")

    def digests(self) -> dict[str, str]:
        """File name -> sha256 of both files: the config counts too, as it holds alpha."""
        return {CONFIG_FILE: sha256_file(self.source.folder / CONFIG_FILE), WEIGHTS_FILE: self.sha256}

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"adapter {self.name!r} ({self.source.folder})"

    def scaling_of(self, module: str, r: int) -> float:
        """As the function `scaling_of`, by this adapter's config."""
        try:
            return scaling_of(module, r, self.config)
        except AdapterError as error:
            raise AdapterError(f"{self.where}: {error}") from error


def load_adapter(path_or_id: str | Path, name: str | None = None, *, base_is_residual: bool = False) -> Adapter:
    """Open one adapter by its config and its header; `name` defaults to its folder's name. `check_numbers` reads the rest.

    Args:
        path_or_id: a PEFT folder, or a hub id.
        name: `[A-Za-z0-9._-]+`.
        base_is_residual: accept an unconverted PiSSA-like adapter: the base given is its residual.

    Returns:
        The adapter; its numbers stay in the file.

    Raises:
        AdapterError: a missing or broken folder.
        UnsupportedError: a feature that is not folded, named.
    """
    return _load(path_or_id, name, lambda _: base_is_residual)


def _load(path_or_id: str | Path, name: str | None, is_residual: Callable[[str], bool]) -> Adapter:
    source = _named_folder(resolve_source(path_or_id, ADAPTER_PATTERNS))
    name = check_adapter_name(name or source.name.rpartition("/")[2])
    where = f"adapter {name!r} ({source.folder})"
    config = _read_config(source.folder, where)
    check_config(config, where, base_is_residual=is_residual(name))
    file = _weights_file(source.folder, where)
    header = read_header(file)
    try:
        _check_dtypes(header)
        weights, modules, tensors, token_rows = _sort_tensors(header, config)
    except WloraMergeError as error:
        raise type(error)(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error
    if not modules and not tensors:
        raise AdapterError(f"{file}: holds no LoRA tensor.")
    biases = _take_biases(tensors, config)
    return Adapter(name, source, config, modules, tensors, biases, token_rows, weights)


def _take_biases(tensors: dict[str, Stored], config: dict[str, Any]) -> dict[str, Stored]:
    """Take the trained biases of the base out of the whole tensors; those of and within a saved module stay there.

    Source: `peft.tuners.tuners_utils.BaseTuner._get_learnable_bias_state_dict`.
    """
    if config.get("bias", "none") in (None, "none"):
        return {}
    saved = tuple(config.get("modules_to_save") or ())
    names = [name.removesuffix(".bias") for name in tensors if name.endswith(".bias")]
    outer = {name: [name, *(name[:i] for i, letter in enumerate(name) if letter == ".")] for name in names}
    free = [name for name in names if not (saved and any(module.endswith(saved) for module in outer[name]))]
    return {name: tensors.pop(f"{name}.bias") for name in free}


AdapterSpec = str | Path | tuple[str, str | Path] | Adapter
"""How adapters are given: PATH_OR_ID, `NAME=PATH_OR_ID`, (name, PATH_OR_ID), or opened already."""


def load_adapters(specs: Iterable[AdapterSpec], *, residual: str | None = None) -> list[Adapter]:
    """Open several adapters, one after another; their numbers stay in their files.

    Args:
        specs: N adapters.
        residual: the name of one whose residual the base is.

    Raises:
        AdapterError: two of the same name, or `residual` names none of them.
    """
    given, adapters = list(specs), []
    meter = Meter("opening adapters", 0, len(given), "adapters")
    for spec in given:
        adapters.append(open_adapter(spec, residual))
        meter.add(0, 1)
    names = [a.name for a in adapters]
    refuse_same_names(names)
    if residual is not None and residual not in names:
        raise AdapterError(f"--base-is-residual {residual}: no adapter has that name; there are {', '.join(names)}.")
    warn_of_same(adapters)
    return adapters


def open_adapter(spec: AdapterSpec, residual: str | None = None) -> Adapter:
    """One adapter, however it is given; arguments as for `load_adapters`."""
    if isinstance(spec, Adapter):
        return spec
    name, path = spec if isinstance(spec, tuple) else split_adapter_spec(spec)
    return _load(path, name, lambda found: found == residual)


def called(spec: AdapterSpec) -> str:
    """The name that an adapter has before it is opened."""
    if isinstance(spec, Adapter):
        return spec.name
    name, path = spec if isinstance(spec, tuple) else split_adapter_spec(spec)
    return name or default_name(str(path))


def warn_of_same(adapters: Sequence[Adapter]) -> None:
    """Warn of the same adapter under two names."""
    first: dict[tuple[str, str], str] = {}
    for adapter in adapters:
        known = first.setdefault((adapter.sha256, json.dumps(adapter.config, sort_keys=True)), adapter.name)
        if known != adapter.name:
            warnings.warn(
                f"adapters {known!r} and {adapter.name!r} are the same (their files agree): its weight counts double.",
                WloraMergeWarning,
                stacklevel=2,
            )


def refuse_same_names(names: Iterable[str]) -> None:
    """Refuse two adapters of the same name.

    Raises:
        AdapterError: with the name.
    """
    seen = set[str]()
    for name in names:
        if name in seen:
            raise AdapterError(
                f"two adapters are called {name!r}: name them, as in --adapter first=PATH, or in a list first=PATH."
            )
        seen.add(name)


def split_adapter_spec(spec: str | Path, folder: Path = Path()) -> tuple[str | None, str]:
    """`NAME=PATH_OR_ID` -> (name, path); a path that exists, or holds a separator before its `=`, has no name.

    Args:
        spec: the text.
        folder: what its path is relative to.
    """
    text = str(spec)
    name, equals, path = text.partition("=")
    if not equals or "/" in name or is_here(folder / text):
        return None, text
    return name, path


def default_name(path_or_id: str) -> str:
    """The name of an adapter that is given none: its folder's, or the last part of its hub id without the revision."""
    local = path_or_id.startswith((".", "/", "~"))
    return Path(path_or_id if local else path_or_id.partition("@")[0]).name


def _named_folder(source: Source) -> Source:
    """The folder in which PEFT saved an adapter that has a name of its own: the one below `source` that has a config.

    Raises:
        AdapterError: there are several.
    """
    if source.hub_id or find_file(source.folder, CONFIG_FILE, AdapterError) is not None:
        return source
    named = sorted(file.parent for file in source.folder.glob(f"*/{CONFIG_FILE}"))
    if len(named) > 1:
        found = ", ".join(folder.name for folder in named)
        raise AdapterError(
            f"{source.folder}: has no {CONFIG_FILE}, but {len(named)} adapters ({found}): give {named[0]}, or another."
        )
    return Source(named[0]) if named else source


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    file = find_file(folder, CONFIG_FILE, AdapterError)
    if file is None:
        raise AdapterError(
            f"{where}: has no {CONFIG_FILE}: give the folder that PEFT's save_pretrained wrote (on the hub: org/name/FOLDER)."
        )
    config = read_json(file, AdapterError, "a table of LoraConfig fields")
    if "fine_tune_type" in config and "peft_type" not in config:
        raise UnsupportedError(
            f"{where}: it is in the mlx-lm convention: convert it to PEFT's first, whose lora_A and lora_B are its lora_a and lora_b "
            "transposed, and whose lora_alpha is its scale times its rank."
        )
    return config


def _weights_file(folder: Path, where: str) -> Path:
    file = find_file(folder, WEIGHTS_FILE, AdapterError)
    if file is not None:
        return file
    pickle = next((p for p in PICKLES if (folder / p).exists()), None)
    if pickle:
        raise AdapterError(
            f"{where}: its weights are a pickle ({pickle}), which could run code and is never loaded: convert it where you trust "
            "it with PEFT: PeftModel.from_pretrained(model, folder).save_pretrained(folder), where model is its base, loaded."
        )
    raise AdapterError(
        f"{where}: has no {WEIGHTS_FILE}: a pickle is never loaded or fetched; convert it where you trust it with PEFT: "
        "PeftModel.from_pretrained(model, id).save_pretrained(folder), where model is its base, loaded."
    )


def _sort_tensors(
    header: Header, config: dict[str, Any]
) -> tuple[WeightsFile, dict[str, Factors], dict[str, Stored], dict[str, TokenRows]]:
    parts: dict[str, dict[str, Entry]] = {}
    tensors: dict[str, Entry] = {}
    trained: dict[str, Entry] = {}
    axes: dict[Entry, int] = {}
    for key, entry in header.entries.items():
        parsed = parse_adapter_key(key, wrapped=bool(config.get("target_parameters")))
        if parsed.part == "original":
            continue
        if parsed.part == "token_rows":
            trained[parsed.name] = entry
            continue
        known = tensors if parsed.part == "tensor" else parts.setdefault(parsed.name, {})
        slot = parsed.name if parsed.part == "tensor" else parsed.part
        if slot in known and parsed.part == "tensor" and _have_same_numbers(entry, known[slot]):
            continue  # with bias="all" PEFT saves a saved module's bias twice
        if slot in known:
            raise AdapterError(f"tensor {key!r} names the same thing as another tensor of the file.")
        known[slot] = entry
        if parsed.part in FACTORS and len(entry.shape) > 1:
            axes[entry] = 0 if parsed.part.endswith("A") else 1
    deadline = time.monotonic() + PATTERN_SECONDS
    modules = {module: _factors_of_parts(module, own, config, deadline) for module, own in by_expert(parts).items()}
    weights = WeightsFile(header.file, header.entries, axes)
    return weights, modules, {**tensors}, _token_rows(trained, config)


def _have_same_numbers(one: Entry, other: Entry) -> bool:
    """Whether two tensors of a file are one, saved twice."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and tensor_bytes(one) == tensor_bytes(other)


def _check_dtypes(header: Header) -> None:
    """Refuse a tensor that holds no floating-point numbers."""
    for key, entry in header.entries.items():
        if entry.dtype not in FLOATING:
            raise UnsupportedError(f"tensor {key!r} has dtype {entry.dtype}, expected one of {', '.join(FLOATING)}.")


def _token_rows(trained: Mapping[str, Entry], config: dict[str, Any]) -> dict[str, TokenRows]:
    """The trained rows of each embedding; one that the config does not name is tied to one that it names, and has its rows."""
    told = {module: _told_indices(module, config) for module in trained}
    for module, values in trained.items():
        if told[module] is None:
            told[module] = next(
                (told[m] for m, other in trained.items() if told[m] and _have_same_numbers(other, values)), None
            )
    return {m: TokenRows(_checked_indices(m, values, told[m] or []), values) for m, values in trained.items()}


def _told_indices(module: str, config: dict[str, Any]) -> Any:
    """What the config says of an embedding's trained rows; None: nothing.

    Source: `peft.utils.other.set_additional_trainable_modules`.
    """
    told = config.get("trainable_token_indices")
    if not isinstance(told, dict):
        return told
    found = [indices for name, indices in told.items() if f".{module}".endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _checked_indices(module: str, values: Entry, told: Any) -> tuple[int, ...]:
    """Which rows of the embedding `values` [k, dim] are."""
    indices = told if isinstance(told, list) else []
    if not all(type(i) is int and i >= 0 for i in indices) or len(set(indices)) != len(indices):
        raise AdapterError(f"{module!r}: trainable_token_indices must be different whole numbers of 0 or more.")
    if len(values.shape) != 2 or len(indices) != values.shape[0]:
        raise AdapterError(
            f"{module!r}: its token rows are {list(values.shape)}, and the config's trainable_token_indices name {len(indices)}."
        )
    return tuple(indices)


def _factors_of_parts(module: str, parts: dict[str, Entry], config: dict[str, Any], deadline: float) -> Factors:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    told = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}
    expected = [*names, *(part for part, field in told.items() if config.get(field))]
    missing = [part for part in expected if part not in parts]
    extra = set(parts) - set(expected)
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"also has {sorted(extra)[0]}, of which the config says nothing"
        raise AdapterError(f"target module {module!r} {problem}: expected {' and '.join(expected)}.")
    lora_A, lora_B = (parts[n] for n in names)
    _check_product(module, tuple(lora_A.shape), tuple(lora_B.shape))
    deferred = config.get("target_parameters")
    scaling = math.nan if deferred else scaling_of(module, lora_A.shape[0], config, deadline)
    return Factors(lora_A, lora_B, scaling, embedding, parts.get("lora_B.bias"), parts.get("lora_magnitude_vector"))


def _check_product(module: str, lora_A: tuple[int, ...], lora_B: tuple[int, ...]) -> None:
    """Refuse shapes of which lora_B @ lora_A is no product, or no weight's."""
    groups = lora_A[0] // lora_B[1] if len(lora_A) > 2 and len(lora_B) > 1 and lora_B[1] else 1
    if groups > 1 and lora_A[0] == groups * lora_B[1]:
        raise UnsupportedError(
            f"target module {module!r} is a convolution in {groups} groups, whose LoRA reads every input channel: no grouped weight "
            "can express it, and PEFT merges none: leave this adapter out."
        )
    if len(lora_A) < 2 or len(lora_B) < 2 or lora_A[0] != lora_B[1] or 0 in (*lora_A, *lora_B):
        raise AdapterError(
            f"target module {module!r}: lora_A {list(lora_A)} and lora_B {list(lora_B)} do not multiply."
        )


def scaling_of(module: str, r: int, config: Mapping[str, Any], deadline: float | None = None) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, of a module (or parameter) by the config's patterns.

    With `target_parameters` it is the module tree that tells which parameter factors belong to; until then it is NaN.

    Args:
        module: dotted name of the module or parameter.
        r: the rank.
        config: the adapter's config.
        deadline: as for `pattern_value`.

    Raises:
        AdapterError: the file has another rank than the config says.

    Source: `peft.tuners.lora.layer.LoraLayer.update_layer`.
    """
    expected = pattern_value(config.get("rank_pattern") or {}, module, config.get("r", 8), deadline)
    if r != expected:
        raise AdapterError(
            f"target module {module!r} has rank {r} in the file, and {expected} by the config's r and rank_pattern."
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8), deadline)
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))
