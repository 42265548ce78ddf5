"""The fit workflow: find the mixture weights, and a head where the task needs a new one, on few-shot data.

With two shots per class or more, stratified folds compare the base, uniform composition, each adapter alone and the learned
mixture in several settings. Each trains its own head in the same way. What is kept is then trained on all shots. With one shot
per class nothing can be held out: the settings are the defaults, and the metrics are not estimated.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, AdapterSpec, load_adapters
from ..adapters.stacking import Stack
from ..adapters.targets import modules_of, tensors_of
from ..data.examples import EVAL_SPLITS, Examples, read_examples
from ..data.sources import name_of
from ..data.tasks import get_task
from ..errors import MixtureError
from ..exporters.report import write_report
from ..fit_options import FitOptions, fit_request
from ..io.digests import sha256_file
from ..io.staging import refuse_out
from ..mixture.combination import Combination
from ..mixture.inputs import find_inputs, stacked_inputs
from ..mixture.mixture import Mixture, adapter_ref
from ..models.base_model import BaseModel, open_base, refuse_attached, refuse_quantized
from ..text import first_line
from .given import Given
from .initial_logits import like_start
from .record import FitJob, data_ref, held_out, recorded, said_of_screening
from .resume import FitState, only_fit, state_file
from .run import FitProgress
from .trackers import tracker_names

if TYPE_CHECKING:
    from ..data.labels import LabelSet
    from ..data.sources import Source
    from ..mixture.record import FitMetrics
    from .candidates import Candidate
    from .learner import Learner
    from .preparation import Prepared

UNUSED = "No adapter has any weight: this is the base, with its head, which is best without them."


def fit(
    base: str | Path,
    adapters: Iterable[AdapterSpec],
    data: Source,
    task: str,
    out: str | Path | None = None,
    *,
    force: bool = False,
    report: bool = False,
    progress: FitProgress | None = None,
    **options: Any,
) -> Mixture:
    """Find the mixture weights of several adapters on few-shot data.

    Args:
        base: folder or hub id of the base model.
        adapters: two or more, as PATH_OR_ID, `NAME=PATH_OR_ID`, (name, PATH_OR_ID), or opened by `mixable`.
        data: the shots: a data file, folder, URL or hub data set; or a `datasets.Dataset`, a pandas frame or a list of dicts, as
            `eval_data` may be too.
        task: its name, as on the command line.
        out: folder to write the mixture to; None writes nothing.
        force: replace what is in `out`.
        report: also write report.html and its figures into `out`.
        progress: called with (candidate, step, steps, loss, mean mixture weights) after every step.
        options: the other fields of `FitCall`: what else is read (`eval_data`, `columns`, ...) and how to fit.

    Returns:
        The mixture; `metrics["candidates"]` has the loss, the metric and its standard error of every candidate.

    Raises:
        WloraMergeError: with one sentence; nothing is left in `out`.
    """
    from ..distributed import team

    job = get_task(task)
    read = (data, options.pop("eval_data", None))
    names = [None if source is None else name_of(source) for source in read]
    request = fit_request({"data": names[0], "eval_data": names[1], "task": task, **options})
    chosen = like_start(request.options)
    tracker_names(chosen)  # refuses before anything is read
    given = Given(job, request, chosen, open_base(base), load_adapters(adapters, residual=request.residual), read)
    if out is not None:
        refuse_out(Path(out), force=force, inputs=given.sources)
    shots, held, labels = _checked(given)
    from .preparation import prepare
    from .screening import screened
    from .stages import find_mixture

    with team() as ranks, only_fit(out if ranks.leads else None):
        with _within_memory(), _seeded(chosen.seed):
            fitted, screening = screened(given, shots, labels, ranks)
        state = _state(out if ranks.leads else None, fitted, shots, held)
        state.table = ranks.share(state.table)  # what a killed fit has trained, no process trains again
        with _within_memory(), _seeded(chosen.seed):
            work = _job(fitted, prepare(fitted, shots, held, labels, ranks, state, progress))
            metrics, kept = find_mixture(work)
        metrics["held_out"] = held_out(work, shots, held, request.eval_split)
        if screening is not None:
            metrics["screening"] = screening
            metrics["note"] += f" {said_of_screening(screening)}"
        mixture = _mixture(work.learner, given, shots, metrics, kept)
        if out is not None and ranks.leads:
            title = f"A mixture on {given.base.source.name}"
            deltas = find_inputs(mixture, any_digest=True).deltas if report else []
            beside = partial(write_report, mixture=mixture, deltas=deltas, title=title) if report else None
            mixture.save(out, force=force, inputs=given.sources, beside=beside)
            state.remove()
    return mixture


def _checked(given: Given) -> tuple[Examples, Examples | None, LabelSet | None]:
    """The shots, the evaluation data and the labels. First what headers and data tell is refused, then what the numbers do."""
    stacked = _stacked(given)
    shots, held = _examples(given)
    labels = given.task.labels(shots, problem_type=given.options.problem_type)
    stacked.check_numbers()
    return shots, held, labels


def _stacked(given: Given) -> Stack:
    """The adapters on the base, whose headers say whether they can be fitted.

    Raises:
        WloraMergeError: they cannot be, or no export could write what they change.
    """
    if given.options.quantize:
        logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)  # which the command line keeps quiet
    _check_adapters(given.adapters, given.options)
    refuse_quantized(given.base)
    refuse_attached(given.base)
    base = given.base
    return Stack.of(given.adapters, modules_of(base), tensors_of(base), model_type=base.model_type)


def _examples(given: Given) -> tuple[Examples, Examples | None]:
    """The shots, and the evaluation data."""
    asked = given.request
    task, columns = asked.task, asked.columns
    data, eval_data = given.read
    shots = read_examples(data, task=task, columns=columns, split=asked.split)
    if not asked.eval_data:
        return shots, None
    held = read_examples(eval_data, task=task, columns=columns, split=asked.eval_split, default_splits=EVAL_SPLITS)
    held.tell_shots(shots)
    return shots, held


@contextmanager
def _within_memory() -> Iterator[None]:
    """Say what to do where the device's memory does not suffice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MixtureError(
            f"the device's memory does not hold the model, or a step ({first_line(error)}): use a smaller --batch-size with "
            "--gradient-accumulation-steps, --gradient-checkpointing, --precision bf16 or --quantize 4bit."
        ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A new head starts from this seed; the caller's generators stay as they were."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _check_adapters(adapters: list[Adapter], options: FitOptions) -> None:
    if options.combination:
        Combination(options.method).refuse_changes(adapters, ())
    if len(adapters) < 2:
        raise MixtureError(f"a fit needs two adapters or more, got {len(adapters)}: for one, see `wlora-merge mix`.")
    for name in ("weights", "initial_logits"):
        row = getattr(options, name)
        if row is not None and not isinstance(row, str) and len(row) != len(adapters):
            raise MixtureError(f"{name} has {len(row)} numbers, expected one for each of the {len(adapters)} adapters.")


