"""The options of a fit, and which of them go together. This module imports nothing heavy, so a recipe can be checked fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .constants import GRANULARITIES, NORMALIZE, PROBLEM_TYPES, PRUNING
from .data.tasks import FIT_TASKS
from .errors import MixtureError
from .mix_options import PRUNING_RULES, AdapterOptions, density_option, majority_sign_option
from .option_fields import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT,
    REQUIRED,
    SEED,
    SEVERAL,
    SHARE,
    Rule,
    Topic,
    checked,
    flag,
    option,
    refuse,
    spec,
)

POOLINGS = ("auto", "model", "mean", "cls", "last")
METHODS = ("learned", "uniform", "best-single", "fixed", "search", "auto", *PRUNING)
LEARNED = ("learned", "auto")
"""The methods that learn weights by gradients."""


def _tasks(fact: str) -> tuple[str, ...]:
    """The tasks of which a fact is true."""
    return tuple(name for name, task in FIT_TASKS.items() if getattr(task, fact))


_PACKING, _LABEL_NAMES = _tasks("takes_packing"), _tasks("takes_label_names")
POOLED_TASKS = _tasks("classifies_examples")
"""The tasks whose new head sees one vector of an example."""


@dataclass(frozen=True, kw_only=True)
class FitInputs:
    """What a fit reads besides the base and the adapters."""

    # fmt: off
    data: str = option(
        REQUIRED, Topic.INPUTS, common=True, metavar="FILE_OR_ID",
        help="The shots: JSONL, JSON, CSV, TSV, Parquet, Arrow, a folder, a hub id, a URL.")
    task: str = option(
        REQUIRED, Topic.INPUTS, common=True, choices=tuple(FIT_TASKS), help="What the model is for.")
    eval_data: str | None = option(
        None, Topic.INPUTS, common=True, metavar="FILE_OR_ID",
        help="Judge the candidates on these, each trained on all shots; the folds still choose among the learned settings. "
        "Default: judge on the folds.")
    split: str | None = option(
        None, Topic.INPUTS, help="Split of --data, a folder or hub data set. Default: train, or the only one.")
    eval_split: str | None = option(
        None, Topic.INPUTS, help="Split of --eval-data. Default: validation, else test, or the only one.")
    columns: dict[str, str] | None = option(
        None, Topic.INPUTS, common=True, flag="--column", metavar="NAME=COLUMN",
        help="Which column of --data is NAME, a name of the table below.")
    # fmt: on


@dataclass(frozen=True)
class FitOptions:
    """How to find the mixture weights; the defaults are for a handful of examples."""

    # fmt: off
    method: str = option(
        "learned", Topic.MIXED, common=True, choices=METHODS,
        help="learned: logits by gradient; uniform; best-single: the adapter best on held-out shots; fixed: --weights; search: "
        "global weights without gradients; auto: the best of all on held-out shots; ties and its kin: as mix --method.",
        detail="learned and uniform are those of Asadi et al. 2024. search is CMA-ES: it searches as LoraHub does, but sums in "
        "delta-weight space. Of ties, dare_linear, dare_ties and magnitude_prune a fit finds the head alone.")
    select: str = option(
        "method", Topic.MIXED, choices=("method", "best"),
        help="best: keep uniform composition or one adapter where it is better, or as good within a standard error.",
        detail="method keeps what the method gives. As good is what is behind by at most a standard error of the difference, with a "
        "loss at most a quarter larger, or 0.05.")
    keep: int | None = option(
        None, Topic.MIXED, common=True, metavar="K", bounds=SEVERAL,
        help="Adapters to mix at most: of more, those that help most on the shots are kept. Default: 16, or all with --weights or "
        "--initial-logits.",
        detail="Each is scored by how far its modules agree that it lowers the loss, by one backward pass for all adapters.")
    weights: Sequence[float] | None = option(
        None, Topic.MIXED, metavar="W,W,...", of=("fixed", *PRUNING),
        help="One mixture weight for each adapter.", detail="They are used as they are.")
    density: float | None = density_option()
    majority_sign: str | None = majority_sign_option()
    granularity: str | None = option(
        None, Topic.MIXED, choices=GRANULARITIES, of=LEARNED,
        help="Which modules share mixture weights. Default: module; the folds try global too from --settings 4 on.")
    normalize: str | None = option(
        None, Topic.MIXED, choices=NORMALIZE,
        help="Softmax over all adapters, renormalized over those present in a module, or none: free weights. Default: none if a "
        "head is trained, else all; the folds try the other too from --settings 3 on.",
        detail="Free weights start as uniform composition. The default is all where logits or a temperature are given, or nothing is "
        "learned.")
    new_adapter: int | None = option(
        None, Topic.MIXED, metavar="R", bounds=AT_LEAST_0, of=LEARNED,
        help="Rank of a LoRA that is trained from zero beside the given ones, with weight 1; 0: none. Default: 8 on four examples or "
        "more, else 0. A new head needs two per class too, and a solved one shots that are far from what the adapters know. The "
        "folds may prefer the other. Always 0 with --normalize present.",
        detail="It lies on the linear layers that the given adapters change, and becomes one more adapter of the mixture. The "
        "weights are then free ones.")
    new_adapter_interpolation: float | None = option(
        None, Topic.MIXED, bounds=SHARE, of=LEARNED,
        help="How far the new adapter goes from nothing (0) to what was trained (1). Default: 1 if there is a new head or "
        "completions repeat, else 0.5, unless the folds prefer 0.25 or 1; of a language model they are not asked.",
        detail="As in WiSE-FT (https://arxiv.org/abs/2109.01903). The folds prefer the better metric, or with the same metric the "
        "lower loss.")
    delta_scale: float | str | None = option(
        None, Topic.MIXED, metavar="X|learned", choices=("learned",),
        help="Factor of the whole delta weight, or learned. Default: 1, or that of the mixture to start from.")
    initial_logits: str | Sequence[float] | None = option(
        None, Topic.MIXED, metavar="V,V,...|PATH", of=LEARNED,
        help="Start: a logit (free weight) for each adapter, a mixture folder, or a JSON file. Default: uniform composition.",
        detail="The JSON file is {group: {adapter: logit}}. Free weights are those of --normalize none.")
    temperature: float = option(
        1.0, Topic.MIXED, bounds=ABOVE_0, of=LEARNED,
        help="Of the softmax over the logits.", detail="v̂ = softmax(v / temperature).")
    pull: float | None = option(
        None, Topic.MIXED, bounds=AT_LEAST_0, of=LEARNED,
        help="Strength of the pull towards uniform. Default: 0; the folds try 0.3 too from --settings 5 on.",
        detail="It adds pull · N · mean over groups of Σ_n (v̂_n - 1/N)² to the loss.")
    interpolation: float | None = option(
        None, Topic.MIXED, bounds=SHARE, of=LEARNED,
        help="How far weights, head and new adapter end between uniform composition (0) and what was learned (1). Default: 0.5 if a "
        "head is trained on one shot per class, else 1.",
        detail="As in WiSE-FT (https://arxiv.org/abs/2109.01903); uniform composition has its own trained head. It is always 1 from "
        "initial logits.")
    pooling: str = option(
        "auto", Topic.MIXED, choices=POOLINGS, tasks=POOLED_TASKS,
        help="What a new head sees of a text: the mean of its tokens, the first (cls), the last, or what the model's class reads "
        "(model). Default: what modules.json says, else what tells the shots apart best.",
        detail="Decoders and image models: model. A mean is one more layer in a dense export of BERT, RoBERTa, ELECTRA and "
        "DistilBERT. It is a key of the config where the class pools by it (ModernBERT). For other models it is exported to ONNX.")
    l2: float | None = option(
        None, Topic.MIXED, bounds=ABOVE_0,
        help="How strongly a new head is held to zero, on features of norm 1: 1/C of scikit-learn. Default: 0.1, unless the folds "
        "prefer 0.01 or 1.",
        detail="A new head that is one linear layer is solved to its optimum, on features that are computed once.")
    prune_below: float = option(
        0.0, Topic.MIXED, bounds=AT_LEAST_0,
        help="Set weights under this to zero after the fit: 0 to 1, of free weights any size.",
        detail="The other weights of the group are renormalized; free weights stay as they are. An adapter without weight anywhere "
        "leaves the mixture.")
    folds: int | None = option(
        None, Topic.JUDGED, bounds=AT_LEAST_0,
        help="Parts of the shots, each held out once; 0: none. Default: 3, on which a learned mixture is trained only where they "
        "decide something.",
        detail="A class with one shot is never held out, nor are fewer than four different examples. They decide with --settings 2, "
        "--select best or --method auto, and where no head is new and no language model is fitted.")
    settings: int = option(
        1, Topic.JUDGED, bounds=COUNT, of=LEARNED,
        help="Learned settings that the folds compare at most; each costs --folds trainings.",
        detail="In this order: the default; without a new adapter (where it has none: with one); the other normalize; the other "
        "granularity; with a pull; then two of these at once. A setting is taken instead of those before it where it is ahead, with "
        "a new head by more than two standard errors.")
    epochs: float | None = option(
        None, Topic.TRAINED, bounds=ABOVE_0, help="Passes over the shots, in place of --max-steps.")
    max_steps: int | None = option(
        None, Topic.TRAINED, bounds=COUNT,
        help="Optimizer steps. Default: 100 if a head is trained, 15 if a solved head classifies examples, else 20 epochs, but 40 to "
        "100 steps. It is fewer where the shots are told apart before, or the folds prefer it.")
    max_minutes: float | None = option(
        None, Topic.TRAINED, bounds=ABOVE_0,
        help="Wall-clock budget in minutes, seen to between steps; half of it for folds.",
        detail="It is looked at between steps, evaluations of a search, and trainings, not while examples are judged. Evaluation "
        "data judge until three quarters of it.")
    early_stopping: int | None = option(
        None, Topic.TRAINED, metavar="N", bounds=COUNT,
        help="Stop after N evaluations on --eval-data (one every tenth of the steps) without a lower loss, and keep the best step. "
        "Default: no.")
    learning_rate: float | None = option(
        None, Topic.TRAINED, bounds=ABOVE_0, of=LEARNED,
        help="Of the logits, and of a learned --delta-scale (AdamW). Default: 0.05, with free weights 0.02.")
    head_learning_rate: float = option(
        0.01, Topic.TRAINED, bounds=ABOVE_0, help="Of a new head that is trained, not solved (AdamW).")
    new_adapter_learning_rate: float | None = option(
        None, Topic.TRAINED, bounds=ABOVE_0, of=LEARNED,
        help="Of a new adapter (AdamW). Default: 0.002 under a solved head that classifies examples, else 0.001.")
    batch_size: int | None = option(
        None, Topic.TRAINED, bounds=COUNT,
        help="Examples in a batch, over all processes. Default: 24 where a solved head classifies examples, else 8.")
    gradient_accumulation_steps: int = option(1, Topic.TRAINED, bounds=COUNT, help="Batches in an optimizer step.")
    max_length: int | None = option(
        None, Topic.TRAINED, bounds=COUNT,
        help="Tokens kept of an example. Default: what the tokenizer says, within the model's positions.")
    seed: int = option(
        0, Topic.TRAINED, bounds=SEED,
        help="Of the head, the new adapter, the search, the order, the folds, and what is kept at random.")
    device: str = option("auto", Topic.TRAINED, choices=("auto", "cpu", "cuda", "mps"), help="Where to run.")
    precision: str = option(
        "float32", Topic.TRAINED, choices=("float32", "bf16", "fp16"),
        help="bf16: the base in bfloat16, what is trained in float32; fp16: mixed.")
    quantize: str | None = option(
        None, Topic.TRAINED, choices=("4bit", "8bit"), help="Load the base quantized (bitsandbytes). Default: no.")
    problem_type: str | None = option(
        None, Topic.INPUTS, choices=PROBLEM_TYPES, tasks=_tasks("classifies_examples"),
        help="Of a classification. Default: lists of names are multi-label, numbers with fractions a regression, all else "
        "single-label.", detail="As in a transformers config.")
    packing: bool = option(
        False, Topic.TRAINED, tasks=_PACKING,
        help=f"{', '.join(_PACKING)}: the examples of a batch end to end in one row; the same loss, no padding.")
    label_names: bool | None = option(
        None, Topic.INPUTS, tasks=_LABEL_NAMES,
        help=f"{', '.join(_LABEL_NAMES)}: take each label's name, as words, for one more example of it, which is never held out. "
        "Default: where the names tell the shots apart.",
        detail="Then half of the shots or more are nearest to their own label's name, which chance gives once in a thousand at most.")
    gradient_checkpointing: bool = option(False, Topic.TRAINED, help="Less memory, more time.")
    report_to: str = option(
        "none", Topic.OUTPUT, help="Trackers of accelerate (tensorboard, wandb, ...), with commas.")
    # fmt: on

    @property
    def combination(self) -> dict[str, Any]:
        """The options of a mix that combines delta weights as this fit does; empty where it sums them."""
        if self.method not in PRUNING:
            return {}
        names = ("method", "density", "majority_sign", "weights", *(["seed"] if self.method.startswith("dare") else []))
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class FitRequest(AdapterOptions, FitOptions, FitInputs):
    """The `fit` section: the options of `wlora-merge fit` under their Python names; what is left out keeps its default."""

    @property
    def options(self) -> FitOptions:
        """How to find the mixture weights, without what is read."""
        return FitOptions(**{name: getattr(self, name) for name in _FIELDS})


@dataclass(frozen=True, kw_only=True)
class FitCall(FitRequest):
    """What a fit may be asked by name on the command line and in Python: a request, and whether it goes on with a stopped one."""

    # fmt: off
    resume: bool = option(
        False, Topic.TRAINED, help="Go on where a killed fit to the same --out stopped (OUT.fit-state).")
    # fmt: on


_FIELDS = {f.name: f for f in dataclasses.fields(FitOptions)}


def fit_options(given: Mapping[str, Any]) -> FitOptions:
    """Options by name; None keeps the default.

    Raises:
        MixtureError: an option that there is not, a value out of range, or options that exclude each other.
    """
    chosen: FitOptions = checked(FitOptions, given, "fit", MixtureError)
    check_together(chosen)
    return chosen


def fit_request(given: Mapping[str, Any]) -> FitCall:
    """Inputs and options by name; None keeps the default.

    Raises:
        MixtureError: as `fit_options`; or options that the task, or a fit without evaluation data, does not have.
    """
    request: FitCall = checked(FitCall, given, "fit", MixtureError)
    check_together(request)
    for f in _FIELDS.values():
        tasks = spec(f).tasks
        if tasks and request.task not in tasks and getattr(request, f.name) != f.default:
            raise MixtureError(f"{f.name} is of {' and '.join(tasks)}, not of {request.task}: leave it out.")
    refuse(_REQUEST_RULES, MixtureError, request)
    return request


def check_together(options: FitOptions) -> None:
    """Refuse options that exclude each other, or that would have no effect.

    Raises:
        MixtureError: with the options' names.
    """
    refuse(_RULES, MixtureError, options)


def given_of_new(options: FitOptions) -> list[str]:
    """The flags of a new adapter's own options that are not at their defaults."""
    own = [f for f in _FIELDS.values() if f.name.startswith("new_adapter_")]
    return [flag(f) for f in own if getattr(options, f.name) != f.default]


