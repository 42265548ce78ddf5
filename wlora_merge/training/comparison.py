"""What each candidate gives on the folds or on evaluation data.

The base, uniform composition, each adapter alone and the learned mixture all train their heads in the same way, on the same
folds; each is judged after several numbers of steps, on examples that it was not trained on. It knows no files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..mixture.attach import attachment_of
from .candidates import LEARNED, SEARCH, UNIFORM, Candidate, setting_name, steps_of
from .cma_es import minimize
from .learner import Learner
from .loop import Trained
from .scoring import Judged, Score, pool, score

OVERRULES = 2.0
"""Standard errors of the difference by which a setting must be ahead on the folds to take the place of the default, where a head is
trained: at one, two examples do it, and they mislead. Where none is, two thirds of the shots teach what all do, and the folds are
right (recipes/bench_fit/README.md)."""
SEARCH_EVALUATIONS = 40
SEARCH_BOUND, SEARCH_L1 = 1.5, 0.05  # LoraHub's, https://arxiv.org/abs/2307.13269


@dataclass
class Comparison:
    """What the candidates gave on examples that they were not trained on.

    `scores` and `steps` (the best number) by candidate; `settings` the learned method's, by what was set; `skipped` what the
    time did not allow; `trained` what was trained, where there was one part.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    settings: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    learned: Candidate | None = None
    pruned: float | None = None
    trained: dict[str, Trained] = field(default_factory=dict)


def compare(
    learner: Learner,
    candidates: Sequence[Candidate],
    parts: Sequence[tuple[Sequence[int], Sequence[int]]],
    steps: dict[str, int] | int,
    *,
    judge_at: Sequence[float],
    deadline: float | None = None,
    patience: int | None = None,
    tag: str = "",
) -> Comparison:
    """Train each candidate on each part and judge it on what that part holds out.

    Args:
        candidates: the settings of the learned method among them, the default first. One stands for all: each takes the place of
            those before it only where it is ahead in the metric, with a head by more than `OVERRULES` standard errors of the
            difference.
        parts: (rows to train on, rows to judge on).
        steps: optimizer steps, for all or by candidate.
        judge_at: shares of the steps after which to judge.
        deadline: after it nothing is trained. Where there is one part, the first candidate is judged as far as it came; any other
            that did not run to its end is skipped, as its score would say nothing of it.
    """
    result = Comparison()
    best: dict[str, Score] = {}
    settings = sum(c.learned for c in candidates)
    for candidate in candidates:
        total = steps if isinstance(steps, int) else steps[candidate.name]
        points = sorted({max(1, round(total * share)) for share in judge_at})
        found = [
            _one(learner, candidate, part, total, points, f"{tag}{i}", deadline, patience, keep=len(parts) == 1)
            for i, part in enumerate(parts)
        ]
        partial = len(parts) == 1 and not best and bool(found[0][0].judged)  # the first one, which is to be kept
        if not (partial or all(trained.complete for trained, _ in found)):
            several = candidate.learned and settings > 1
            result.skipped.append(f"{LEARNED} ({setting_name(candidate)})" if several else candidate.name)
            continue
        if len(parts) == 1:
            result.trained[candidate.name] = found[0][0]
        scores = {at: score(pool([t.judged[at] for t, _ in found]), learner.metric) for at in found[0][0].judged}
        step, new = _best_point(scores)
        chosen, reached = replace(candidate, new_interpolations=(new,)), scores[step, new]
        if candidate.learned:
            result.settings[setting_name(chosen)] = reached.row() | {"steps": step}
        if before := best.get(candidate.name):
            lead, error = reached.ahead_of(before)
            if lead <= (OVERRULES if learner.head else 0.0) * error:
                continue
        best[candidate.name], result.steps[candidate.name] = reached, step
        if candidate.learned:
            result.learned = chosen
            if found[0][1] is not None:
                pruned = pool([p for _, p in found if p is not None])
                whole = scores[max(step for step, _ in scores), candidate.new_interpolation]
                result.pruned = score(pruned, learner.metric).loss - whole.loss
    result.scores = best
    return result


def _best_point(scores: Mapping[tuple[int, float], Score]) -> tuple[int, float]:
    """The step and the interpolation of the new adapter to keep: of each interpolation's step of the lowest loss the best score."""
    steps: dict[float, int] = {}
    for step, new in sorted(scores, key=lambda point: (scores[point].loss, point[0])):
        steps.setdefault(new, step)
    return max(((step, new) for new, step in sorted(steps.items())), key=lambda point: scores[point].key())


