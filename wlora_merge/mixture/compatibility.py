"""Which adapters can be mixed with each other on a base, and why the others cannot; and the same as rows for a table.

An adapter is judged as `mix` judges it: alone on the base, then stacked with those before it that could be mixed. Tables are made
of headers; norms, where they are asked for, of the factors. No delta weight is formed but a DoRA's, which scales the base's rows too.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, AdapterSpec, called, open_adapter, warn_of_same
from ..adapters.added_tokens import other_vocabulary, resized
from ..adapters.deltas import ModuleDelta
from ..adapters.modules_to_save import Names, stack_tensors
from ..adapters.stacking import Stack
from ..adapters.targets import modules_of, tensors_of
from ..errors import AdapterError, WloraMergeError, WloraMergeWarning
from ..models.base_model import BaseModel, open_base
from ..progress import Meter
from .combination import Combination
from .fold import fold_factor, fold_factors

if TYPE_CHECKING:
    import torch

Rows = list[dict[str, Any]]
NAMED = (
    "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters", "trainable_token_indices",
)  # fmt: skip
"""Fields of the config that are a feature where they are set."""


NO, YES, WITH_HEADS, WITH_TOKENS, NAMED_APART = (
    "no",
    "yes",
    "yes, with --modules-to-save or a fit that trains a head",
    "yes, with --resize-vocab",
    "yes, named apart",
)
"""Whether an adapter mixes."""
REASONS = {
    "Adapters that cannot be mixed": (NO,),
    "What adapters need to be mixed": (WITH_HEADS, WITH_TOKENS, NAMED_APART),
}


def mixable(
    base: str | Path,
    adapters: Iterable[AdapterSpec],
    *,
    modules_to_save: str | None = None,
    resize_vocab: str | None = None,
    residual: str | None = None,
    method: str = "linear",
) -> list[Adapter]:
    """The adapters that can be mixed with each other on a base, opened, as `mix` and `fit` take them; each other one is left out
    with a warning that says why.

    Args:
        base: folder or hub id of the base model.
        adapters: as for `mix`.
        modules_to_save: as for `mix`, like the rest.
        resize_vocab: the adapter whose vocabulary the base is to have.
        residual: the adapter whose residual the base is.
        method: how delta weights are to be combined.

    Raises:
        AdapterError: none can be mixed; with the reason for each.
    """
    opened, given, left = open_base(base), list(adapters), dict[str, WloraMergeError]()
    loaded, kept = list[Adapter](), list[Adapter]()
    meter = Meter("opening adapters", 0, len(given), "adapters")
    for spec in given:
        try:
            loaded.append(open_adapter(spec, residual))
        except WloraMergeError as error:
            left[called(spec)] = error
        meter.add(0, 1)
    grown, brought = resized(opened, loaded, resize_vocab)
    together = Together(grown, modules_to_save, Combination(method))
    meter = Meter("trying adapters on the base", 0, len(loaded), "adapters")
    for adapter, own in zip(loaded, brought, strict=True):
        try:
            together.add(own)
            kept.append(adapter)
        except WloraMergeError as error:
            left[adapter.name] = error
        meter.add(0, 1)
    if not kept:
        told = _grouped((name, _without_name(str(why), name).rstrip(".")) for name, why in left.items())
        reasons = "; ".join(f"{row['adapter']}: {row['reason']}" for row in told)
        raise AdapterError(f"{opened.folder}: none of the {len(given)} adapters can be mixed on this base ({reasons}).")
    for name, why in left.items():
        warnings.warn(f"adapter {name!r} is left out: {why}", WloraMergeWarning, stacklevel=2)
    return kept


class Together:
    """Adapters on a base that can be mixed with each other, tried one after another.

    Args:
        base: the opened base model.
        choice: `modules_to_save`, as for `stack_tensors`.
        how: how they are to be combined.
        numbers: whether their files are read too, and refused where a number is not finite, or all are zero.
    """

    def __init__(
        self, base: BaseModel, choice: str | None, how: Combination | None = None, *, numbers: bool = True
    ) -> None:
        self._base, self._choice, self._how, self._numbers = base, choice, how or Combination(), numbers
        self._stack, self._names = Stack(modules_of(base), tensors_of(base), model_type=base.model_type), Names()
        self.adapters: list[Adapter] = []

    def add(self, adapter: Adapter) -> list[ModuleDelta]:
        """Take one more adapter, if it mixes with those that there are; what it changes by factors and biases.

        Raises:
            WloraMergeError: why it does not; it is not taken then.
        """
        find = tensors_of(self._base)
        alone = Stack.of([adapter], modules_of(self._base), find, model_type=self._base.model_type)
        deltas = alone.deltas()
        choice = self._choice if self._choice in (None, "drop", "mix", adapter.name) else "drop"
        tensors, head = stack_tensors([adapter], choice, (), find)
        self._how.refuse_changes([adapter], tensors)
        names = self._names | Names.of(deltas, tensors, head, find)
        names.refuse_both()
        if self._numbers:
            alone.check_numbers()
        self._stack.add(adapter)
        self._names = names
        self.adapters.append(adapter)
        return deltas


def adapter_tables(given: Sequence[AdapterSpec], base: BaseModel | None, *, norms: bool = False) -> dict[str, Rows]:
    """Tables with a row for each adapter: what it is; why it cannot be mixed; what it changes and how.

    What an adapter needs, and why one cannot be mixed, stands in tables of its own: a sentence in a narrow column reads badly.

    Args:
        given: the adapters.
        base: what they are tried on; None: they are not.
        norms: read all weights, and say how large each adapter's change is; else headers say what there is to say.
    """
    rows: Rows = []
    adapters: list[Adapter] = []
    together = Together(base, "drop", numbers=norms) if base is not None else None
    known: dict[str, float] | None = {} if norms else None
    meter = Meter("looking at adapters", 0, len(given), "adapters")
    for spec in given:
        meter.add(0, 1)
        try:
            adapter = open_adapter(spec)
        except WloraMergeError as error:
            rows.append({"adapter": called(spec), "mixes": "no", "reason": str(error)})
            continue
        row = _on_base(adapter, base, together, known) if base is not None and together is not None else {}
        deltas = row.pop("deltas", None)
        rows.append(_what(adapter, deltas) | row)
        adapters.append(adapter)
    warn_of_same(adapters)
    tables = {"Adapters": rows}
    reasons = [(row, row.pop("reason")) for row in rows if "reason" in row]
    for title, answers in REASONS.items():
        if found := [(row["adapter"], reason) for row, reason in reasons if row["mixes"] in answers]:
            tables[title] = _grouped(found)
    if features := [feature_row(a) for a in adapters]:
        tables["Targets and features"] = features
    return tables


def _without_name(reason: str, name: str) -> str:
    """A reason without the adapter's name and place before it, so that it is the same sentence for another."""
    return re.sub(rf"^adapter {re.escape(repr(name))} \([^)]*\): ", "", reason)


