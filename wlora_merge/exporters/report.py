"""report.html: one page that shows a mixture or an export, for a person with a browser and no network.

Everything stands in the one file: tables as HTML, drawings as SVG. The drawings are also PNG files in `figures/`, for the model
card. It needs matplotlib (`pip install 'wlora-merge[report]'`); where that is missing, nothing is written and a warning says so.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    kind: str | None = None,
    base: BaseModel | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write report.html and figures/*.png into a folder.

    Args:
        mixture, deltas: what is shown.
        title: what the page is about.
        kind: `dense`, `lora` or `onnx` for an export's report, which measures what was written; None for a mixture's.
        base: of a dense export: its base.
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
    drawn, rows = _drawings(folder, mixture, deltas, kind, base)
    (folder / FIGURES).mkdir()
    parts = [_comparison(mixture)]
    for name, figure in drawn.items():
        (folder / FIGURES / f"{name}.png").write_bytes(png(figure))
        parts.append(f"<h2>{html.escape(CAPTIONS[name])}</h2>\n<figure>{svg(figure, name)}</figure>")
    parts += [_change_table(rows), _provenance(mixture, facts or {})]
    (folder / FILE).write_text(_page(title, parts), encoding="utf-8")
    return list(drawn)


def _drawings(
    folder: Path, mixture: Mixture, deltas: Deltas, kind: str | None, base: BaseModel | None
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
    if kind == "lora":
        found = spectra(deltas, mixture)
        drawn["spectrum"] = lines(_spectrum_lines(found), "index", "singular value", log=True)
        errors = error_by_rank(found)
        mark = ("this export", _rank(folder))
        drawn["error"] = lines({"error": (range(len(errors)), errors)}, "rank", "relative error", mark=mark)
    if kind == "dense" and base is not None:
        rows = sorted(changes(base, deltas, mixture, folder), key=lambda c: -c.relative_change)
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


def _rank(folder: Path) -> float:
    import json

    return float(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])


# ----------------------------------------------------------------------------------------------------- the page


def interval(share: float, examples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (0 to 1) seen on so many examples; Wilson 1927, J. Am. Stat. Assoc. 22, 209."""
    z = 1.959964
    middle = share + z * z / (2 * examples)
    half = z * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples**2))
    scale = 1 + z * z / examples
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _comparison(mixture: Mixture) -> str:
    metrics = mixture.metrics
    table = metrics.get("candidates") or {}
    if not table:
        return f"<p>{html.escape(metrics.get('note', 'Nothing was held out to judge this mixture on.'))}</p>"
    examples = int((metrics.get("held_out") or {}).get("examples", 0))
    columns = list(dict.fromkeys(key for row in table.values() for key in row if not key.endswith("_se")))
    rows = [[name, *(_measured(key, row, examples) for key in columns)] for name, row in table.items()]
    note = html.escape(metrics.get("note", ""))
    shares = " In brackets: Wilson's 95 % interval for that many examples." if "accuracy" in columns else ""
    return (
        f"<h2>Comparison</h2>\n<p>{note}{shares}</p>\n"
        + _table(["", *columns], rows, strong=metrics.get("kept"))
        + _settings(metrics.get("settings") or {})
    )


def _settings(table: Mapping[str, Mapping[str, float]]) -> str:
    """The settings of the learned method that the folds compared, where there are several."""
    if len(table) < 2:
        return ""
    columns = list(dict.fromkeys(k for row in table.values() for k in row if k != "steps" and not k.endswith("_se")))
    rows = [[name, *(_measured(key, row, 0) for key in columns)] for name, row in table.items()]
    return "<h2>Settings of the learned mixture, out of fold</h2>\n" + _table(["", *columns], rows)


def _measured(key: str, row: Mapping[str, float], examples: int) -> str:
    if key not in row:
        return ""
    if key == "accuracy" and examples:
        low, high = interval(row[key], examples)
        return f"{row[key]:.4f} [{low:.2f}, {high:.2f}]"
    error = row.get(f"{key}_se")
    return f"{row[key]:.4f}" if error is None else f"{row[key]:.4f} ± {error:.4f}"


def _change_table(rows: Sequence[Change]) -> str:
    if not rows:
        return ""
    cells = [
        [c.tensor, f"{c.relative_change:.2e}", "" if c.lost is None else f"{c.lost:.2e}"]
        for c in sorted(rows, key=lambda c: natural_key(c.tensor))
    ]
    return (
        "<details><summary>Every changed tensor</summary>\n<p>Frobenius norms, measured on up to 64 evenly spread rows of each; "
        "the drawing has the largest.</p>\n"
        + _table(["tensor", "change / base weight", "lost to rounding / change"], cells)
        + "</details>"
    )


def _provenance(mixture: Mixture, facts: Mapping[str, Any]) -> str:
    rows = [["base model", public_name(mixture.base.source), _digests(mixture.base.sha256)]]
    rows += [[f"adapter {a.name}", public_name(a.source), _digests(a.sha256)] for a in mixture.adapters]
    settled = {
        "task": mixture.task or "not set",
        "granularity": f"{mixture.granularity} ({mixture.group_count})",
        "normalize": mixture.normalize,
        "delta_scale": f"{mixture.delta_scale:g}",
        **{f"data: {k}": v for k, v in mixture.data.items() if not isinstance(v, dict)},
        **{f"{k}: {n}": v for k, d in mixture.data.items() if isinstance(d, dict) for n, v in d.items()},
        **facts,
    }
    return (
        "<h2>Provenance</h2>\n"
        + _table(["input", "source", "sha256 of its files, first digits"], rows)
        + '<div class="facts">'
        + _table(["setting", "value"], [[key, str(value)] for key, value in settled.items() if value is not None])
        + "</div>"
    )


def _digests(table: Mapping[str, str]) -> str:
    return " ".join(digest[:12] for digest in table.values())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: str | None = None) -> str:
    """A table that scrolls where it is too wide; the row that begins with `strong` is the one that counts."""

    def line(cells: Sequence[str], tag: str) -> str:
        mark = ' class="strong"' if tag == "td" and strong is not None and cells[0] == strong else ""
        return f"<tr{mark}>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>\n{line(head, "th")}\n{body}\n</table></div>'


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --rule: #d5dae0; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e7ea; --rule: #3a4149; --soft: #1d2126; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem;
  padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; margin: .75rem 0; }  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
.strong { font-weight: bold; } .facts td + td { overflow-wrap: anywhere; }
figure { margin: .5rem 0; overflow-x: auto; } svg { display: block; height: auto; max-width: 44rem; min-width: 34rem; width: 100%; }
@media (max-width: 36rem) { figure::before { content: "scrolls sideways →"; font-size: .8rem; } }
summary { cursor: pointer; margin: 1rem 0; }
"""


def _page(title: str, parts: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
