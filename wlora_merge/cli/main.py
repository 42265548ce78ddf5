"""The program: its group of commands, exit codes, and errors made into one sentence.

Results go to stdout, logs and progress to stderr. Exit 0 done, 1 the work failed, 2 wrong usage, 130 and 143 stopped by
SIGINT and SIGTERM. Libraries that take seconds to import are imported when a command runs, so `--help` does not wait.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from time import monotonic
from typing import Any

import click

from ..errors import WloraMergeError
from ..io.signals import terminate_as_exit
from ..text import redacted
from .commands import cache, export, fit, inspect, mix, run, verify
from .options import Group
from .terminal import human_time, say, shown_log, shown_warnings


class Main(Group):
    """Turns the library's errors into one sentence and exit 1; `--debug` keeps the traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the program; a Ctrl-C that comes when a command has ended is not its failure (click's exit 1) but exit 130."""
        try:
            return super().main(*args, **extra)
        except SystemExit as leave:
            if isinstance(leave.__context__, click.Abort):
                raise SystemExit(130) from leave
            raise
        except OSError as error:
            if error.filename is not None or not _stdout_is_broken():
                raise
            sys.stdout = io.StringIO()  # what is left in its buffer fails no more
            click.echo(f"Error: what there is to say cannot be written to stdout: {error.strerror}.", err=True)
            raise SystemExit(1) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command under the rules of this module's docstring."""
        # OpenMP threads that spin while they wait make a step 25 times slower where another process shares the cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        quiet, began = bool(ctx.params.get("quiet")), monotonic()
        with terminate_as_exit(), shown_warnings(), shown_log(quiet):
            try:
                result = super().invoke(ctx)
                if (seconds := monotonic() - began) >= 1:
                    say(f"Took {human_time(seconds)}.")
                return result
            except WloraMergeError as error:
                if ctx.params.get("debug"):
                    raise
                raise click.ClickException(redacted(str(error))) from error
            except KeyboardInterrupt:
                click.echo("Stopped.", err=True)
                sys.exit(130)


def _stdout_is_broken() -> bool:
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return False  # whoever reads it has gone, which click knows
    except OSError:
        return True
    return False


def _versions(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        packages = ("wlora-merge", "torch", "transformers", "peft", "safetensors", "onnx", "onnxruntime")
        from ..exporters.manifest import versions

        found = versions(packages[1:])
        click.echo("\n".join(f"{name} {found[name]}" for name in ("wlora-merge", "python", *packages[1:])))
        ctx.exit()


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No progress and no log on stderr: results, warnings and errors alone.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_versions, help="Show versions and exit."
)
def main(debug: bool, quiet: bool) -> None:
    """Learn a mixture of LoRA adapters on a few examples, and fold it into one model to serve.

    \b
    wlora-merge fit --base BASE --adapter A --adapter B --data shots.jsonl --task causal-lm --out mixture
    wlora-merge export mixture --format dense --out served
    wlora-merge verify served

    Completion for bash (or zsh, fish): eval "$(_WLORA_MERGE_COMPLETE=bash_source wlora-merge)"
    """
    # imports make a million objects that stay: walking them again and again, and at the end, costs half a second
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)


for command in (fit, mix, export, verify, run, inspect, cache):
    main.add_command(command)
