"""What a folder is, as rows for a table: adapters, a base model, a mixture, an export; and which adapters fit which base.

Nothing is changed and nothing is loaded but adapters. It knows no terminal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import CONFIG_FILE, Adapter, load_adapter
from .base_model import BaseModel, open_base
from .errors import WloraMergeError
from .fold import fold_factor, fold_factors
from .manifest import FILE, read_manifest
from .mixture import JSON_FILE, Mixture
from .stacking import ModuleDelta, modules_of, stack, tensors_of

if TYPE_CHECKING:
    import torch

Rows = list[dict[str, Any]]


def inspect_paths(paths: Sequence[str | Path]) -> dict[str, Rows]:
    """Tables for some folders: title -> rows. With a base among them, adapters are checked against the first.

    Why an adapter cannot be mixed stands in a table of its own: a sentence in a narrow column reads badly.

    Raises:
        WloraMergeError: a folder that is none of the kinds.
    """
    tables: dict[str, Rows] = {}
    adapters: list[Adapter | WloraMergeError] = []
    names: list[str] = []
    bases: list[BaseModel] = []
    for path in paths:
        folder = Path(path)
        if (folder / FILE).is_file():
            tables[f"Export {path}"] = export_rows(read_manifest(folder))
        elif (folder / JSON_FILE).is_file():
            mixture = Mixture.load(folder)
            tables[f"Mixture {path}"] = mixture_rows(mixture)
            tables[f"Mixture weights of {path}, over the groups"] = weight_rows(mixture)
            if candidates := candidate_rows(mixture):
                tables[f"Held out, {path}"] = candidates
        elif (folder / CONFIG_FILE).exists():
            adapters.append(_loaded(path))
            names.append(str(path))
        else:
            bases.append(open_base(path))
            tables[f"Base model {path}"] = base_rows(bases[-1])
    if adapters:
        base = bases[0] if bases else None
        rows = [adapter_row(a, name, base) for a, name in zip(adapters, names, strict=True)]
        reasons = [{"adapter": row["adapter"], "reason": row.pop("reason")} for row in rows if "reason" in row]
        tables["Adapters"] = rows
        if reasons:
            tables["Adapters that cannot be mixed"] = reasons
        if features := [feature_row(a) for a in adapters if isinstance(a, Adapter)]:
            tables["Targets and features"] = features
    return tables


def _loaded(path: str | Path) -> Adapter | WloraMergeError:
    try:
        return load_adapter(path)
    except WloraMergeError as error:
        return error


def adapter_row(adapter: Adapter | WloraMergeError, path: str, base: BaseModel | None) -> dict[str, Any]:
    """r, alpha, scaling and size of one adapter, and whether it fits the base, with the `reason` if not."""
    if isinstance(adapter, WloraMergeError):
        return {"adapter": Path(path).name, "fits": "no", "reason": str(adapter)}
    factors = list(adapter.modules.values())
    row = {
        "adapter": adapter.name,
        "r": _range([f.r for f in factors]),
        "alpha": adapter.config.get("lora_alpha"),
        "scaling": _range([round(f.scaling, 4) for f in factors]),
        "modules": len(factors),
        "parameters": sum(f.parameters for f in factors),
    }
    if base is not None:
        row |= _fit(adapter, base)
    return row


def feature_row(adapter: Adapter) -> dict[str, Any]:
    """What one adapter changes, which features of PEFT it uses, and the base that it names."""
    return {
        "adapter": adapter.name,
        "targets": " ".join(sorted({name.rpartition(".")[2] for name in adapter.modules})),
        "features": " ".join(_features(adapter)) or "plain",
        "trained on": adapter.config.get("base_model_name_or_path"),
    }


def _features(adapter: Adapter) -> list[str]:
    config = adapter.config
    named = ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "modules_to_save")
    found = [name for name in named if config.get(name)]
    return [name for name in found if name != "modules_to_save" or adapter.tensors]


def _fit(adapter: Adapter, base: BaseModel) -> dict[str, Any]:
    try:
        deltas = stack([adapter], modules_of(base), tensors_of(base), model_type=base.model_type)
    except WloraMergeError as error:
        return {"delta / base norm": None, "fits": "no", "reason": str(error)}
    changed = whole = 0.0
    for delta in deltas:
        if not delta.factors or delta.read is None:
            continue
        weight = delta.read().double()
        whole += float(weight.square().sum())
        changed += _square(delta, weight)
    return {"delta / base norm": math.sqrt(changed / whole) if whole else None, "fits": "yes"}


def _square(delta: ModuleDelta, weight: torch.Tensor) -> float:
    """Squared Frobenius norm of the delta weight; without forming it, but for a DoRA, which also scales W [rows, ...]."""
    import torch

    left, right = fold_factors(delta, delta.scaling)
    factor = fold_factor(delta, torch.ones(1))
    if factor is None:
        return float(((left.T @ left) * (right @ right.T)).sum())
    return float(((factor - 1) * weight.flatten(1) + left @ right).square().sum())


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"


def base_rows(base: BaseModel) -> Rows:
    """What a base is."""
    entries = base.entries.values()
    dtypes = sorted({e.dtype for e in entries})
    return [
        {"what": "model type", "value": base.model_type},
        {"what": "architectures", "value": " ".join(base.config.get("architectures") or [])},
        {"what": "parameters", "value": str(sum(math.prod(e.shape) for e in entries))},
        {"what": "tensors", "value": str(len(entries))},
        {"what": "dtypes", "value": " ".join(dtypes)},
        {"what": "files", "value": str(len(base.headers))},
    ]


def mixture_rows(mixture: Mixture) -> Rows:
    """What a mixture was made from and how."""
    return [
        {"what": "base model", "value": mixture.base.source},
        {"what": "adapters", "value": " ".join(mixture.adapter_names)},
        {"what": "task", "value": mixture.task or "not set"},
        {"what": "granularity", "value": f"{mixture.granularity} ({len(mixture.groups)} groups)"},
        {"what": "normalize", "value": mixture.normalize},
        {"what": "delta_scale", "value": f"{mixture.delta_scale:g}"},
        {"what": "head", "value": " ".join(mixture.head) or "none"},
    ]


def weight_rows(mixture: Mixture) -> Rows:
    """Mean, lowest and highest mixture weight of each adapter over the groups."""
    weights = mixture.mixture_weights.double()
    columns = zip(
        mixture.adapter_names, weights.mean(0).tolist(), weights.amin(0).tolist(), weights.amax(0).tolist(), strict=True
    )
    return [{"adapter": name, "mean": mean, "lowest": low, "highest": high} for name, mean, low, high in columns]


def candidate_rows(mixture: Mixture) -> Rows:
    """Held-out loss and metric of every candidate of a fit."""
    return [{"candidate": name, **row} for name, row in (mixture.metrics.get("candidates") or {}).items()]


def export_rows(manifest: dict[str, Any]) -> Rows:
    """What an export is and what went into it."""
    return [
        {"what": "format", "value": manifest["format"]},
        {"what": "task", "value": manifest.get("task") or "not set"},
        {"what": "base model", "value": manifest["base_model"]["name"]},
        {"what": "adapters", "value": " ".join(row["name"] for row in manifest["adapters"])},
        {"what": "files", "value": str(len(manifest["files"]))},
        {"what": "bytes", "value": str(sum(row["bytes"] for row in manifest["files"].values()))},
        {"what": "made with", "value": " ".join(f"{k} {v}" for k, v in manifest["versions"].items())},
    ]
