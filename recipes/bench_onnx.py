"""How fast an ONNX export is: traced, with a graph that was traced before, and as a refold.

    python recipes/bench_onnx.py --base BASE --adapter ADAPTER --adapter ADAPTER --task causal-lm --rounds 4

Makes a mixture, a dense export of it, and an ONNX export of its base: a mixture with a delta scale of 0, whose graph is kept. Then
it runs the commands in turn, each whole (its imports, checks and digests included) and in a process of its own, round after round,
with `sync` before each run. The first round warms the caches and does not count. The commands that trace run in two rounds alone:
they are slow, vary little, and need no warming, as the base was traced just before. Beside them: the trace and its tidying alone,
and two floors. A refold's floor imports torch, multiplies the factors and copies the files; an export's also runs the check once.

Prints each run as it ends. At the end, or when Ctrl-C stops it: medians of seconds and of CPU seconds (all threads, user and
system), ratios, and whether the exports have the same bytes, or the same weights.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Prints the seconds of the step, without the imports before it
TRACE = """
import json, sys, time
from pathlib import Path
import torch, transformers.exporters
from wlora_merge.onnx.graph import tidy
from wlora_merge.onnx.weights import take_weights
from wlora_merge.data.tasks import get_task
from wlora_merge.models.loading import quiet
from wlora_merge.onnx.dummy_inputs import load_model
from wlora_merge.onnx.trace import trace
task = get_task(sys.argv[2])
model = load_model(Path(sys.argv[1]), task, torch.float32, attention="eager")
start = time.perf_counter()
graphs = trace(model, task, 20)
for graph in graphs.values():
    take_weights(graph.graph, model)
    with quiet():
        tidy(graph)
print(json.dumps(time.perf_counter() - start))
"""
FLOOR = """
import json, shutil, sys, time
start = time.perf_counter()
import torch
from wlora_merge.mixture.fold import fold_factors
from wlora_merge.mixture.inputs import find_inputs
inputs = find_inputs(sys.argv[1])
for delta in inputs.deltas:
    left, right = fold_factors(delta, inputs.mixture.gains_of(delta))
    torch.mm(left, right)
shutil.copytree(sys.argv[2], sys.argv[3])
if len(sys.argv) > 4:
    from pathlib import Path
    from wlora_merge.onnx.validate import check_onnx
    check_onnx(Path(sys.argv[3]), Path(sys.argv[4]), task=sys.argv[5])
print(json.dumps(time.perf_counter() - start))
"""
SLOW_ROUNDS = 2

TRACED, ALONE, CACHED = "export, traced", "the trace and its tidying alone", "export, its graph traced before"
CHECKED = "import torch, multiply, copy, check once"
REFOLDED, COPIED = "refold", "import torch, multiply, copy"


def prepare(work: Path, base: Path, adapters: list[Path], task: str) -> None:
    """The mixture, its dense export and the ONNX export of its base, whose graph is kept; where they are not there yet."""
    from wlora_merge.exporters.export import export
    from wlora_merge.mixture.mix import mix

    if not (work / "mixture").exists():
        mix(base, adapters, work / "mixture", task=task)
    if not (work / "unchanged").exists():
        mix(base, adapters, work / "unchanged", task=task, delta_scale=0)
    if not (work / "dense").exists():
        export(work / "mixture", "dense", work / "dense", dtype="float32")
    if not (work / "base").exists() or not (work / "cache" / "graphs").exists():
        export(work / "unchanged", "onnx", work / "base", force=True)


def taken(command: list[str], output: Path | None, prints: bool) -> tuple[float, float]:
    """Run once, in a process of its own: the seconds that it prints, or those that it took, and its CPU seconds."""
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    os.sync()
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(json.loads(done.stdout.splitlines()[-1])) if prints else seconds, cpu


def same_files(one: Path, two: Path) -> bool:
    """Whether two exports have the same files, byte for byte."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in (one, two)]
    return names[0] == names[1] and not filecmp.cmpfiles(one, two, names[0], shallow=False)[1]


def differences(one: Path, two: Path) -> int:
    """How many weights of two ONNX exports differ, by name and by every byte."""
    import onnx

    count = 0
    for file in sorted((one / "onnx").glob("*.onnx")):
        models = [onnx.load(str(folder / "onnx" / file.name)) for folder in (one, two)]
        weights = [{t.name: t.raw_data for t in model.graph.initializer} for model in models]
        count += sum(weights[0].get(name) != weights[1].get(name) for name in {*weights[0], *weights[1]})
    return count


