"""The fit workflow: learn the mixture logits, and a head where the task needs a new one, on few-shot data.

Part of the shots is held out. On the rest the learned mixture is trained, and so is every simpler candidate: the base alone,
each adapter alone, uniform composition; each trains its own head in the same way. All are judged on what was held out. Then
the mixture is trained once more on all shots, and that one is kept. `transformers.Trainer` drives the loop.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .adapters import load_adapters
from .base_model import BaseModel, open_base, refuse_quantized
from .check import quiet_libraries
from .data import Examples, read_examples, split_held_out
from .errors import DataError, MixtureError
from .mixture import Mixture
from .ranks import is_leader
from .stacking import modules_of, stack, tensors_of
from .tasks import Task, get_task

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

    from .labels import LabelSet

LEARNED = "learned"
STEPS_WITH_HEAD, STEPS_WITHOUT = 100, 40
PRECISIONS = ("float32", "bf16", "fp16")
FitProgress = Callable[[str, int, int, float], None]
"""Called with (candidate, step, steps, loss) after every step."""


@dataclass(frozen=True)
class FitOptions:
    """How to train; the defaults are for a handful of examples.

    epochs or max_steps (the latter wins; neither: 100 steps where a head is trained, 40 where not); learning_rate of the
    logits; head_learning_rate; batch_size in examples (of each process); held_out: the share of the shots to judge on, 0 for
    none; precision: `float32`, or `bf16` and `fp16` for Trainer's mixed precision.
    """

    granularity: str = "module"
    normalize: str = "all"
    delta_scale: float = 1.0
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float = 0.05
    head_learning_rate: float = 5e-3
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int | None = None
    held_out: float = 0.25
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    report_to: str = "none"


@dataclass
class _Run:
    """What every candidate's training shares."""

    model: Any
    task: Task
    labels: LabelSet | None
    processor: Any
    options: FitOptions
    head: list[str]
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    progress: FitProgress | None = None
    scratch: str = ""

    @property
    def steps(self) -> int:
        """Optimizer steps; -1 where epochs decide."""
        if self.options.max_steps is not None:
            return self.options.max_steps
        if self.options.epochs is not None:
            return -1
        return STEPS_WITH_HEAD if self.head else STEPS_WITHOUT


def fit(
    base: str | Path,
    adapters: Iterable[str | Path | tuple[str, str | Path]],
    data: str | Path,
    task: str,
    out: str | Path | None = None,
    *,
    eval_data: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    modules_to_save: str | None = None,
    residual: str | None = None,
    force: bool = False,
    progress: FitProgress | None = None,
    **options: Any,
) -> Mixture:
    """Learn a mixture of adapters on few-shot data.

    Args:
        base: folder or hub id of the base model.
        adapters: two or more, as PATH_OR_ID, `NAME=PATH_OR_ID` or (name, PATH_OR_ID).
        data: a data file, folder or hub data set with the shots.
        task: `causal-lm`, `seq2seq-lm`, `text-classification`, `token-classification`, `question-answering` or
            `image-classification`.
        out: folder to write the mixture to; None writes nothing.
        eval_data: judge on these examples and hold none of the shots out.
        columns: {canonical column: column in the file}, where the names follow no convention.
        modules_to_save: what becomes of whole tensors that the adapters carry and the head does not replace.
        residual: name of the adapter whose residual the base is.
        force: replace what is in `out`.
        progress: called with (candidate, step, steps, loss).
        options: fields of `FitOptions`.

    Returns:
        The learned mixture; `metrics["candidates"]` has the held-out loss and metric of every candidate.

    Raises:
        WloraMergeError: with one sentence; nothing is left in `out`.
    """
    chosen = _options(options)
    job = get_task(task)
    opened, loaded = open_base(base), load_adapters(adapters, residual=residual)
    refuse_quantized(opened)
    shots = read_examples(data, task=task, columns=columns)
    held = read_examples(eval_data, task=task, columns=columns) if eval_data else None
    labels = job.labels(shots)
    stack(
        loaded, modules_of(opened), tensors_of(opened), model_type=opened.model_type
    )  # refuses what no export could write
    run = _prepare(opened, loaded, job, labels, chosen, modules_to_save, progress)
    part, held = (shots, held) if held is not None else _parts(shots, chosen)
    with tempfile.TemporaryDirectory(prefix="wlora-merge-") as scratch:
        run.scratch = scratch
        metrics = _judge(run, [a.name for a in loaded], part, held)
        _train(run, LEARNED if held is None else f"{LEARNED}, all shots", shots)
    metrics["held_out"] = _held_out(eval_data, held, shots)
    mixture = Mixture.from_model(run.model, opened)
    mixture.task, mixture.metrics, mixture.modules_to_save = task, metrics, modules_to_save
    mixture.config = _config(run) if run.head else {}
    mixture.data = {"method": LEARNED, "data": _data_ref(shots), "fit": _recorded(chosen, run)}
    if out is not None and is_leader():
        mixture.save(out, force=force, inputs=[opened.folder, *(a.source.folder for a in loaded)])
    return mixture


