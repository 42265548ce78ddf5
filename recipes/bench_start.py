"""How long it takes from Enter to the answer: the most common mistakes, and `inspect`.

    python recipes/bench_start.py --base BASE --adapter ADAPTER --adapter ADAPTER --rounds 5

Makes a mixture, an export, and beside them inputs that are wrong in one way each. Then it runs every command in a process of its own,
round after round; the first round warms the caches and does not count. Prints medians of the seconds on the clock and of the seconds
of CPU, whose sum over threads may be larger. The messages are those of docs/troubleshooting.md that need no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIT = "fit --base base --adapter a=a --adapter b=b --out new --data"
CLASSIFY = "--task text-classification"
MISTAKES = {
    "a base that is not there": "mix --base ./bsae --adapter a=a --out new",
    "a hub id that is not there": "mix --base org/name --adapter a=a --out new",
    "one adapter for a fit": "fit --base base --adapter a=a --data reviews.csv --task causal-lm --out new",
    "a base of pickles": "mix --base picklebase --adapter a=a --out new",
    "an adapter that is a pickle": "mix --base base --adapter a=pickle --out new",
    "a base for an adapter": "mix --base base --adapter a=base --out new",
    "an IA3 adapter": "mix --base base --adapter a=ia3 --out new",
    "an adapter of another size": "mix --base base --adapter b=b --adapter a=wide --out new",
    "a PiSSA adapter": "mix --base base --adapter a=pissa --out new",
    "an unknown config field": "mix --base base --adapter a=strange --out new",
    "a head that nobody chose": "mix --base base --adapter b=b --adapter a=head --out new",
    "a download that was cut": "mix --base base --adapter b=b --adapter a=cut --out new",
    "columns of other names": f"{FIT} reviews.csv {CLASSIFY}",
    "columns that may be meant": f"{FIT} qa.csv --task causal-lm",
    "a broken line of JSON": f"{FIT} broken.jsonl --task causal-lm",
    "a quote without an end": f"{FIT} quote.csv {CLASSIFY}",
    "one class alone": f"{FIT} same.csv {CLASSIFY}",
    "shots as evaluation data": f"{FIT} shots.csv --eval-data shots.csv {CLASSIFY}",
    "an --out that is not empty": "mix --base base --adapter a=a --out mixture",
    "a dense export of a quantized base": "export over-gptq --format dense --out new",
    "a base that has moved": "export moved --format dense --out new",
    "an adapter that has changed": "export changed --format dense --out new",
    "verify of a mixture": "verify mixture",
    "verify of a changed export": "verify served",
    "an unknown key of a recipe": "run recipe.yaml --set fit.max_stps=3 --check",
}
LOOKS = {
    "inspect of a base": "inspect base",
    "inspect of adapters": "inspect {adapters}",
    "inspect of a base and adapters": "inspect base {adapters}",
    "the same with --norms": "inspect base {adapters} --norms",
    "inspect of a mixture": "inspect mixture",
    "inspect of an export": "inspect served",
}


def linked(work: Path, name: str, like: Path) -> Path:
    """A folder with the files of another: hard links, or copies where those lie on another disk."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in like.iterdir():
        if file.is_file():
            try:
                os.link(file.resolve(), folder / file.name)
            except OSError:
                shutil.copy(file, folder / file.name)
    return folder


