"""What a fit works on, and what the mixture remembers of it: scores, what was kept and what else was as good, data, options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.examples import Examples
from ..fit_options import FitOptions, given_of_new
from .candidates import AUTO, BASE, LEARNED, SEARCH_EVALUATIONS, Candidate, Contender
from .cross_validation import FEWEST

if TYPE_CHECKING:
    from ..mixture.record import Chosen, DataRef, FitMetrics, HeldOut, Pruned, Screening
    from .comparison import Comparison
    from .learner import Learner
    from .loop import Trained
    from .run import Run
    from .selection import Leads


@dataclass(frozen=True)
class FitJob:
    """What a fit works on: the learner, and which of its rows are for what."""

    learner: Learner
    shots: list[int]
    held: list[int]
    parts: list[tuple[list[int], list[int]]]

    @property
    def run(self) -> Run:
        """What stays the same through the fit."""
        return self.learner.run

    @property
    def names(self) -> int:
        """How many names of classes are among the rows that it trains on."""
        return len(self.shots) - self.learner.shots

    @property
    def counted(self) -> str:
        """How many rows it trains on, in words."""
        return f"{self.learner.shots} shots" + (f" and {self.names} labels' names" if self.names else "")

    @property
    def options(self) -> FitOptions:
        """Its options."""
        return self.run.options


@dataclass(frozen=True)
class Kept:
    """What a fit keeps: the candidate, for how many steps it was to be trained, and what training it gave."""

    candidate: Candidate
    steps: int
    trained: Trained


def _with_what(candidate: Candidate) -> list[str]:
    """What is kept beside the weights, and how far it goes."""
    said, share, new = [], candidate.interpolation, candidate.new_interpolation
    if candidate.new_adapter:
        far = "" if new == 1 else f", {new:g} of the way to what was trained (--new-adapter-interpolation)"
        said.append(
            f"With a new adapter of rank {candidate.new_adapter}, trained on the shots beside those given{far}."
        )
    if share != 1:
        said.append(
            f"The mixture lies {share:g} of the way from uniform composition to what was learned (--interpolation)."
        )
    return said


def _said_of_rivals(asked: Contender, better: Leads, equal: Leads, metric: str) -> list[str]:
    """What did better than what the method gives and what as well, for the note."""

    def listed(leads: Leads) -> str:
        return ", ".join(f"{who.called} ({lead:+.3f} ± {error:.3f})" for who, (lead, error) in leads.items())

    said = [f"Better than {asked.called} in {metric}: {listed(better)}."] if better else []
    if equal:
        said.append(
            f"As good as {asked.called}, within one standard error and with a loss at most a quarter larger: {listed(equal)}."
        )
    return said


def _said_of_stop(kept: Kept) -> list[str]:
    """Where a training stopped, and what its weights are, for the note; nothing where it ran to its end."""
    done, steps, said = kept.trained, kept.steps, list[str]()
    made = done.history[-1][0] if done.history else 0
    if done.evaluations is not None:
        said.append(
            f"The search stopped after {done.evaluations} of {SEARCH_EVALUATIONS} evaluations, for want of time."
        )
    if 0 < made < steps and not done.complete:
        said.append(f"Stopped after {made} of {steps} steps, for want of time.")
    if done.learned:
        said.append(f"Trained for {made} of {steps} steps, by when the shots are told apart.")
    elif done.steps < made or (0 < made < steps and done.complete):
        said.append(
            f"The weights are those of step {done.steps} of {steps}, where the loss on the evaluation data was lowest."
        )
    return said


def said_of_pruning(pruned: Pruned, *, scored: bool) -> str:
    """What pruning did, for the note."""
    count = pruned["weights_set_to_zero"]
    left = f" {', '.join(pruned['left'])} left the mixture." if pruned["left"] else ""
    before = " The scores are those before it." if scored else ""
    return (
        f"Pruning below {pruned['below']:g} set {count} weight{'s' if count != 1 else ''} to zero and added "
        f"{pruned['loss_added']:.3g} to the loss on {pruned['on']}.{left}{before}"
    )


def said_of_screening(screening: Screening) -> str:
    """How many adapters were kept, of how many, and which."""
    kept, of = screening["kept"], len(screening["scores"])
    return f"Screened on the shots: {len(kept)} of {of} adapters were kept ({', '.join(kept)})."


def _without_effect(options: FitOptions, candidate: Candidate, *, folds: bool) -> list[str]:
    """Options that were given, and that came to nothing."""
    names = [] if folds or options.settings == FitOptions.settings else ["--settings (there were no folds)"]
    if not candidate.new_adapter:
        names += [f"{flag} (no new adapter was kept)" for flag in given_of_new(options)]
    return [f"Without effect: {', '.join(names)}."] if names else []


def metrics_of(job: FitJob, comparison: Comparison, on_folds: Comparison, kept: Kept) -> FitMetrics:
    """The scores of all candidates, what was kept, and in words what they were measured on and what else is as good."""
    from .selection import of_method, rivals, simpler, tables

    candidate, who = kept.candidate, kept.candidate.contender
    setting: FitMetrics = (
        {"chosen": _setting(kept) | _head_setting(job)} if candidate.learned or job.learner.solved else {}
    )
    if not comparison.scores:
        note = " ".join([_not_estimated(job, comparison, candidate), *_said_of_names(job), *_said_of_stop(kept)])
        return {"kept": who.label, "note": note, **setting}
    metric, names = job.learner.metric, job.learner.names
    asked = of_method(job.options.method, comparison)
    asked = asked if asked in comparison.scores else who
    better, equal = rivals(asked, comparison, [BASE, *simpler(names)])
    said = [
        f"Loss, {metric.name} and its standard error {_how_judged(job)}.",
        *_said_of_rivals(asked, better, equal, metric.name),
        *_said_of_unjudged(who, comparison),
        *_said_of_kept(job, [*better, *equal], asked, candidate),
        *_said_of_skipped(job, comparison, on_folds),
        *_said_of_names(job),
        *_without_effect(job.options, candidate, folds=bool(job.parts)),
        *_said_of_stop(kept),
    ]
    result: FitMetrics = {
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "candidates": tables(comparison),
        "kept": who.label,
        "compared_with": asked.label,
        "better": [rival.label for rival in better],
        "as_good": [rival.label for rival in equal],
        "note": " ".join(said),
    }
    if on_folds.settings:
        result["settings"] = on_folds.settings
    return {**result, **setting}


def _setting(kept: Kept) -> Chosen:
    """How what was kept was learned."""
    candidate = kept.candidate
    return {
        "granularity": candidate.granularity, "normalize": candidate.normalize, "pull": candidate.pull,
        "new_adapter": candidate.new_adapter, "interpolation": candidate.interpolation,
        "new_adapter_interpolation": candidate.new_interpolation, "steps": kept.trained.steps,
    }  # fmt: skip


def _head_setting(job: FitJob) -> Chosen:
    """What a solved head sees, and how it is held."""
    solved = job.learner.solved
    return {} if solved is None else {"pooling": solved.seen.pooling, "l2": solved.l2}


def _not_estimated(job: FitJob, comparison: Comparison, candidate: Candidate) -> str:
    """The note where nothing was judged: why, and what to give."""
    fewer = "two different shots per class or more" if job.learner.head else f"{FEWEST} different examples or more"
    each = "a second example of more classes" if job.learner.enough else fewer
    more = "--folds 2 or more" if job.options.folds == 0 else each
    skipped = "; ".join(comparison.skipped)
    words = not (job.learner.enough or job.names) and job.run.labels and job.run.labels.names
    if job.run.task.takes_label_names and words:
        more += ". If the labels are words, --label-names makes an example of each"
    why = f"no time was left for {skipped}." if skipped else f"nothing was held out. Give --eval-data, or {more}."
    if job.options.method == AUTO or job.options.select == "best":
        why += f" Kept: {candidate.contender.called}, as there was nothing to choose by."
    idle = _without_effect(job.options, candidate, folds=bool(job.parts))
    return " ".join([f"Not estimated: {why}", *_with_what(candidate), *idle])


def _how_judged(job: FitJob) -> str:
    """What the scores were measured on."""
    if job.held:
        return f"on {len(job.held)} evaluation examples, every candidate trained on all {job.counted}"
    if not job.parts:
        return "on the shots themselves, which flatters every candidate"
    tested = sum(len(held) for _, held in job.parts)
    never = "a label's name or the only one of a class" if job.names else "the only one of a class"
    rest = "" if tested == len(job.shots) else f", {tested} of them held out: {never} never is"
    return f"out of fold ({len(job.parts)} folds of {job.counted}{rest}); what is kept was then trained on all shots"


def _said_of_kept(job: FitJob, rivals: Sequence[Contender], asked: Contender, candidate: Candidate) -> list[str]:
    """What is kept, with what, and what --select best would keep."""
    from .selection import simpler

    said, simple, kept = list[str](), simpler(job.learner.names), candidate.contender
    rival = next((who for who in rivals if who in simple), None)
    if rival and kept == asked and kept not in simple and job.options.method != AUTO:
        said.append(f"Kept: {kept.label}; --select best keeps {rival.called}.")
    elif kept != LEARNED:
        said.append(f"Kept: {kept.called}.")
    return said + _with_what(candidate)


def _said_of_names(job: FitJob) -> list[str]:
    """That the labels' names are examples, where nobody asked for it."""
    said = "The labels' names tell the shots apart, and are examples too (--no-label-names leaves them out)."
    return [said] if job.names and job.options.label_names is None else []


