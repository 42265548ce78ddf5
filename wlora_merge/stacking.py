"""ModuleDelta and TensorDelta: the changes of all adapters, laid side by side over one base.

This is the one structure between reading and writing. `stack` joins the adapters' factors module by module; `stack_tensors`
says what becomes of the whole tensors that adapters carry. This room knows shapes and names, no weights of a mixture.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING

from .adapters import Adapter, Factors
from .base_model import OUTPUT_EMBEDDINGS, BaseModel
from .checkpoint import FLOATING
from .errors import AdapterError, UnsupportedError, WloraMergeWarning
from .experts import WRAPPER, split_factors
from .layouts import Layout, factors_from_file, layout_of, output_rows, row_norms
from .names import natural_key
from .quantized import WEIGHT_SUFFIXES
from .token_rows import with_token_rows
from .tying import twin_of

if TYPE_CHECKING:
    import torch

    from .module_tree import ModuleTree


@dataclass(frozen=True)
class ModuleDelta:
    """All adapters' low-rank changes of one module, stacked.

    lora_A [R, in] and lora_B [out, R] hold the rows and columns of all adapters that target the module, R = Σ r_n;
    scaling [R] and adapter_index [R] say for each row its adapter's scaling and which adapter it came from.
    `module` is the base tensor's name without `.weight`; `shape` the base tensor's shape, or with `start` that of the rows from
    there on which alone change (rows of a matrix with its last dimension as columns). `name` is what an adapter calls the
    module; empty where it knows it as rows of another. `read` gives the base weight.

    DoRA's merged weight is c_n·(W + s_n B_n A_n) with c_n = magnitude_n / ||W + s_n B_n A_n|| of each output row. It is
    W + (c_n - 1)·W + s_n (c_n·B_n) A_n: lora_B holds c_n·B_n, and `row_scale` [N, out] holds c_n - 1.

    `biases` holds, by adapter, the delta [out] float64 of a trained bias. A module of which only the bias changes (a norm,
    say) has no factors, R = 0, and the bias's shape.
    """

    module: str
    layout: Layout
    shape: tuple[int, ...]
    factors: tuple[Factors, ...]
    scaling: torch.Tensor
    adapter_index: torch.Tensor
    n_adapters: int
    read: Callable[[], torch.Tensor] | None = field(default=None, compare=False)
    name: str = ""
    start: int | None = None
    biases: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def bias(self) -> torch.Tensor | None:
        """Deltas of the bias [N, out] float64, zero for an adapter that leaves it alone; None where all do."""
        import torch

        if not self.biases:
            return None
        zero = torch.zeros_like(next(iter(self.biases.values())))
        return torch.stack([self.biases.get(n, zero) for n in range(self.n_adapters)])

    @property
    def changes(self) -> list[str]:
        """Names of the base's tensors that change."""
        return [*([f"{self.module}.weight"] if self.factors else []), *([self.bias_name] if self.biases else [])]

    @property
    def bias_name(self) -> str:
        """The name of the module's bias in the base's files."""
        return f"{self.module}.bias"

    @property
    def present(self) -> torch.Tensor:
        """[N] bool: which adapters change this module."""
        import torch

        mask = torch.zeros(self.n_adapters, dtype=torch.bool)
        mask[[*self.adapter_index.tolist(), *self.biases]] = True
        return mask

    @property
    def R(self) -> int:
        """Rank of the stack: the sum of the adapters' ranks."""
        return sum(f.r for f in self.factors)

    @property
    def dtype(self) -> torch.dtype:
        """float32, or wider where an adapter is, or where DoRA's factor is in lora_B."""
        import torch

        if self.has_row_scale:
            return torch.float64
        return max((f.dtype for f in self.factors), key=lambda dtype: dtype.itemsize)

    @property
    def lora_A(self) -> torch.Tensor:
        """[R, in], joined from the adapters when it is asked for: a stack holds no tensors of its own."""
        import torch

        return torch.cat([factors_from_file(self.layout, f.lora_A).to(self.dtype) for f in self.factors])

    @property
    def lora_B(self) -> torch.Tensor:
        """[out, R], joined when it is asked for; DoRA's factor of each output row is in it."""
        import torch

        parts = [factors_from_file(self.layout, f.lora_B).to(self.dtype) for f in self.factors]
        if self.row_scale is not None:
            parts = [(1 + self.row_scale[n])[:, None] * part for n, part in zip(self._owners, parts, strict=True)]
        return torch.cat(parts, dim=1)

    @property
    def has_row_scale(self) -> bool:
        """True where an adapter is a DoRA."""
        return any(f.magnitude is not None for f in self.factors)

    @cached_property
    def row_scale(self) -> torch.Tensor | None:
        """c_n - 1 [N, out] float64, zero for an adapter that is no DoRA here; None where none is. It reads the base weight.

        Raises:
            AdapterError: a row that DoRA divides by is zero.
        """
        import torch

        if not self.has_row_scale:
            return None
        if self.read is None:
            raise AdapterError(f"module {self.module!r}: an adapter is a DoRA, and the base weight cannot be read.")
        base = self.read()
        scale = torch.zeros(self.n_adapters, output_rows(self.layout, self.shape), dtype=torch.float64)
        for n, f in zip(self._owners, self.factors, strict=True):
            if f.magnitude is not None:
                lora_A, lora_B = (factors_from_file(self.layout, t).double() for t in (f.lora_A, f.lora_B))
                norms = row_norms(self.layout, base, lora_A, f.scaling * lora_B)
                scale[n] = f.magnitude.double().flatten() / norms - 1
        if not bool(scale.isfinite().all()):
            raise AdapterError(f"module {self.module!r}: DoRA divides by the norm of a row that is zero: leave it out.")
        return scale

    @property
    def _owners(self) -> list[int]:
        """The adapter that each of `factors` came from."""
        ends = list(accumulate(f.r for f in self.factors))
        return [int(self.adapter_index[end - 1]) for end in ends]


