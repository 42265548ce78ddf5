"""The stages of a fit once its model is loaded: compare on the folds or on evaluation data, choose, train what is kept.

It knows candidates and how they are compared. It knows neither files nor the data that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..constants import REGRESSION
from ..errors import MixtureError
from ..mixture.new_lora import new_targets
from .candidates import (
    AUTO,
    BEST_SINGLE,
    LEARNED,
    SEARCH,
    UNIFORM,
    Candidate,
    Contender,
    Kind,
    checkpoints,
    fixed_candidates,
    judgements,
    learned_settings,
    on_folds,
)
from .comparison import Comparison, Judging, compare, prune, searched, total_steps
from .learner import Learner
from .loop import Trained, restore
from .record import FitJob, Kept, history, metrics_of, said_of_pruning
from .run import Split
from .scoring import Score, pool, score
from .selection import chosen
from .solved_head import L2, L2_TRIED, OVERRULES
from .trackers import tracking

if TYPE_CHECKING:
    from ..mixture.record import FitMetrics, Pruned

FOLD_SHARE, JUDGED_SHARE = 0.5, 0.75
"""Of `max_minutes`: when the folds must end, and what evaluation data judge."""


def find_mixture(job: FitJob) -> tuple[FitMetrics, Candidate]:
    """Compare, choose, train what is kept; the metrics and the candidate that the model now holds."""
    choose_l2(job)
    options, plan = job.options, _plan(job)
    if job.held and plan.judgements <= 1:  # nothing is left to decide
        job = replace(job, parts=[])
    folds = _on_folds(job, plan)
    candidates = plan.candidates(folds)
    steps = {who: folds.steps.get(who, plan.steps) for who in candidates}
    comparison = folds
    if job.held:
        comparison = _on_held(job, plan, candidates, steps)
    elif not job.parts and options.method == BEST_SINGLE:
        singles = [c for c in plan.fixed if c.contender.kind is Kind.SINGLE]
        judging = Judging([(job.shots, job.shots)], plan.steps, judge_at=(1.0,), tag="shots, ")
        comparison = compare(job.learner, singles, judging)
    who = chosen(options.method, options.select, comparison, job.learner.names)
    kept, title = _finish(job, candidates[who], steps[who], comparison)
    metrics = metrics_of(job, comparison, folds, kept)
    metrics["history"] = history(kept, title)
    if options.prune_below:
        pruned = metrics["pruned"] = _prune(job, kept.candidate, folds)
        metrics["note"] += f" {said_of_pruning(pruned, scored=bool(comparison.scores))}"
    return metrics, kept.candidate


def choose_l2(job: FitJob) -> None:
    """Hold a solved head as asked, or as the folds prefer under uniform composition: by more than chance, but of a regression."""
    solved, learner = job.learner.solved, job.learner
    if solved is None:
        return
    solved.l2 = job.options.l2 or L2
    if job.options.l2 is not None or not job.parts:
        return
    features = learner.uniform_features()

    def reached(l2: float) -> Score:
        heads = [(solved.solve(features, rows, l2), held) for rows, held in job.parts]
        return score(pool([learner.judge(held, (found, features)) for found, held in heads]), learner.metric)

    scores = {l2: reached(l2) for l2 in (L2, *L2_TRIED)}
    for l2 in L2_TRIED:
        lead, error = scores[l2].ahead_of(scores[solved.l2])
        if lead > (0.0 if solved.kind == REGRESSION else OVERRULES) * error:
            solved.l2 = l2


@dataclass(frozen=True)
class _Plan:
    """The candidates of a fit, for how many steps each is trained, and what of the learned one the folds judge.

    Attributes:
        judged: the settings of the learned one that the folds judge.
        judge_at: shares of the steps after which they do.
        judgements: how often they do.
    """

    fixed: list[Candidate]
    search: list[Candidate]
    settings: list[Candidate]
    steps: int
    judged: list[Candidate]
    judge_at: Sequence[float]
    judgements: int

    def candidates(self, folds: Comparison) -> dict[Contender, Candidate]:
        """Every candidate, the learned one in the setting that the folds prefer, else in the default one."""
        default = [replace(s, new_interpolations=(s.new_interpolation,)) for s in self.settings[:1]]
        learned = [folds.learned] if folds.learned else default
        return {c.contender: c for c in [*self.fixed, *self.search, *learned]}


def _plan(job: FitJob) -> _Plan:
    options = job.options
    if options.new_adapter is None and not new_targets(job.learner.model):
        options = replace(options, new_adapter=0)
    now = replace(job.learner.situation, near=job.learner.nearness())
    fixed, settings = fixed_candidates(job.learner.names, options), learned_settings(options, now)
    uniform = next(c for c in fixed if c.contender == UNIFORM)
    search = [replace(uniform, contender=SEARCH)] if options.method in (SEARCH.label, AUTO) else []
    steps = total_steps(job.learner, len(job.shots))
    judged, judge_at = on_folds(options, settings, now), checkpoints(options, now)
    return _Plan(fixed, search, settings, steps, judged, judge_at, judgements(options, judged, now))


def _on_folds(job: FitJob, plan: _Plan) -> Comparison:
    """What the folds say: of all candidates, or of the settings alone where evaluation data judge the rest."""
    if not job.parts:
        return Comparison()
    among = plan.judged if job.held else [*plan.fixed, *plan.search, *plan.judged]
    deadline = job.run.clock.deadline(FOLD_SHARE)
    return compare(job.learner, among, Judging(job.parts, plan.steps, plan.judge_at, deadline))


def _on_held(
    job: FitJob, plan: _Plan, candidates: dict[Contender, Candidate], steps: dict[Contender, int]
) -> Comparison:
    """What the evaluation data say: of what the method gives first, as time may end."""
    options = job.options

    def is_of_method(candidate: Candidate) -> bool:
        kind = candidate.contender.kind
        return kind is Kind.SINGLE if options.method == BEST_SINGLE else kind.value == options.method

    order = [*(candidates[who] for who in (LEARNED, SEARCH) if who in candidates), *plan.fixed]
    order.sort(key=lambda candidate: not is_of_method(candidate))
    judge_at = tuple(i / 10 for i in range(1, 11)) if options.early_stopping else (1.0,)
    deadline = job.run.clock.deadline(JUDGED_SHARE)
    judging = Judging([(job.shots, job.held)], steps, judge_at, deadline, options.early_stopping, tag="all, ")
    found = compare(job.learner, order, judging)
    found.scores = {who: found.scores[who] for who in candidates if who in found.scores}
    return found


def _finish(job: FitJob, candidate: Candidate, steps: int, comparison: Comparison) -> tuple[Kept, str]:
    """Train what is kept on all shots, unless that is what was judged; also what its training is called."""
    learner, title = job.learner, candidate.contender.label
    with tracking(job.options, job.run.team.leads) as log:
        if done := comparison.trained.get(candidate.contender):
            candidate = done.candidate or candidate
            restore(learner.placement.place(candidate), done.tensors)
            _log_again(learner, done, log)
        else:
            evaluations, title = None, f"{title}, all shots" if job.parts else title
            split = Split(job.shots, steps, "final", title, deadline=job.run.clock.deadline())
            if candidate.contender == SEARCH:
                candidate, evaluations = searched(learner, candidate, replace(split, key=f"{candidate} all"))
            learner.log = log
            done = learner.train(candidate, split)
            done.evaluations = evaluations
            learner.log = None
    if done.evaluations == 0 or not (done.complete or done.steps or done.evaluations):
        less = ", or --folds 0" if job.parts else ""
        raise MixtureError(f"max_minutes left no time for a single step on all shots: give more{less}.")
    return Kept(candidate, steps, done), title


def _log_again(learner: Learner, done: Trained, log: Callable[[dict[str, float], int], None] | None) -> None:
    """Log a training that was made before the trackers were opened."""
    if not log or not done.history:
        return
    *before, (last, loss) = done.history
    for step, value in before:
        log({"loss": value}, step)
    log({"loss": loss, **{f"weight/{name}": w for name, w in learner.placement.weights().items()}}, last)


def _prune(job: FitJob, candidate: Candidate, on_folds: Comparison) -> Pruned:
    """Prune the model's weights and say what it cost."""
    learner = job.learner
    judged_on, where = (job.held, "evaluation data") if job.held else (job.shots, "the shots themselves")
    before, used = learner.judge(judged_on).loss, learner.placement.used()
    dropped = prune(learner)
    cost = learner.judge(judged_on).loss - before
    if not job.held and candidate.learned and on_folds.pruned is not None:
        cost, where = on_folds.pruned, "held-out folds"
    left = [name for name in used if name not in learner.placement.used()]
    return {
        "below": job.options.prune_below, "weights_set_to_zero": dropped, "left": left, "loss_added": cost, "on": where,
    }  # fmt: skip
