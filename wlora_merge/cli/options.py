"""The options of the commands, made from the fields of the option records, and help by topic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import click

from ..data.tasks import FIT_TASKS
from ..option_fields import REQUIRED, Field, Topic, flag, kinds, spec

COLUMNS = "\b\nColumns of --data by task; --column NAME=COLUMN where the file calls one otherwise:\n" + "\n".join(
    f"  {name:<22}{', or '.join(map(str, task.forms))}" for name, task in FIT_TASKS.items()
)
"""What stands under the help of `fit`."""
MANY_OPTIONS = 10
"""A command with more options than this has a short `--help`, of its common options."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


# ----------------------------------------------------------------------------------------------------- by topic


class Option(click.Option):
    """An option that stands under a topic of the help.

    `field` is where it is declared, if a record has it; a `common` one is shown by the short help of a long command too.
    """

    def __init__(
        self, *names: Any, topic: Topic, field: Field | None = None, common: bool = False, **facts: Any
    ) -> None:
        super().__init__(*names, **facts)
        self.topic, self.field, self.common = topic, field, common


class Argument(click.Argument):
    """An argument with help."""

    topic = Topic.INPUTS

    def __init__(self, *names: Any, help: str, **facts: Any) -> None:
        super().__init__(*names, **facts)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """What the help says of it, which click below 8.5 leaves out."""
        return self.metavar or "", self.help or ""


class Command(click.Command):
    """A command that stands under a topic, and whose options are listed by theirs.

    Of a long one `--help` shows the common options, and `--help-all`, which click's errors name, all of them.
    """

    def __init__(self, *args: Any, topic: str, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self.topic = topic
        if len(self.params) > MANY_OPTIONS:
            self.context_settings = {**self.context_settings, "help_option_names": ["--help-all"]}
            self.params.append(_short_help())

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Click's own option, which of a long command is `--help-all`."""
        found = super().get_help_option(ctx)
        if found is not None and "--help-all" in found.opts:
            found.help = "Show all options."
        return found

    def by_topic(self, ctx: click.Context) -> dict[Topic, list[click.Parameter]]:
        """Its arguments and options; the one that is click's own is of the last topic."""
        parameters = self.get_params(ctx)
        found = {topic: [p for p in parameters if getattr(p, "topic", Topic.OUTPUT) is topic] for topic in Topic}
        return {topic: chosen for topic, chosen in found.items() if chosen}

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write none: arguments stand under their topic."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each topic that has options here."""
        for topic, parameters in self.by_topic(ctx).items():
            _write_section(formatter, ctx, topic, parameters)

    def short_help_page(self, ctx: click.Context) -> str:
        """The help with the common options alone, and where the others are."""
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        common = {topic: list(filter(_is_common, parameters)) for topic, parameters in self.by_topic(ctx).items()}
        for topic, parameters in common.items():
            if parameters:
                _write_section(formatter, ctx, topic, parameters)
        hidden = len(self.get_params(ctx)) - sum(map(len, common.values()))
        formatter.write(f"\n{hidden} more options: {ctx.command_path} --help-all\n")
        self.format_epilog(ctx, formatter)
        return formatter.getvalue().rstrip("\n")


def _is_common(parameter: click.Parameter) -> bool:
    """Arguments and click's own option are."""
    return getattr(parameter, "common", True)


def _write_section(
    formatter: click.HelpFormatter, ctx: click.Context, topic: Topic, parameters: list[click.Parameter]
) -> None:
    with formatter.section(topic.value):
        formatter.write_dl([row for p in parameters if (row := p.get_help_record(ctx)) is not None])


def _short_help() -> Option:
    """`--help` of a long command."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing and isinstance(ctx.command, Command):
            click.echo(ctx.command.short_help_page(ctx), color=ctx.color)
            ctx.exit()

    names = ("-h", "--help")
    help_ = "Show the options that most people need first."
    return Option(
        names,
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help=help_,
        topic=Topic.OUTPUT,
        common=True,
    )


class Group(click.Group):
    """A group whose commands are listed by topic."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each topic."""
        commands = [c for c in self.commands.values() if isinstance(c, Command)]
        for topic in dict.fromkeys(c.topic for c in commands):
            with formatter.section(topic):
                formatter.write_dl([(c.name or "", c.get_short_help_str(120)) for c in commands if c.topic == topic])


# --------------------------------------------------------------------------------------------------- from fields


def fields_of(record: type[Any]) -> Callable[[Any], Any]:
    """The options of a record as one decorator, in the order of its fields."""
    return together(*map(_made, dataclasses.fields(record)))


def _made(f: Field) -> Callable[[Any], Any]:
    known = spec(f)
    facts: dict[str, Any] = {
        "cls": Option,
        "topic": known.topic,
        "field": f,
        "help": known.help,
        "common": known.common,
    }
    if kinds(f) == ["bool"]:
        names = flag(f) if f.default is False else f"{flag(f)}/--no-{flag(f)[2:]}"
        return click.option(names, f.name, is_flag=True, default=f.default, **facts)
    if kinds(f) == ["dict[str, str]"]:
        return click.option(flag(f), f.name, multiple=True, metavar=known.metavar, callback=_columns, **facts)
    facts |= {"required": True} if f.default is REQUIRED else {"default": f.default, "show_default": True}
    return click.option(flag(f), f.name, metavar=known.metavar, type=_type(f), **facts)


def _type(f: Field) -> Any:
    kind, known = kinds(f), spec(f)
    if known.unit == "bytes":
        return _size
    if kind == ["str"]:
        return click.Choice(known.choices) if known.choices else click.STRING
    if kind not in (["int"], ["float"]):
        several = _parse_numbers if "Sequence[float]" in kind else float
        return _or_text(several) if "str" in kind else several
    if (bounds := known.bounds) is None:
        return int if kind == ["int"] else float
    between: Any = click.IntRange if kind == ["int"] else click.FloatRange
    return between(bounds.low, None if math.isinf(bounds.high) else bounds.high, min_open=bounds.open)


def _parse_numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r}, expected numbers with commas between them, as 0.5,0.5.") from error


