"""The adapters' factors and biases over one base, joined module by module.

Whether they fit is told by their headers; their numbers are checked behind that. This room knows shapes and names, no weights
of a mixture. What becomes of whole tensors stands in `modules_to_save.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError, WloraMergeWarning
from ..models.names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, natural_key
from ..progress import Meter
from .adapter import Adapter
from .deltas import ModuleDelta
from .experts import split_factors
from .factors import Factors, Stored, numbers
from .layouts import Layout, layout_of, output_rows
from .targets import OTHER_VOCABULARY, Find, Target, foreign, in_peft_names, remembered, target_of
from .trainable_tokens import with_token_rows

if TYPE_CHECKING:
    import torch

OUT_PROJ = ".out_proj"


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
        AdapterError: a target module or a bias that the base lacks, factors that do not fit it, a number that is not finite, or an
            adapter that changes nothing.
        UnsupportedError: a trained lora_B.bias where the base has no bias.
    """
    made = Stack.of(adapters, find, find_tensor, model_type=model_type)
    made.check_numbers()
    return made.deltas()


class Stack:
    """Adapters laid side by side over one base, one after another; arguments as for `stack`.

    What is added must fit by its header. `check_numbers` reads the rest, which takes longer and needs torch.
    """

    @classmethod
    def of(cls, adapters: Iterable[Adapter], find: Find, find_tensor: Find | None = None, *, model_type: str) -> Stack:
        """Some adapters; arguments and errors as for `stack`."""
        made = cls(find, find_tensor, model_type=model_type)
        for adapter in adapters:
            made.add(adapter)
        return made

    def __init__(self, find: Find, find_tensor: Find | None = None, *, model_type: str) -> None:
        self._find, self._find_tensor = remembered(find), find_tensor or (lambda name: None)
        self._model_type, self._adapters = model_type, list[Adapter]()
        self._rows: dict[tuple[str, int | None], list[ModuleChange]] = {}
        self._starts: dict[str, set[int | None]] = {}
        self._biases: dict[str, dict[int, torch.Tensor]] = {}

    def add(self, adapter: Adapter) -> None:
        """Lay one more adapter beside the others; where it is refused, the stack is as it was.

        Raises:
            WloraMergeError: as `stack`.
        """
        adapter, n = in_peft_names(adapter, self._find), len(self._adapters)
        if adapter.token_rows:
            adapter = with_token_rows(adapter, partial(target_of, adapter, find=self._find))
        rows: dict[tuple[str, int | None], list[ModuleChange]] = {}
        for name in adapter.modules:
            for change in _changes(n, adapter, name, self._find, self._model_type):
                own = rows.setdefault((change.module, change.start), [])
                _refuse_conflict(adapter, name, change, self._rows.get((change.module, change.start), []), own)
                own.append(change)
        starts: dict[str, set[int | None]] = {}
        for module, start in rows:
            starts.setdefault(module, {*self._starts.get(module, ())}).add(start)
        together = [(module, start) for module in starts for start in starts[module]]
        _refuse_overlapping_rows({key: self._rows.get(key) or rows[key] for key in together})
        biases = _biases(adapter, self._find_tensor)
        for key, changes in rows.items():
            self._rows.setdefault(key, []).extend(changes)
        self._starts |= starts
        for module, delta in biases.items():
            self._biases.setdefault(module, {})[n] = delta
        self._adapters.append(adapter)

    def deltas(self) -> list[ModuleDelta]:
        """What `stack` gives; no number of a factor is read for it."""
        rows, biases, n_adapters = self._rows, self._biases, len(self._adapters)
        order = sorted(
            {*rows, *((module, None) for module in biases)}, key=lambda key: (natural_key(key[0]), key[1] or 0)
        )
        return [
            _stack_one(key[0], rows.get(key, []), biases.get(key[0], {}) if key[1] is None else {}, n_adapters)
            for key in order
        ]

    def check_numbers(self) -> None:
        """Read each adapter's file once, and refuse numbers that no export should have. It warns of a module that does not change.

        Raises:
            AdapterError: a NaN or an infinity, or an adapter that changes nothing.
        """
        meter = Meter("reading adapters", 0, len(self._adapters), "adapters", told=len(self._adapters) > 1)
        for n, adapter in enumerate(self._adapters):
            adapter.check_numbers()
            if adapter.is_zero and not any(_changes_beside(delta, n) for delta in self.deltas()):
                raise AdapterError(f"{adapter.where}: every delta weight is zero: train this adapter, or leave it out.")
            for name, factors in adapter.modules.items():
                if factors.is_zero and factors.magnitude is None and factors.bias is None:
                    warnings.warn(
                        f"{adapter.where}: the delta weight of {name!r} is zero.", WloraMergeWarning, stacklevel=2
                    )
            meter.add(0, 1)


