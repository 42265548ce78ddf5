"""What a folder is, as rows for a table: adapters, a base model, a mixture, an export.

Nothing is changed, and no model is loaded: of a base some weights alone, to say how large a change is. It knows no terminal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.adapter import CONFIG_FILE
from ..constants import MIXTURE_FILE
from ..exporters.manifest import FILE, below, read_manifest
from ..exporters.model_card import judged_on
from ..io.hub import is_here
from ..mixture.compatibility import Rows, adapter_tables
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel, open_base


def inspect_paths(paths: Sequence[str | Path]) -> dict[str, Rows]:
    """Tables for some folders: title -> rows. With a base among them, adapters are checked against the first.

    Raises:
        WloraMergeError: a folder that is none of the kinds.
    """
    tables: dict[str, Rows] = {}
    adapters: list[str | Path] = []
    bases: list[BaseModel] = []
    for path in paths:
        folder = Path(path)
        here = is_here(path)
        if here and (folder / FILE).is_file():
            tables[f"Export {path}"] = export_rows(read_manifest(folder))
        elif here and (folder / MIXTURE_FILE).is_file():
            mixture = Mixture.load(folder)
            tables[f"Mixture {path}"] = mixture_rows(mixture)
            tables[f"Mixture weights of {path}, over the groups"] = weight_rows(mixture)
            if candidates := candidate_rows(mixture):
                tables[f"{judged_on(mixture.metrics)}, {path}"] = candidates
            if settings := setting_rows(mixture):
                tables[f"Out of fold, {path}"] = settings
        elif here and (folder / CONFIG_FILE).exists():
            adapters.append(path)
        elif here and not (folder / "config.json").exists() and (found := below(folder)):
            tables[f"Output of a run {path}"] = [{"what": kind, "path": below_it} for below_it, kind in found.items()]
        else:
            bases.append(open_base(path))
            tables[f"Base model {path}"] = base_rows(bases[-1])
    if adapters:
        tables |= adapter_tables(adapters, bases[0] if bases else None)
    return tables


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
        {"what": "granularity", "value": f"{mixture.granularity} ({mixture.group_count})"},
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
    """Loss and metric of every candidate of a fit."""
    return [{"candidate": name, **row} for name, row in (mixture.metrics.get("candidates") or {}).items()]


def setting_rows(mixture: Mixture) -> Rows:
    """Held-out loss and metric of every setting of the learned method, where a fit compared several."""
    settings = mixture.metrics.get("settings") or {}
    return [{"setting of learned": name, **row} for name, row in settings.items()] if len(settings) > 1 else []


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
