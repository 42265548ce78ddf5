"""How good a fit is on few shots, against everything simpler; and how fast a step of it is.

    python recipes/bench_fit quality --jobs banking:g5,minilm:mr --shots 1,4 --seeds 5
    python recipes/bench_fit speed
    python recipes/bench_fit many --zoo zoo-out/minilm --jobs banking:g3,banking:g4 --shots 2,8
    python recipes/bench_fit screening --jobs smollm2:mr --rounds 3 --fit "--method uniform --folds 0"
    python recipes/bench_fit launches

`quality` trains every method on the same shots and judges all on the same test examples. Each result goes to a JSON Lines
file as soon as it is there; a run that was stopped goes on where it stopped. `many` lets `fit --keep` and others choose eight
of the adapters that recipes/zoo trains; `screening` says what that costs. `speed` compares a training step with the base
model's own; `launches` compares how many kernels the two launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPORTED = "banking:g0,banking:g3,banking:g4,banking:g5,minilm:mr,minilm:subj,minilm:sst2,smollm2:mr,bbh:navigate"
FIT = "wlora-merge fit"


def quality(options: argparse.Namespace) -> None:
    from methods import METHODS, trial

    results = options.out / "quality.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    known = {(r["job"], r["method"], r["shots"], r["seed"]) for r in done}
    jobs, methods = options.jobs.split(","), options.methods.split(",") if options.methods else list(METHODS)
    numbers = [int(n) for n in options.shots.split(",")]
    wanted = [
        (job, method, n, seed)
        for seed, n, job, method in itertools.product(range(options.seeds), numbers, jobs, methods)
    ]
    os.environ["PROCESSES"] = str(options.processes)
    with (
        open(results, "a") as log,
        ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool,
    ):
        running = [pool.submit(trial, *one, options.models) for one in wanted if one not in known]
        for number, future in enumerate(as_completed(running), 1):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            row = future.result()
            done.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(f"{number}/{len(running)} {row}", file=sys.stderr)
    chosen = set(wanted)
    show([r for r in done if (r["job"], r["method"], r["shots"], r["seed"]) in chosen], methods, numbers, jobs, options)


def show(
    rows: list[dict[str, Any]], methods: list[str], numbers: list[int], jobs: list[str], options: argparse.Namespace
) -> None:
    """One table for each family of jobs: mean over jobs and seeds, and the standard error of the mean."""
    console = Console(highlight=False, width=110)
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    )
    for family in dict.fromkeys(job.partition(":")[0] for job in jobs):
        part = [r for r in rows if r["job"].startswith(f"{family}:")]
        names = ", ".join(job for job in jobs if job.startswith(f"{family}:"))
        table = Table(title=f"{names}; {options.seeds} seeds", title_justify="left")
        table.add_column("method")
        for n in numbers:
            table.add_column(f"{n} shot{'s' * (n > 1)}", justify="right")
        table.add_column("seconds", justify="right")
        table.add_column("parameters", justify="right")
        for method in methods:
            mine = [r for r in part if r["method"] == method]
            if mine:
                cells = [_mean([r["accuracy"] for r in mine if r["shots"] == n]) for n in numbers]
                seconds = f"{statistics.median(r['seconds'] for r in mine):.1f}"
                table.add_row(method, *cells, seconds, f"{round(statistics.median(r['parameters'] for r in mine)):,}")
        console.print(table)
    if FIT in methods:
        console.print(_ahead(rows, [m for m in methods if m != FIT], numbers))


def _ahead(rows: list[dict[str, Any]], others: list[str], numbers: list[int]) -> Table:
    """By how much the fit is ahead of the other methods, over the cells (job, shots, seed) that both have."""
    table = Table(title=f"{FIT} ahead of, all jobs, paired", title_justify="left")
    table.add_column("method")
    for title in (*map(str, numbers), "all", "cells"):
        table.add_column(title, justify="right")
    found = {(r["job"], r["shots"], r["seed"], r["method"]): r["accuracy"] for r in rows}
    for other in others:
        leads = [
            (n, accuracy - found[job, n, seed, other])
            for (job, n, seed, method), accuracy in found.items()
            if method == FIT and (job, n, seed, other) in found
        ]
        cells = [_mean([lead for n, lead in leads if n == number], sign="+") for number in numbers]
        table.add_row(other, *cells, _mean([lead for _, lead in leads], sign="+"), str(len(leads)))
    return table


def _mean(values: list[float], sign: str = "") -> str:
    if not values:
        return "–"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.1f} ± {error:.1f}"


def speed(options: argparse.Namespace) -> None:
    from speed import CONTENDERS, TOKENS, speed_rows

    contenders = options.contenders.split(",") if options.contenders else CONTENDERS
    console = Console(highlight=False)
    what = f"SmolLM2-135M, {options.batch} × {TOKENS} tokens, all seven linear layers"
    table = Table(title=f"A training step: {what}", title_justify="left")
    for column in ("adapters", "what", "seconds", "× floor", "GB", "× floor"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in speed_rows(contenders, options.models / "smollm2", options.out, options.batch, options.rounds):
        table.add_row(*row)
    console.print(table)


def launches(options: argparse.Namespace) -> None:
    from launches import launch_rows

    table = Table(title="Launches of a training step: SmolLM2-135M, all seven linear layers", title_justify="left")
    for column in ("adapters", "dtype", "base", "attached", "× base"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for row in launch_rows(options.models / "smollm2", options.out):
        table.add_row(*row)
    Console(highlight=False).print(table)


def many(options: argparse.Namespace) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
    from many import SCREENED, compare
    from processes import workers

    results, jobs = options.out / "many.jsonl", options.jobs.split(",")
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(r["job"], r["shots"], r["seed"]) for r in rows}
    numbers = [int(n) for n in options.shots.split(",")]
    cells = list(itertools.product(jobs, numbers, range(options.seeds)))
    wanted = [cell for cell in cells if cell not in done]
    with open(results, "a") as log, workers(options.processes) as pool:
        for found in pool.map(partial(compare, models=options.models, zoo=options.zoo), wanted):
            rows += found
            log.writelines(json.dumps(row) + "\n" for row in found)
            log.flush()
            print(found[0], file=sys.stderr)
    rows = [r for r in rows if (r["job"], r["shots"], r["seed"]) in set(cells)]
    table = Table(title="Of many adapters, which eight", title_justify="left")
    for column in (
        "method",
        *(f"{job}, {n} shots" for job in jobs for n in numbers),
        "behind --keep, paired",
        "CPU-seconds",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    known = {(r["job"], r["shots"], r["seed"], r["method"]): r for r in rows}
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        leads = [known[r["job"], r["shots"], r["seed"], SCREENED]["accuracy"] - r["accuracy"] for r in mine]
        seconds = [r["cpu_seconds"] for r in mine if "cpu_seconds" in r]
        means = [
            _mean([r["accuracy"] for r in mine if (r["job"], r["shots"]) == (job, n)]) for job in jobs for n in numbers
        ]
        table.add_row(method, *means, _mean(leads, "+"), f"{statistics.median(seconds):.1f}" if seconds else "")
    Console(highlight=False, width=140).print(table)


def screening(options: argparse.Namespace) -> None:
    from jobs import get_job
    from screen_cost import measure

    for name in options.jobs.split(","):
        table = Table(
            title=f"fit --keep {options.keep} {options.fit}: {name}, four shots per class", title_justify="left"
        )
        for column in ("adapters", "seconds", "peak RSS, MB"):
            table.add_column(column, justify="right")
        counts = [int(n) for n in options.counts.split(",")]
        job, asked = get_job(name, options.models), ["--keep", str(options.keep), *options.fit.split()]
        for command in measure(job, counts, asked, options.rounds, options.out):
            table.add_row(*command.row())
        Console(highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench_fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["quality", "many", "screening", "speed", "launches"])
    parser.add_argument("--jobs", default=REPORTED, help="with commas between them")
    parser.add_argument("--methods", help="with commas between them; default: all")
    parser.add_argument("--shots", default="1,2,4,8,16", help="per class, with commas between them")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the shots")
    parser.add_argument("--rounds", type=int, default=7, help="of the speed table")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step in the speed table")
    parser.add_argument("--contenders", help="of the speed table, floor first, with commas between them; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("bench-out/fit"), help="results; a stopped run goes on there")
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(os.environ.get("WLORA_MERGE_REAL_MODELS", "~/.cache/wlora_merge/real-models")).expanduser(),
        help="folder with minilm and smollm2, as ../shared/tools/get_real_models.py makes it",
    )
    parser.add_argument("--keep", type=int, default=8, help="of screening: how many adapters are kept")
    parser.add_argument("--fit", default="", help="of screening: more options of the fit, as one text")
    parser.add_argument("--counts", default="8,64,500", help="of screening: adapters, with commas between them")
    parser.add_argument("--zoo", type=Path, default=Path("zoo-out/minilm"), help="of many: what recipes/zoo has made")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"quality": quality, "many": many, "screening": screening, "speed": speed, "launches": launches}[options.what](
        options
    )


if __name__ == "__main__":
    main()