def _grouped(found: Iterable[tuple[str, str]]) -> Rows:
    """One row for each reason, with the adapters that it holds for."""
    groups: dict[str, list[str]] = {}
    for name, reason in found:
        groups.setdefault(reason, []).append(name)
    return [{"adapter": " ".join(names), "reason": reason} for reason, names in groups.items()]


def _what(adapter: Adapter, deltas: Sequence[ModuleDelta] | None) -> dict[str, Any]:
    factors = [f for d in deltas for f in d.factors] if deltas is not None else list(adapter.modules.values())
    known = not any(math.isnan(f.scaling) for f in factors)  # of fused experts, only on a base
    ranks = [f.r for f in factors] if known else [adapter.config.get("r", 8), *_pattern(adapter, "rank_pattern")]
    return {
        "adapter": adapter.name,
        "r": _range(ranks),
        "alpha": _range([adapter.config.get("lora_alpha", 8), *_pattern(adapter, "alpha_pattern")]),
        "scaling": _range([round(f.scaling, 4) for f in factors]) if known else None,
        "modules": len(adapter.modules),
        "parameters": sum(f.parameters for f in adapter.modules.values()),
    }


def _pattern(adapter: Adapter, field: str) -> Iterable[float]:
    return (adapter.config.get(field) or {}).values()


