"""How fast an export is, against PEFT's merge and `cp` of the same folder; how much memory it takes.

    python recipes/bench_export.py --size 1b --rounds 5
    python recipes/bench_export.py --adapters 64 --without-peft --svd-rounds 0

Makes a synthetic Llama checkpoint with `../shared/tools/mk_synth.py` (sizes tiny, 125m, 1b; 7b is made here, and takes 27 GB of
disk), then runs each contender in turn in a process of its own, round after round, with `sync` before each run. The first round
warms the caches and measures memory, by sampling, which slows a process down; its time does not count. Prints medians, ratios,
and the peak memory of each process; anonymous memory apart from RSS, as mapped pages count in RSS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

TOOL = Path(__file__).resolve().parents[2] / "shared" / "tools" / "mk_synth.py"
RANK = 32  # of the lora export
ADAPTER_RANK = 16

PEFT_DENSE = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapters, out, n = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, f"{adapters}/a0", adapter_name="a0")
for i in range(1, n): model.load_adapter(f"{adapters}/a{i}", adapter_name=f"a{i}")
names = [f"a{i}" for i in range(n)]
model.add_weighted_adapter(names, [1 / n] * n, "merged", combination_type="cat")
model.set_adapter("merged")
model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""
MATMULS = """
import sys, torch
from safetensors import safe_open
from pathlib import Path
R, dtype = int(sys.argv[2]), getattr(torch, sys.argv[3])
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(file, "pt") as f:
        for name in f.keys():
            if "_proj" in name:
                out, cols = f.get_slice(name).get_shape()
                torch.mm(torch.ones(out, R, dtype=dtype), torch.ones(R, cols, dtype=dtype))