def _said_of_unjudged(kept: Contender, comparison: Comparison) -> list[str]:
    """That what is kept has no score, where its trainings on the folds would decide nothing."""
    if kept in comparison.scores or comparison.skipped:
        return []
    return [
        f"What is kept ({kept.label}) was trained on all shots alone, and is not judged: --folds 3 trains it on each fold too."
    ]


def _said_of_skipped(job: FitJob, comparison: Comparison, on_folds: Comparison) -> list[str]:
    """What the time did not allow."""
    said = [f"Not compared for want of time: {'; '.join(comparison.skipped)}."] if comparison.skipped else []
    if job.held and on_folds.skipped:
        said.append(f"Not compared on the folds for want of time: {'; '.join(on_folds.skipped)}.")
    return said


def history(kept: Kept, title: str) -> dict[str, list[list[float]]]:
    """[step, loss] of the last training of what is kept: at most 200 of them, evenly spread, the last among them."""
    finite = [point for point in kept.trained.history if math.isfinite(point[1])]  # fp16 leaves out steps that overflow
    every = -(-len(finite) // 200) or 1
    return {title: [[step, loss] for step, loss in finite[::-1][::every][::-1]]} if kept.trained.history else {}


def held_out(job: FitJob, shots: Examples, held: Examples | None, split: str | None) -> HeldOut:
    """Which examples the candidates were judged on."""
    if held is not None:
        return {"examples": len(job.held), "from": data_ref(held, split)}
    return {"examples": sum(len(fold) for _, fold in job.parts), "of": len(shots), "folds": len(job.parts)}


def data_ref(examples: Examples, split: str | None = None) -> DataRef:
    """What a mixture remembers of its data: the file's own name, digest and columns, how many rows, and the split that was named."""
    ref: DataRef = {
        "name": Path(examples.source).name, "sha256": examples.sha256, "examples": len(examples),
        "columns": dict(examples.columns), "unused_columns": list(examples.unused),
    }  # fmt: skip
    return {**ref, "split": split} if split else ref


def recorded(options: FitOptions) -> dict[str, Any]:
    """The options that decide what comes out; a file's own name, as of the data."""
    table = {key: value for key, value in asdict(options).items() if key not in ("device", "report_to")}
    start = table["initial_logits"]
    return table | {"initial_logits": Path(start).name if isinstance(start, str) else start}