def _job(given: Given, ready: Prepared) -> FitJob:
    """Which rows the fit trains on, and which its folds hold out."""
    from ..mixture.live_model import LiveNames
    from ..mixture.new_lora import new_targets
    from .cross_validation import fold_indices

    learner, options = ready.learner, given.options
    folds = fold_indices(ready.classes, ready.twins, options.folds, options.seed)
    if learner.situation.left_out:
        everywhere = new_targets(learner.model, everywhere=True)
        learner.placement.everywhere = LiveNames(learner.model, given.base).are_stored(everywhere)
    _rehearse(learner, given)
    trained = ready.trained
    parts = [(sorted({*trained}.difference(fold)), fold) for fold in folds]
    return FitJob(learner, trained, list(ready.held), parts)


def _rehearse(learner: Learner, given: Given) -> None:
    """Make the mixture of the start as that of the end is made, and stack its inputs as an export does: what the end of the fit
    would refuse is refused before its first step."""
    mixture = Mixture.from_model(learner.model, given.base)
    mixture.config, mixture.modules_to_save = _config(learner, given.base), given.request.modules_to_save
    stacked_inputs(mixture, given.base, given.adapters)


def _mixture(learner: Learner, given: Given, shots: Examples, metrics: FitMetrics, kept: Candidate) -> Mixture:
    """The mixture that the model holds; an adapter without weight anywhere leaves it, one that was trained enters it."""
    import torch

    from ..mixture.attachment import attachment_of
    from ..mixture.live_model import LiveNames
    from ..mixture.new_lora import add_new, new_files
    from .model import in_own_unit, last_layer

    mixture = Mixture.from_model(learner.model, given.base)
    logits = mixture.wlora_weights
    mixture.wlora_weights = torch.where(logits.isfinite(), logits, torch.finfo(torch.float32).min)
    used = [n for n in range(len(mixture.adapters)) if bool(mixture.mixture_weights[:, n].any())]
    if used and not mixture.combination.elects:  # where one without weight has a vote
        mixture.adapters = [mixture.adapters[n] for n in used]
        mixture.mixture_weights, mixture.wlora_weights = (
            mixture.mixture_weights[:, used],
            mixture.wlora_weights[:, used],
        )
    mixture.task, mixture.metrics, mixture.modules_to_save = given.task.name, metrics, given.request.modules_to_save
    mixture.config = _config(learner, given.base)
    labels = learner.run.labels
    if labels is not None and (layer := last_layer(learner.model, mixture.head)):
        in_own_unit(mixture.head, layer, labels)
    mixture.pooling = learner.solved.seen.layer_pooling if learner.solved else None
    mixture.data = {
        "method": given.options.method,
        "data": data_ref(shots, given.request.split),
        "fit": recorded(given.options),
        **({"columns": given.request.columns} if given.request.columns else {}),
        **({"residual": given.request.residual} if given.request.residual else {}),
    }
    if len(mixture.adapters) < len(given.adapters):
        mixture.data["adapters"] = {a.name: adapter_ref(a).spec for a in given.adapters}
    if files := new_files(learner.model, given.base.source.name):
        names = LiveNames(learner.model, given.base).stored_modules(attachment_of(learner.model).new)
        add_new(mixture, files, [stored for name in names for stored in names[name]])
        mixture.data["new_adapter"] = {"name": mixture.adapter_names[-1], "r": kept.new_adapter}
    elif not used:
        mixture.metrics["note"] = f"{metrics['note']} {UNUSED}"
    return mixture


