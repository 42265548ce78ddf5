"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


FORCE = click.option("--force", is_flag=True, help="Replace what is in --out. Default: it must be empty or not exist.")
OUT = click.option("--out", required=True, type=click.Path(), help="Folder to write; all or nothing.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
MODULES_TO_SAVE = click.option(
    "--modules-to-save",
    metavar="NAME|drop|mix",
    help="What becomes of whole tensors that adapters carry (their heads): take adapter NAME's, drop them, or mix them "
    "against the base's. Default: refuse those that a trained head does not replace.",
)
RESIDUAL = click.option(
    "--base-is-residual", metavar="NAME", help="The base given is the residual of adapter NAME (PiSSA and its kind)."
)
INPUTS = together(
    click.option("--base", required=True, metavar="PATH_OR_ID", help="Base model: a folder, or a hub id."),
    click.option(
        "--adapter",
        "adapters",
        required=True,
        multiple=True,
        metavar="[NAME=]PATH_OR_ID",
        help="An adapter: a PEFT folder, or a hub id; its name is the folder's. Give it for each adapter.",
    ),
)
MOVED = together(
    click.option("--base", metavar="PATH", help="The base model, if it has moved; its sha256 must match."),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME=PATH",
        help="An adapter that has moved; its sha256 must match.",
    ),
)
