"""What each candidate gives on the folds or on evaluation data.

The base, uniform composition, each adapter alone and the learned mixture all train their heads in the same way, on the same
folds. Each is judged after several numbers of steps, on examples that it was not trained on. It knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..mixture.attachment import attachment_of
from .candidates import SEARCH, SEARCH_EVALUATIONS, UNIFORM, Candidate, Contender, setting_name, steps_of
from .cma_es import minimize
from .learner import Learner
from .loop import Trained
from .run import Split, halfway
from .scoring import Judged, Score, pool, score
from .solved_head import OVERRULES

SEARCH_BOUND, SEARCH_L1 = 1.5, 0.05  # LoraHub's, https://arxiv.org/abs/2307.13269


@dataclass
class Comparison:
    """What the candidates gave on examples that they were not trained on.

    `settings` has the scores of the learned method, by what was set, and `steps` the best number of them. `skipped` names what the
    time did not allow, for the note. `trained` is what was trained, where there was one part.
    """

    scores: dict[Contender, Score] = field(default_factory=dict)
    steps: dict[Contender, int] = field(default_factory=dict)
    settings: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    learned: Candidate | None = None
    pruned: float | None = None
    trained: dict[Contender, Trained] = field(default_factory=dict)

    def enter(self, candidate: Candidate, found: Sequence[_One], learner: Learner) -> None:
        """Score a candidate by its trainings on all parts; of the settings of the learned method the one that is ahead stays."""
        who, judged = candidate.contender, [one.trained.judged for one in found]
        scores = {at: score(pool([part[at] for part in judged]), learner.metric) for at in judged[0]}
        step, new = _best_point(scores)
        chosen, reached = replace(candidate, new_interpolations=(new,)), scores[step, new]
        if candidate.learned:
            self.settings[setting_name(chosen)] = reached.row() | {"steps": step}
        if _is_behind(reached, self.scores.get(who), head=bool(learner.head)):
            return
        self.scores[who], self.steps[who] = reached, step
        if candidate.learned:
            self.learned = chosen
            pruned = [one.pruned for one in found if one.pruned is not None]
            whole = scores[max(step for step, _ in scores), candidate.new_interpolation]
            self.pruned = score(pool(pruned), learner.metric).loss - whole.loss if pruned else None


@dataclass(frozen=True)
class Judging:
    """How candidates are compared.

    Attributes:
        parts: (rows to train on, rows to judge on).
        steps: optimizer steps, for all or by candidate.
        judge_at: shares of the steps after which to judge.
        deadline: after it nothing is trained. Where there is one part, the first candidate is judged as far as it came. Any other
            that did not run to its end is skipped, as its score would say nothing of it.
        patience: stop a training after so many judgements without a lower loss.
        tag: tells this comparison from another in the fit's state.
    """

    parts: Sequence[tuple[Sequence[int], Sequence[int]]]
    steps: Mapping[Contender, int] | int
    judge_at: Sequence[float]
    deadline: float | None = None
    patience: int | None = None
    tag: str = ""

    def splits(self, candidate: Candidate) -> list[Split]:
        """The trainings of a candidate, one for each part."""
        steps = self.steps if isinstance(self.steps, int) else self.steps[candidate.contender]
        points = sorted({max(1, round(steps * share)) for share in self.judge_at})
        title = candidate.contender.label
        return [
            Split(rows, steps, f"{candidate} {self.tag}{i}", title, held, points, self.patience, self.deadline)
            for i, (rows, held) in enumerate(self.parts)
        ]


def compare(learner: Learner, candidates: Sequence[Candidate], judging: Judging) -> Comparison:
    """Train each candidate on each part and judge it on what that part holds out.

    Args:
        learner: the model on which the candidates are placed.
        candidates: the settings of the learned method among them, the default first. One stands for all: each takes the place of
            those before it only where it is ahead in the metric, with a head by more than `OVERRULES` standard errors of the
            difference.
        judging: how they are compared.
    """
    result, alone = Comparison(), len(judging.parts) == 1
    several = sum(c.learned for c in candidates) > 1
    for candidate in candidates:
        who, found = candidate.contender, [_one(learner, candidate, s, keep=alone) for s in judging.splits(candidate)]
        first = alone and not result.scores and bool(found[0].trained.judged)  # which is to be kept
        if not (first or all(one.trained.complete for one in found)):
            setting = f" ({setting_name(candidate)})" if candidate.learned and several else ""
            result.skipped.append(f"{who.label}{setting}")
            continue
        if alone:
            result.trained[who] = found[0].trained
        result.enter(candidate, found, learner)
    return result


@dataclass(frozen=True)
class _One:
    """A training of a candidate, and what the model gave once its weights were pruned, where that was asked for."""

    trained: Trained
    pruned: Judged | None = None


def _is_behind(reached: Score, before: Score | None, *, head: bool) -> bool:
    """Whether a setting is not ahead enough of the one that stands for the method, to take its place."""
    if before is None:
        return False
    lead, error = reached.ahead_of(before)
    return lead <= (OVERRULES if head else 0.0) * error


def _best_point(scores: Mapping[tuple[int, float], Score]) -> tuple[int, float]:
    """The step and the interpolation of the new adapter to keep: of each interpolation's step of the lowest loss the best score."""
    steps: dict[float, int] = {}
    for step, new in sorted(scores, key=lambda point: (scores[point].loss, point[0])):
        steps.setdefault(new, step)
    points = [(step, new) for new, step in sorted(steps.items())]
    return max(points, key=lambda point: scores[point].key())


