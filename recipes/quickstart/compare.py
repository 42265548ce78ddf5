"""The table: the learned mixture against everything simpler, on held-out images of shifts that no adapter saw.

Every number is measured in the run that prints it. A trial makes one model from one draw of shots and judges it; what
learns does so for several draws.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from digits import DOWNSTREAM, UPSTREAM, Digits, read_digits, write_pictures
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import ViTForImageClassification
from zoo import Settings, Zoo, accuracy, new_lora, train

import wlora_merge

TASK = "image-classification"
BASE, UNIFORM, SCRATCH = "base model", "uniform composition", "LoRA from scratch"
ALONE = {f"{name} alone": name for name in UPSTREAM}
LEARNED: dict[str, dict[str, Any]] = {  # options of the fit
    "learned, per layer": {"granularity": "layer", "new_adapter": 0},
    "learned, per module": {"granularity": "module", "new_adapter": 0},
    "with a new adapter": {"granularity": "layer", "new_adapter": 8, "new_adapter_interpolation": 1.0},
}
METHODS = [BASE, *ALONE, UNIFORM, *LEARNED, SCRATCH]  # the rows of the table


@dataclass(frozen=True)
class FewShot:
    """How one learns from a few shots. All of this was chosen on draws of shots that the table does not use."""

    batch_size: int = 32  # all shots at once
    steps: int = 60
    learning_rate: float = 0.15  # of the mixture logits
    scratch_steps: int = 100
    scratch_learning_rate: float = 5e-3


@dataclass(frozen=True)
class Trial:
    """One number to measure. What needs no shots is tried once, with `per_class` 0."""

    method: str
    shift: str
    per_class: int = 0
    seed: int = 0


Results = dict[tuple[str, str, int], list[float]]
"""(method, shift, shots per class) -> accuracy in percent, one for each seed."""


def trials(shots: Sequence[int], seeds: int) -> list[Trial]:
    """All that the table needs."""
    fixed = [Trial(method, shift) for shift in DOWNSTREAM for method in (BASE, *ALONE, UNIFORM)]
    drawn = [(shift, n, seed) for shift in DOWNSTREAM for n in shots for seed in range(seeds)]
    return fixed + [Trial(method, *draw) for draw in drawn for method in (*LEARNED, SCRATCH)]


def measure(
    zoo: Zoo, settings: Settings, few: FewShot, planned: Sequence[Trial], pool: Executor, console: Console
) -> Results:
    """Run every trial."""
    results: Results = {}
    done = pool.map(partial(run_trial, zoo, settings, few), planned)
    for trial, percent in track(zip(planned, done, strict=True), "", total=len(planned), console=console):
        results.setdefault((trial.method, trial.shift, trial.per_class), []).append(percent)
    return results


def run_trial(zoo: Zoo, settings: Settings, few: FewShot, trial: Trial) -> float:
    """Make the model of this trial from its shots, and judge it on shifted held-out images."""
    _, pool, held_out = read_digits()
    change = DOWNSTREAM[trial.shift]
    shots = pool.shots(trial.per_class, trial.seed).shifted(change) if trial.per_class else None
    return accuracy(make_model(zoo, settings, few, trial, shots), held_out.shifted(change), zoo.base)


def make_model(zoo: Zoo, settings: Settings, few: FewShot, trial: Trial, shots: Digits | None) -> torch.nn.Module:
    """The method of this trial."""
    if shots is None:
        model = ViTForImageClassification.from_pretrained(zoo.base)
        if trial.method == UNIFORM:
            return wlora_merge.attach(model, list(zoo.adapters.items()))  # the logits start at zero
        if trial.method == BASE:
            return model
        return PeftModel.from_pretrained(model, zoo.adapters[ALONE[trial.method]])
    if trial.method == SCRATCH:
        return from_scratch(zoo, shots, settings, few, trial.seed)
    return learned(zoo, shots, few, trial.seed, **LEARNED[trial.method])


def learned(zoo: Zoo, shots: Digits, few: FewShot, seed: int, **options: Any) -> torch.nn.Module:
    """The product, in Python: fit, export, and load what was exported. So the table judges what a server would load."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pictures(shots, folder / "shots")
        mixture = wlora_merge.fit(
            zoo.base,
            list(zoo.adapters.items()),
            folder / "shots",
            TASK,
            normalize="all",
            max_steps=few.steps,
            batch_size=few.batch_size,
            learning_rate=few.learning_rate,
            folds=0,
            seed=seed,
            **options,
        )
        wlora_merge.export(mixture, "dense", folder / "dense")
        return ViTForImageClassification.from_pretrained(folder / "dense")


def from_scratch(zoo: Zoo, shots: Digits, settings: Settings, few: FewShot, seed: int) -> torch.nn.Module:
    """What one would do without the adapters: train a new LoRA on the shots."""
    model = new_lora(zoo.base, settings.r, seed)
    train(
        model,
        shots,
        zoo.base,
        steps=few.scratch_steps,
        batch_size=few.batch_size,
        learning_rate=few.scratch_learning_rate,
        seed=seed,
    )
    return model


def results_table(results: Results, shots: Sequence[int]) -> Table:
    """One row for each method, one column for each shift and number of shots; the best of each column in bold."""
    columns = [(shift, n) for shift in dict.fromkeys(shift for _, shift, _ in results) for n in shots]
    cells = {(m, c): results.get((m, *c)) or results[m, c[0], 0] for m in METHODS for c in columns}
    best = {c: max(statistics.mean(cells[m, c]) for m in METHODS) for c in columns}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for shift, n in columns:
        table.add_column("\n".join([*shift.replace("+ ", "+").split(), f"{n} shot{'s' * (n > 1)}"]), justify="right")
    for method in METHODS:
        row = [_cell(cells[method, c], statistics.mean(cells[method, c]) == best[c]) for c in columns]
        table.add_row(method, *row, style="cyan" if method in LEARNED else None)
    return table


def _cell(values: Sequence[float], best: bool) -> str:
    text = f"{statistics.mean(values):.0f}" + (f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else "")
    return f"[bold]{text}[/bold]" if best else text