@dataclass(frozen=True)
class TensorDelta:
    """A whole tensor of the base that adapters carry their own copy of; `saved[n]` is adapter n's."""

    tensor: str
    shape: tuple[int, ...]
    saved: dict[int, torch.Tensor]
    n_adapters: int

    @property
    def present(self) -> torch.Tensor:
        """[N] bool: which adapters carry this tensor."""
        import torch

        return torch.tensor([n in self.saved for n in range(self.n_adapters)])

    @property
    def module(self) -> str:
        """The name by which it belongs to a group."""
        return self.tensor.removesuffix(".weight")


@dataclass(frozen=True)
class Target:
    """A target module as its owner knows it: its name there, and the shape of its weight.

    `tied` says that the model also uses the weight as another embedding, and cannot use two; `read` gives the weight, or the
    whole tensor; `twin` names the module that uses a tied weight too. `tree` is the module tree, where that knows the module and
    the files hold its rows in other tensors.
    """

    module: str
    shape: tuple[int, ...]
    tied: bool = False
    read: Callable[[], torch.Tensor] | None = field(default=None, compare=False)
    twin: Callable[[], str | None] | None = field(default=None, compare=False)
    tree: ModuleTree | None = field(default=None, compare=False)


ATTENTION = "in_proj_weight"
"""What torch's MultiheadAttention has for a weight: query, key and value in one [3 · embed_dim, embed_dim]."""
OUT_PROJ = ".out_proj"
INPUT_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "shared", "tok_embeddings")

Find = Callable[[str], "Target | None"]
"""The target of an adapter's module (or whole tensor) by the name that the adapter gives it; None when there is none."""


def modules_of(base: BaseModel) -> Find:
    """Finds target modules in a base's files."""

    def find(module: str) -> Target | None:
        entry = base.find_tensor(f"{module}.weight")
        if base.quantized and (entry is None or entry.dtype not in FLOATING):
            return _packed(base, module)
        target = find_whole(f"{module}.weight")
        if target is not None:
            tied = target.module in base.tied
            twin = partial(twin_of, base, target.module) if tied else None
            return replace(target, module=target.module.removesuffix(".weight"), twin=twin)
        target = find_whole(f"{module}.{ATTENTION}")
        if target is not None:
            return target
        known = base.tree is not None and base.tree.find_module(module.replace(WRAPPER, ""))
        return Target(module, (), tree=base.tree) if known else None

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
        own = base.find_tensor(name)
        entry = own or base.find_tied(name)
        if entry is None:
            return None
        tied = entry.name in base.tied and bool(base.config.get("is_encoder_decoder"))
        return Target(own.name if own else name, entry.shape, tied, partial(base.read, entry.name))

    return find


