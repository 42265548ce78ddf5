"""report.html: one page that shows a mixture or an export, for a person with a browser and no network.

Everything stands in the one file: tables as HTML, drawings as SVG; report.html.j2 is its layout. The drawings are also PNG files
in `figures/`, for the model card. They need matplotlib (`pip install 'wlora-merge[report]'`). Where that is missing, nothing is
written and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..errors import WloraMergeWarning
from ..io.hub import public_name
from ..mixture.groups import group_of
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel
from ..models.names import natural_key
from ..progress import Meter
from .report_answer import answer, interval, is_share
from .report_data import Change, adapter_similarity, changes, error_by_rank, spectra
from .report_groups import FEW, MANY, Group, by_likeness, by_weight, mean_columns, mean_cosines

if TYPE_CHECKING:
    import torch
    from jinja2 import Template
    from numpy.typing import ArrayLike, NDArray

FILE = "report.html"
FIGURES = "figures"
MISSING = "report.html is not written, as matplotlib is not installed: pip install 'wlora-merge[report]'."


@dataclass(frozen=True)
class Caption:
    """What stands at a figure: its title, what it shows, and what would be a reason to worry."""

    title: str
    shows: str
    worry: str

    def __str__(self) -> str:
        return f"{self.shows} Worry {self.worry}"


CAPTIONS = {
    "weights": Caption(
        "Mixture weights, layers × adapters (mean over a layer's modules)",
        "How much of each adapter a layer takes.",
        "if one adapter has nearly all of it, or if neighbouring layers differ without a pattern.",
    ),
    "loss": Caption(
        "Training loss of the learned mixture",
        "The loss on the shots at each step.",
        "if it jumps (a lower --learning-rate), or if it still falls at the end (more --max-steps).",
    ),
    "similarity": Caption(
        "How alike the adapters are (cosine of their delta weights)",
        "1: the same direction; 0: nothing in common; -1: they undo each other.",
        "about a pair near 1, of which one is enough, or clearly below 0.",
    ),
    "spectrum": Caption(
        "Singular values of the mixture's delta weights",
        "What each further rank adds, the largest first.",
        "if the lines are still high at this export's rank: what lies beyond is lost.",
    ),
    "error": Caption(
        "Relative error against rank",
        "The share of the delta weights (Frobenius norm) that a LoRA of each rank loses.",
        "if it is above 0.1 at this export's rank: raise --rank.",
    ),
    "changes": Caption(
        "Relative change of the base weights, and what rounding lost of it",
        "How far a tensor moved, over its norm, and the share of that move lost to rounding.",
        "about a move near 1, or a loss near 1 (--dtype float32).",
    ),
}
"""Of each figure, by the name of its file."""
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
    drawings, rows = _drawings(folder, mixture, deltas, rank, base, names)
    drawn = {name: drawing.draw() for name, drawing in drawings.items() if not drawing.said}
    if drawn:
        (folder / FIGURES).mkdir()
    for name, figure in drawn.items():
        (folder / FIGURES / f"{name}.png").write_bytes(png(figure))
    metrics = mixture.metrics
    page = _template().render(
        title=title,
        many=MANY,
        answer=answer(mixture),
        note=metrics.get("note", ""),
        candidates=_scores(metrics.get("candidates") or {}, int((metrics.get("held_out") or {}).get("examples", 0))),
        kept=metrics.get("kept"),
        settings=_scores(metrics.get("settings") or {}),
        figures=[
            {"caption": CAPTIONS[name], "drawing": drawing, "svg": svg(drawn[name], name) if name in drawn else ""}
            for name, drawing in drawings.items()
        ],
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


@dataclass(frozen=True)
class _Drawing:
    """A figure that can be drawn.

    Attributes:
        draw: makes it.
        numbers: those that it shows.
        groups: adapters that it shows as one.
        beside: a sentence on what it does not show.
    """

    draw: Callable[[], Any]
    numbers: ArrayLike
    groups: Sequence[tuple[str, str]] = ()
    beside: str = ""

    @property
    def said(self) -> str:
        """What it would show, in words, where it would repeat one number; an empty text where it has several."""
        numbers = np.asarray(self.numbers, dtype=float)
        numbers = numbers[np.isfinite(numbers)]
        if not numbers.size:
            return "There is nothing to draw."
        low, high = float(numbers.min()), float(numbers.max())
        return f"{low:.4g} everywhere." if high - low <= 1e-6 * max(abs(low), abs(high)) else ""


def _drawings(
    folder: Path,
    mixture: Mixture,
    deltas: Deltas,
    rank: int | None,
    base: BaseModel | None,
    written: Mapping[str, str | None],
) -> tuple[dict[str, _Drawing], list[Change]]:
    from .report_figures import dots, lines

    drawings = {"weights": _weights(mixture)}
    history = {name: _axes(points) for name, points in (mixture.metrics.get("history") or {}).items()}
    if history:
        losses = np.concatenate([loss for _, loss in history.values()])
        drawings["loss"] = _Drawing(partial(lines, history, "step", "loss"), losses)
    if len(mixture.adapters) > 1 and any(isinstance(delta, ModuleDelta) for delta in deltas):
        drawings["similarity"] = _similarity(mixture, deltas)
    rows: list[Change] = []
    if rank is not None:
        found = spectra(deltas, mixture)
        drawings["spectrum"] = _spectrum(found)
        errors = error_by_rank(found)
        mark = ("this export", float(rank))
        error = {"error": (range(len(errors)), errors)}
        drawings["error"] = _Drawing(partial(lines, error, "rank", "relative error", mark=mark), errors)
    if base is not None:
        rows = sorted(changes(base, deltas, mixture, folder, written), key=lambda c: -c.relative_change)
        top = rows[:SHOWN_CHANGES]
        series = {
            "change / base weight": [c.relative_change for c in top],
            "lost to rounding / change": [c.lost or 0.0 for c in top],
        }
        tensors = [c.tensor.removesuffix(".weight") for c in top]
        draw = partial(dots, tensors, series, "ratio of Frobenius norms", log=True)
        drawings["changes"] = _Drawing(draw, list(series.values()))
    return drawings, rows


def _weights(mixture: Mixture) -> _Drawing:
    """Layers × adapters; a row for each adapter where all layers have the same weights.

    A new adapter, whose weight the fit does not learn, is not drawn beside those whose weights it learns.
    """
    from .report_figures import dots, heatmap

    layers, rows = weights_by_layer(mixture)
    new, whole = mixture.data.get("new_adapter", {}).get("name"), np.asarray(rows)
    same = np.ptp(whole, axis=0) <= 1e-6  # in all layers
    left_out = [i for i, name in enumerate(mixture.adapter_names) if name == new and same[i] and len(same) > 1]
    shown = [i for i in range(len(mixture.adapters)) if i not in left_out]
    names, weights = [mixture.adapter_names[i] for i in shown], whole[:, shown]
    groups = by_weight(names, _mean_weights(mixture)[shown])
    labels, table = [group.label for group in groups], mean_columns(weights, groups)
    draw = partial(heatmap, table, layers, labels, "mixture weight")
    if same[shown].all():
        draw = partial(dots, labels, {"in all layers": table[0].tolist()}, "mixture weight, the same in all layers")
    left = [f"The new adapter, {new}, is not drawn: its weight is {whole[0, i]:g} in all layers." for i in left_out]
    return _Drawing(draw, weights, _members_of(groups, names), " ".join(left))


def _similarity(mixture: Mixture, deltas: Deltas) -> _Drawing:
    """Adapters × adapters; those that are alike as one where there are many."""
    from .report_figures import heatmap

    names, cosines = mixture.adapter_names, adapter_similarity(deltas).numpy()
    groups = by_likeness(names, cosines, _mean_weights(mixture))
    labels = [group.label for group in groups]
    pairs = {
        (names[i], names[j]): float(cosines[i, j])
        for i, j in zip(*np.triu_indices(len(names), k=1), strict=True)
        if np.isfinite(cosines[i, j])
    }
    draw = partial(heatmap, mean_cosines(cosines, groups), labels, labels, "cosine", signed=True)
    beside = _said_of_pairs(pairs) if len(names) > FEW and pairs else ""
    return _Drawing(draw, list(pairs.values()), _members_of(groups, names), beside)


def _said_of_pairs(pairs: Mapping[tuple[str, str], float]) -> str:
    """The two adapters that are most alike, and the two that are least."""
    most, least = max(pairs, key=lambda pair: pairs[pair]), min(pairs, key=lambda pair: pairs[pair])
    return f"Most alike: {' and '.join(most)} ({pairs[most]:.2f}); least: {' and '.join(least)} ({pairs[least]:.2f})."


def _mean_weights(mixture: Mixture) -> NDArray[np.float64]:
    """Of each adapter the mean mixture weight over the groups: [N]."""
    return mixture.mixture_weights.double().mean(0).numpy()


def _members_of(groups: Sequence[Group], names: Sequence[str]) -> list[tuple[str, str]]:
    """Of each group of several adapters its label and its members."""
    return [(g.label, ", ".join(names[i] for i in g.members)) for g in groups if len(g.members) > 1]


def weights_by_layer(mixture: Mixture) -> tuple[list[str], list[list[float]]]:
    """Layer names, and for each the mean mixture weight of its modules: [layers, N]."""
    layers: dict[str, list[torch.Tensor]] = {}
    for row, modules in zip(mixture.mixture_weights.double(), mixture.groups.values(), strict=True):
        for module in modules:
            layers.setdefault(group_of(module, "layer"), []).append(row)
    names = sorted(layers, key=natural_key)
    return names, [(sum(layers[name]) / len(layers[name])).tolist() for name in names]  # type: ignore[union-attr]


def _spectrum(found: Mapping[str, torch.Tensor]) -> _Drawing:
    """Highest, median and lowest singular value over the modules, by index; what is zero to working precision ends a line."""
    from .report_figures import lines

    longest = max(len(v) for v in found.values())
    top = max(float(v[0]) for v in found.values() if len(v))
    by_index = [sorted(float(v[i]) for v in found.values() if len(v) > i) for i in range(longest)]
    series = {}
    for name, place in {"largest": -1, "median": None, "smallest": 0}.items():
        picked = [v[len(v) // 2 if place is None else place] for v in by_index]
        series[f"{name} of the modules"] = _axes([(i + 1, v) for i, v in enumerate(picked) if v > 1e-12 * top])
    numbers = [value for _, values in series.values() for value in values]
    return _Drawing(partial(lines, series, "index", "singular value", log=True), numbers)


def _axes(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """[(x, y), ...] -> [x, ...], [y, ...]."""
    return [x for x, _ in points], [y for _, y in points]


# ----------------------------------------------------------------------------------------------------- the page


def _scores(table: Mapping[str, Mapping[str, float]], examples: int = 0) -> dict[str, Any]:
    """A row for each candidate or setting, a column for each metric; a standard error stands beside its metric."""
    keys = dict.fromkeys(key for row in table.values() for key in row)
    columns = [key for key in keys if key != "steps" and not key.endswith("_se")]
    rows = [[name, *(_measured(key, row, examples) for key in columns)] for name, row in table.items()]
    return {"columns": columns, "rows": rows}


def _measured(key: str, row: Mapping[str, float], examples: int) -> str:
    if key not in row:
        return ""
    if key == "accuracy" and examples > 0 and is_share(row[key]):
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
    return {name: _plain(value) for name, value in rows.items() if value is not None and value not in ([], {})}


def _plain(value: Any) -> str:
    """A value as a person would write it: `a=b, c=d` of a table, `a, b` of a list."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
