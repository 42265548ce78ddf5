"""The commands: options in, library calls, results out.

Libraries that take seconds to import are imported when a command runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import click

from .. import constants
from ..data.tasks import FIT_TASKS, TASKS
from ..errors import RecipeError, WloraMergeError
from ..export_options import ExportOptions, export_options
from ..fit_options import FitOptions, check_for_task, fit_options
from ..text import human_bytes
from .options import (
    AS_JSON,
    COLUMNS,
    COUNT,
    FIT_OPTIONS,
    FORCE,
    INPUTS,
    MODULES_TO_SAVE,
    MOVED,
    OUT,
    REPORT_HELP,
    RESIDUAL,
    RESIZE_VOCAB,
    Command,
)
from .terminal import fit_progress, human_time, say, show_table, work_progress

DTYPES = click.Choice(list(constants.DTYPES))
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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


@click.command(cls=Command, epilog=COLUMNS)
@INPUTS
@click.option("--data", required=True, metavar="FILE_OR_ID", help="The shots: JSONL, CSV, Parquet, a folder, a hub id.")
@click.option("--task", required=True, type=click.Choice(list(FIT_TASKS)), help="What the model is for.")
@OUT
@FIT_OPTIONS
@MODULES_TO_SAVE
@RESIDUAL
@click.option("--report/--no-report", default=True, show_default=True, help=REPORT_HELP)
@FORCE
@AS_JSON
def fit(
    base: str,
    adapters: tuple[str, ...],
    data: str,
    task: str,
    out: str,
    eval_data: str | None,
    columns: tuple[str, ...],
    weights: str | None,
    delta_scale: str | None,
    initial_logits: str | None,
    modules_to_save: str | None,
    base_is_residual: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Learn the mixture weights of several adapters on few-shot data.

    \b
    wlora-merge fit --base BASE --adapter a=PATH --adapter b=PATH \\
        --data shots.csv --task text-classification --out mixture
    """
    if len(adapters) < 2:
        raise click.UsageError("a fit needs --adapter twice or more; for one adapter, see wlora-merge mix.")
    options |= {
        "weights": _numbers(weights, len(adapters)),
        "delta_scale": _number("--delta-scale", delta_scale) if delta_scale not in (None, "learned") else delta_scale,
        "initial_logits": _numbers_or_path(initial_logits),
    }
    with _wrong_usage():
        chosen = fit_options(_those_of(FitOptions, options))
        check_for_task(chosen, task, eval_data, options["eval_split"])
    from ..training.fit import fit as run

    with fit_progress() as progress, work_progress(), _naming_state(out):
        mixture = run(
            base,
            adapters,
            data,
            task,
            out,
            eval_data=eval_data,
            columns=_columns(columns),
            modules_to_save=modules_to_save,
            residual=base_is_residual,
            force=force,
            progress=progress,
            **options,
        )
    from ..distributed import is_leader

    if is_leader():
        _show_mixture(mixture, out, as_json)


# ----------------------------------------------------------------------------------------------------------- mix