def replaced(file: Path, content: bytes) -> None:
    """Another content in the place of a link."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def configured(folder: Path, **changes: Any) -> Path:
    """The folder, its config with some keys changed."""
    (file,) = [folder / name for name in ("adapter_config.json", "config.json") if (folder / name).exists()]
    replaced(file, json.dumps(json.loads(file.read_bytes()) | changes).encode())
    return folder


def make_adapters(work: Path, adapter: Path) -> None:
    """Adapters that are wrong in one way each."""
    import torch
    from safetensors.torch import load_file, save

    for name, changes in {
        "ia3": {"peft_type": "IA3"},
        "pissa": {"init_lora_weights": "pissa"},
        "strange": {"some_new_field": 3},
    }.items():
        configured(linked(work, name, adapter), **changes)
    weights = "adapter_model.safetensors"
    (linked(work, "pickle", adapter) / weights).rename(work / "pickle" / "adapter_model.bin")
    replaced(linked(work, "cut", adapter) / weights, (adapter / weights).read_bytes()[:-40])
    tensors = load_file(adapter / weights)
    wide = {key: torch.cat([t, t], 1) if "lora_A" in key else t for key, t in tensors.items()}
    replaced(linked(work, "wide", adapter) / weights, save(wide))
    head = {"base_model.model.score.weight": torch.ones(2, 8)}
    replaced(configured(linked(work, "head", adapter), modules_to_save=["score"]) / weights, save(tensors | head))


def make_mixtures(work: Path) -> None:
    """A mixture and an export, and what is wrong of their kind."""
    from wlora_merge import export, mix

    adapters = [f"{name}={work / name}" for name in "ab"]
    mix(work / "base", adapters, work / "mixture", force=True)
    export(work / "mixture", "dense", work / "served", force=True)
    config = work / "served" / "config.json"
    replaced(config, config.read_bytes() + b" ")
    gptq = {"quant_method": "gptq", "bits": 4}
    mix(
        configured(linked(work, "gptq", work / "base"), quantization_config=gptq),
        adapters,
        work / "over-gptq",
        force=True,
    )
    gone = linked(work, "gone", work / "base")
    mix(gone, adapters, work / "moved", force=True)
    shutil.rmtree(gone)
    other = linked(work, "other", work / "a")
    mix(work / "base", [f"a={other}", adapters[1]], work / "changed", force=True)
    configured(other, lora_alpha=1)


def prepare(work: Path, base: Path, adapters: Sequence[Path]) -> None:
    """Everything that the commands name."""
    linked(work, "base", base)
    for number, adapter in enumerate(adapters):
        linked(work, "abcdefgh"[number], adapter)
    make_adapters(work, adapters[0])
    weights = linked(work, "picklebase", base)
    for file in [*weights.glob("*.safetensors"), *weights.glob("*.safetensors.index.json")]:
        file.rename(file.with_name("pytorch_model.bin"))
    texts = {
        "reviews.csv": "review,stars\na gem,x\na bore,y\n",
        "qa.csv": "question,passage,completion\na gem,x y,z\na bore,x,z\n",
        "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
        "quote.csv": 'text,label\n"a gem,x\na bore,y\n',
        "same.csv": "text,label\na gem,x\na bore,x\n",
        "shots.csv": "text,label\na gem,x\na bore,y\n",
        "recipe.yaml": "base: base\nadapters: [a=a, b=b]\nfit: {data: shots.csv, task: text-classification}\nexports: {dense: {}}\n",
    }
    for name, text in texts.items():
        (work / name).write_text(text)
    make_mixtures(work)


def seconds_of(words: Sequence[str], work: Path, *, fails: bool) -> tuple[float, float]:
    """Run one command: its seconds on the clock, and of CPU."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "wlora_merge", *words],
        cwd=work,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if (child.returncode in (1, 2)) != fails:
        raise SystemExit(f"wlora-merge {shlex.join(words)}: exit code {child.returncode}")
    return wall, used.ru_utime + used.ru_stime


def main() -> None:
    """Prepare, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--adapter", type=Path, action="append", required=True, help="folder of an adapter; twice or more"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--out", type=Path, default=Path("bench-out/start"), help="working folder; it is kept")
    options = parser.parse_args()
    work = options.out.resolve()
    prepare(work, options.base, options.adapter)
    adapters = " ".join("abcdefgh"[: len(options.adapter)])
    commands = {what: (command, True) for what, command in MISTAKES.items()}
    commands |= {what: (command.format(adapters=adapters), False) for what, command in LOOKS.items()}
    taken: dict[str, list[tuple[float, float]]] = {what: [] for what in commands}
    for number in range(options.rounds + 1):
        for what, (command, fails) in commands.items():
            found = seconds_of(shlex.split(command), work, fails=fails)
            if number:
                taken[what].append(found)
    console = Console(highlight=False)
    console.print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    console.print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets")))
    table = Table(title=f"From Enter to the answer: medians of {options.rounds} rounds", title_justify="left")
    for column in ("what", "seconds", "spread", "of CPU"):
        table.add_column(column, justify="left" if column == "what" else "right")
    walls = {what: [wall for wall, _ in rounds] for what, rounds in taken.items()}
    for what, rounds in taken.items():
        spread = f"{min(walls[what]):.2f} to {max(walls[what]):.2f}"
        cpu = statistics.median(cpu for _, cpu in rounds)
        table.add_row(what, f"{statistics.median(walls[what]):.2f}", spread, f"{cpu:.2f}")
    console.print(table)
    slowest = max(MISTAKES, key=lambda what: statistics.median(walls[what]))
    console.print(f"The slowest of {len(MISTAKES)} mistakes: {slowest}.")


if __name__ == "__main__":
    main()