"""
PEFT_SVD = """
import sys, time, torch, json
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapters, n, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, f"{adapters}/a0", adapter_name="a0")
for i in range(1, n): model.load_adapter(f"{adapters}/a{i}", adapter_name=f"a{i}")
names = [f"a{i}" for i in range(n)]
start = time.perf_counter()
model.add_weighted_adapter(names, [1 / n] * n, "svd", combination_type="svd", svd_rank=rank, svd_full_matrices=False)
print(json.dumps(time.perf_counter() - start))
"""
OURS_SVD = """
import sys, time, json
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.exporters.lora import as_one_lora
inputs = find_inputs(sys.argv[1])
start = time.perf_counter()
as_one_lora(inputs.mixture, inputs.deltas, rank=int(sys.argv[2]))
print(json.dumps(time.perf_counter() - start))
"""


@dataclass
class Contender:
    """A command, and what was measured of it: seconds, peak RSS and peak anonymous memory in bytes."""

    name: str
    command: list[str]
    output: Path | None = None
    seconds: list[float] = field(default_factory=list)
    rss: int = 0
    anonymous: int = 0


def run(contender: Contender, counted: bool) -> None:
    """Run once, in a process of its own: for its time if the run counts, else for its memory, sampled every 10 ms."""
    if contender.output:
        shutil.rmtree(contender.output, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(contender.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = {"Rss": 0, "Anonymous": 0}
    watcher = threading.Thread(target=_watch, args=(process.pid, peak))
    if not counted:
        watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{contender.name} failed:\n{errors.decode()[-2000:]}")
    if counted:
        contender.seconds.append(seconds)
    else:
        watcher.join()
        contender.rss, contender.anonymous = peak["Rss"], peak["Anonymous"]
    if contender.output:
        shutil.rmtree(contender.output)


def _watch(pid: int, peak: dict[str, int]) -> None:
    file = Path(f"/proc/{pid}/smaps_rollup")
    while True:
        try:
            lines = file.read_text().splitlines()
        except (OSError, ProcessLookupError):
            return
        if len(lines) < 2:
            return
        for line in lines[1:]:
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(rest.split()[0]) * 1024)
        time.sleep(0.01)


def contenders(work: Path, adapters: int) -> list[Contender]:
    base, mixture = work / "base", work / "mixture"
    python, ours = sys.executable, [sys.executable, "-m", "wlora_merge", "export", str(mixture)]
    found = [
        Contender("cp -r", ["cp", "-r", str(base), str(work / "copy")], work / "copy"),
        Contender("python -c 'import torch'", [python, "-c", "import torch"]),
        *(
            Contender(
                f"import torch and the bare matmuls, {dtype}",
                [python, "-c", MATMULS, str(base), str(ADAPTER_RANK * adapters), dtype],
            )
            for dtype in ("float32", "float64")
        ),
        Contender(
            "imports of an export", [python, "-c", "import wlora_merge.cli.main, wlora_merge.exporters.export, torch"]
        ),
        Contender(
            "wlora-merge export dense", [*ours, "--format", "dense", "--out", str(work / "dense")], work / "dense"
        ),
        Contender(
            f"wlora-merge export lora --rank {RANK}",
            [*ours, "--format", "lora", "--rank", str(RANK), "--out", str(work / "lora")],
            work / "lora",
        ),
        Contender(
            "PEFT cat, merge_and_unload, save_pretrained",
            [python, "-c", PEFT_DENSE, str(base), str(work / "adapters"), str(work / "peft"), str(adapters)],
            work / "peft",
        ),
    ]
    if find_spec("mergekit"):
        found.append(_mergekit(work, adapters))
    return found


def _mergekit(work: Path, adapters: int) -> Contender:
    recipe = work / "mergekit.yaml"
    models = [
        {"model": f"{work / 'base'}+{work / 'adapters' / f'a{i}'}", "parameters": {"weight": 1 / adapters}}
        for i in range(adapters)
    ]
    recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": models}))
    return Contender("mergekit linear", ["mergekit-yaml", str(recipe), str(work / "mk"), "--allow-crimes"], work / "mk")


def combination_alone(work: Path, adapters: int, rounds: int) -> dict[str, float]:
    """Seconds of the low-rank combination itself, ours and PEFT's svd, medians of alternate runs."""
    ours = [sys.executable, "-c", OURS_SVD, str(work / "mixture"), str(RANK)]
    theirs = [sys.executable, "-c", PEFT_SVD, str(work / "base"), str(work / "adapters"), str(adapters), str(RANK)]
    seconds: dict[str, list[float]] = {"ours": [], "PEFT svd": []}
    for _ in range(rounds):
        for name, command in {"ours": ours, "PEFT svd": theirs}.items():
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_7b(work: Path, adapters: int) -> None:
    """A checkpoint of Llama 2 7B's shapes, a layer at a time, for machines that cannot hold it; the numbers repeat."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, layers, vocabulary, rank = 4096, 11008, 32, 32000, ADAPTER_RANK
    linear = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    numbers = torch.randn(vocabulary * hidden, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def tensor(*shape: int) -> torch.Tensor:
        return numbers[: math.prod(shape)].view(shape).clone()

    ends = {name: tensor(vocabulary, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shards = [ends | {"model.norm.weight": torch.ones(hidden).bfloat16()}]
    index = {}
    (work / "base").mkdir(exist_ok=True)
    for number in range(layers + 1):
        at = f"model.layers.{number - 1}"
        shard = shards[0] if number == 0 else {f"{at}.{m}.weight": tensor(*shape) for m, shape in linear.items()}
        if number:
            shard |= {f"{at}.{n}_layernorm.weight": torch.ones(hidden).bfloat16() for n in ("input", "post_attention")}
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, work / "base" / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (work / "base" / "config.json").write_text(json.dumps(config))
    (work / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for n in range(adapters):
        folder = work / "adapters" / f"a{n}"
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(n)
        tensors = {}
        for layer, (m, (out, cols)) in itertools.product(range(layers), linear.items()):
            key = f"base_model.model.model.layers.{layer}.{m}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, cols, generator=generator) / 64
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 64
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        targets = sorted(m.partition(".")[2] for m in linear)
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets})
        )


def make_synthetic(work: Path, size: str, adapters: int) -> None:
    if (work / "mixture" / "mixture.json").is_file():
        return
    last = work / "adapters" / f"a{adapters - 1}"
    if size == "7b" and not (last / "adapter_config.json").is_file():
        make_7b(work, adapters)
    elif not TOOL.is_file():
        raise SystemExit(f"{TOOL} makes the synthetic checkpoint, and is not here.")
    if not last.is_dir():
        asked = ["--size", size, "--adapters", str(adapters), "--rank", str(ADAPTER_RANK)]
        subprocess.run([sys.executable, str(TOOL), str(work), *asked], check=True)
    from wlora_merge.mixture.mix import mix

    mix(
        work / "base",
        [work / "adapters" / f"a{i}" for i in range(adapters)],
        work / "mixture",
        task="causal-lm",
        force=True,
    )


def show(found: list[Contender], console: Console) -> None:
    table = Table(title="Export: medians over the rounds", title_justify="left")
    for column in ("what", "seconds", "spread", "peak RSS MB", "peak anonymous MB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for c in found:
        spread = f"{min(c.seconds):.2f} to {max(c.seconds):.2f}"
        table.add_row(
            c.name, f"{statistics.median(c.seconds):.2f}", spread, f"{c.rss / 1e6:.0f}", f"{c.anonymous / 1e6:.0f}"
        )
    console.print(table)
    median = {c.name: statistics.median(c.seconds) for c in found}
    ours = median["wlora-merge export dense"]
    memory = {c.name: c.anonymous for c in found}
    over = (memory["wlora-merge export dense"] - memory["imports of an export"]) / 1e6
    for name in ("PEFT cat, merge_and_unload, save_pretrained", "mergekit linear", "cp -r"):
        if name in median:
            console.print(f"{name} / ours: {median[name] / ours:.2f}×")
    for dtype in ("float32", "float64"):
        floor = median["cp -r"] + median[f"import torch and the bare matmuls, {dtype}"]
        console.print(f"ours / (cp + import torch + bare matmuls in {dtype}): {ours / floor:.2f}×")
    console.print(f"anonymous memory over the interpreter with its imports: {over:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=["tiny", "125m", "1b", "7b"], help="of the synthetic Llama")
    parser.add_argument("--adapters", type=int, default=4, help=f"how many, each of rank {ADAPTER_RANK}")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out"), help="working folder; the checkpoint is kept there"
    )
    parser.add_argument("--without-peft", action="store_true", help="leave PEFT's merge out")
    parser.add_argument(
        "--svd-rounds", type=int, default=1, help="rounds of the low-rank combination alone; 0 for none"
    )
    options = parser.parse_args()
    work = (options.out / f"{options.size}-{options.adapters}").resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_synthetic(work, options.size, options.adapters)
    console = Console(highlight=False)
    console.print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    console.print(
        ", ".join(f"{name} {_version(name)}" for name in ("torch", "peft", "transformers", "safetensors", "mergekit"))
    )
    found = [c for c in contenders(work, options.adapters) if not (options.without_peft and c.name.startswith("PEFT"))]
    for number in range(options.rounds + 1):
        for contender in found:
            run(contender, counted=number > 0)
    show(found, console)
    if options.svd_rounds:
        alone = combination_alone(work, options.adapters, options.svd_rounds)
        console.print(
            f"low-rank combination alone, rank {RANK}: ours {alone['ours']:.2f} s, PEFT svd {alone['PEFT svd']:.1f} s, "
            f"{alone['PEFT svd'] / alone['ours']:.0f}×"
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
