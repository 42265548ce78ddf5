"""What stays the same through a fit, and what one training of it is asked for.

It knows tasks, options and clocks. It knows neither models nor candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..fit_options import FitOptions

if TYPE_CHECKING:
    from ..data.labels import LabelSet
    from ..data.task import Task
    from ..distributed import Team
    from .resume import FitState

FitProgress = Callable[[str, int, int, float, dict[str, float]], None]
"""Called with (candidate, step, steps, loss, mean mixture weight of each adapter) after every step."""


@dataclass(frozen=True)
class Clock:
    """When the fit began, in `time.monotonic()` seconds, and how many minutes it may take; None: as many as it needs."""

    start: float
    minutes: float | None = None

    def deadline(self, share: float = 1.0) -> float | None:
        """When a share of the time is over, in `time.monotonic()` seconds; None without a budget."""
        return None if self.minutes is None else self.start + share * 60 * self.minutes


def halfway(deadline: float | None) -> float | None:
    """When half of the time that is left is over; None without a deadline."""
    return None if deadline is None else (time.monotonic() + deadline) / 2


@dataclass(frozen=True)
class Run:
    """What stays the same through a fit.

    Attributes:
        labels: in the head's order; None for a task without labels.
        team: the processes that share the work.
        state: what has been trained, so that a killed fit can go on.
        screened: whether the adapters were chosen on the shots.
    """

    task: Task
    labels: LabelSet | None
    options: FitOptions
    team: Team
    state: FitState
    clock: Clock
    progress: FitProgress | None = None
    screened: bool = False

    def is_over(self, deadline: float | None) -> bool:
        """Whether a deadline has passed, as the leading process sees it."""
        return deadline is not None and self.team.share(time.monotonic() > deadline)


@dataclass(frozen=True)
class Rows:
    """The encoded examples of a fit.

    Attributes:
        encoded: the shots first.
        shots: how many of them are shots.
        classes: of each shot, as `Examples.classes` gives them.
        enough: whether the shots are enough for a new adapter (`cross_validation.enough`).
    """

    encoded: Sequence[Any]
    shots: int
    classes: Sequence[Sequence[str]]
    enough: bool


@dataclass(frozen=True)
class Split:
    """What one training is asked for.

    Attributes:
        rows: numbers of the rows to train on.
        steps: optimizer steps.
        key: names this training in the fit's state, so that it can be taken up again.
        title: what progress and errors call it.
        held: rows to judge on, after the steps `judge_at`.
        patience: stop after so many judgements without a lower loss, and go back to the best.
        deadline: in `time.monotonic()` seconds; stop after it.
    """

    rows: Sequence[int]
    steps: int
    key: str
    title: str
    held: Sequence[int] = ()
    judge_at: Sequence[int] = ()
    patience: int | None = None
    deadline: float | None = None
