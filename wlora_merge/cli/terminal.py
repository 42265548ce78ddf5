"""What people see at the terminal: tables on stdout, progress, warnings and the log on stderr.

The only room that knows rich, which is imported when something is drawn. Where stderr is no terminal there are no bars and no
colours, and `quiet` leaves out what is neither a result nor a warning nor an error.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import WloraMergeWarning
from ..progress import Done, listening
from ..text import human_bytes, redacted


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Our own warnings as lines on stderr; those of libraries are not the user's to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", WloraMergeWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(redacted(f"Warning: {message}"), err=True)
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
        click.echo(redacted(record.getMessage()), err=True)


@contextmanager
def fit_progress() -> Iterator[Callable[[str, int, int, float, dict[str, float]], None]]:
    """A bar for each training of a fit, with its loss and mean weights; gives what `fit` takes as its progress."""
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
                say(f"{name}: {steps} step{'s' if steps != 1 else ''}, loss {loss:.4f}, {text}")

        yield update


@contextmanager
def work_progress() -> Iterator[None]:
    """A line on stderr for what is being worked on: a bar, bytes, tensors or files, and the time that it takes."""
    if _plain():
        yield
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Progress(*columns, TimeElapsedColumn(), console=_stderr(), transient=True, redirect_stdout=False) as bars:
        known: dict[str, Any] = {}

        def show(done: Done) -> None:
            """Show what is being done, in place of what was done before it."""
            for other in [what for what in known if what != done.what]:
                bars.remove_task(known.pop(other))
            if done.what not in known:
                known[done.what] = bars.add_task(done.what, total=None, amount="")
            whole = done.total_bytes or done.total_items or None
            count = done.bytes if done.total_bytes else done.items
            bars.update(known[done.what], total=whole, completed=count, amount=amount_of(done))

        with listening(show):
            yield


def amount_of(done: Done) -> str:
    """How much is done, in human units: `1.2 GB of 2.2 GB, 45 of 291 tensors`."""
    sizes = f"{human_bytes(done.bytes)} of {human_bytes(done.total_bytes)}" if done.total_bytes else ""
    items = f"{done.items} of {done.total_items} {done.unit}" if done.total_items > 1 else ""
    return ", ".join(part for part in (sizes, items) if part)


def show_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table on stdout; every key that one of them has is a column."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table()
    for column in columns:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(escape(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(row.get(column))) for column in columns))
    console = Console()
    # no title of the table's own, which would be folded at its width
    console.print(escape(title), style="italic", highlight=False, soft_wrap=True)
    console.print(table)


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
