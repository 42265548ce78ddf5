"""The reference page of the command line, made from the commands and the fields of their options.

python -m wlora_merge.cli.reference > docs/cli-reference.md
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import cleandoc
from typing import Any

import click

from ..option_fields import Field, expected, flag, spec
from .main import main
from .options import Command

HEAD = """# The command line

Made from the options themselves by `make generate`; `wlora-merge COMMAND --help` says in short what most people need first,
`--help-all` the rest too.
In a recipe and in Python, an option has its own name with underscores, or the name in parentheses."""
HEADINGS = ["option", "value", "default", "what it does"]


def reference() -> str:
    """The page, as Markdown."""
    commands = [c for c in main.commands.values() if isinstance(c, Command)]
    return "\n\n".join([HEAD, _markdown_table(main.params), *map(_command, commands)]) + "\n"


def _command(command: Command) -> str:
    said, _, example = cleandoc(command.help or "").partition("\b\n")
    parts = [f"## wlora-merge {command.name}", said.strip(), f"```sh\n{example}\n```"]
    for topic, parameters in command.by_topic(click.Context(command, help_option_names=[])).items():
        parts += [f"### {topic.value}", _markdown_table(parameters)]
    if command.epilog:
        title, _, rows = command.epilog.removeprefix("\b\n").partition("\n")
        parts += [title, f"```\n{rows}\n```"]
    return "\n\n".join(parts)


def _markdown_table(parameters: Iterable[click.Parameter]) -> str:
    rows = [[text.replace("|", "\\|") for text in _row(p)] for p in parameters]
    return "\n".join(f"| {' | '.join(row)} |" for row in [HEADINGS, ["---"] * len(HEADINGS), *rows])


def _row(p: Any) -> list[str]:
    """Name, value, default and help of an argument or an option."""
    if isinstance(p, click.Argument):
        return [f"`{p.metavar}`", "a path", "required", p.help or ""]
    name = " / ".join(f"`{flag}`" for flag in (*p.opts, *p.secondary_opts))
    field = getattr(p, "field", None)
    if field is None:
        return [name, "" if p.is_flag else f"`{p.metavar or 'PATH'}`", _default(p), p.help]
    known = spec(field)
    if flag(field) != f"--{field.name.replace('_', '-')}":
        name += f" (`{field.name}`)"
    only = [f"For {' and '.join(names)} alone." for names in (known.of, known.tasks) if names]
    return [name, "" if p.is_flag else _value(field), _default(p), " ".join([known.help, *only, known.detail]).strip()]


def _value(field: Field) -> str:
    known = spec(field)
    value = f"{expected(field)}, {known.bounds}" if known.bounds else expected(field)
    return f"`{known.metavar}`: {value}" if known.metavar else value


def _default(p: Any) -> str:
    if p.is_flag:
        return {True: "on", False: "off"}.get(p.default, "") if p.secondary_opts else ""
    if p.required:
        return "required"
    return str(p.default) if isinstance(p.default, int | float | str) else ""


if __name__ == "__main__":
    print(reference(), end="")