def _idle(options: FitOptions) -> str:
    """Options that a method without gradients does not use, and what to do about them; an empty text where there are none."""
    if options.method in LEARNED:
        return ""
    own = [f for f in _FIELDS.values() if spec(f).of == LEARNED]
    given = [f.name for f in own if getattr(options, f.name) not in (f.default, 0)]
    given += ["delta_scale: learned"] * (options.delta_scale == "learned")
    leave = f"would have no effect: leave {'it' if len(given) == 1 else 'them'} out"
    return f"{', '.join(given)} {leave}" if given else ""


# fmt: off
_RULES: list[Rule] = [
    (lambda o: o.folds == 1, "folds is 1, expected 0 (hold nothing out) or 2 and more."),
    (lambda o: o.folds == 0 and o.settings != FitOptions.settings,
     "settings are compared on the folds, and folds 0 makes none: leave one of them out."),
    (lambda o: o.epochs is not None and o.max_steps is not None,
     "epochs and max_steps both say how long to train: give one."),
    (lambda o: o.keep is not None and (o.weights is not None or o.initial_logits is not None),
     "keep chooses among the adapters, and weights and initial_logits are of all of them: leave keep out."),
    (lambda o: o.method == "fixed" and o.weights is None,
     "method fixed takes the weights that are given: say --weights too."),
    (lambda o: o.method not in ("fixed", *PRUNING) and o.weights is not None,
     "method {o.method} finds its own weights: leave --weights out, or say --method fixed."),
    (lambda o: o.method in PRUNING and o.weights is not None and not any(o.weights),
     "weights are all 0, so method {o.method} combines nothing: give others, or say --method fixed, which keeps the base."),
    *PRUNING_RULES,
    (lambda o: o.method in PRUNING and ("prune_below" if o.prune_below else "normalize" if o.normalize else ""),
     "{found} is of mixture weights that are summed as they are, and method {o.method} does more: leave it out."),
    (lambda o: o.prune_below >= 1 and o.normalize != "none" and o.method not in ("fixed", "best-single"),
     "prune_below is {o.prune_below}, expected less than 1, as no weight of a softmax is larger; for free weights give "
     "--normalize none too."),
    (_idle, "method {o.method} learns no weights by gradients, so {found}, or use method learned."),
    (lambda o: o.method == "auto" and o.select == "best",
     "method auto keeps what is best anyway: leave --select best out."),
    (lambda o: o.method in ("fixed", "best-single") and o.normalize is not None,
     "method {o.method} uses weights as they are: leave --normalize out."),
    (lambda o: o.new_adapter == 0 and next(iter(given_of_new(o)), ""),
     "new_adapter 0 trains none: leave {found} out."),
    (lambda o: o.temperature != 1 and o.normalize == "none",
     "the temperature is of a softmax, and normalize none has none: leave one of them out."),
    (lambda o: o.interpolation is not None and o.initial_logits is not None,
     "interpolation goes back to uniform composition, not to initial_logits: leave one of them out."),
    (lambda o: o.new_adapter and o.normalize == "present",
     "a new adapter is in every module, which normalize present does not know: leave --new-adapter {o.new_adapter} out, or "
     "take --normalize all or none."),
]
_REQUEST_RULES: list[Rule] = [
    (lambda r: r.max_length and FIT_TASKS[r.task].takes_images,
     "max_length is of texts, not of images: leave it out."),
    (lambda r: r.eval_split and not r.eval_data, "eval_split is of eval_data: give both, or neither."),
    (lambda r: r.early_stopping is not None and not r.eval_data,
     "early_stopping needs eval_data to look at; on the shots alone, the folds choose the number of steps."),
]
