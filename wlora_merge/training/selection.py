"""Which candidate is kept, by what was judged: what the method gives, or what is as good and simpler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import MixtureError
from .candidates import AUTO, BASE, BEST_SINGLE, LEARNED, UNIFORM
from .comparison import Comparison


def of_method(method: str, comparison: Comparison, names: Sequence[str]) -> str:
    """The candidate that the method itself gives, of what was judged.

    `auto` takes the best in the metric, then in the loss, and without scores the learned mixture.
    """
    among = [name for name in comparison.scores if (name in names if method == BEST_SINGLE else name != BASE)]
    if method not in (AUTO, BEST_SINGLE):
        return method
    if not among and method == BEST_SINGLE:
        raise MixtureError("max_minutes left no time to judge a single adapter: give more.")
    return max(among, key=lambda name: comparison.scores[name].key(), default=LEARNED)


def chosen(method: str, select: str, comparison: Comparison, names: Sequence[str]) -> str:
    """The candidate to keep, of what was judged: what the method gives, or, with `select: best`, what is as good and simpler.

    That is the one-standard-error rule of Breiman et al. 1984: uniform composition or one adapter, where it is better or as good
    (`rivals`). Those are equally simple: between them the metric, then the loss, decides.
    """
    scores, simple = comparison.scores, (UNIFORM, *names)
    asked = of_method(method, comparison, names)
    if select == "method":
        return asked
    if asked in simple or asked not in scores:
        return max((name for name in simple if name in scores), key=lambda name: scores[name].key(), default=asked)
    better, as_good = rivals(asked, comparison, simple)
    return next(iter(better | as_good), asked)


Leads = dict[str, tuple[float, float]]


def rivals(kept: str, comparison: Comparison, others: Sequence[str]) -> tuple[Leads, Leads]:
    """The simpler candidates that did better than the kept one in the metric, and those that are as good, the best first.

    As good: behind by at most a standard error of the difference, and the loss at most a quarter above the kept one's, or 0.05.

    Returns:
        for both: name -> (how much better than the kept one, negative where worse; its standard error).
    """
    scores = comparison.scores
    if kept not in scores:
        return {}, {}
    present = [name for name in others if name in scores and name != kept]
    leads = {name: scores[name].ahead_of(scores[kept]) for name in sorted(present, key=lambda n: scores[n].key())[::-1]}
    loss = scores[kept].loss
    better = {name: lead for name, lead in leads.items() if lead[0] > 0}
    good = {
        name: (lead, error)
        for name, (lead, error) in leads.items()
        if -error <= lead <= 0 and scores[name].loss <= max(1.25 * loss, loss + 0.05)
    }
    return better, good


def tables(comparison: Comparison) -> dict[str, Any]:
    """The scores as mixture.json has them."""
    return {name: s.row() for name, s in comparison.scores.items()}
