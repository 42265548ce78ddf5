"""How far long work is, told to whoever listens; nobody does unless a program says so.

A room that works for longer than a second tells, whatever called it: no function passes a callback on. Threads tell through a
`Meter` that was made before they began.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

LOG = logging.getLogger("wlora_merge")
"""What the library tells a user who listens; the command line shows it on stderr."""


@dataclass(frozen=True)
class Done:
    """How much of `what` is done; a total of 0 is one that is not known.

    `bytes` and `total_bytes` are bytes, `items` and `total_items` whatever `unit` says (`tensors`, `files`).
    """

    what: str
    bytes: int = 0
    total_bytes: int = 0
    items: int = 0
    total_items: int = 0
    unit: str = "tensors"


Listener = Callable[[Done], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("wlora_merge_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener` called, from any thread, with what is done until the block ends."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class Meter:
    """Counts what is done and tells it to who listens now; `add` may be called from any thread.

    Args:
        what: a few words, as `writing weights`; work of unknown length has no totals.
        told: False tells nobody: a short step of other work, which tells of itself.
    """

    def __init__(
        self, what: str, total_bytes: int = 0, total_items: int = 0, unit: str = "tensors", *, told: bool = True
    ) -> None:
        self._done = Done(what, 0, total_bytes, 0, total_items, unit)
        self._tell, self._lock = _LISTENER.get() if told else None, threading.Lock()
        self.add()

    def add(self, count: int = 0, items: int = 0) -> None:
        """So many bytes and items more are done."""
        if self._tell is None:
            return
        with self._lock:
            self._done = replace(self._done, bytes=self._done.bytes + count, items=self._done.items + items)
            self._tell(self._done)
