"""The answer that a report opens with: which candidate is best, by how much, and how sure that is.

It knows the record of a fit and writes sentences. It measures nothing anew, and knows no page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..mixture.mixture import Mixture
from ..mixture.record import FitMetrics

Z = 1.959964
"""Standard errors on each side of a 95 % interval."""
FEWEST = 6
"""The examples from which on a lead can be more than chance: all five of five for the same candidate have p = 0.06 (sign test)."""

SHOWN = 3
"""Candidates that are named where several are equally good."""


def interval(share: float, examples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (0 to 1) seen on so many examples; Wilson 1927, J. Am. Stat. Assoc. 22, 209."""
    middle = share + Z * Z / (2 * examples)
    half = Z * math.sqrt(share * (1 - share) / examples + Z * Z / (4 * examples**2))
    scale = 1 + Z * Z / examples
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def is_share(value: float) -> bool:
    """Whether a number is one that an accuracy can be; a file may say another."""
    return 0 <= value <= 1


def answer(mixture: Mixture) -> list[str]:
    """The sentences that say which candidate of a fit is best, by how much, how sure that is, and what is kept.

    Where no candidate was judged, they say that nothing was estimated.
    """
    metrics = mixture.metrics
    scored = _scored(metrics)
    kept = metrics.get("kept", "")
    if not scored:
        made = "no candidate of the fit was judged" if "fit" in mixture.data else "this mixture comes from no fit"
        return [f"Nothing was estimated: {made}.", *([f"Kept: {kept}."] if kept else [])]
    best = scored[0]
    first = [one for one in scored if one.value == best.value]
    behind = next((one for one in scored[len(first) :] if one.name == kept), None)
    rival = behind or next(iter(scored[len(first) :]), None)
    said = [f"{_listed(first)} the best of {len(scored)} candidates on {_judged_on(metrics)}: {best}."]
    if behind:
        said.append(f"Kept is {kept}, {_gap(best, behind)}.")
    elif kept:
        said.append(_said_of_kept(kept, first))
    if rival and not behind:
        said.append(f"{rival.name} comes next, {_gap(best, rival)}.")
    return said + _how_sure(best, rival, int(metrics.get("held_out", {}).get("examples", 0)))


def _said_of_kept(kept: str, first: list[_Scored]) -> str:
    """What is kept, where it is among the best, or was not judged."""
    among = next((one for one in first if one.name == kept), None)
    if among is None:
        return f"What is kept, {kept}, was not judged itself."
    return f"Kept is {kept}; {first[0].name} has the lower loss." if first[0].loss < among.loss else f"Kept is {kept}."


def _listed(first: list[_Scored]) -> str:
    names = [one.name for one in first]
    if len(names) > SHOWN:
        names = [*names[: SHOWN - 1], f"{len(names) - SHOWN + 1} others"]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


@dataclass(frozen=True)
class _Scored:
    """A candidate's number in the metric by which all are compared, with its standard error, where it has one."""

    name: str
    metric: str
    value: float
    error: float | None
    loss: float

    def __str__(self) -> str:
        error = f" ± {self.error:.4f} (one standard error)" if self.error else ""
        return f"{self.metric} {self.value:.4f}{error}"


def _scored(metrics: FitMetrics) -> list[_Scored]:
    """The candidates with a finite score, the best first: by the metric, then by the loss."""
    metric = metrics.get("metric", "loss")
    sign = -1 if metrics.get("higher_is_better") else 1
    found = [
        _Scored(name, metric, row[metric], row.get(f"{metric}_se"), row.get("loss", math.inf))
        for name, row in metrics.get("candidates", {}).items()
        if math.isfinite(row.get(metric, math.nan))
    ]
    return sorted(found, key=lambda one: (sign * one.value, one.loss))


def _judged_on(metrics: FitMetrics) -> str:
    held = metrics.get("held_out", {})
    count, folds = held.get("examples", 0), held.get("folds", 0)
    if count < 1:
        return "the shots themselves, which flatters each of them"
    if "from" in held:
        return f"{count} evaluation examples"
    return f"{count} held-out examples" + (f" ({folds} folds)" if folds else "")


def _gap(best: _Scored, other: _Scored) -> str:
    return f"{abs(best.value - other.value):.4f} behind"


def _how_sure(best: _Scored, rival: _Scored | None, examples: int) -> list[str]:
    """The 95 % interval of a lead in words; nothing where there is no lead, or nothing was held out."""
    if rival is None or examples < 1:
        return []
    if examples < FEWEST:
        return [
            f"On {examples} example{'s' if examples > 1 else ''} any lead may be chance: hold out {FEWEST} or more."
        ]
    found = _lead(best, rival, examples)
    if found is None:
        return ["How sure that is cannot be said: there are no standard errors."]
    low, high = found
    verdict = "holds 0: chance alone may have made it" if low <= 0 else "lies above 0: it is unlikely to be chance"
    return [
        f"The 95 % interval of that lead, {low:.2f} to {high:.2f}, {verdict}. "
        "It takes the two scores for independent, and so is rather too wide."
    ]


def _lead(best: _Scored, rival: _Scored, examples: int) -> tuple[float, float] | None:
    """The 95 % interval of how far the best is ahead, both taken for independent; None without standard errors.

    Of an accuracy it is Newcombe's, made from Wilson's intervals, which holds at 0 and 1 too: Newcombe 1998, Stat. Med. 17,
    873, method 10. Of any other metric it is the normal one.
    """
    lead = abs(best.value - rival.value)
    if best.metric == "accuracy" and is_share(best.value) and is_share(rival.value):
        low, high = interval(best.value, examples), interval(rival.value, examples)
        down = math.hypot(best.value - low[0], high[1] - rival.value)
        return lead - down, lead + math.hypot(low[1] - best.value, rival.value - high[0])
    half = Z * math.hypot(best.error or 0.0, rival.error or 0.0)
    return (lead - half, lead + half) if half else None