@click.command(cls=Command)
@INPUTS
@OUT
@click.option("--weights", metavar="W,W,...", help="One weight for each adapter. Default: uniform composition.")
@click.option("--task", type=click.Choice(list(TASKS)), help="What the exported model is for; an ONNX export needs it.")
@click.option("--normalize", type=click.Choice(["all", "present"]), help="For uniform composition. Default: all.")
@click.option("--delta-scale", type=float, default=1.0, show_default=True, help="Factor of the whole delta weight.")
@MODULES_TO_SAVE
@RESIZE_VOCAB
@RESIDUAL
@FORCE
@AS_JSON
def mix(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    weights: str | None,
    base_is_residual: str | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Make a mixture without fitting: uniform composition, or the weights given.

    \b
    wlora-merge mix --base BASE --adapter a=PATH --adapter b=PATH --weights 0.7,0.3 --out mixture
    """
    from ..mixture.mix import mix as run

    row = _numbers(weights, len(adapters))
    with work_progress():
        mixture = run(base, adapters, out, weights=row, residual=base_is_residual, **rest)
    _show_mixture(mixture, out, as_json)


# -------------------------------------------------------------------------------------------------------- export


@click.command(cls=Command)
@click.argument("mixture", metavar="MIXTURE_DIR", type=click.Path())
@click.option("--format", "format_", required=True, type=click.Choice(constants.FORMATS), help="What to write.")
@OUT
@click.option("--rank", type=COUNT, help="lora: the uniform r. Default: the smallest that is exact.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="lora: smallest r that keeps this share (0 to 1) of the squared norm.",
)
@click.option(
    "--for", "server", type=click.Choice(constants.SERVERS), help="lora: refuse what this server would not load."
)
@click.option("--max-rank", type=COUNT, help="lora: refuse a larger r, as a server's --max-lora-rank does.")
@click.option("--dtype", type=DTYPES, help="Of the weights. Default: dense the base's, lora and onnx float32.")
@click.option("--max-shard-size", metavar="SIZE", help="dense: file size, as 5GB. Default: the base's own shards.")
@click.option("--opset", type=click.IntRange(17, 30), help="onnx: opset version. Default: 20.")
@click.option(
    "--onnx-base", metavar="PATH", help="onnx: an ONNX export of the base; rewrite its weights, trace nothing."
)
@click.option(
    "--onnx-runtime",
    type=click.Choice(constants.ONNX_RUNTIMES),
    help="onnx: write an onnxruntime-genai folder instead.",
)
@click.option(
    "--ort-fusions",
    type=click.Choice(constants.ONNX_PROVIDERS),
    help="onnx: ONNX Runtime's own operators for cpu, cuda, dml or webgpu.",
)
@click.option(
    "--quantize", type=click.Choice(constants.ONNX_QUANTIZE), help="onnx: a quantized graph beside the float one."
)
@MOVED
@click.option("--base-name", help="What the card and a lora's config call the base. Default: hub id or folder name.")
@click.option("--any-digest", is_flag=True, help="Accept inputs that are not those the mixture was made from.")
@click.option("--report/--no-report", default=False, show_default=True, help=REPORT_HELP)
@FORCE
@AS_JSON
def export(mixture: str, format_: str, out: str, max_shard_size: str | None, as_json: bool, **options: Any) -> None:
    """Fold a mixture and write it as dense safetensors, as one LoRA, or as ONNX.

    \b
    wlora-merge export mixture --format dense --out served
    wlora-merge export mixture --format lora --rank 64 --out adapter
    """
    options["max_shard_bytes"] = _bytes(max_shard_size)
    with _wrong_usage():
        export_options({"format": format_} | _those_of(ExportOptions, options))
    from ..distributed import is_leader
    from ..exporters.export import export as run
    from ..exporters.manifest import digest

    with work_progress():
        result = run(mixture, format_, out, **options)
    if not is_leader():
        return
    if as_json:
        table = {"folder": str(out), "format": format_, "bytes": result.bytes, "digest": digest(result.folder)}
        click.echo(json.dumps(table | {"report": result.report}))
        return
    report = result.report
    detail = ""
    if format_ == "lora":
        detail = f" r = {report['r']}, relative error {report['relative_error']:.2e}, energy kept {report['energy_kept']:.4%}."
    if "rewritten" in report:
        detail = f" {report['rewritten']} weights of {options['onnx_base']} rewritten."
    elif "same_tokens" in report:
        detail = f" {report['same_tokens']:.1%} of the greedy tokens are PyTorch's."
    elif format_ == "onnx":
        detail = f" Largest difference from PyTorch {report['largest_difference']:.2e}."
    if "quantized" in report:
        q = report["quantized"]
        detail += f" {q['file']}: off by {q['relative']:.2e} of the largest, same choice {q['same_choice']:.1%}."
    click.echo(f"Wrote {out} ({format_}, {human_bytes(result.bytes)}).{detail}\n{digest(result.folder)}")


# -------------------------------------------------------------------------------------------------------- verify


@click.command(cls=Command)
@click.argument("folder", metavar="EXPORT_DIR", type=click.Path())
@click.option("--quick", is_flag=True, help="Digests and headers alone. Default: load the model and compare outputs.")
@click.option("--digest", "pinned", metavar="sha256:...", help="Fail unless this is the digest that an export printed.")
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


@click.command(cls=Command)
@click.argument("recipe", metavar="RECIPE.yaml", type=click.Path())
@click.option("--out", type=click.Path(), help="Folder tree to write. Default: the recipe's name without .yaml.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, as fit.max_steps=30.")
@click.option(
    "--check", is_flag=True, help="Check the recipe and open its inputs (hub ids are fetched); train and write nothing."
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


# ------------------------------------------------------------------------------------------------------- inspect


@click.command(cls=Command)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path())
@AS_JSON
def inspect(paths: tuple[str, ...], as_json: bool) -> None:
    """Show adapters, a base model, a mixture or an export as tables.

    \b
    wlora-merge inspect BASE ADAPTER ADAPTER
    wlora-merge inspect mixture
    """
    from .inspect_tables import inspect_paths

    with work_progress():
        tables = inspect_paths(paths)
    if as_json:
        click.echo(json.dumps(tables))
        return
    for title, rows in tables.items():
        show_table(title, rows)


# --------------------------------------------------------------------------------------------------------- small


def _show_mixture(mixture: Any, out: str, as_json: bool) -> None:
    if as_json:
        mean = dict(zip(mixture.adapter_names, mixture.mixture_weights.mean(0).tolist(), strict=True))
        click.echo(json.dumps({"folder": out, "weights": mean, "metrics": mixture.metrics}))
        return
    from ..exporters.model_card import judged_on
    from .inspect_tables import candidate_rows, setting_rows, weight_rows

    candidates = candidate_rows(mixture)
    if candidates:
        show_table(judged_on(mixture.metrics), candidates)
    if settings := setting_rows(mixture):
        show_table("Out of fold", settings)
    if mixture.metrics.get("note"):
        click.echo(mixture.metrics["note"])
    show_table("Mixture weights over the groups", weight_rows(mixture))
    click.echo(f"Wrote {out}.")


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


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{text!r}: expected NAME=VALUE.")
    return name, value


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [_pair(text) for text in given]
    if twice := [name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1]:
        raise click.UsageError(f"--column {twice[0]}=... is given twice.")
    return dict(pairs)


def _numbers(text: str | None, count: int) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--weights {text!r}: expected numbers with commas between them, as 0.5,0.5.") from error
    if not all(map(math.isfinite, numbers)):
        raise click.UsageError(f"--weights {text!r}: expected finite numbers.")
    if len(numbers) != count:
        raise click.UsageError(
            f"--weights {text!r}: has {len(numbers)} numbers, expected one for each of {count} adapters."
        )
    return numbers


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise click.UsageError(f"{option} {text!r}: expected a number, or learned.") from error


def _numbers_or_path(text: str | None) -> list[float] | str | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        return text


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    digits = text.rstrip("KMGiIBkmgb ")
    unit = text[len(digits) :].strip().upper()
    try:
        return int(float(digits) * UNITS[unit])
    except (ValueError, KeyError) as error:
        raise click.UsageError(f"--max-shard-size {text!r}: expected a size, as 5GB or 500MB.") from error
