"""The drawings of a report, with matplotlib: data in, SVG and PNG out, the same bytes for the same data.

An SVG takes the colour of the text around it, so that it is readable on light and on dark paper; a PNG has white paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .report_groups import FEW

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

INK = "#010203"  # becomes currentColor
CYCLE = ("#3b7dd8", "#d9822b", "#2e9e6b", "#b4519e", "#7a6fd0", "#c2554d")
RC: Any = {
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # the one that matplotlib ships
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def heatmap(values: ArrayLike, rows: Sequence[str], columns: Sequence[str], label: str, *, signed: bool = False) -> Any:
    """Values [rows, columns] as colours, written into the cells where there are few; `signed` runs from -1 to 1."""
    table = np.asarray(values, dtype=float)
    with rc_context(RC):
        names, sloping = [_short(column, 20) for column in columns], len(columns) <= FEW
        below = max(map(len, names)) * (0.04 if sloping else 0.08)  # inches that the names take
        figure = Figure(figsize=(6.4, max(1.4, min(9.0, 0.5 + 0.26 * len(rows))) + below), layout="constrained")
        axes = figure.subplots()
        low, high = (-1.0, 1.0) if signed else _range(table)
        cells = axes.pcolormesh(table, cmap="RdBu_r" if signed else "viridis", vmin=low, vmax=high, edgecolors="face")
        axes.invert_yaxis()
        step = -(-len(rows) // 32)
        axes.set_yticks(np.arange(0, len(rows), step) + 0.5, [_short(r) for r in rows[::step]])
        slope = {"rotation": 30, "ha": "right"} if sloping else {"rotation": 90}
        axes.set_xticks(np.arange(len(columns)) + 0.5, names, **slope)
        if table.size <= 200 and len(columns) <= FEW:
            middle = (low + high) / 2
            for (y, x), value in np.ndenumerate(table):
                pale = abs(value) < 0.6 if signed else value > middle
                axes.text(
                    x + 0.5,
                    y + 0.5,
                    f"{round(value, 2) + 0.0:.2f}" if np.isfinite(value) else "–",
                    ha="center",
                    va="center",
                    color="k" if pale else "w",
                )
        figure.colorbar(cells, ax=axes, label=label)
    return figure


def lines(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    mark: tuple[str, float] | None = None,
) -> Any:
    """One line for each name -> (x, y); `mark` draws an upright line at its x, with its name beside it."""
    with rc_context(RC):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for i, (name, (x, y)) in enumerate(series.items()):
            point = "o" if np.size(x) == 1 else ""  # a line of one point is nothing to see
            axes.plot(np.asarray(x), np.asarray(y), point + "-", color=CYCLE[i % len(CYCLE)], label=name, linewidth=1.5)
        if mark is not None:
            axes.axvline(mark[1], color=INK, linewidth=0.8, linestyle="--")
            axes.text(mark[1], 1.0, f" {mark[0]}", transform=axes.get_xaxis_transform(), va="top")
        if log:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # steps, ranks and indexes
        axes.set(xlabel=x_label, ylabel=y_label)
        if len(series) > 1:
            axes.legend(frameon=False)
    return figure


def dots(names: Sequence[str], series: Mapping[str, Sequence[float]], x_label: str, *, log: bool = False) -> Any:
    """A row for each name with a dot of each series; on a logarithmic axis, the length of a bar would mean nothing."""
    with rc_context(RC):
        figure = Figure(figsize=(8.0, max(1.8, min(11.0, 0.8 + 0.3 * len(names)))), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(series.items()):
            axes.plot(values, np.arange(len(names)), "o", color=CYCLE[i], label=name)
        axes.set_yticks(np.arange(len(names)), [_short(n, 64) for n in names])
        axes.grid(axis="y", color=INK, alpha=0.15)
        axes.set_axisbelow(True)
        axes.set_ylim(-0.6, len(names) - 0.4)
        if log and any(value > 0 for values in series.values() for value in values):
            axes.set_xscale("log")
        if not log:
            axes.axvline(0, color=INK, alpha=0.3, linewidth=0.8)
        axes.set(xlabel=x_label)
        axes.invert_yaxis()
        if len(series) > 1:
            axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))
    return figure


def svg(figure: Any, name: str) -> str:
    """The drawing as an element for a page; `name` keeps its ids apart from other drawings'."""
    stream = io.StringIO()
    with rc_context(RC | {"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("\r", "")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def png(figure: Any) -> bytes:
    """The drawing on white paper, 120 dots per inch."""
    stream = io.BytesIO()
    with rc_context(RC):
        figure.savefig(stream, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def _range(table: NDArray[np.float64]) -> tuple[float, float]:
    """The range of the values, widened where they are all but equal."""
    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def _short(text: str, limit: int = 34) -> str:
    """At most so many characters: the beginning and, of twice that length, the end, where names differ."""
    head = (limit - 1) // 3
    return text if len(text) <= limit else f"{text[:head]}…{text[head + 1 - limit :]}"
