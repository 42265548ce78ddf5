"""What people see at the terminal: tables on stdout, progress, warnings and the log on stderr.

The only room that knows rich, which is imported when something is drawn. Where stderr is no terminal there are no bars and no
colours, and `quiet` leaves errors alone.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from . import names
from .errors import WloraMergeWarning


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Our own warnings as lines on stderr; those of libraries are not the user's to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", WloraMergeWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(names.redacted(f"Warning: {message}"), err=True)
        yield


@contextmanager
def shown_log(quiet: bool) -> Iterator[None]:
    """What the package tells its logger, as lines on stderr; warnings alone if `quiet`.

    bitsandbytes, which transformers imports where it is installed, is kept quiet: a fit that is to use it lets it speak.
    """
    log, handler, unused = logging.getLogger("wlora_merge"), _Echo(), logging.getLogger("bitsandbytes")
    level, unused_level = log.level, unused.level
    unused.setLevel(logging.ERROR)
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        unused.setLevel(unused_level)


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(names.redacted(record.getMessage()), err=True)


@contextmanager
def fit_progress() -> Iterator[Callable[[str, int, int, float, dict[str, float]], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tail = TextColumn("loss {task.fields[loss]:.4f}  {task.fields[weights]}")
    with Progress(*columns, tail, console=_stderr(), disable=_plain()) as bars:
        known: dict[str, Any] = {}

        def update(name: str, step: int, steps: int, loss: float, weights: dict[str, float]) -> None:
            text = " ".join(f"{adapter} {weight:.2f}" for adapter, weight in weights.items())
            if name not in known:
                known[name] = bars.add_task(name, total=steps, loss=loss, weights=text)
            bars.update(known[name], completed=step, total=steps, loss=loss, weights=text)
            if _plain() and step == steps:
                say(f"{name}: {steps} steps, loss {loss:.4f}, {text}")

        yield update


@contextmanager
def byte_progress() -> Iterator[Callable[[int, str], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=_stderr(), disable=_plain(), transient=True) as bars:
        known: dict[str, Any] = {}

        def update(count: int, name: str) -> None:
            if name not in known:
                known[name] = bars.add_task(name, total=None)
            bars.update(known[name], advance=count)

        yield update


def show_table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _plain() -> bool:
    """No bars: stderr is no terminal, or --quiet."""
    return _quiet() or not sys.stderr.isatty()


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().params.get("quiet"))


def say(line: str) -> None:
    """A line of progress, on stderr."""
    if not _quiet():
        click.echo(line, err=True)


def human_time(seconds: float) -> str:
    """`4 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