@dataclass(frozen=True)
class Contender:
    """What is measured: a command, the folder that it writes, whether it prints its seconds, and whether it is slow."""

    command: list[str]
    output: Path | None = None
    prints: bool = False
    slow: bool = False


Runs = dict[str, list[tuple[float, float]]]
"""Name of a contender -> seconds and CPU seconds of each counted run."""


def run_rounds(contenders: dict[str, Contender], rounds: int, runs: Runs, console: Console) -> None:
    """Measure all contenders in turn; each counted run is added to `runs` and printed as it ends."""
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            if contender.slow and not 0 < number <= SLOW_ROUNDS:
                continue
            wall, cpu = taken(contender.command, contender.output, contender.prints)
            if number:
                runs.setdefault(name, []).append((wall, cpu))
            console.print(f"round {number}{'' if number else ' (not counted)'}, {name}: {wall:.2f} s, CPU {cpu:.2f} s")


def summarize(runs: Runs, contenders: dict[str, Contender], console: Console) -> None:
    """The medians, their ratios, and what the exports share, of all that was measured."""
    table = Table(title="ONNX: medians over the rounds", title_justify="left")
    for column in ("what", "runs", "seconds", "spread", "CPU seconds"):
        table.add_column(column, justify="left" if column == "what" else "right")
    seconds = {name: statistics.median(wall for wall, _ in values) for name, values in runs.items()}
    cpu = {name: statistics.median(used for _, used in values) for name, values in runs.items()}
    for name, values in runs.items():
        spread = f"{min(wall for wall, _ in values):.2f} to {max(wall for wall, _ in values):.2f}"
        table.add_row(name, str(len(values)), f"{seconds[name]:.2f}", spread, f"{cpu[name]:.2f}")
    console.print(table)
    for one, other in ((TRACED, CACHED), (CACHED, CHECKED), (TRACED, REFOLDED), (REFOLDED, COPIED), (ALONE, TRACED)):
        if {one, other} <= {*runs}:
            ratios = f"{seconds[one] / seconds[other]:.2f}, of CPU seconds {cpu[one] / cpu[other]:.2f}"
            console.print(f"{one} / {other}: {ratios}")
    traced, cached, refolded = (contenders[name].output or Path() for name in (TRACED, CACHED, REFOLDED))
    if {TRACED, CACHED} <= {*runs} and traced.is_dir() and cached.is_dir():
        console.print(f"traced and cached export are the same, byte for byte: {same_files(traced, cached)}")
    if {TRACED, REFOLDED} <= {*runs} and traced.is_dir() and refolded.is_dir():
        console.print(f"weights that differ between the traced export and the refold: {differences(traced, refolded)}")


def main() -> None:
    """Prepare, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--adapter", type=Path, action="append", required=True, help="folder of an adapter; twice or more"
    )
    parser.add_argument("--task", default="causal-lm", help="of the mixture")
    parser.add_argument("--rounds", type=int, default=4, help="counted rounds, at least 2")
    parser.add_argument("--out", type=Path, default=Path("bench-out/onnx"), help="working folder; it is kept")
    options = parser.parse_args()
    work = options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    console.print(
        ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxscript", "onnxruntime"))
    )
    os.environ["WLORA_MERGE_CACHE"] = str(work / "cache")
    prepare(work, options.base, options.adapter, options.task)
    python, export = sys.executable, [sys.executable, "-m", "wlora_merge", "export", str(work / "mixture")]
    traced, cached, refolded, copy = (work / name for name in ("traced", "cached", "refolded", "copy"))
    as_onnx = [*export, "--format", "onnx", "--out"]
    floor = [python, "-c", FLOOR, str(work / "mixture")]
    contenders = {
        TRACED: Contender([*as_onnx, str(traced), "--no-trace-cache"], traced, slow=True),
        ALONE: Contender([python, "-c", TRACE, str(options.base), options.task], prints=True, slow=True),
        CACHED: Contender([*as_onnx, str(cached)], cached),
        CHECKED: Contender([*floor, *map(str, (cached, copy, work / "dense")), options.task], copy, prints=True),
        REFOLDED: Contender([*as_onnx, str(refolded), "--onnx-base", str(work / "base")], refolded),
        COPIED: Contender([*floor, *map(str, (work / "base", copy))], copy, prints=True),
    }
    runs: Runs = {}
    try:
        run_rounds(contenders, options.rounds, runs, console)
    except KeyboardInterrupt:
        console.print("stopped; what was measured until then:")
    summarize(runs, contenders, console)


if __name__ == "__main__":
    main()