def stack(
    adapters: Sequence[Adapter], find: Find, find_tensor: Find | None = None, *, model_type: str
) -> list[ModuleDelta]:
    """Lay the adapters' factors side by side, module by module.

    Args:
        adapters: N adapters, in mixture order.
        find: the target of an adapter's module name in the base (or in a live model), None when there is none.
        find_tensor: the same for whole tensors, by which biases are found; None: there are none.
        model_type: the base config's `model_type`.

    Returns:
        One ModuleDelta per changed module, in natural name order, float32 (or wider, where an adapter is).

    Raises:
        AdapterError: a target module or a bias that the base lacks, factors that do not fit it, or an adapter that changes
            nothing.
        UnsupportedError: a trained lora_B.bias where the base has no bias.
    """
    adapters = [with_token_rows(a, partial(_target, a, find=find)) if a.token_rows else a for a in adapters]
    rows: dict[tuple[str, int | None], list[Change]] = {}
    for n, adapter in enumerate(adapters):
        for name in adapter.modules:
            for change in _changes(n, adapter, name, find, model_type):
                known = rows.setdefault((change.module, change.start), [])
                if known and known[0].layout is not change.layout:
                    raise AdapterError(
                        f"{adapter.where}: target module {name!r} is {change.layout.value} here and {known[0].layout.value} in "
                        "another."
                    )
                if any(other.n == n for other in known):
                    raise AdapterError(
                        f"{adapter.where}: two of its target modules are {change.module!r} of the base model."
                    )
                known.append(change)
    _refuse_overlapping_rows(rows)
    biases = _biases(adapters, find_tensor or (lambda name: None))
    order = sorted({*rows, *((module, None) for module in biases)}, key=lambda key: (natural_key(key[0]), key[1] or 0))
    deltas = [
        _stack_one(key[0], rows.get(key, []), biases.get(key[0], {}) if key[1] is None else {}, len(adapters))
        for key in order
    ]
    for n, adapter in enumerate(adapters):
        if adapter.is_zero and not any(_changes_beside(delta, n) for delta in deltas):
            raise AdapterError(f"{adapter.where}: every delta weight is zero: train this adapter, or leave it out.")
    return deltas


@dataclass(frozen=True)
class Change:
    """One adapter's factors for one tensor of the base, or for some rows of it."""

    n: int
    module: str
    shape: tuple[int, ...]
    factors: Factors
    layout: Layout
    name: str = ""
    start: int | None = None
    read: Callable[[], torch.Tensor] | None = field(default=None, compare=False)


def _changes(n: int, adapter: Adapter, name: str, find: Find, model_type: str) -> Iterator[Change]:
    target, factors = _target(adapter, name, find), adapter.modules[name]
    if factors.is_zero and factors.magnitude is None and factors.bias is None:
        warnings.warn(f"{adapter.where}: the delta weight of {name!r} is zero.", WloraMergeWarning, stacklevel=2)
    if target.tree is None:
        factors = _scaled(adapter, name)
        layout = _layout(adapter, name, target, factors, model_type)
        yield Change(n, target.module, target.shape, factors, layout, name, read=target.read)
        return
    parts = split_factors(adapter, name, target.tree)
    if not parts:
        raise _foreign(adapter, name)
    for part in parts:
        shape = (part.count, part.entry.shape[-1])
        start = None if shape == part.entry.shape else part.start
        module = part.entry.name.removesuffix(".weight")
        yield Change(n, module, shape, part.factors, part.layout, start=start, read=part.read)


def _scaled(adapter: Adapter, name: str) -> Factors:
    """One module's factors with their scaling; PEFT matches a wrapped parameter's own name with the patterns, and adds the
    product of a MultiheadAttention's out_proj twice, in its forward pass and in its merge (`peft.tuners.lora.layer`)."""
    if name.endswith(OUT_PROJ) and name.removesuffix(OUT_PROJ) in adapter.modules:
        return replace(adapter.modules[name], scaling=2 * adapter.modules[name].scaling)
    factors, targets = adapter.modules[name], adapter.config.get("target_parameters") or []
    wrapped = any(f".{name}.weight".endswith(f".{target}") for target in targets)
    if not targets:
        return factors
    return replace(factors, scaling=adapter.scaling_of(f"{name}.weight" if wrapped else name, factors.r))


