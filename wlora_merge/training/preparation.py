"""What a fit is given, made ready: the model loaded, with its adapters attached, and the examples encoded as its inputs.

It knows one model and its rows. It knows neither candidates nor what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import ConcatDataset

from ..data.examples import Examples
from ..data.task import Task, refuse_unknown_tokens
from ..errors import DataError, MixtureError
from ..fit_options import FitOptions
from ..onnx.pooling import own_pooling
from .cross_validation import enough
from .given import Given
from .initial_logits import find_start
from .learner import Learner
from .model import attached_model, max_tokens
from .run import Clock, FitProgress, Rows, Run

if TYPE_CHECKING:
    from ..data.labels import LabelSet
    from ..distributed import Team
    from .resume import FitState


@dataclass(frozen=True)
class Prepared:
    """A loaded model and its rows: the shots, behind them the names of their classes, behind these the evaluation data.

    Attributes:
        classes: of each shot, as `Examples.classes` gives them.
        twins: for each shot the first that is equal to it.
        names: the rows that are names.
        held: the rows of the evaluation data.
    """

    learner: Learner
    classes: Sequence[Sequence[str]]
    twins: Sequence[int]
    names: range
    held: range

    @property
    def trained(self) -> list[int]:
        """The rows that are trained on: the shots, and the names of classes that are asked for or tell the shots apart."""
        return [*range(self.learner.shots), *(self.names if self.learner.takes_names(self.names) else ())]


def prepare(
    given: Given,
    shots: Examples,
    held: Examples | None,
    labels: LabelSet | None,
    ranks: Team,
    state: FitState,
    progress: FitProgress | None = None,
) -> Prepared:
    """Load the model with its adapters attached, and encode the examples.

    Args:
        given: what the fit works on.
        shots: its examples.
        held: the evaluation data.
        labels: of the shots; None for a task without.
        ranks: the processes that share the work.
        state: what has been trained already.
        progress: as of `fit`.

    Raises:
        WloraMergeError: what the model, the task and the examples do not allow.
    """
    task, base, options = given.task, given.base, given.options
    clock = Clock(time.monotonic(), options.max_minutes)
    processor = task.load_processor(base.folder)
    words = _names(task, shots, labels, options)  # refuses before the model is loaded
    model, head, labels = attached_model(
        base, given.adapters, task, labels, processor, options, given.request.modules_to_save, ranks
    )
    if not head and options.head_learning_rate != FitOptions.head_learning_rate:
        raise MixtureError(
            f"{base.folder}: no new head is trained on it for {task.name}: leave --head-learning-rate out."
        )
    length = max_tokens(model, processor, options.max_length)
    rows, named, judged = (
        _encoded(task, examples, processor, length, labels, model) if examples else []
        for examples in (shots, words, held)
    )
    n, every = (
        len(rows),
        ConcatDataset[Any]([rows, named, judged]),
    )  # read lazily: images are decoded when they are used
    start = find_start(options, [a.name for a in given.adapters], base)
    whole = len(shots) == n  # else an example is several rows
    classes, twins = (shots.classes(labels), shots.twins) if whole else ([("",)] * n, list(range(n)))
    run = Run(task, labels, options, ranks, state, clock, progress, given.screened)
    encoded = Rows(every, n, classes, enough(classes, twins, head=bool(head)))  # type: ignore[arg-type]
    learner = Learner(run, model, processor, encoded, head, start, own_pooling(base.folder))
    if learner.solved and options.head_learning_rate != FitOptions.head_learning_rate:
        raise MixtureError(
            f"{base.folder}: its new head is solved, not trained, as it is one linear layer: leave --head-learning-rate out."
        )
    behind = n + len(named)
    return Prepared(learner, classes, twins, range(n, behind), range(behind, len(every)))


def _names(task: Task, shots: Examples, labels: LabelSet | None, options: FitOptions) -> Examples | None:
    """The names of the shots' classes, where they are asked for, or are words that may be taken."""
    if options.label_names is False or not task.takes_label_names:
        return None
    try:
        return shots.label_names(labels)
    except DataError:
        if options.label_names:
            raise
        return None


def _encoded(
    task: Task, examples: Examples, processor: Any, length: int | None, labels: LabelSet | None, model: Any
) -> Any:
    rows = task.encode(examples, processor, max_length=length, labels=labels)
    refuse_unknown_tokens(task, examples, rows, processor, model)
    for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):  # images are decoded later
        if not task.items(row):
            raise DataError(
                f"{examples.where(number)} has no token that the loss counts, as its labels were cut off or lie on none: leave it "
                "out, or give a larger --max-length."
            )
    return rows