def _on_base(adapter: Adapter, base: BaseModel, together: Together, norms: dict[str, float] | None) -> dict[str, Any]:
    """The deltas, their norm over the base's where norms are asked for, and whether the adapter mixes with the others, by the words
    above."""
    row: dict[str, Any] = {"delta / base norm": None, "mixes": NO}
    needs: list[str] = []
    names = {other.name for other in together.adapters}
    try:
        rows = other_vocabulary(base, adapter)
        if rows is not None:
            base, together, adapter = _resized(base, together, adapter, numbers=norms is not None)
            needs = [f"was trained with a vocabulary of {rows} rows: say --resize-vocab {adapter.name}."]
            norms = None if norms is None else {}
        deltas = together.add(adapter)
    except WloraMergeError as error:
        return row | {"reason": str(error)}
    row |= {
        "deltas": deltas,
        "delta / base norm": _relative_norm(adapter.name, deltas, norms) if norms is not None else None,
        "mixes": WITH_TOKENS if needs else YES,
    }
    if adapter.name in names:
        reason = f"another adapter is called {adapter.name!r} too: name them, as in --adapter first=PATH --adapter second=PATH."
        return row | {"mixes": NAMED_APART, "reason": " ".join([*needs, reason])}
    try:
        stack_tensors([adapter], None, (), tensors_of(base))
    except WloraMergeError:
        row |= {} if needs else {"mixes": WITH_HEADS}
        needs.append(_carries(adapter))
    return row | ({"reason": " ".join(needs)} if needs else {})


def _resized(
    base: BaseModel, together: Together, adapter: Adapter, *, numbers: bool
) -> tuple[BaseModel, Together, Adapter]:
    """The base with an adapter's vocabulary, the others on it, and the adapter at that size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the others' tokens
        base, (*others, adapter) = resized(base, [*together.adapters, adapter], adapter.name)
        together = Together(base, "drop", numbers=numbers)
        for other in others:
            together.add(other)
    return base, together, adapter


def _carries(adapter: Adapter) -> str:
    names = sorted({name.rpartition(".")[0] or name for name in adapter.tensors})
    return (
        f"carries whole tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): say --modules-to-save NAME to take one "
        "adapter's, drop to leave them out, or mix; a fit that trains a new head in their place needs no option."
    )


def _relative_norm(adapter: str, deltas: Sequence[ModuleDelta], norms: dict[str, float]) -> float | None:
    """Frobenius norm of the delta weights over that of the base weights that they change; None where those are packed.

    Args:
        adapter: its name.
        deltas: of that adapter.
        norms: squared norms of the base's weights that are known already, by the deltas' labels; others are added.
    """
    changed = whole = 0.0
    meter = Meter(f"norms of {adapter}", 0, len(deltas), "modules")
    for delta in deltas:
        meter.add(0, 1)
        if not delta.factors or delta.read is None:
            continue
        if delta.label not in norms:
            norms[delta.label] = float(delta.read().double().square().sum())
        whole += norms[delta.label]
        changed += _square(delta, delta.read)
    return math.sqrt(changed / whole) if whole else None


def _square(delta: ModuleDelta, read: Callable[[], torch.Tensor]) -> float:
    """Squared Frobenius norm of the delta weight, by the trace of the factors' Gram matrices."""
    import torch

    left, right = fold_factors(delta, delta.scaling)
    factor = fold_factor(delta, torch.ones(1))
    if factor is None:
        return float(((left.T @ left) * (right @ right.T)).sum())
    return float(((factor - 1) * read().double().flatten(1) + left @ right).square().sum())


def feature_row(adapter: Adapter) -> dict[str, Any]:
    """What one adapter changes, which features of PEFT it uses, and the base that it names."""
    return {
        "adapter": adapter.name,
        "targets": " ".join(sorted({_short(name) for name in adapter.modules})),
        "features": " ".join(_features(adapter)) or "plain",
        "trained on": adapter.config.get("base_model_name_or_path"),
    }


def _short(module: str) -> str:
    return module.replace(".base_layer", "").rpartition(".")[2]


def _features(adapter: Adapter) -> list[str]:
    config = adapter.config
    found = [name for name in NAMED if config.get(name)]
    if config.get("bias") not in (None, "none"):
        found.append(f"bias={config['bias']}")
    if isinstance(config.get("init_lora_weights"), str):
        found.append(f"init={config['init_lora_weights']}")
    return [*found, *(["modules_to_save"] if adapter.tensors else [])]


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