def _refuse_overlapping_rows(rows: Mapping[tuple[str, int | None], list[Change]]) -> None:
    ends: dict[str, float] = {}
    for (module, start), changes in sorted(rows.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        if (start or 0) < ends.get(module, 0):
            raise UnsupportedError(
                f"tensor {module!r}: one adapter changes it as a whole, and another rows of it as a module of its own, which "
                "cannot both be: leave one adapter out."
            )
        ends[module] = math.inf if start is None else start + changes[0].shape[0]


def _biases(adapters: Sequence[Adapter], find_tensor: Find) -> dict[str, dict[int, torch.Tensor]]:
    """Module of the base -> adapter -> the delta [out] float64 of its bias: what was trained less the base's own, and
    scaling · lora_B.bias. Source: `peft.tuners.lora.layer.Linear.merge`."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for n, adapter in enumerate(adapters):
        for name, trained in adapter.biases.items():
            module, base = _base_bias(adapter, name, trained, find_tensor)
            found.setdefault(module, {})[n] = trained.double() - base
        for name in adapter.modules:
            bias = adapter.modules[name].bias
            if bias is None:
                continue
            if find_tensor(f"{name}.bias") is None:
                raise UnsupportedError(
                    f"{adapter.where}: it has a lora_B.bias on {name!r}, which has no bias in the base model, so it cannot be "
                    "folded: leave this adapter out."
                )
            module, _ = _base_bias(adapter, name, bias, find_tensor)
            known, delta = found.setdefault(module, {}), _scaled(adapter, name).scaling * bias.double()
            known[n] = known[n] + delta if n in known else delta
    return found


def _base_bias(adapter: Adapter, name: str, trained: torch.Tensor, find_tensor: Find) -> tuple[str, torch.Tensor]:
    """The base's module that an adapter's name means, and its own bias [out] float64."""
    target = find_tensor(f"{name}.bias")
    if target is None or target.read is None or target.shape != tuple(trained.shape):
        got = "none" if target is None else str(list(target.shape))
        raise AdapterError(
            f"{adapter.where}: it trained a bias {list(trained.shape)} of {name!r}, and the base model has {got}: this adapter was "
            "trained on another base."
        )
    return target.module.removesuffix(".bias"), target.read().cpu().double()


def _changes_beside(delta: ModuleDelta, n: int) -> bool:
    """True where adapter n changes a bias of this module, or its rows by more than rounding."""
    scaled = n in delta.adapter_index and delta.row_scale is not None and bool((delta.row_scale[n].abs() > 1e-5).any())
    return scaled or (n in delta.biases and bool(delta.biases[n].any()))


def _target(adapter: Adapter, name: str, find: Find) -> Target:
    target = find(name)
    if target is None:
        raise _foreign(adapter, name)
    _refuse_tied(adapter, name, target)
    return target


def _foreign(adapter: Adapter, name: str) -> AdapterError:
    return AdapterError(
        f"{adapter.where}: its target module {name!r} is not in the base model: this adapter was trained on another base."
    )


def _refuse_tied(adapter: Adapter, name: str, target: Target) -> None:
    if target.tied:
        raise UnsupportedError(
            f"{adapter.where}: it changes {name!r}, which this encoder-decoder uses in several places "
            "(tie_word_embeddings) and computes otherwise when they differ: leave this adapter out."
        )


def _layout(adapter: Adapter, name: str, target: Target, factors: Factors, model_type: str) -> Layout:
    try:
        layout = layout_of(
            name,
            target.shape,
            tuple(factors.stored_A.shape),
            tuple(factors.stored_B.shape),
            embedding=factors.embedding,
            model_type=model_type,
            fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out")),
        )
    except (AdapterError, UnsupportedError) as error:
        raise type(error)(f"{adapter.where}: {error}") from error
    out = output_rows(layout, target.shape)
    if factors.magnitude is not None and factors.magnitude.numel() != out:
        raise AdapterError(
            f"{adapter.where}: target module {name!r}: lora_magnitude_vector has {factors.magnitude.numel()} numbers, expected {out}."
        )
    return layout


def _stack_one(module: str, changes: list[Change], biases: dict[int, torch.Tensor], n_adapters: int) -> ModuleDelta:
    import torch

    first, factors = changes[0] if changes else None, tuple(c.factors for c in changes)
    ranks = torch.tensor([f.r for f in factors], dtype=torch.int64)
    return ModuleDelta(
        module=module,
        layout=first.layout if first else Layout.LINEAR,
        shape=first.shape if first else tuple(next(iter(biases.values())).shape),
        factors=factors,
        scaling=torch.tensor([f.scaling for f in factors], dtype=torch.float64).repeat_interleave(ranks),
        adapter_index=torch.tensor([c.n for c in changes], dtype=torch.int64).repeat_interleave(ranks),
        n_adapters=n_adapters,
        read=first.read if first else None,
        name=first.name if first else "",
        start=first.start if first else None,
        biases=biases,
    )


def stack_tensors(
    adapters: Sequence[Adapter], choice: str | None, replaced: Iterable[str], find: Find
) -> tuple[list[TensorDelta], dict[str, torch.Tensor]]:
    """What becomes of the whole tensors (`modules_to_save`) that adapters carry.

    Args:
        choice: an adapter's name takes that one's, `drop` leaves all out, `mix` mixes them as deltas against the base's; None
            refuses any that is not `replaced`.
        replaced: names of the parameters that a trained head replaces.
        find: as for `stack`, for whole tensor names.

    Returns:
        The deltas, and the tensors taken as they are, under the names that the adapter gives them.

    Raises:
        UnsupportedError: tensors that nobody said what to do with, or that cannot be mixed; a copy of the weight of one of
            the adapter's own target modules (PEFT saves that of an embedding) which is not equal to the base's.
    """
    taken: dict[str, torch.Tensor] = {}
    saved: dict[str, dict[int, torch.Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if choice not in (None, "drop", "mix", *(a.name for a in adapters)):
        raise AdapterError(
            f"--modules-to-save {choice}: expected drop, mix, or one of {', '.join(a.name for a in adapters)}."
        )
    for n, adapter in enumerate(adapters):
        for name in sorted(set(adapter.tensors) - set(replaced)):
            if _is_base_copy(adapter, name, find):
                continue
            if choice is None:
                raise UnsupportedError(
                    f"{adapter.where}: it carries its own copy of tensor {name!r}: say --modules-to-save NAME to take one adapter's, "
                    "drop to leave them out, or mix to mix them against the base's."
                )
            if choice == adapter.name:
                _check_taken(adapter, name, find)
                taken[name] = adapter.tensors[name]
            if choice == "mix":
                target = _whole_target(adapter, name, find)
                saved.setdefault(target.module, {})[n] = adapter.tensors[name]
                shapes[target.module] = target.shape
    return [
        TensorDelta(name, shapes[name], saved[name], len(adapters)) for name in sorted(saved, key=natural_key)
    ], taken


def _whole_target(adapter: Adapter, name: str, find: Find) -> Target:
    target, shape = find(name), tuple(adapter.tensors[name].shape)
    if target is None or target.shape != shape:
        got = "is not in the base model" if target is None else f"is {list(target.shape)} there and {list(shape)} here"
        raise UnsupportedError(
            f"{adapter.where}: its tensor {name!r} {got}, so it cannot be mixed: take one adapter's, or drop it."
        )
    _refuse_tied(adapter, name, target)
    return target


def _is_base_copy(adapter: Adapter, name: str, find: Find) -> bool:
    """True for the copy of a target module's base weight that PEFT saves beside an embedding's LoRA, which changes nothing."""
    if name.removesuffix(".weight") not in adapter.modules:
        return False
    target = find(name)
    if target is None or target.read is None:
        return False
    saved, base = adapter.tensors[name], target.read()
    if saved.shape != base.shape or not bool((saved.double() == base.double()).all()):
        raise UnsupportedError(
            f"{adapter.where}: its copy of tensor {name!r} {list(saved.shape)} is not equal to the base model's {list(base.shape)}, "
            "so its LoRA belongs to another or a resized embedding: leave this adapter out."
        )
    return True


def _check_taken(adapter: Adapter, name: str, find: Find) -> None:
    target, shape = find(name), tuple(adapter.tensors[name].shape)
    if target is None:
        return
    embedding = name.split(".")[-2] in (*OUTPUT_EMBEDDINGS, *INPUT_EMBEDDINGS)
    if embedding and len(target.shape) == 2 and target.shape[1:] == shape[1:] and target.shape != shape:
        raise UnsupportedError(
            f"{adapter.where}: its {name!r} has {shape[0]} tokens, and the base model's has {target.shape[0]}: a vocabulary is never "
            "resized here: resize the base (model.resize_token_embeddings), save it with the adapter's tokenizer, and give that."
        )
    _refuse_tied(adapter, name, target)
    if target.module != name:
        raise UnsupportedError(
            f"{adapter.where}: its tensor {name!r} is called {target.module!r} by the base model, so it cannot be taken as it is: "
            "drop it, or mix it."
        )


def refuse_overlap(
    deltas: Sequence[ModuleDelta], tensors: Sequence[TensorDelta], head: Iterable[str], find: Find
) -> None:
    """Refuse a tensor that changes in two ways: by a LoRA or as a trained bias, and as a whole.

    Args:
        head: names of tensors that replace the base's.
        find: as for `stack_tensors`.

    Raises:
        UnsupportedError: names the tensor.
    """
    low_rank = {name for delta in deltas for name in delta.changes}
    found = [(name, find(name)) for name in head]
    whole = [*(t.tensor for t in tensors), *(target.module if target else name for name, target in found)]
    for name in whole:
        if name in low_rank:
            raise UnsupportedError(
                f"tensor {name!r}: one adapter changes it by a LoRA, or trains it as a bias, and another or the head replaces it as "
                "a whole, which cannot both be: leave one adapter out, or say --modules-to-save drop."
            )
