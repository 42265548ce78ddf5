"""Logging integrations for the final training: trackers of accelerate (tensorboard, wandb, ...), named by the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ..errors import UnsupportedError
from ..fit_options import FitOptions

Log = Callable[[dict[str, float], int], None]
RUN_NAME, LOG_FOLDER = "wlora-merge-fit", "wlora-merge-logs"


def tracker_names(options: FitOptions) -> list[str]:
    """The trackers that were asked for.

    Raises:
        UnsupportedError: one that accelerate does not find.
    """
    names = [name.strip() for name in options.report_to.split(",") if name.strip() not in ("", "none")]
    if names:
        from accelerate.tracking import get_available_trackers

        known = [str(name) for name in get_available_trackers()]
        for name in names:
            if name not in known:
                raise UnsupportedError(
                    f"--report-to {name}: accelerate finds no such tracker here; it finds {', '.join(known) or 'none'}."
                )
    return names


@contextmanager
def tracking(options: FitOptions, leads: bool) -> Iterator[Log | None]:
    """A function that logs (values, step) to the trackers that were asked for; None where there are none."""
    names = tracker_names(options) if leads else []
    if not names:
        yield None
        return
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=options.device == "cpu")
    with ExitStack() as stack:
        trackers = []
        for name in names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": LOG_FOLDER} if cls.requires_logging_directory else {}
            tracker = cls(RUN_NAME, **place)
            if hasattr(tracker, "start"):  # from accelerate 1.11 on, which opens its files there
                tracker.start()
            stack.callback(tracker.finish)
            trackers.append(tracker)

        def log(values: dict[str, float], step: int) -> None:
            for tracker in trackers:
                tracker.log(values, step=step)

        yield log
