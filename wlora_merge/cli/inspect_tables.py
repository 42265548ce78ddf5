"""What a folder is, as rows for a table: adapters, a base model, a mixture, an export.

Nothing is changed, and no model is loaded: of a base some weights alone, to say how large a change is. It knows no terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import CONFIG_FILE
from ..constants import MANIFEST_FILE, MIXTURE_FILE
from ..exporters.folders import below
from ..io.hub import is_here
from ..mixture.compatibility import Rows, adapter_tables
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel, open_base

if TYPE_CHECKING:
    from ..adapters.adapter import AdapterSpec
    from ..exporters.manifest import Manifest


def inspect_paths(paths: Sequence[str | Path], others: Sequence[AdapterSpec] = ()) -> dict[str, Rows]:
    """Tables for some folders: title -> rows. With a base among them, adapters are checked against the first.

    Args:
        paths: folders of any kind.
        others: adapters that stand behind those.

    Raises:
        WloraMergeError: a folder that is none of the kinds.
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
    if adapters := [*adapters, *others]:
        tables |= adapter_tables(adapters, bases[0] if bases else None)
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
    mixture = Mixture.load(path)
    tables = {
        f"Mixture {path}": mixture_rows(mixture),
        f"Mixture weights of {path}, over the groups": weight_rows(mixture),
        f"{mixture.judged_on}, {path}": candidate_rows(mixture),
        f"Out of fold, {path}": setting_rows(mixture),
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


def _pooling(mixture: Mixture) -> str | None:
    """What the head sees of a text, where a fit has said so."""
    return mixture.pooling or mixture.metrics.get("chosen", {}).get("pooling")


def mixture_rows(mixture: Mixture) -> Rows:
    """What a mixture was made from and how."""
    return [
        {"what": "base model", "value": mixture.base.source},
        {"what": "adapters", "value": " ".join(mixture.adapter_names)},
        {"what": "task", "value": mixture.task or "not set"},
        {"what": "granularity", "value": f"{mixture.granularity} ({mixture.group_count})"},
        {"what": "normalize", "value": mixture.normalize},
        {"what": "delta_scale", "value": f"{mixture.delta_scale:g}"},
        *([] if mixture.combination.is_linear else [{"what": "combination", "value": str(mixture.combination)}]),
        {"what": "head", "value": " ".join(mixture.head) or "none"},
        *([{"what": "pooling", "value": pooling}] if (pooling := _pooling(mixture)) else []),
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