def _state(out: str | Path | None, given: Given, shots: Examples, held: Examples | None) -> FitState:
    """The state of this fit, with a fingerprint of all that decides its result."""
    from ..exporters.manifest import versions
    from .model import device_name

    options, start = given.options, given.options.initial_logits
    start = start if isinstance(start, str) else None
    files = sorted(Path(start).glob("mixture.*")) if start and Path(start).is_dir() else [Path(start)] if start else []
    table = {
        "base": given.base.sha256(),
        "initial_logits": [sha256_file(file) for file in files if file.is_file()],
        "adapters": [[a.name, a.sha256] for a in given.adapters],
        "data": [data_ref(shots), data_ref(held) if held else None],
        "device": device_name(options),
        "options": {k: v for k, v in asdict(options).items() if k not in ("report_to", "max_minutes")},
        "task": given.task.name,
        "columns": given.request.columns or {},
        "modules_to_save": given.request.modules_to_save,
        "versions": versions(("torch", "transformers")),
    }
    fingerprint = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    return FitState(state_file(out) if out is not None else None, fingerprint, resume=given.request.resume)


def _config(learner: Learner, base: BaseModel) -> dict[str, Any]:
    """The config keys that the new head changes, as JSON has them; with the base's own head, the padding that it lacks."""
    from .head_inputs import CONFIG_KEY

    changes = learner.run.task.config_changes(learner.run.labels, learner.processor)
    if not learner.head:
        pad = changes.get("pad_token_id")
        return {"pad_token_id": pad} if pad is not None and base.config.get("pad_token_id") is None else {}
    if "id2label" in changes:
        changes["id2label"] = {str(key): value for key, value in changes["id2label"].items()}
    if hasattr(learner.model.config, CONFIG_KEY):
        changes[CONFIG_KEY] = getattr(learner.model.config, CONFIG_KEY)
    return {"architectures": [type(learner.model).__name__], **changes}