def _or_text(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_keep(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, click.BadParameter):
            return text

    return parse_or_keep


def _size(text: str) -> int:
    digits = text.rstrip("KMGiIBkmgb ")
    try:
        return int(float(digits) * UNITS[text[len(digits) :].strip().upper()])
    except (ValueError, KeyError, OverflowError) as error:
        raise click.BadParameter(f"{text!r}, expected a size, as 5GB or 500MB.") from error


def _columns(_: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    table: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"{text!r}: expected NAME=VALUE.")
        if name in table:
            raise click.UsageError(f"{parameter.opts[0]} {name}=... is given twice.")
        table[name] = value
    return table


# ------------------------------------------------------------------------------------- of the command line alone


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order given."""

    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def option(*names: str, topic: Topic = Topic.OUTPUT, **facts: Any) -> Callable[[Any], Any]:
    """An option that only the command line has."""
    return click.option(*names, cls=Option, topic=topic, **facts)


def argument(name: str, **facts: Any) -> Callable[[Any], Any]:
    """An argument with help; a path."""
    return click.argument(name, cls=Argument, type=click.Path(), **facts)


FORCE = option("--force", is_flag=True, help="Replace what is in --out. Default: it must be empty or not exist.")
OUT = option("--out", common=True, required=True, type=click.Path(), help="Folder to write; all or nothing.")
REPORT_HELP = "Write report.html and its figures into the folder (needs matplotlib)."
AS_JSON = option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
MANY = option(
    "--adapters",
    "lists",
    topic=Topic.INPUTS,
    common=True,
    multiple=True,
    metavar="FOLDER_OR_LIST",
    help="Every PEFT folder below a folder, or a text file with one [NAME=]PATH_OR_ID on a line.",
)
INPUTS = together(
    option(
        "--base",
        topic=Topic.INPUTS,
        common=True,
        required=True,
        metavar="PATH_OR_ID",
        help="Base model: a folder, or a hub id.",
    ),
    option(
        "--adapter",
        "adapters",
        topic=Topic.INPUTS,
        common=True,
        multiple=True,
        metavar="[NAME=]PATH_OR_ID",
        help="An adapter: a PEFT folder, or a hub id; its name is the folder's. Give it for each adapter, or give --adapters.",
    ),
    MANY,
    option(
        "--strict",
        topic=Topic.INPUTS,
        is_flag=True,
        help="With --adapters: refuse an adapter that cannot be mixed on the base. Default: leave it out and say why, but with "
        "--weights refuse it.",
    ),
)
MOVED = together(
    option(
        "--base",
        topic=Topic.INPUTS,
        common=True,
        metavar="PATH",
        help="The base model, if it has moved; its sha256 must match.",
    ),
    option(
        "--adapter",
        "adapters",
        topic=Topic.INPUTS,
        common=True,
        multiple=True,
        metavar="NAME=PATH",
        help="An adapter that has moved; its sha256 must match.",
    ),
)
