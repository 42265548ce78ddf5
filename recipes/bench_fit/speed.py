"""One training step of the logits against the base model's own: seconds and peak memory.

The floor is a forward and backward pass of the base alone, with gradients flowing to its input, as they must to reach the
logits of the first layer. `stacked` is what `wlora_merge.attach` makes; `folded once a step` adds the mixture to each weight and
multiplies by the sum, forward and backward; `separate paths` computes each adapter's product on its own: PEFT's own layers with
all adapters active, and trainable logits in the place of their scalings.

Seconds come from one process that takes the contenders in turn; peak memory from a process for each.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wlora_merge
from wlora_merge.mixture.attachment import attachment_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, TOKENS = 16, 128
CONTENDERS = ("floor", "stacked", "folded once a step", "separate paths")


def make_adapters(base: Path, folder: Path, count: int) -> list[Path]:
    """Random rank-16 adapters on all seven linear layers, written by PEFT."""
    folders = [folder / f"a{i}" for i in range(count)]
    if not all((f / "adapter_config.json").is_file() for f in folders):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        for i, out in enumerate(folders):
            torch.manual_seed(i)
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(0.01)
            model.save_pretrained(out)
    return folders


def make_step(
    contender: str, base: Path, adapters: list[Path], batch: int, dtype: torch.dtype, device: str
) -> Callable[[], None]:
    """A function that takes one forward and backward pass."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
    model.requires_grad_(False)
    before_step = model.zero_grad
    if contender == "stacked":
        wlora_merge.attach(model, adapters)
    elif contender == "folded once a step":
        fold_once_a_step(wlora_merge.attach(model, adapters))
    elif contender == "separate paths":
        model, before_step = separate_paths(model, adapters)
    else:
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    model.train()
    most = min(1000, model.config.vocab_size)
    ids = torch.randint(0, most, (batch, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


class Folded(torch.autograd.Function):
    """x @ (weight + lora_B · diag(gains) · lora_A).T; the sum is kept for the backward pass, of the tokens only [tokens, R]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gains: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """x [..., in], gains [R], weight [out, in], lora_A [R, in], lora_B [out, R]."""
        total = torch.addmm(weight, lora_B * gains, lora_A)
        ctx.save_for_backward(x.reshape(-1, x.shape[-1]) @ lora_A.T, total, lora_B)
        return nn.functional.linear(x, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and gains: the latter needs no gradient of the sum."""
        hidden, total, lora_B = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (rows @ total).view(*grad.shape[:-1], -1), ((rows @ lora_B) * hidden).sum(0), None, None, None


def fold_once_a_step(model: nn.Module) -> None:
    """Make the target modules of an attached model, linear layers without bias, fold before they multiply."""
    attachment = attachment_of(model)
    stacked = {
        layer: attachment.stacked(name) for name, layer in attachment.layers.items() if isinstance(layer, nn.Linear)
    }
    attachment.remove()
    for layer, lora in stacked.items():
        layer.forward = lambda x, layer=layer, lora=lora: Folded.apply(
            x, lora.gains().to(x.dtype), layer.weight, lora.lora_A, lora.lora_B
        )


def separate_paths(model: nn.Module, adapters: list[Path]) -> tuple[nn.Module, Callable[[], None]]:
    """PEFT's own layers with all adapters active; each scaling is made a function of trainable logits before every step."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"a{i}" for i in range(len(adapters))]
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.base_model.set_adapter(names)
    model.requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    scalings = [[layer.scaling[name] for name in names] for layer in layers]
    logits = nn.Parameter(torch.zeros(len(layers), len(names), device=next(model.parameters()).device))

    def before_step() -> None:
        logits.grad = None
        for layer, row, fixed in zip(layers, logits.softmax(-1), scalings, strict=True):
            for name, weight, scaling in zip(names, row, fixed, strict=True):
                layer.scaling[name] = weight.to(layer.weight.dtype) * scaling

    return model, before_step


def measure(
    contenders: Sequence[str],
    base: Path,
    adapters: list[Path],
    batch: int,
    rounds: int,
    dtype: torch.dtype,
    device: str,
) -> dict[str, float]:
    """Median seconds of a step for each contender, in turn, after two uncounted rounds."""
    steps = {name: make_step(name, base, adapters, batch, dtype, device) for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(contender: str, base: Path, adapters: list[Path], batch: int, device: str) -> float:
    """Peak bytes of a process that takes three steps: RSS, or the GPU's allocations; not a number where it was killed."""
    command = [sys.executable, __file__, contender, str(base), str(batch), device, *map(str, adapters)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if found.returncode == -signal.SIGKILL:  # as the system does when memory runs out
        return math.nan
    found.check_returncode()
    return float(json.loads(found.stdout.splitlines()[-1]))


def speed_rows(
    contenders: Sequence[str], base: Path, work: Path, batch: int, rounds: int, counts: tuple[int, ...] = (4, 16)
) -> list[tuple[str, ...]]:
    """Rows of the table: adapters, contender, seconds, times the floor, GB, times the floor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    for count in counts:
        adapters = make_adapters(base, work / "adapters", count)
        seconds = measure(contenders, base, adapters, batch, rounds, dtype, device)
        memory = {name: peak_memory(name, base, adapters, batch, device) for name in contenders}
        for name in contenders:
            rows.append(
                (
                    str(count),
                    name,
                    f"{seconds[name]:.3f}",
                    f"{seconds[name] / seconds['floor']:.2f}",
                    f"{memory[name] / 1e9:.2f}",
                    f"{memory[name] / memory['floor']:.2f}",
                )
            )
    return rows


def resident_peak() -> int:
    """Peak RSS of this process in bytes; getrusage's would count the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """The process that `peak_memory` starts."""
    contender, base, batch, device, *adapters = sys.argv[1:]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    step = make_step(contender, Path(base), [Path(a) for a in adapters], int(batch), dtype, device)
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    print(peak if peak is not None else resident_peak())


if __name__ == "__main__":
    main()
