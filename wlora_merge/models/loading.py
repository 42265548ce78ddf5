"""What transformers and PEFT print, kept away, and what they raise, in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import VerifyError, WloraMergeError


@contextmanager
def quiet_libraries() -> Any:
    """Keep load reports and progress bars of transformers away: what they would say is checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What a library says of a folder from elsewhere, in one sentence: its loaders let errors of any kind through."""
    try:
        yield
    except (WloraMergeError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise VerifyError(f"{what}: {said[:500]}") from error