def _one(learner: Learner, candidate: Candidate, split: Split, *, keep: bool) -> _One:
    """One training and what it gave when it was judged; taken from the fit's state where it has been done.

    Args:
        learner: the model on which the candidates are placed.
        candidate: the candidate.
        split: the training that is asked for.
        keep: what was trained too, not the judgements alone.
    """
    run, evaluations = learner.run, None
    saved = run.state.done(split.key)
    if not saved and run.is_over(split.deadline):
        return _One(Trained(complete=False))
    if candidate.contender == SEARCH:
        candidate, evaluations = searched(learner, candidate, split)
    if saved:
        return _restored(saved, candidate)
    if evaluations == 0:
        return _One(Trained(complete=False))
    trained = learner.train(candidate, split)
    trained.candidate, trained.evaluations = candidate, evaluations
    trained.complete = trained.complete and evaluations is None
    if not trained.complete:
        if keep and trained.steps:  # what time allowed is what would be kept
            trained.judged[trained.steps, candidate.new_interpolation] = learner.judge(split.held)
        return _One(trained)
    pruned = _judge_pruned(learner, split.held) if candidate.learned and run.options.prune_below else None
    run.state.finish(split.key, _saved(trained, pruned, keep=keep))
    return _One(trained, pruned)


def _judge_pruned(learner: Learner, held: Sequence[int]) -> Judged:
    prune(learner)
    return learner.judge(held)


def _saved(trained: Trained, pruned: Judged | None, *, keep: bool) -> dict[str, Any]:
    """A training as plain containers and tensors."""
    return {
        "steps": trained.steps,
        "loss": trained.loss,
        "pruned": vars(pruned) if pruned else None,
        "tensors": trained.tensors if keep else [],
        "history": trained.history,
        "learned": trained.learned,
        "judged": {point: vars(judged) for point, judged in trained.judged.items()},
    }


def _restored(saved: dict[str, Any], candidate: Candidate) -> _One:
    """The training that `_saved` wrote down."""
    judged = {point: Judged(**row) for point, row in saved["judged"].items()}
    same = {key: saved[key] for key in ("steps", "loss", "tensors", "history", "learned")}
    trained = Trained(**same, judged=judged, candidate=candidate)
    return _One(trained, Judged(**saved["pruned"]) if saved["pruned"] else None)


def prune(learner: Learner) -> int:
    """Set weights under `prune_below` to zero in their group; how many were.

    One stays where a module of the group uses it with more than that (`present` renormalizes at each), or has no larger one.
    """
    attachment = attachment_of(learner.model)
    logits = attachment.weights.data
    used, kept = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits, dtype=torch.bool)
    for group, modules in enumerate(attachment.groups.values()):
        for module in modules:
            size = attachment.gains.weights_of(module).detach().abs()
            used[group] |= size > 0
            kept[group] |= (size >= learner.run.options.prune_below) | (size == size.max())
    logits.masked_fill_(~kept, 0.0 if attachment.normalize == "none" else float("-inf"))
    return int((used & ~kept).sum())


def searched(learner: Learner, candidate: Candidate, split: Split) -> tuple[Candidate, int | None]:
    """Global weights by CMA-ES on the loss of some rows, from uniform composition; the head is trained on that first.

    Free weights are bounded and pulled to zero as LoraHub does; logits are searched as they are. A search that ran to its end is
    not made again within a fit.

    Returns:
        the candidate with the best weights; how many of `SEARCH_EVALUATIONS` were made in half of the time that is left, None
        where that sufficed for all.
    """
    key, run, rows = f"{split.key} row", learner.run, split.rows
    saved = run.state.done(key)
    if saved is not None:
        return replace(candidate, row=tuple(saved)), None
    start, tried, steps = list(candidate.row or ()), 0, total_steps(learner, len(rows))
    deadline = halfway(split.deadline)  # the head is trained again on what is found
    even = replace(candidate, contender=UNIFORM)
    learner.train(even, Split(rows, steps, f"{key} head", even.contender.label, deadline=deadline))
    free = candidate.normalize == "none"

    def bounded(point: Sequence[float]) -> list[float]:
        return [max(-SEARCH_BOUND, min(SEARCH_BOUND, x)) for x in point] if free else list(point)

    def loss(point: Sequence[float]) -> float:
        """Of the rows at these weights; infinite, so that nothing is better, once the time is over."""
        nonlocal tried
        if run.is_over(deadline):
            return math.inf
        tried += 1
        row = bounded(point)
        with torch.no_grad():
            weights = attachment_of(learner.model).weights
            weights.copy_(torch.tensor(row).expand_as(weights))
        return learner.judge(rows).loss + (SEARCH_L1 * sum(map(abs, row)) if free else 0.0)

    row = bounded(
        minimize(loss, start, sigma=0.3 if free else 1.0, evaluations=SEARCH_EVALUATIONS, seed=learner.run.options.seed)
    )
    if tried == SEARCH_EVALUATIONS:
        run.state.finish(key, row)
    return replace(candidate, row=tuple(row)), None if tried == SEARCH_EVALUATIONS else tried


def total_steps(learner: Learner, shots: int) -> int:
    """Optimizer steps that the options ask for."""
    return steps_of(learner.run.options, shots, learner.situation)