def _one(
    learner: Learner,
    candidate: Candidate,
    part: tuple[Sequence[int], Sequence[int]],
    steps: int,
    points: Sequence[int],
    tag: str,
    deadline: float | None,
    patience: int | None,
    *,
    keep: bool,
) -> tuple[Trained, Judged | None]:
    """One training and what it gave when it was judged; taken from the fit's state where it has been done.

    Args:
        keep: what was trained too, not the judgements alone.
    """
    key, (rows, held), tried = f"{candidate} {tag}", part, SEARCH_EVALUATIONS
    saved = learner.state.done(key)
    if saved is None and deadline is not None and learner.team.share(time.monotonic() > deadline):
        return Trained(complete=False), None
    if candidate.name == SEARCH:
        candidate, tried = searched(learner, candidate, rows, tag, deadline)
    if saved:
        judged = {point: Judged(**row) for point, row in saved["judged"].items()}
        return Trained(
            saved["steps"],
            saved["loss"],
            judged,
            tensors=saved["tensors"],
            history=saved["history"],
            candidate=candidate,
        ), Judged(**saved["pruned"]) if saved["pruned"] else None
    if not tried:
        return Trained(complete=False), None
    trained = learner.train(
        candidate, rows, steps, key=key, held=held, judge_at=points, patience=patience, deadline=deadline
    )
    trained.candidate, trained.complete = candidate, trained.complete and tried == SEARCH_EVALUATIONS
    trained.stopped = cut(tried)
    if keep and not trained.complete and trained.steps:  # what time allowed is what would be kept
        trained.judged[trained.steps, candidate.new_interpolation] = learner.judge(held)
    pruned = None
    if candidate.learned and learner.options.prune_below and trained.complete:
        prune(learner)
        pruned = learner.judge(held)
    if trained.complete:
        table = {
            "steps": trained.steps,
            "loss": trained.loss,
            "pruned": vars(pruned) if pruned else None,
            "tensors": trained.tensors if keep else [],
            "history": trained.history,
        }
        learner.state.finish(key, table | {"judged": {point: vars(j) for point, j in trained.judged.items()}})
    return trained, pruned


def prune(learner: Learner) -> int:
    """Set weights under `prune_below` to zero in their group; how many were.

    One stays where a module of the group uses it with more than that (`present` renormalizes at each), or has no larger one.
    """
    attachment = attachment_of(learner.model)
    logits = attachment.weights.data
    used, kept = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits, dtype=torch.bool)
    for group, modules in enumerate(attachment.groups.values()):
        for module in modules:
            present = learner.model.get_buffer(f"{module}.wlora.present")
            size = attachment.weights_of(module, present).detach().abs().to(logits.device)
            used[group] |= size > 0
            kept[group] |= (size >= learner.options.prune_below) | (size == size.max())
    logits.masked_fill_(~kept, 0.0 if attachment.normalize == "none" else float("-inf"))
    return int((used & ~kept).sum())


def searched(
    learner: Learner, candidate: Candidate, rows: Sequence[int], tag: str, deadline: float | None
) -> tuple[Candidate, int]:
    """Global weights by CMA-ES on the loss of some rows, from uniform composition; the head is trained on that first.

    Free weights are bounded and pulled to zero as LoraHub does; logits are searched as they are. A search that ran to its end is
    not made again within a fit.

    Returns:
        the candidate with the best weights; how many of `SEARCH_EVALUATIONS` were made in half of the time that is left.
    """
    key = f"{candidate} {tag} row"
    saved = learner.state.done(key)
    if saved is not None:
        return replace(candidate, row=tuple(saved)), SEARCH_EVALUATIONS
    start, tried, steps = list(candidate.row or ()), 0, total_steps(learner, len(rows))
    if deadline is not None:  # the head is trained again on what is found
        deadline = (time.monotonic() + deadline) / 2
    learner.train(replace(candidate, name=UNIFORM), rows, steps, key=f"{key} head", deadline=deadline)
    free = candidate.normalize == "none"

    def bounded(point: Sequence[float]) -> list[float]:
        return [max(-SEARCH_BOUND, min(SEARCH_BOUND, x)) for x in point] if free else list(point)

    def loss(point: Sequence[float]) -> float:
        """Of the rows at these weights; infinite, so that nothing is better, once the time is over."""
        nonlocal tried
        if deadline is not None and learner.team.share(time.monotonic() > deadline):
            return math.inf
        tried += 1
        row = bounded(point)
        with torch.no_grad():
            weights = attachment_of(learner.model).weights
            weights.copy_(torch.tensor(row).expand_as(weights))
        return learner.judge(rows).loss + (SEARCH_L1 * sum(map(abs, row)) if free else 0.0)

    row = bounded(
        minimize(loss, start, sigma=0.3 if free else 1.0, evaluations=SEARCH_EVALUATIONS, seed=learner.options.seed)
    )
    if tried == SEARCH_EVALUATIONS:
        learner.state.finish(key, row)
    return replace(candidate, row=tuple(row)), tried


def cut(tried: int) -> str:
    """What a note says of a search that made so many evaluations: nothing, where it made all."""
    whole = tried == SEARCH_EVALUATIONS
    return "" if whole else f"The search stopped after {tried} of {SEARCH_EVALUATIONS} evaluations, for want of time."


def total_steps(learner: Learner, shots: int) -> int:
    """Optimizer steps that the options ask for."""
    return steps_of(learner.options, shots, head=bool(learner.start))
