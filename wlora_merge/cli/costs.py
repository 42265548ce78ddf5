"""What a recipe will cost, from headers and the size of the data: disk exactly or nearly so, memory and time roughly.

Time is counted from floating-point operations and bytes, at the speed that a short matmul has on this machine's CPU; within a
factor of three or so. Nothing is trained or written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..adapters.deltas import ModuleDelta
from ..constants import DTYPES
from ..data.examples import Examples
from ..data.tasks import get_task
from ..exporters.dense import folder_bytes, plan
from ..exporters.lora_format import lora_bytes
from ..io.tensors import matrix_shape
from ..mixture.inputs import Inputs
from .recipe import ExportRecipe

if TYPE_CHECKING:
    from ..data.labels import LabelSet
    from ..fit_options import FitOptions, FitRequest
    from ..training.candidates import Situation

IMPORTS = 160 << 20  # bytes of a process that has imported torch
TRAINER_IMPORTS = 600 << 20  # and transformers
START = 2.0  # seconds until torch is imported
DISK_SPEED = 500e6  # bytes a second, written and flushed
EFFICIENCY = 0.4  # of a matmul's speed that a model's forward pass has
CHARACTERS_PER_TOKEN = 4
IMAGE_TOKENS = 200
REPORT = 250_000  # bytes of an export's report.html and its figures, roughly
BYTES_PER_PARAMETER = {None: 4.0, "8bit": 1.1, "4bit": 0.65}


def predict(
    inputs: Inputs, exports: Sequence[ExportRecipe], fit: FitRequest | None, examples: Examples | None, report: bool
) -> list[dict[str, Any]]:
    """Rows of step, disk and memory in bytes, and seconds (None where a GPU would do it)."""
    speed = _matmul_speed()
    rows = []
    if fit is not None and examples is not None:
        rows.append(_fit_row(inputs, fit, examples, speed))
    rows += [_export_row(inputs, entry, speed) for entry in exports]
    for row in rows[len(rows) - len(exports) :]:
        row["disk"] += REPORT * report
    return rows


def _fit_row(inputs: Inputs, fit: FitRequest, examples: Examples, speed: float) -> dict[str, Any]:
    import torch

    from ..training.candidates import batch_size, steps_of

    entries = inputs.base.entries.values()
    embedding = max((math.prod(e.shape) for e in entries if len(e.shape) == 2), default=0)
    parameters = sum(math.prod(e.shape) for e in entries)
    tokens = _tokens(fit, examples)
    options = fit.options
    task = get_task(fit.task)
    labels = task.labels(examples, problem_type=options.problem_type)
    now = _situation(options, fit, examples, labels)
    trained = len(examples) + (len(examples.label_names(labels)) if options.label_names else 0)
    learned, judgings = _trainings(options, fit, examples, labels, [a.name for a in inputs.adapters], now)
    batch = min(batch_size(options, now), trained) * options.gradient_accumulation_steps
    steps = steps_of(options, trained, now)
    judged = len(examples) * judgings
    work = 2 * max(1, parameters - embedding) * tokens * (2 * learned * steps * batch + judged)
    config = inputs.base.config
    width, depth = int(config.get("hidden_size") or 1024), int(config.get("num_hidden_layers") or 24)
    activations = 4 * batch * tokens * width * (20 if not fit.gradient_checkpointing else 2) * depth
    seconds = 3 * START + work / (speed * EFFICIENCY)
    on_gpu = fit.device in ("cuda", "mps") or (fit.device in (None, "auto") and torch.cuda.is_available())
    return {
        "step": f"fit (about {learned} trainings of at most {steps} steps)",
        "disk": 40 * len(inputs.mixture.groups) * len(inputs.adapters)
        + _new_adapter_bytes(inputs, options.new_adapter),
        "memory": int(
            TRAINER_IMPORTS + parameters * BYTES_PER_PARAMETER[fit.quantize] + activations + _combined_bytes(inputs)
        ),
        "seconds": None
        if on_gpu
        else round(seconds if fit.max_minutes is None else min(seconds, 60 * fit.max_minutes), 1),
    }


def _combined_bytes(inputs: Inputs) -> int:
    """Of the combination of delta weights as a fit attaches it: of each module its matrix and an identity, in float32."""
    if inputs.mixture.combination.is_linear:
        return 0
    shapes = [matrix_shape(d.shape) for d in inputs.deltas if isinstance(d, ModuleDelta) and d.R]
    return sum(4 * (rows * columns + min(rows, columns) ** 2) for rows, columns in shapes)


def _new_adapter_bytes(inputs: Inputs, r: int | None) -> int:
    """Of the float32 factors of a new adapter of rank r on all target modules; None: of the one that the folds try."""
    from ..training.candidates import NEW_RANK

    shapes = [matrix_shape(d.shape) for d in inputs.deltas if isinstance(d, ModuleDelta) and d.R]
    return 4 * (NEW_RANK if r is None else r) * sum(rows + columns for rows, columns in shapes)


def _trainings(
    options: FitOptions, fit: FitRequest, examples: Examples, labels: LabelSet | None, names: list[str], now: Situation
) -> tuple[int, int]:
    """Trainings of learned mixtures, passes over the examples to judge or to solve heads on.

    Args:
        options: the options of the fit.
        fit: what the fit is asked.
        examples: the shots.
        labels: the labels, in the head's order.
        names: of the adapters.
        now: what decides the defaults.
    """
    from ..training.candidates import fixed_candidates, judgements, learned_settings, on_folds
    from ..training.cross_validation import fold_indices

    planned = [setting for setting in learned_settings(options, now) if setting.trained]
    search = options.method in ("search", "auto")
    fixed = len(fixed_candidates(names, options)) + 2 * search
    folds = len(fold_indices(examples.classes(labels), examples.twins, options.folds, options.seed))
    held, on_them = bool(fit.eval_data), on_folds(options, planned, now)
    judged = judgements(options, on_them, now)
    folds *= not held or judged > 1
    learned = folds * len(on_them) + bool(planned)  # what is kept is trained on all shots
    return learned, bool(folds) * (fixed * (not held) + judged) + held * (fixed + 1)


def _situation(options: FitOptions, fit: FitRequest, examples: Examples, labels: LabelSet | None) -> Situation:
    """What decides the defaults, as far as no model is needed: a new head is taken for one that is solved."""
    from ..training.candidates import Situation
    from ..training.cross_validation import enough

    task = get_task(fit.task)
    suffice = enough(examples.classes(labels), examples.twins, head=task.has_head)
    return Situation(
        task.has_head,
        suffice,
        solved=task.has_head,
        left_out=task.classifies_examples,
        generates=task.generates,
        choice=task.is_decoder and any(name for row in examples.classes(labels) for name in row),
    )


def _tokens(fit: FitRequest, examples: Examples) -> int:
    """Tokens of an example on average."""
    if get_task(fit.task).takes_images:
        return IMAGE_TOKENS
    columns = [examples.column(name) for name in examples.columns]
    characters = sum(len(value) for column in columns for value in column if isinstance(value, str))
    tokens = max(1, characters // (CHARACTERS_PER_TOKEN * max(1, len(examples))))
    return min(tokens, fit.max_length) if fit.max_length else tokens


def _export_row(inputs: Inputs, entry: ExportRecipe, speed: float) -> dict[str, Any]:
    stacks = [d for d in inputs.deltas if isinstance(d, ModuleDelta) and d.R]
    folds = sum(2 * d.R * math.prod(matrix_shape(d.shape)) for d in stacks) / (speed / 2)  # in float64
    carried = sum(path.stat().st_size for path in inputs.base.carried_files().values())
    if entry.format == "lora":
        size = lora_bytes(inputs, entry.rank)
        size = size // 2 if entry.dtype in ("float16", "bfloat16") else size
        work = (
            sum(20 * d.R**2 * sum(matrix_shape(d.shape)) for d in stacks) / (speed / 10)
            if entry.rank or entry.energy
            else 0
        )
        memory = IMPORTS + 3 * size
    else:
        dtype = entry.dtype or ("float32" if entry.format == "onnx" else "")
        files = plan(
            inputs.base, inputs.deltas, inputs.mixture.head, untied=inputs.untied.tensors, dtype=DTYPES.get(dtype)
        )
        size, work = folder_bytes(files), folds
        memory = IMPORTS + max(100 << 20, max((16 * d.R * sum(matrix_shape(d.shape)) for d in stacks), default=0))
        if not inputs.mixture.combination.is_linear:  # magnitudes are compared over a whole delta weight
            memory += max((8 * math.prod(d.shape) for d in stacks), default=0)
        if entry.format == "onnx":
            memory, work = TRAINER_IMPORTS + 3 * size, folds + 10 + size / 100e6  # tracing and checking
    return {
        "step": f"export {entry.folder}",
        "disk": size + carried,
        "memory": int(memory),
        "seconds": round(START + work + size / DISK_SPEED, 1),
    }


def _matmul_speed() -> float:
    """Floating-point operations a second of this machine's CPU in float32."""
    import torch

    a = torch.ones(512, 512)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best
