"""How fast a refold is, against exporting the same mixture to ONNX again.

    python recipes/bench_onnx.py --base BASE --adapter ADAPTER --adapter ADAPTER --task causal-lm --rounds 5

Makes a mixture and an ONNX export of its base, then runs both commands in turn, each whole (its imports, checks and digests
included) and in a process of its own, round after round, with `sync` before each run; the first round warms the caches and does
not count. Beside them: the trace and its tidying alone, and the floor of a refold, which copies the file, imports torch and
multiplies the factors. Prints medians and ratios, and whether the two exports have the same weights and outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
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
from wlora_merge.data.tasks import get_task
from wlora_merge.models.loading import quiet
from wlora_merge.onnx.dummy_inputs import load_model
from wlora_merge.onnx.trace import trace
task = get_task(sys.argv[2])
model = load_model(Path(sys.argv[1]), task, torch.float32, attention="eager")
start = time.perf_counter()
graphs = trace(model, task, 20)
with quiet():
    for graph in graphs.values():
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
print(json.dumps(time.perf_counter() - start))
"""
BASE = """
import sys
from pathlib import Path
from wlora_merge.onnx.convert import write_onnx
Path(sys.argv[2]).mkdir()
write_onnx(Path(sys.argv[1]), Path(sys.argv[2]), task=sys.argv[3])
"""


def prepare(work: Path, base: Path, adapters: list[Path], task: str) -> None:
    """The mixture and the ONNX export of its base, where they are not there yet."""
    from wlora_merge.mixture.mix import mix

    if not (work / "mixture").exists():
        mix(base, adapters, work / "mixture", task=task)
    if not (work / "base" / "onnx").exists():
        shutil.rmtree(work / "base", ignore_errors=True)
        subprocess.run([sys.executable, "-c", BASE, str(base), str(work / "base"), task], check=True)


def seconds_of(command: list[str], output: Path | None, prints: bool) -> float:
    """Run once, in a process of its own: the seconds that it prints, or those that it took."""
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])) if prints else seconds


def differences(one: Path, two: Path) -> int:
    """How many weights of two ONNX exports differ, by name and by every byte."""
    import onnx

    count = 0
    for file in sorted((one / "onnx").glob("*.onnx")):
        models = [onnx.load(str(folder / "onnx" / file.name)) for folder in (one, two)]
        weights = [{t.name: t.raw_data for t in model.graph.initializer} for model in models]
        count += sum(weights[0].get(name) != weights[1].get(name) for name in {*weights[0], *weights[1]})
    return count


def main() -> None:
    """Prepare, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--adapter", type=Path, action="append", required=True, help="folder of an adapter; twice or more"
    )
    parser.add_argument("--task", default="causal-lm", help="of the mixture")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--out", type=Path, default=Path("bench-out/onnx"), help="working folder; it is kept")
    options = parser.parse_args()
    work = options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, options.base, options.adapter, options.task)
    console = Console(highlight=False)
    console.print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    console.print(
        ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxscript", "onnxruntime"))
    )
    python, export = sys.executable, [sys.executable, "-m", "wlora_merge", "export", str(work / "mixture")]
    traced, refolded, copy = (work / name for name in ("traced", "refolded", "copy"))
    contenders: dict[str, tuple[list[str], Path | None, bool]] = {
        "export --format onnx": ([*export, "--format", "onnx", "--out", str(traced)], traced, False),
        "the trace and its tidying alone": ([python, "-c", TRACE, str(options.base), options.task], None, True),
        "export --format onnx --onnx-base": (
            [*export, "--format", "onnx", "--onnx-base", str(work / "base"), "--out", str(refolded)], refolded, False,
        ),
        "import torch, read and multiply the factors, copy": (
            [python, "-c", FLOOR, str(work / "mixture"), str(work / "base"), str(copy)], copy, True,
        ),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name, contender in contenders.items():
            taken = seconds_of(*contender)
            if number:
                seconds[name].append(taken)
    table = Table(title="ONNX: medians over the rounds", title_justify="left")
    for column in ("what", "seconds", "spread"):
        table.add_column(column, justify="left" if column == "what" else "right")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        table.add_row(name, f"{median[name]:.2f}", f"{min(values):.2f} to {max(values):.2f}")
    console.print(table)
    whole, trace, refold, floor = median.values()
    console.print(f"export again / refold: {whole / refold:.1f}×, the trace alone / refold: {trace / refold:.1f}×")
    console.print(f"refold / (import torch, matmuls, copy): {refold / floor:.2f}×")
    console.print(f"weights that differ between the two exports: {differences(traced, refolded)}")


if __name__ == "__main__":
    main()
