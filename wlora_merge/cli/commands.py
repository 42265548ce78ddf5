"""The commands: options in, library calls, results out.

Libraries that take seconds to import are imported when a command runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from ..errors import RecipeError, WloraMergeError
from ..export_options import ExportOptions, export_options
from ..fit_options import FitCall, fit_request
from ..mix_options import MixOptions, mix_options
from ..option_fields import Topic
from ..text import human_bytes
from .given_adapters import given_adapters, mixable_adapters
from .options import (
    AS_JSON,
    COLUMNS,
    FORCE,
    INPUTS,
    MANY,
    MOVED,
    OUT,
    REPORT_HELP,
    Command,
    argument,
    fields_of,
    option,
)
from .terminal import fit_progress, human_time, say, show_table, work_progress

if TYPE_CHECKING:
    from ..adapters.adapter import AdapterSpec
    from ..onnx.trace_cache import KeptGraphs


@contextmanager
def _naming_state(out: str) -> Iterator[None]:
    """Say, where a fit is stopped, what was kept of it."""
    from ..training.resume import state_file

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        from ..distributed import is_leader

        if (kept := state_file(out)).is_file() and is_leader():
            say(f"{kept} holds what has been trained: the same command with --resume goes on.")
        raise


# ----------------------------------------------------------------------------------------------------------- fit


@click.command(cls=Command, topic="Make a mixture", epilog=COLUMNS)
@INPUTS
@fields_of(FitCall)
@OUT
@option("--report/--no-report", default=True, show_default=True, help=REPORT_HELP)
@FORCE
@AS_JSON
def fit(
    base: str, adapters: tuple[str, ...], lists: tuple[str, ...], strict: bool, out: str, as_json: bool, **options: Any
) -> None:
    """Learn the mixture weights of several adapters on few-shot data.

    \b
    wlora-merge fit --base BASE --adapter A --adapter B \\
        --data shots.csv --task text-classification --out mixture
    """
    given = _given(adapters, lists, strict)
    if len(given) < 2 and not lists:
        raise click.UsageError("a fit needs --adapter twice or more; for one adapter, see wlora-merge mix.")
    with _wrong_usage():
        _check_weights(options["weights"], given)
        fit_request(_those_of(FitCall, options))
    from ..training.fit import fit as run

    with fit_progress() as progress, work_progress(), _naming_state(out):
        if lists and not strict:
            given = mixable_adapters(base, given, options)
        mixture = run(base, given, out=out, progress=progress, **options)
    from ..distributed import is_leader

    if is_leader():
        _show_mixture(mixture, out, as_json)


# ----------------------------------------------------------------------------------------------------------- mix


@click.command(cls=Command, topic="Make a mixture")
@INPUTS
@fields_of(MixOptions)
@OUT
@FORCE
@AS_JSON
def mix(
    base: str, adapters: tuple[str, ...], lists: tuple[str, ...], strict: bool, out: str, as_json: bool, **options: Any
) -> None:
    """Make a mixture without fitting: uniform composition, or the weights given.

    \b
    wlora-merge mix --base BASE --adapter A --adapter B --weights 0.7,0.3 --out mixture
    wlora-merge mix --base BASE --adapters FOLDER --out average
    """
    given = _given(adapters, lists, strict)
    with _wrong_usage():
        mix_options(_those_of(MixOptions, options))
        _check_weights(options["weights"], given)
    from ..mixture.mix import mix as run

    with work_progress():
        if lists and not strict:
            given = mixable_adapters(base, given, options)
        mixture = run(base, given, out, **options)
    _show_mixture(mixture, out, as_json)


# -------------------------------------------------------------------------------------------------------- export


@click.command(cls=Command, topic="Write a model")
@argument("mixture", metavar="MIXTURE_DIR", help="What fit or mix wrote.")
@fields_of(ExportOptions)
@MOVED
@option(
    "--any-digest", topic=Topic.INPUTS, is_flag=True, help="Accept inputs that are not those the mixture was made from."
)
@OUT
@option("--report/--no-report", common=True, default=False, show_default=True, help=REPORT_HELP)
@FORCE
@AS_JSON
def export(mixture: str, out: str, as_json: bool, **options: Any) -> None:
    """Fold a mixture and write it as dense safetensors, as one LoRA, or as ONNX.

    \b
    wlora-merge export mixture --format dense --out served
    wlora-merge export mixture --format lora --rank 64 --out adapter
    """
    with _wrong_usage():
        kind = export_options(_those_of(ExportOptions, options)).format
    from ..distributed import is_leader
    from ..exporters.export import export as run
    from ..exporters.manifest import digest

    with work_progress():
        result = run(mixture, out=out, **options)
    if not is_leader():
        return
    if as_json:
        table = {"folder": str(out), "format": kind, "bytes": result.bytes, "digest": digest(result.folder)}
        click.echo(json.dumps(table | {"report": result.report}))
        return
    detail = f" {result.detail}" if result.detail else ""
    click.echo(f"Wrote {out} ({kind}, {human_bytes(result.bytes)}).{detail}\n{digest(result.folder)}")


# -------------------------------------------------------------------------------------------------------- verify


@click.command(cls=Command, topic="Look and check")
@argument("folder", metavar="EXPORT_DIR", help="What export wrote, or one export below what run wrote.")
@option(
    "--quick",
    topic=Topic.CHECKED,
    is_flag=True,
    help="Digests and headers alone. Default: load the model and compare outputs.",
)
@option(
    "--digest",
    "pinned",
    topic=Topic.CHECKED,
    metavar="sha256:...",
    help="Fail unless this is the digest that an export printed.",
)
@MOVED
@AS_JSON
def verify(
    folder: str, quick: bool, pinned: str | None, base: str | None, adapters: tuple[str, ...], as_json: bool
) -> None:
    """Check an export: every digest, its structure, and its outputs against the unmerged mixture.

    \b
    wlora-merge verify served
    """
    from pathlib import Path

    from ..exporters.manifest import digest
    from ..exporters.verify import verify as run

    with work_progress():
        checked = run(folder, quick=quick, pinned=pinned, base=base, adapters=adapters)
    found = digest(Path(folder))
    if as_json:
        click.echo(json.dumps({"folder": folder, "digest": found, **vars(checked)}))
        return
    click.echo(f"{folder}: {checked.files} files as they were written.")
    click.echo(f"  {found}")
    for item in checked.done[2:]:
        click.echo(f"  {item}")
    for item, reason in checked.skipped.items():
        click.echo(f"  skipped: {item} ({reason})")


# ----------------------------------------------------------------------------------------------------------- run


@click.command(cls=Command, topic="Write a model")
@argument(
    "recipe",
    metavar="RECIPE.yaml",
    help="YAML: base, adapters, fit or mix, exports; its paths are relative to it, or else to the working directory.",
)
@option("--out", type=click.Path(), help="Folder tree to write. Default: the recipe's name without .yaml.")
@option(
    "--set",
    "overrides",
    topic=Topic.CHECKED,
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value, as fit.max_steps=30.",
)
@option(
    "--check",
    topic=Topic.CHECKED,
    is_flag=True,
    help="Check the recipe and open its inputs (hub ids are fetched); train and write nothing.",
)
@FORCE
@AS_JSON
def run(recipe: str, out: str | None, overrides: tuple[str, ...], check: bool, force: bool, as_json: bool) -> None:
    """Fit (or mix), export and verify in one go, as a recipe says.

    \b
    wlora-merge run recipe.yaml --out build
    wlora-merge run recipe.yaml --check --set fit.max_steps=30
    """
    from pathlib import Path

    from ..exporters.manifest import digest
    from .recipe import read_recipe
    from .run import check_paths
    from .run import run as work

    try:
        job = read_recipe(recipe, overrides)
    except RecipeError as error:
        if overrides and _is_sound(recipe):
            raise click.UsageError(f"--set: {error}") from error
        raise
    where = Path(recipe).resolve().parent
    if check:
        with work_progress():
            rows, costs = check_paths(job, where)
        if as_json:
            click.echo(json.dumps({"recipe": recipe, "inputs": rows, "predicted": costs}))
        else:
            show_table(f"{recipe} is sound", rows)
            show_table("Predicted, roughly", [_readable(row) for row in costs])
        return
    with fit_progress() as progress, work_progress():
        result = work(
            job,
            out or str(Path(recipe).with_suffix("")),
            where=where,
            force=force,
            say=say,
            fit_progress=progress,
        )
    if as_json:
        pins = {n: digest(result.folder / n) for n in result.exports}
        exports = {n: {"bytes": e.bytes, "digest": pins[n], "report": e.report} for n, e in result.exports.items()}
        verified = {n: vars(c) for n, c in result.checked.items()}
        click.echo(json.dumps({"folder": str(result.folder), "exports": exports, "verified": verified}))
        return
    show_table(
        f"Wrote {result.folder}",
        [
            {
                "export": name,
                "format": done.format,
                "size": human_bytes(done.bytes),
                "difference": f"{c.largest_difference:.1e}"
                if (c := result.checked.get(name)) and c.largest_difference is not None
                else "not checked",
            }
            for name, done in result.exports.items()
        ],
    )
    for name, verified_export in result.checked.items():
        for item, reason in verified_export.skipped.items():
            click.echo(f"{name}: skipped: {item} ({reason})")


# ------------------------------------------------------------------------------------------------------- inspect


@click.command(cls=Command, topic="Look and check")
@argument(
    "paths",
    metavar="PATH...",
    nargs=-1,
    help="Folders (or a base's hub id); with a base among them, adapters are tried on the first.",
)
@MANY
@option(
    "--norms",
    is_flag=True,
    help="Read all weights: how large each adapter's change is, relative to the base weights that it changes.",
)
@AS_JSON
def inspect(paths: tuple[str, ...], lists: tuple[str, ...], norms: bool, as_json: bool) -> None:
    """Show adapters, a base model, a mixture or an export as tables, from headers, configs and records.

    \b
    wlora-merge inspect BASE A B
    wlora-merge inspect BASE --adapters FOLDER
    wlora-merge inspect mixture
    """
    from .inspect_tables import inspect_paths

    if not paths and not lists:
        raise click.UsageError("Missing argument 'PATH...', or --adapters FOLDER_OR_LIST.")
    with work_progress():
        tables = inspect_paths(paths, given_adapters((), lists), norms=norms)
    if as_json:
        click.echo(json.dumps(tables))
        return
    for title, rows in tables.items():
        show_table(title, rows)


# --------------------------------------------------------------------------------------------------------- cache


@click.command(cls=Command, topic="Look and check")
@option("--clear", topic=Topic.CHECKED, is_flag=True, help="Remove them; the next export traces again.")
@AS_JSON
def cache(clear: bool, as_json: bool) -> None:
    """Show the traced ONNX graphs that are kept for the next export, or remove them.

    \b
    wlora-merge cache
    wlora-merge cache --clear
    """
    from ..io.cache import cache_folder
    from ..onnx.trace_cache import KIND, forget_graphs, kept_graphs

    kept, root = kept_graphs(), cache_folder()
    where = "nowhere, as this user has no home" if root is None else str(root / KIND)
    if clear:
        try:
            forget_graphs()
        except OSError as error:
            raise WloraMergeError(f"{where}: cannot be cleared ({error.strerror}): remove the folder.") from error
    rows = [_kept_row(entry) for entry in kept]
    if as_json:
        click.echo(json.dumps({"folder": None if root is None else where, "cleared": clear, "graphs": rows}))
        return
    total = f"{len(kept)} traced graphs ({human_bytes(sum(entry.file.nbytes for entry in kept))})"
    if rows and not clear:
        show_table(f"{where}: {total}", [{**row, "bytes": human_bytes(row["bytes"])} for row in rows])
        return
    click.echo(f"{where}: removed {total}." if clear else f"{where}: no traced graph is kept.")


def _kept_row(entry: KeptGraphs) -> dict[str, Any]:
    """An entry of the cache as a row; one that is not sound has no key to tell of."""
    return {
        "base": entry.base if entry.sound else "not sound: never used",
        "task": entry.task,
        "dtype": entry.dtype,
        "opset": entry.opset,
        "bytes": entry.file.nbytes,
        "used": datetime.fromtimestamp(entry.file.used, timezone.utc).isoformat(timespec="seconds"),
    }


# --------------------------------------------------------------------------------------------------------- small


def _show_mixture(mixture: Any, out: str, as_json: bool) -> None:
    if as_json:
        mean = dict(zip(mixture.adapter_names, mixture.mixture_weights.mean(0).tolist(), strict=True))
        click.echo(json.dumps({"folder": out, "weights": mean, "metrics": mixture.metrics}))
        return
    from .inspect_tables import candidate_rows, setting_rows, weight_rows

    candidates = candidate_rows(mixture.metrics)
    if candidates:
        show_table(mixture.judged_on, candidates)
    if settings := setting_rows(mixture.metrics):
        show_table("Out of fold", settings)
    if mixture.metrics.get("note"):
        click.echo(mixture.metrics["note"])
    show_table("Mixture weights over the groups", weight_rows(mixture.adapter_names, mixture.mixture_weights.tolist()))
    click.echo(f"Wrote {out}.")


def _given(adapters: Sequence[str], lists: Sequence[str], strict: bool) -> list[AdapterSpec]:
    """The adapters that are asked for, before any is opened."""
    if not adapters and not lists:
        raise click.UsageError("Missing option '--adapter': give it for each adapter, or --adapters FOLDER_OR_LIST.")
    if strict and not lists:
        raise click.UsageError("--strict is of --adapters: adapters given one by one are never left out.")
    return given_adapters(adapters, lists)


def _is_sound(recipe: str) -> bool:
    from .recipe import read_recipe

    try:
        read_recipe(recipe)
    except RecipeError:
        return False
    return True


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    known = row["seconds"] is not None
    return {
        "step": row["step"],
        "disk": human_bytes(row["disk"]),
        "memory": human_bytes(row["memory"]),
        "time": human_time(row["seconds"]) if known else "on a GPU",
    }


@contextmanager
def _wrong_usage() -> Iterator[None]:
    """Options that do not go together are wrong usage, as those that click refuses are."""
    try:
        yield
    except WloraMergeError as error:
        raise click.UsageError(str(error)) from error


def _those_of(cls: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(cls)}
    return {name: value for name, value in options.items() if name in known}


def _check_weights(weights: list[float] | None, adapters: Sequence[object]) -> None:
    if weights is None:
        return
    given = ",".join(f"{weight:.12g}" for weight in weights)
    if not all(map(math.isfinite, weights)):
        raise click.UsageError(f"--weights '{given}': expected finite numbers.")
    if len(weights) != len(adapters):
        raise click.UsageError(
            f"--weights '{given}': has {len(weights)} numbers, expected one for each of {len(adapters)} adapters."
        )