def _refuse_conflict(
    adapter: Adapter, name: str, change: ModuleChange, others: Sequence[ModuleChange], own: Sequence[ModuleChange]
) -> None:
    """Refuse a change of a module that others change as another kind of layer, or that the same adapter changes twice."""
    known = [*others[:1], *own]
    if known and known[0].layout is not change.layout:
        raise AdapterError(
            f"{adapter.where}: target module {name!r} is {change.layout.value} here and {known[0].layout.value} in another."
        )
    if any(not _apart(other.factors, change.factors) for other in own):
        raise AdapterError(f"{adapter.where}: two of its target modules are {change.module!r} of the base model.")


def _apart(one: Factors, other: Factors) -> bool:
    """Whether two products change different rows of one weight [out, in], as gate_proj and up_proj those of a gate_up_proj."""
    spreads = [f.slice.spread for f in (one, other) if f.slice and f.slice.spread]
    return len(spreads) == 2 and set(spreads[0]).isdisjoint(spreads[1])


@dataclass(frozen=True)
class ModuleChange:
    """One adapter's factors for one tensor of the base, or for some rows of it."""

    n: int
    module: str
    shape: tuple[int, ...]
    factors: Factors
    layout: Layout
    name: str = ""
    start: int | None = None
    read: Callable[[], torch.Tensor] | None = field(default=None, compare=False)


def _changes(n: int, adapter: Adapter, name: str, find: Find, model_type: str) -> Iterator[ModuleChange]:
    target, factors = target_of(adapter, name, find), adapter.modules[name]
    if target.tree is None:
        factors = _scaled(adapter, name)
        layout = _layout(adapter, name, target, factors, model_type)
        yield ModuleChange(n, target.module, target.shape, factors, layout, name, read=target.read)
        return
    parts = split_factors(adapter, name, target.tree)
    if not parts:
        raise foreign(adapter, name, find)
    for part in parts:
        shape = (part.count, part.entry.shape[-1])
        start = None if shape == part.entry.shape else part.start
        module = part.entry.name.removesuffix(".weight")
        own = name if part.whole else ""
        yield ModuleChange(n, module, shape, part.factors, part.layout, own, start=start, read=part.read)


def _scaled(adapter: Adapter, name: str) -> Factors:
    """One module's factors with their scaling.

    PEFT matches a wrapped parameter's own name with the patterns. It adds the product of a MultiheadAttention's out_proj twice, in
    its forward pass and in its merge (`peft.tuners.lora.layer`).
    """
    if name.endswith(OUT_PROJ) and name.removesuffix(OUT_PROJ) in adapter.modules:
        return replace(adapter.modules[name], scaling=2 * adapter.modules[name].scaling)
    factors, targets = adapter.modules[name], adapter.config.get("target_parameters") or []
    wrapped = any(f".{name}.weight".endswith(f".{target}") for target in targets)
    if not targets:
        return factors
    return replace(factors, scaling=adapter.scaling_of(f"{name}.weight" if wrapped else name, factors.r))


