"""Which candidate is kept, by what was judged: what the method gives, or what is as good and simpler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import MixtureError
from .candidates import AUTO, BASE, BEST_SINGLE, LEARNED, UNIFORM, Contender, Kind, single
from .comparison import Comparison


def of_method(method: str, comparison: Comparison) -> Contender:
    """The candidate that the method itself gives, of what was judged.

    `auto` takes the best in the metric, then in the loss, and without scores the learned mixture.
    """
    if method not in (AUTO, BEST_SINGLE):
        return Contender(Kind(method))
    among = [who for who in comparison.scores if who.kind is Kind.SINGLE or (method == AUTO and who != BASE)]
    if not among and method == BEST_SINGLE:
        raise MixtureError("max_minutes left no time to judge a single adapter: give more.")
    return max(among, key=lambda who: comparison.scores[who].key(), default=LEARNED)


def chosen(method: str, select: str, comparison: Comparison, names: Sequence[str]) -> Contender:
    """The candidate to keep, of what was judged: what the method gives, or, with `select: best`, what is as good and simpler.

    That is the one-standard-error rule of Breiman et al. 1984: uniform composition or one adapter, where it is better or as good
    (`rivals`). Those are equally simple: between them the metric, then the loss, decides.
    """
    scores, simple = comparison.scores, simpler(names)
    asked = of_method(method, comparison)
    if select == "method":
        return asked
    if asked in simple or asked not in scores:
        return max((who for who in simple if who in scores), key=lambda who: scores[who].key(), default=asked)
    better, as_good = rivals(asked, comparison, simple)
    return next(iter(better | as_good), asked)


def simpler(names: Sequence[str]) -> list[Contender]:
    """Uniform composition and each adapter alone: candidates that are simpler than a learned mixture."""
    return [UNIFORM, *map(single, names)]


Leads = dict[Contender, tuple[float, float]]


def rivals(kept: Contender, comparison: Comparison, others: Sequence[Contender]) -> tuple[Leads, Leads]:
    """The simpler candidates that did better than the kept one in the metric, and those that are as good, the best first.

    As good: behind by at most a standard error of the difference, and the loss at most a quarter above the kept one's, or 0.05.

    Returns:
        for both: candidate -> (how much better than the kept one, negative where worse; its standard error).
    """
    scores = comparison.scores
    if kept not in scores:
        return {}, {}
    present = [who for who in others if who in scores and who != kept]
    leads = {who: scores[who].ahead_of(scores[kept]) for who in sorted(present, key=lambda w: scores[w].key())[::-1]}
    loss = scores[kept].loss
    better = {who: lead for who, lead in leads.items() if lead[0] > 0}
    good = {
        who: (lead, error)
        for who, (lead, error) in leads.items()
        if -error <= lead <= 0 and scores[who].loss <= max(1.25 * loss, loss + 0.05)
    }
    return better, good


def tables(comparison: Comparison) -> dict[str, Any]:
    """The scores as mixture.json has them."""
    return {who.label: s.row() for who, s in comparison.scores.items()}
