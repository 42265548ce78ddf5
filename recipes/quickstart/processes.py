"""Several processes side by side, so that all cores are at work.

A model as small as ours keeps one core busy; a second thread costs more than it brings.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import torch
import transformers


def workers(count: int) -> Executor:
    """As many processes, one thread each."""
    if count == 1:
        return Here()
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=quiet)


class Here(Executor):
    """No further process: for one core."""

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(fn, *iterables)


def quiet() -> None:
    """One thread, and no chatter from the libraries between our lines."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
