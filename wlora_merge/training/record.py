"""What a fit works on, and what the mixture remembers of it: scores, what was kept and what else was as good, data, options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.examples import Examples
from ..fit_options import FitOptions, given_of_new
from .cross_validation import FEWEST

if TYPE_CHECKING:
    from .candidates import Candidate
    from .comparison import Comparison
    from .learner import Learner
    from .loop import Trained
    from .selection import Leads


@dataclass
class FitJob:
    """What a fit works on: the learner, which of its rows are for what, and whether they are enough for a new adapter."""

    learner: Learner
    shots: list[int]
    held: list[int]
    parts: list[tuple[list[int], list[int]]]
    enough: bool
    options: FitOptions
    start: float
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    stopped: str = ""
    steps: int = 0

    def deadline(self, share: float = 1.0) -> float | None:
        """In `time.monotonic()`; None without a budget."""
        return None if self.options.max_minutes is None else self.start + share * 60 * self.options.max_minutes


def _called(name: str, adapters: Sequence[str]) -> str:
    return f"{name} alone" if name in adapters else name


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


def _said_of_rivals(asked: str, better: Leads, equal: Leads, adapters: Sequence[str], metric: str) -> list[str]:
    """What did better than what the method gives and what as well, for the note."""

    def listed(leads: Leads) -> str:
        return ", ".join(f"{_called(n, adapters)} ({lead:+.3f} ± {error:.3f})" for n, (lead, error) in leads.items())

    name = _called(asked, adapters)
    said = [f"Better than {name} in {metric}: {listed(better)}."] if better else []
    if equal:
        said.append(
            f"As good as {name}, within one standard error and with a loss at most a quarter larger: {listed(equal)}."
        )
    return said


def said_of_stop(done: Trained, steps: int) -> str:
    """Where a training of so many steps stopped, and what its weights are, for the note; nothing where it ran to its end."""
    made = done.history[-1][0] if done.history else 0
    said = [done.stopped] if done.stopped else []
    if 0 < made < steps and not done.complete:
        said.append(f"Stopped after {made} of {steps} steps, for want of time.")
    if done.steps < made or (0 < made < steps and done.complete):
        said.append(
            f"The weights are those of step {done.steps} of {steps}, where the loss on the evaluation data was lowest."
        )
    return " ".join(said)


def said_of_pruning(pruned: Mapping[str, Any], *, scored: bool) -> str:
    """What pruning did, for the note."""
    count = pruned["weights_set_to_zero"]
    left = f" {', '.join(pruned['left'])} left the mixture." if pruned["left"] else ""
    before = " The scores are those before it." if scored else ""
    return (
        f"Pruning below {pruned['below']:g} set {count} weight{'s' if count != 1 else ''} to zero and added "
        f"{pruned['loss_added']:.3g} to the loss on {pruned['on']}.{left}{before}"
    )


def _without_effect(options: FitOptions, candidate: Candidate, *, folds: bool) -> list[str]:
    """Options that were given, and that came to nothing."""
    names = [] if folds or options.settings == FitOptions.settings else ["--settings (there were no folds)"]
    if not candidate.new_adapter:
        names += [f"{flag} (no new adapter was kept)" for flag in given_of_new(options)]
    return [f"Without effect: {', '.join(names)}."] if names else []


def metrics_of(
    job: FitJob, comparison: Comparison, on_folds: Comparison, kept: str, candidate: Candidate
) -> dict[str, Any]:
    """The scores of all candidates, what was kept, and in words what they were measured on and what else is as good."""
    from .candidates import BASE, UNIFORM
    from .selection import of_method, rivals, tables

    setting = {"chosen": _setting(job, candidate)} if candidate.learned else {}
    if not comparison.scores:
        return {"kept": kept, "note": _not_estimated(job, comparison, kept, candidate)} | setting
    metric, names = job.learner.metric, job.learner.names
    asked = of_method(job.options.method, comparison, names)
    asked = asked if asked in comparison.scores else kept
    better, equal = rivals(asked, comparison, [BASE, UNIFORM, *names])
    said = [
        f"Loss, {metric.name} and its standard error {_how_judged(job)}.",
        *_said_of_rivals(asked, better, equal, names, metric.name),
        *_said_of_kept(job, [*better, *equal], asked, kept, candidate),
        *_said_of_skipped(job, comparison, on_folds),
        *_without_effect(job.options, candidate, folds=bool(job.parts)),
    ]
    result: dict[str, Any] = {
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "candidates": tables(comparison),
        "kept": kept,
        "compared_with": asked,
        "better": list(better),
        "as_good": list(equal),
        "note": " ".join(said),
    }
    if on_folds.settings:
        result["settings"] = on_folds.settings
    return result | setting


def _setting(job: FitJob, candidate: Candidate) -> dict[str, Any]:
    """How what was kept was learned."""
    return {
        "granularity": candidate.granularity, "normalize": candidate.normalize, "pull": candidate.pull,
        "new_adapter": candidate.new_adapter, "interpolation": candidate.interpolation,
        "new_adapter_interpolation": candidate.new_interpolation, "steps": job.steps,
    }  # fmt: skip


def _not_estimated(job: FitJob, comparison: Comparison, kept: str, candidate: Candidate) -> str:
    """The note where nothing was judged: why, and what to give."""
    from .candidates import AUTO

    fewer = "two different shots per class or more" if job.learner.head else f"{FEWEST} different examples or more"
    each = "a second example of more classes" if job.enough else fewer
    more = each if job.options.folds else "--folds 2 or more"
    skipped = "; ".join(comparison.skipped)
    named = not (job.enough or job.options.label_names) and job.learner.labels and job.learner.labels.names
    if job.learner.task.takes_label_names and named:
        more += ". If the labels are words, --label-names makes an example of each"
    why = f"no time was left for {skipped}." if skipped else f"nothing was held out. Give --eval-data, or {more}."
    if job.options.method == AUTO or job.options.select == "best":
        why += f" Kept: {_called(kept, job.learner.names)}, as there was nothing to choose by."
    idle = _without_effect(job.options, candidate, folds=bool(job.parts))
    return " ".join([f"Not estimated: {why}", *_with_what(candidate), *idle])


def _how_judged(job: FitJob) -> str:
    """What the scores were measured on."""
    if job.held:
        return f"on {len(job.held)} evaluation examples, every candidate trained on all {len(job.shots)} shots"
    if not job.parts:
        return "on the shots themselves, which flatters every candidate"
    tested = sum(len(held) for _, held in job.parts)
    never = "a label's name or the only one of a class" if job.options.label_names else "the only one of a class"
    rest = "" if tested == len(job.shots) else f", {tested} of them held out: {never} never is"
    return f"out of fold ({len(job.parts)} folds of {len(job.shots)} shots{rest}); what is kept was then trained on all shots"


def _said_of_kept(job: FitJob, rivals: Sequence[str], asked: str, kept: str, candidate: Candidate) -> list[str]:
    """What is kept, with what, and what --select best would keep."""
    from .candidates import AUTO, LEARNED, UNIFORM

    names, said = job.learner.names, []
    simple = [UNIFORM, *names]
    rival = next((name for name in rivals if name in simple), None)
    if rival and kept == asked and kept not in simple and job.options.method != AUTO:
        said.append(f"Kept: {kept}; --select best keeps {_called(rival, names)}.")
    elif kept != LEARNED:
        said.append(f"Kept: {_called(kept, names)}.")
    return said + _with_what(candidate)


def _said_of_skipped(job: FitJob, comparison: Comparison, on_folds: Comparison) -> list[str]:
    """What the time did not allow."""
    said = [f"Not compared for want of time: {'; '.join(comparison.skipped)}."] if comparison.skipped else []
    if job.held and on_folds.skipped:
        said.append(f"Not compared on the folds for want of time: {'; '.join(on_folds.skipped)}.")
    return said


def history(losses: Mapping[str, list[tuple[int, float]]], kept: str) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of the last training of what is kept: at most 200 of them, evenly spread, the last among them."""
    name = next((name for name in (f"{kept}, all shots", kept) if losses.get(name)), None)
    if name is None:
        return {}
    finite = [point for point in losses[name] if math.isfinite(point[1])]  # fp16 leaves out steps that overflow
    step = -(-len(finite) // 200) or 1
    return {name: finite[::-1][::step][::-1]}


def held_out(job: FitJob, shots: Examples, held: Examples | None, split: str | None) -> dict[str, Any]:
    """Which examples the candidates were judged on."""
    if held is not None:
        return {"examples": len(job.held), "from": data_ref(held, split)}
    return {"examples": sum(len(fold) for _, fold in job.parts), "of": len(shots), "folds": len(job.parts)}


def data_ref(examples: Examples, split: str | None = None) -> dict[str, Any]:
    """What a mixture remembers of its data: the file's own name, digest and columns, how many rows, and the split that was named."""
    ref = {
        "name": Path(examples.source).name, "sha256": examples.sha256, "examples": len(examples),
        "columns": dict(examples.columns), "unused_columns": list(examples.unused),
    }  # fmt: skip
    return ref | ({"split": split} if split else {})


def recorded(options: FitOptions) -> dict[str, Any]:
    """The options that decide what comes out; a file's own name, as of the data."""
    table = {key: value for key, value in asdict(options).items() if key not in ("device", "report_to")}
    start = table["initial_logits"]
    return table | {"initial_logits": Path(start).name if isinstance(start, str) else start}
