"""Signals that end a run: as exceptions that unwind it, and put off while it tidies up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the program as ``SystemExit(128 + signal)``, so that what was staged is removed.

    Outside the main thread, where Python does not allow handlers, it does nothing. A SIGHUP that is ignored (nohup)
    stays ignored.

    Raises:
        SystemExit: 143 on SIGTERM, 129 on SIGHUP.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    mine = [signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)
    with _handled(mine, leave):
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off signals until the block has ended: a second Ctrl-C must not stop the tidying up after the first."""
    held: list[int] = []
    with _handled(_ENDING, lambda number, frame: held.append(number)):
        yield
    for number in held[:1]:
        signal.raise_signal(number)


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    # one that C code installed reads as None and could not be put back
    before = {n: old for n in numbers if main and (old := signal.getsignal(n)) is not None}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
