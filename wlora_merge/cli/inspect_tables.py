"""What a folder is, as rows for a table: adapters, a base model, a mixture, an export.

Nothing is changed, and no model is loaded. Headers, configs and records say all but how large a change is. It knows no terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import CONFIG_FILE
from ..constants import MANIFEST_FILE, MIXTURE_FILE
from ..errors import WloraMergeError
from ..exporters.folders import below
from ..io.hub import is_here
from ..mixture.compatibility import Rows, adapter_tables
from ..mixture.groups import group_count
from ..mixture.mixture import combination_of, judged_on, refs_of
from ..models.base_model import BaseModel, open_base

if TYPE_CHECKING:
    from ..adapters.adapter import AdapterSpec
    from ..exporters.manifest import Manifest
    from ..mixture.record import FitMetrics, MixtureRecord


def inspect_paths(
    paths: Sequence[str | Path], others: Sequence[AdapterSpec] = (), *, norms: bool = False
) -> dict[str, Rows]:
    """Tables for some folders: title -> rows. With a base among them, adapters are checked against the first.

    Args:
        paths: folders of any kind.
        others: adapters that stand behind those.
        norms: read the weights too, and say how large each adapter's change of the first base is.

    Raises:
        WloraMergeError: a folder that is none of the kinds; norms without a base and an adapter.
    """
    tables: dict[str, Rows] = {}
    adapters: list[AdapterSpec] = []
    bases: list[BaseModel] = []
    for path in paths:
        kind = _kind_of(path)
        if kind is _Kind.ADAPTER:
            adapters.append(path)
        elif kind is _Kind.BASE:
            bases.append(open_base(path))
            tables[f"Base model {path}"] = base_rows(bases[-1])
        else:
            tables |= _TABLES[kind](path)
    adapters += others
    if norms and not (bases and adapters):
        raise WloraMergeError(
            "--norms is of adapters on a base: give the base's folder or hub id, and the adapters' folders."
        )
    if adapters:
        tables |= adapter_tables(adapters, bases[0] if bases else None, norms=norms)
    return tables


class _Kind(Enum):
    """What a folder is, told by a file in it; what has none of them is a base, or the hub's."""

    EXPORT = MANIFEST_FILE
    MIXTURE = MIXTURE_FILE
    ADAPTER = CONFIG_FILE
    BASE = "config.json"
    RUN = "output of a run"


def _kind_of(path: str | Path) -> _Kind:
    if not is_here(path):
        return _Kind.BASE
    folder = Path(path)
    if (folder / MANIFEST_FILE).is_file():
        return _Kind.EXPORT
    if (folder / MIXTURE_FILE).is_file():
        return _Kind.MIXTURE
    if (folder / CONFIG_FILE).exists():
        return _Kind.ADAPTER
    return _Kind.BASE if (folder / "config.json").exists() or not below(folder) else _Kind.RUN


def _export_tables(path: str | Path) -> dict[str, Rows]:
    from ..exporters.manifest import read_manifest

    return {f"Export {path}": export_rows(read_manifest(Path(path)))}


def _mixture_tables(path: str | Path) -> dict[str, Rows]:
    from ..mixture.files import read_mixture_record, read_mixture_weights

    folder = Path(path)
    record = read_mixture_record(folder)
    names, weights = [adapter.name for adapter in record.adapters], read_mixture_weights(folder, record)
    tables = {
        f"Mixture {path}": mixture_rows(record, folder),
        f"Mixture weights of {path}, over the groups": weight_rows(names, weights),
        f"{judged_on(record.metrics)}, {path}": candidate_rows(record.metrics),
        f"Out of fold, {path}": setting_rows(record.metrics),
    }
    return {title: rows for title, rows in tables.items() if rows}


def _run_tables(path: str | Path) -> dict[str, Rows]:
    return {f"Output of a run {path}": [{"what": kind, "path": found} for found, kind in below(Path(path)).items()]}


_TABLES: Mapping[_Kind, Callable[[str | Path], dict[str, Rows]]] = {
    _Kind.EXPORT: _export_tables,
    _Kind.MIXTURE: _mixture_tables,
    _Kind.RUN: _run_tables,
}


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


def mixture_rows(record: MixtureRecord, folder: Path) -> Rows:
    """What a mixture was made from and how, as the record in its folder says."""
    base, _ = refs_of(record, folder)
    combination = combination_of(record)
    pooling = record.pooling or record.metrics.get("chosen", {}).get("pooling")
    return [
        {"what": "base model", "value": base.source},
        {"what": "adapters", "value": " ".join(adapter.name for adapter in record.adapters)},
        {"what": "task", "value": record.task or "not set"},
        {"what": "granularity", "value": f"{record.granularity} ({group_count(record.groups)})"},
        {"what": "normalize", "value": record.normalize},
        {"what": "delta_scale", "value": f"{record.delta_scale:g}"},
        *([] if combination.is_linear else [{"what": "combination", "value": str(combination)}]),
        {"what": "head", "value": " ".join(record.head) or "none"},
        *([{"what": "pooling", "value": pooling}] if pooling else []),
    ]


def weight_rows(names: Sequence[str], weights: Sequence[Sequence[float]]) -> Rows:
    """Mean, lowest and highest mixture weight of each adapter over the groups, whose rows `weights` has."""
    columns = zip(names, zip(*weights, strict=True), strict=True)
    return [
        {"adapter": name, "mean": math.fsum(column) / len(column), "lowest": min(column), "highest": max(column)}
        for name, column in columns
    ]


def candidate_rows(metrics: FitMetrics) -> Rows:
    """Loss and metric of every candidate of a fit."""
    return [{"candidate": name, **row} for name, row in (metrics.get("candidates") or {}).items()]


def setting_rows(metrics: FitMetrics) -> Rows:
    """Held-out loss and metric of every setting of the learned method, where a fit compared several."""
    settings = metrics.get("settings") or {}
    return [{"setting of learned": name, **row} for name, row in settings.items()] if len(settings) > 1 else []


def export_rows(manifest: Manifest) -> Rows:
    """What an export is and what went into it."""
    mixture = manifest.mixture
    return [
        {"what": "format", "value": manifest.format},
        {"what": "task", "value": mixture.task or "not set"},
        {"what": "base model", "value": mixture.base_model.source},
        {"what": "adapters", "value": " ".join(adapter.name for adapter in mixture.adapters)},
        {"what": "files", "value": str(len(manifest.files))},
        {"what": "bytes", "value": str(sum(file.bytes for file in manifest.files.values()))},
        {"what": "made with", "value": " ".join(f"{k} {v}" for k, v in manifest.versions.items())},
    ]