def _options(options: Mapping[str, Any]) -> FitOptions:
    try:
        chosen = FitOptions(**{name: value for name, value in options.items() if value is not None})
    except TypeError as error:
        raise MixtureError(f"fit has no such option: {error}.") from error
    positive = (
        "epochs",
        "max_steps",
        "learning_rate",
        "head_learning_rate",
        "batch_size",
        "gradient_accumulation_steps",
    )
    for name in positive:
        value = getattr(chosen, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise MixtureError(f"{name} is {value}, expected a number above 0.")
    if chosen.precision not in PRECISIONS:
        raise MixtureError(f"precision is {chosen.precision!r}, expected one of {', '.join(PRECISIONS)}.")
    if not 0 <= chosen.held_out < 1:
        raise MixtureError(f"held_out is {chosen.held_out}, expected a share from 0 up to 1.")
    return chosen


# ----------------------------------------------------------------------------------------------------- the model


def _prepare(
    base: BaseModel,
    adapters: list[Any],
    task: Task,
    labels: LabelSet | None,
    options: FitOptions,
    modules_to_save: str | None,
    progress: FitProgress | None,
) -> _Run:
    import transformers

    from .layers import PARAMETER, attach

    transformers.set_seed(options.seed)
    processor = task.load_processor(base.folder)
    model, head, labels = _load(base, task, labels, processor)
    modules = sorted({name.rpartition(".")[0] for name in head})
    attach(
        model,
        adapters,
        granularity=options.granularity,
        normalize=options.normalize,
        delta_scale=options.delta_scale,
        head=modules,
        modules_to_save=modules_to_save,
    )
    run = _Run(model, task, labels, processor, options, modules, progress=progress)
    trained = {PARAMETER, *model.wlora.head}
    run.start = {n: p.detach().clone() for n, p in model.named_parameters() if n in trained}
    return run


def _load(
    base: BaseModel, task: Task, labels: LabelSet | None, processor: Any
) -> tuple[Any, list[str], LabelSet | None]:
    """The base with the task's head; the names of the parameters that are new; the labels in the head's order.

    A head that the base has for these very labels is kept, frozen; otherwise a new one is trained.
    """
    import torch

    from .labels import LabelSet

    own = _own_labels(base)
    keep = labels is not None and own is not None and set(labels.names) <= set(own) and bool(labels.names)
    if keep and labels is not None and own is not None:
        labels = LabelSet(tuple(own), labels.problem_type)
    changes = {} if keep else task.config_changes(labels, processor)
    with quiet_libraries():
        model, info = task.auto_class().from_pretrained(
            base.folder,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **changes,
        )
    new = {str(key) for key in info["missing_keys"]} | {str(row[0]) for row in info["mismatched_keys"]}
    if labels is not None and not keep:
        prefix = f"{model.base_model_prefix}."
        new |= {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
        for name, module in model.named_modules():
            if name and not name.startswith(prefix) and name != model.base_model_prefix:
                model._init_weights(module)
    known = {name for name, _ in model.named_parameters()}
    return model, sorted(new & known), labels


def _own_labels(base: BaseModel) -> list[str] | None:
    """The label names of the base's own config, in the head's order; None where it has none of its own."""
    table = base.config.get("id2label")
    if not isinstance(table, dict) or not table:
        return None
    return [str(table[key]) for key in sorted(table, key=int)]


# ------------------------------------------------------------------------------------------------------ training


def _judge(run: _Run, names: list[str], part: Examples, held: Examples | None) -> dict[str, Any]:
    """Train every candidate on `part` and judge it on `held`."""
    if held is None:
        return {"note": "Not estimated: nothing was held out. Give --eval-data, or two shots per class or more."}
    n = len(names)
    fixed: dict[str, list[float] | None] = {"base": None, "uniform": [1 / n] * n}
    fixed |= {name: [float(i == j) for j in range(n)] for i, name in enumerate(names)}
    table = {}
    for name, weights in fixed.items():
        with _fixed(run, weights):
            table[name] = _evaluate(run, _train(run, name, part), held)
    table[LEARNED] = _evaluate(run, _train(run, LEARNED, part), held)
    metric = run.task.metric(run.labels)
    return {
        "metric": metric.name,
        "candidates": table,
        "note": f"Loss and {metric.name} on {len(held)} held-out examples, every candidate trained on {len(part)}; the mixture "
        "that is kept was then trained on all shots.",
    }


def _train(run: _Run, name: str, examples: Examples) -> Trainer:
    """Train from the start what the model's parameters that require gradients are; nothing, if there are none."""
    import torch
    import transformers

    from .layers import PARAMETER

    transformers.set_seed(run.options.seed)
    parameters = dict(run.model.named_parameters())
    with torch.no_grad():
        for key, value in run.start.items():
            if parameters[key].requires_grad:
                parameters[key].copy_(value)
    trainer = _trainer(run, name, examples)
    logits: list[Any] = []
    head: list[Any] = []
    for key, parameter in parameters.items():
        if parameter.requires_grad:
            (logits if key == PARAMETER else head).append(parameter)
    groups = [
        {"params": logits, "lr": run.options.learning_rate},
        {"params": head, "lr": run.options.head_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        trainer.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trainer.train()
        _check_loss(run, name)
    return trainer


def _trainer(run: _Run, name: str, examples: Examples) -> Trainer:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    options, metric = run.options, run.task.metric(run.labels)
    arguments = TrainingArguments(
        output_dir=run.scratch,  # Trainer wants one; nothing is kept of it
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        max_steps=run.steps,
        num_train_epochs=options.epochs or 1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=max(options.batch_size, 16),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        lr_scheduler_type="constant",
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=options.device == "cpu",
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        report_to=options.report_to if options.report_to != "none" else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=None,
    )
    encoded = run.task.encode(examples, run.processor, max_length=options.max_length, labels=run.labels)
    trainer = Trainer(
        model=run.model,
        args=arguments,
        train_dataset=encoded,
        data_collator=run.task.collator(run.processor),
        compute_metrics=metric.compute,
        preprocess_logits_for_metrics=metric.preprocess,
        callbacks=[_callback(run, name)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log line to stdout
    return trainer


def _callback(run: _Run, name: str) -> Any:
    from transformers import TrainerCallback

    progress = run.progress

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if progress and logs and "loss" in logs:
                progress(name, state.global_step, state.max_steps, float(logs["loss"]))

    return Report()


def _check_loss(run: _Run, name: str) -> None:
    import torch

    bad = [n for n, p in run.model.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if bad:
        raise MixtureError(
            f"training {name!r} diverged: {bad[0]} is not finite after it; use a smaller --learning-rate, now "
            f"{run.options.learning_rate}."
        )


def _evaluate(run: _Run, trainer: Trainer, held: Examples) -> dict[str, float]:
    encoded = run.task.encode(held, run.processor, max_length=run.options.max_length, labels=run.labels)
    result = trainer.evaluate(cast("Any", encoded))
    names = {"eval_loss": "loss", f"eval_{run.task.metric(run.labels).name}": run.task.metric(run.labels).name}
    row = {short: float(result[key]) for key, short in names.items() if key in result}
    if not all(map(math.isfinite, row.values())):
        raise MixtureError(
            f"judging the held-out examples gave {row}, expected finite numbers; use a smaller --learning-rate."
        )
    return row


@contextmanager
def _fixed(run: _Run, weights: list[float] | None) -> Iterator[None]:
    """Hold the mixture weights at one row for all groups; None takes the adapters away."""
    import torch

    from .layers import PARAMETER, set_delta_scale

    parameter = run.model.get_parameter(PARAMETER)
    saved, scale = parameter.detach().clone(), run.options.delta_scale
    parameter.requires_grad_(False)
    set_delta_scale(run.model, 0.0 if weights is None else scale)
    with torch.no_grad():
        if weights is not None:
            row = torch.tensor(weights, device=parameter.device)
            parameter.copy_((row if run.options.normalize == "none" else row.log()).expand_as(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(saved)
        parameter.requires_grad_(True)
        set_delta_scale(run.model, scale)


# --------------------------------------------------------------------------------------------------------- parts


def _parts(shots: Examples, options: FitOptions) -> tuple[Examples, Examples | None]:
    if options.held_out == 0:
        return shots, None
    try:
        part, held = split_held_out(shots, fraction=options.held_out, seed=options.seed)
    except DataError:
        return shots, None
    return (part, held) if len(held) else (shots, None)


def _held_out(eval_data: str | Path | None, held: Examples | None, shots: Examples) -> dict[str, Any]:
    if held is None:
        return {"examples": 0, "of": len(shots)}
    if eval_data:
        return {"examples": len(held), "from": _data_ref(held)}
    return {"examples": len(held), "of": len(shots)}


def _data_ref(examples: Examples) -> dict[str, Any]:
    """What a mixture remembers of its data: the file's own name, its digest, how many rows."""
    return {"name": Path(examples.source).name, "sha256": examples.sha256, "examples": len(examples)}


def _config(run: _Run) -> dict[str, Any]:
    """The config keys that the new head changes, as JSON has them."""
    changes = run.task.config_changes(run.labels, run.processor)
    if "id2label" in changes:
        changes["id2label"] = {str(key): value for key, value in changes["id2label"].items()}
    return {"architectures": [type(run.model).__name__], **changes}


def _recorded(options: FitOptions, run: _Run) -> dict[str, Any]:
    table = asdict(options) | {"max_steps": run.steps if run.steps > 0 else None}
    return {key: value for key, value in table.items() if key not in ("device", "report_to")}
