"""Adapters beside each other, as rows for a table: what each one is, and whether it can be mixed with the others on a base.

An adapter is judged as `mix` judges it: alone on the base, then stacked with those before it that could be mixed. Norms come
from the factors; no delta weight is formed but a DoRA's, which scales the base's rows too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, load_adapter
from ..adapters.added_tokens import other_vocabulary, resized
from ..adapters.deltas import ModuleDelta
from ..adapters.modules_to_save import join_changes, stack_tensors
from ..adapters.stacking import stack
from ..adapters.targets import modules_of, tensors_of
from ..errors import WloraMergeError
from ..models.base_model import BaseModel
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


def adapter_tables(paths: Sequence[str | Path], base: BaseModel | None) -> dict[str, Rows]:
    """Tables with a row for each adapter: what it is; why it cannot be mixed; what it changes and how.

    What an adapter needs, and why one cannot be mixed, stands in tables of its own: a sentence in a narrow column reads badly.
    """
    adapters = [_loaded(path) for path in paths]
    rows: Rows = []
    fitting: list[Adapter] = []
    for path, adapter in zip(paths, adapters, strict=True):
        if isinstance(adapter, WloraMergeError):
            rows.append({"adapter": Path(path).name, "mixes": "no", "reason": str(adapter)})
            continue
        row = _on_base(adapter, base, fitting) if base is not None else {}
        deltas = row.pop("deltas", None)
        rows.append(_what(adapter, deltas) | row)
        if row.get("mixes") not in (NO, WITH_TOKENS):  # on the base as it is
            fitting.append(adapter)
    tables = {"Adapters": rows}
    reasons = [(row, row.pop("reason")) for row in rows if "reason" in row]
    for title, answers in REASONS.items():
        if found := [(row["adapter"], reason) for row, reason in reasons if row["mixes"] in answers]:
            tables[title] = _grouped(found)
    if features := [feature_row(a) for a in adapters if isinstance(a, Adapter)]:
        tables["Targets and features"] = features
    return tables


def _grouped(found: Iterable[tuple[str, str]]) -> Rows:
    """One row for each reason, with the adapters that it holds for."""
    groups: dict[str, list[str]] = {}
    for name, reason in found:
        groups.setdefault(reason, []).append(name)
    return [{"adapter": " ".join(names), "reason": reason} for reason, names in groups.items()]


def _loaded(path: str | Path) -> Adapter | WloraMergeError:
    try:
        return load_adapter(path)
    except WloraMergeError as error:
        return error


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


def _on_base(adapter: Adapter, base: BaseModel, others: Sequence[Adapter]) -> dict[str, Any]:
    """The deltas, their norm over the base's, and whether the adapter mixes with the others, by the words above."""
    row: dict[str, Any] = {"delta / base norm": None, "mixes": NO}
    needs: list[str] = []
    try:
        rows = other_vocabulary(base, adapter)
        if rows is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the others' tokens
                base, (*others, adapter) = resized(base, [*others, adapter], adapter.name)
            needs = [f"was trained with a vocabulary of {rows} rows: say --resize-vocab {adapter.name}."]
        find = tensors_of(base)
        deltas = stack([adapter], modules_of(base), find, model_type=base.model_type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line above has said it
            together = stack([*others, adapter], modules_of(base), find, model_type=base.model_type)
        tensors, head = stack_tensors([*others, adapter], "drop", (), find)
        join_changes(together, tensors, head, find)
    except WloraMergeError as error:
        return row | {"reason": str(error)}
    row |= {"deltas": deltas, "delta / base norm": _relative_norm(deltas), "mixes": WITH_TOKENS if needs else YES}
    if adapter.name in [other.name for other in others]:
        reason = f"another adapter is called {adapter.name!r} too: name them, as in --adapter first=PATH --adapter second=PATH."
        return row | {"mixes": NAMED_APART, "reason": " ".join([*needs, reason])}
    try:
        stack_tensors([adapter], None, (), find)
    except WloraMergeError:
        row |= {} if needs else {"mixes": WITH_HEADS}
        needs.append(_carries(adapter))
    return row | ({"reason": " ".join(needs)} if needs else {})


def _carries(adapter: Adapter) -> str:
    names = sorted({name.rpartition(".")[0] or name for name in adapter.tensors})
    return (
        f"carries whole tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): say --modules-to-save NAME to take one "
        "adapter's, drop to leave them out, or mix; a fit that trains a new head in their place needs no option."
    )


def _relative_norm(deltas: Sequence[ModuleDelta]) -> float | None:
    """Frobenius norm of the delta weights over that of the base weights that they change; None where those are packed."""
    changed = whole = 0.0
    for delta in deltas:
        if not delta.factors or delta.read is None:
            continue
        weight = delta.read().double()
        whole += float(weight.square().sum())
        changed += _square(delta, weight)
    return math.sqrt(changed / whole) if whole else None


def _square(delta: ModuleDelta, weight: torch.Tensor) -> float:
    """Squared Frobenius norm of the delta weight, by the trace of the factors' Gram matrices."""
    import torch

    left, right = fold_factors(delta, delta.scaling)
    factor = fold_factor(delta, torch.ones(1))
    if factor is None:
        return float(((left.T @ left) * (right @ right.T)).sum())
    return float(((factor - 1) * weight.flatten(1) + left @ right).square().sum())


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
