"""report.html: one page that shows a mixture or an export, for a person with a browser and no network.

Everything stands in the one file: tables as HTML, drawings as SVG; report.html.j2 is its layout. The drawings are also PNG files
in `figures/`, for the model card. They need matplotlib (`pip install 'wlora-merge[report]'`). Where that is missing, nothing is
written and a warning says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..errors import WloraMergeWarning
from ..io.hub import public_name
from ..mixture.groups import group_of
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel
from ..models.names import natural_key
from ..progress import Meter
from .report_data import Change, adapter_similarity, changes, error_by_rank, spectra

if TYPE_CHECKING:
    import torch
    from jinja2 import Template

FILE = "report.html"
FIGURES = "figures"
MISSING = "report.html is not written, as matplotlib is not installed: pip install 'wlora-merge[report]'."
CAPTIONS = {
    "weights": "Mixture weights, layers × adapters (mean over a layer's modules)",
    "loss": "Training loss of the learned mixture",
    "similarity": "How alike the adapters are (cosine of their delta weights)",
    "spectrum": "Singular values of the mixture's delta weights",
    "error": "Relative error against rank",
    "changes": "Relative change of the base weights, and what rounding lost of it",
}
SHOWN_CHANGES = 24

Deltas = Sequence[ModuleDelta | TensorDelta]


def write_report(
    folder: Path,
    mixture: Mixture,
    deltas: Deltas,
    *,
    title: str,
    rank: int | None = None,
    base: BaseModel | None = None,
    names: Mapping[str, str | None] = MappingProxyType({}),
    facts: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write report.html and figures/*.png into a folder.

    Args:
        folder: an export or mixture folder.
        mixture: what is shown.
        deltas: what its adapters change.
        title: what the page is about.
        rank: of an export as one LoRA, the uniform r, which is drawn beside what other ranks would lose.
        base: of an export that has the base's tensors, the base; what changed in each is drawn.
        names: tensor as the base calls it -> as that export does, where it calls it otherwise.
        facts: rows for the provenance, name -> value.

    Returns:
        The names of the figures drawn, as in CAPTIONS; empty where matplotlib is missing.
    """
    try:
        from .report_figures import png, svg
    except ImportError:
        warnings.warn(MISSING, WloraMergeWarning, stacklevel=2)
        return []
    Meter("drawing the report")
    drawn, rows = _drawings(folder, mixture, deltas, rank, base, names)
    (folder / FIGURES).mkdir()
    for name, figure in drawn.items():
        (folder / FIGURES / f"{name}.png").write_bytes(png(figure))
    metrics = mixture.metrics
    page = _template().render(
        title=title,
        note=metrics.get("note", ""),
        candidates=_scores(metrics.get("candidates") or {}, int((metrics.get("held_out") or {}).get("examples", 0))),
        kept=metrics.get("kept"),
        settings=_scores(metrics.get("settings") or {}),
        figures=[{"caption": CAPTIONS[name], "svg": svg(figure, name)} for name, figure in drawn.items()],
        changes=[
            (c.tensor, f"{c.relative_change:.2e}", "" if c.lost is None else f"{c.lost:.2e}")
            for c in sorted(rows, key=lambda c: natural_key(c.tensor))
        ],
        inputs=_inputs(mixture),
        settled=_settled(mixture, facts or {}),
    )
    (folder / FILE).write_text(page, encoding="utf-8")
    return list(drawn)


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("wlora_merge.exporters", package_path="")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.get_template(f"{FILE}.j2")


def _drawings(
    folder: Path,
    mixture: Mixture,
    deltas: Deltas,
    rank: int | None,
    base: BaseModel | None,
    written: Mapping[str, str | None],
) -> tuple[dict[str, Any], list[Change]]:
    from .report_figures import dots, heatmap, lines

    names = mixture.adapter_names
    layers, table = weights_by_layer(mixture)
    drawn = {"weights": heatmap(table, layers, names, "mixture weight")}
    history = mixture.metrics.get("history") or {}
    if history:
        drawn["loss"] = lines({name: _axes(points) for name, points in history.items()}, "step", "loss")
    if len(names) > 1 and any(isinstance(delta, ModuleDelta) for delta in deltas):
        drawn["similarity"] = heatmap(adapter_similarity(deltas).tolist(), names, names, "cosine", signed=True)
    rows: list[Change] = []
    if rank is not None:
        found = spectra(deltas, mixture)
        drawn["spectrum"] = lines(_spectrum_lines(found), "index", "singular value", log=True)
        errors = error_by_rank(found)
        mark = ("this export", float(rank))
        drawn["error"] = lines({"error": (range(len(errors)), errors)}, "rank", "relative error", mark=mark)
    if base is not None:
        rows = sorted(changes(base, deltas, mixture, folder, written), key=lambda c: -c.relative_change)
        top = rows[:SHOWN_CHANGES]
        series = {
            "change / base weight": [c.relative_change for c in top],
            "lost to rounding / change": [c.lost or 0.0 for c in top],
        }
        drawn["changes"] = dots([c.tensor.removesuffix(".weight") for c in top], series, "ratio of Frobenius norms")
    return drawn, rows