def _refuse_overlapping_rows(rows: Mapping[tuple[str, int | None], list[ModuleChange]]) -> None:
    ends: dict[str, float] = {}
    for (module, start), changes in sorted(rows.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        if (start or 0) < ends.get(module, 0):
            raise UnsupportedError(
                f"tensor {module!r}: one adapter changes it as a whole, and another rows of it as a module of its own, which "
                "cannot both be: leave one adapter out."
            )
        ends[module] = math.inf if start is None else start + changes[0].shape[0]


def _biases(adapter: Adapter, find_tensor: Find) -> dict[str, torch.Tensor]:
    """Module of the base -> the delta [out] float64 of its bias: what was trained less the base's own, and scaling · lora_B.bias.
    Source: `peft.tuners.lora.layer.Linear.merge`."""
    found: dict[str, torch.Tensor] = {}
    for name, trained in adapter.biases.items():
        module, base = _base_bias(adapter, name, trained, find_tensor)
        found[module] = numbers(trained).double() - base
    for name in adapter.modules:
        bias = adapter.modules[name].bias
        if bias is None:
            continue
        if find_tensor(f"{name}.bias") is None:
            raise UnsupportedError(
                f"{adapter.where}: it has a lora_B.bias on {name!r}, which has no bias in the base model, so it cannot be folded: "
                "leave this adapter out."
            )
        module, _ = _base_bias(adapter, name, bias, find_tensor)
        delta = _scaled(adapter, name).scaling * numbers(bias).double()
        found[module] = found[module] + delta if module in found else delta
    return found


def _base_bias(adapter: Adapter, name: str, trained: Stored, find_tensor: Find) -> tuple[str, torch.Tensor]:
    """The base's module that an adapter's name means, and its own bias [out] float64."""
    target = find_tensor(f"{name}.bias")
    if target is None or target.read is None:
        raise AdapterError(
            f"{adapter.where}: it trained a bias {list(trained.shape)} of {name!r}, of which the base model has none, or has it as "
            "a part of another tensor, which is not folded yet: leave this adapter out."
        )
    if target.shape != tuple(trained.shape):
        raise AdapterError(
            f"{adapter.where}: it trained a bias {list(trained.shape)} of {name!r}, and the base model has {list(target.shape)}: "
            "this adapter was trained on another base."
        )
    return target.module.removesuffix(".bias"), target.read().cpu().double()


def _changes_beside(delta: ModuleDelta, n: int) -> bool:
    """True where adapter n changes a bias of this module, or its rows by more than rounding."""
    scaled = n in delta.owners and delta.row_scale is not None and bool((delta.row_scale[n].abs() > 1e-5).any())
    return scaled or (n in delta.biases and bool(delta.biases[n].any()))


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
        embedding = name.rpartition(".")[2] in (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS)
        hint = f" If it has other tokens: {OTHER_VOCABULARY}" if embedding else ""
        raise type(error)(f"{adapter.where}: {error}{hint}") from error
    out = output_rows(layout, target.shape)
    if factors.magnitude is not None and (found := math.prod(factors.magnitude.shape)) != out:
        raise AdapterError(
            f"{adapter.where}: target module {name!r}: lora_magnitude_vector has {found} numbers, expected {out}."
        )
    return layout


def _stack_one(
    module: str, changes: list[ModuleChange], biases: dict[int, torch.Tensor], n_adapters: int
) -> ModuleDelta:
    first = changes[0] if changes else None
    return ModuleDelta(
        module=module,
        layout=first.layout if first else Layout.LINEAR,
        shape=first.shape if first else tuple(next(iter(biases.values())).shape),
        factors=tuple(c.factors for c in changes),
        owners=tuple(c.n for c in changes),
        n_adapters=n_adapters,
        read=first.read if first else None,
        name=first.name if first else "",
        start=first.start if first else None,
        biases=biases,
    )