def weights_by_layer(mixture: Mixture) -> tuple[list[str], list[list[float]]]:
    """Layer names, and for each the mean mixture weight of its modules: [layers, N]."""
    layers: dict[str, list[torch.Tensor]] = {}
    for row, modules in zip(mixture.mixture_weights.double(), mixture.groups.values(), strict=True):
        for module in modules:
            layers.setdefault(group_of(module, "layer"), []).append(row)
    names = sorted(layers, key=natural_key)
    return names, [(sum(layers[name]) / len(layers[name])).tolist() for name in names]  # type: ignore[union-attr]


def _spectrum_lines(found: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Highest, median and lowest singular value over the modules, by index; what is zero to working precision ends a line."""
    longest = max(len(v) for v in found.values())
    top = max(float(v[0]) for v in found.values() if len(v))
    by_index = [sorted(float(v[i]) for v in found.values() if len(v) > i) for i in range(longest)]
    found_lines = {}
    for name, place in {"largest": -1, "median": None, "smallest": 0}.items():
        picked = [v[len(v) // 2 if place is None else place] for v in by_index]
        found_lines[f"{name} of the modules"] = _axes([(i + 1, v) for i, v in enumerate(picked) if v > 1e-12 * top])
    return found_lines


def _axes(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """[(x, y), ...] -> [x, ...], [y, ...]."""
    return [x for x, _ in points], [y for _, y in points]


# ----------------------------------------------------------------------------------------------------- the page


def interval(share: float, examples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (0 to 1) seen on so many examples; Wilson 1927, J. Am. Stat. Assoc. 22, 209."""
    z = 1.959964
    middle = share + z * z / (2 * examples)
    half = z * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples**2))
    scale = 1 + z * z / examples
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _scores(table: Mapping[str, Mapping[str, float]], examples: int = 0) -> dict[str, Any]:
    """A row for each candidate or setting, a column for each metric; a standard error stands beside its metric."""
    keys = dict.fromkeys(key for row in table.values() for key in row)
    columns = [key for key in keys if key != "steps" and not key.endswith("_se")]
    rows = [[name, *(_measured(key, row, examples) for key in columns)] for name, row in table.items()]
    return {"columns": columns, "rows": rows}


def _measured(key: str, row: Mapping[str, float], examples: int) -> str:
    if key not in row:
        return ""
    if key == "accuracy" and examples:
        low, high = interval(row[key], examples)
        return f"{row[key]:.4f} [{low:.2f}, {high:.2f}]"
    error = row.get(f"{key}_se")
    return f"{row[key]:.4f}" if error is None else f"{row[key]:.4f} ± {error:.4f}"


def _inputs(mixture: Mixture) -> list[tuple[str, str, str]]:
    """What each input is, its public name, and the first digits of its files' sha256."""
    named = {"base model": mixture.base, **{f"adapter {ref.name}": ref for ref in mixture.adapters}}
    return [
        (what, public_name(ref.source), " ".join(digest[:12] for digest in ref.sha256.values()))
        for what, ref in named.items()
    ]


def _settled(mixture: Mixture, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the mixture and of its fit, then the facts; None is left out."""
    rows: dict[str, Any] = {
        "task": mixture.task or "not set",
        "granularity": f"{mixture.granularity} ({mixture.group_count})",
        "normalize": mixture.normalize,
        "delta_scale": f"{mixture.delta_scale:g}",
        **{f"data: {k}": v for k, v in mixture.data.items() if not isinstance(v, dict)},
        **{f"{k}: {n}": v for k, d in mixture.data.items() if isinstance(d, dict) for n, v in d.items()},
        **facts,
    }
    return {name: value for name, value in rows.items() if value is not None}
