"""The options of a fit, and which values they may have. This room imports nothing heavy, so a recipe can be checked fast."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from .constants import GRANULARITIES, NORMALIZE, PROBLEM_TYPES
from .errors import MixtureError, WloraMergeError
from .text import nearest

METHODS = ("learned", "uniform", "best-single", "fixed", "search", "auto")
SELECT = ("method", "best")
PRECISIONS = ("float32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
QUANTIZE = ("4bit", "8bit")


@dataclass(frozen=True)
class FitOptions:
    """How to find the mixture weights; the defaults are for a handful of examples.

    What is fitted:
        method: `learned` logits (Asadi et al. 2024); `uniform` composition; `best-single`, the adapter that does best on what
            is held out; `fixed` weights; `search`, global weights without gradients (CMA-ES; as LoraHub searches, but summed in
            delta-weight space); `auto`, the best of these on what is held out.
        select: `method` keeps what the method gives; `best` keeps uniform composition or one adapter where it is better, or as good:
            behind by at most a standard error of the difference, and with a loss at most a quarter larger, or 0.05.
        weights: [N] mixture weights of `fixed`, used as they are.
        granularity: `module`, `layer` or `global`: who shares a row of weights; None: `module`, and from 4 settings on the folds
            try `global`.
        normalize: `all`, `present` or `none`: softmax over all adapters, over those present in a module, or free weights that
            start as uniform composition; None: `none` if a new head is trained, else `all`, and from 3 settings on the folds try
            the other; always `all` where logits or a temperature are given, or nothing is learned.
        new_adapter: rank of a LoRA that is trained from zero beside the given adapters, on the linear layers that they change; it
            becomes one more adapter of the mixture, with weight 1, and the weights free ones. 0: none; None: 8 on four
            different examples or more, if a new head is trained two per class too, else 0, unless the folds prefer the other;
            always 0 with `normalize: present`.
        new_adapter_interpolation: how far it goes from nothing (0) to what was trained (1), as in WiSE-FT; None: 1 if a new head is
            trained, else 0.5, or 0.25 or 1 where the folds' metric, or with the same metric the loss, is better.
        delta_scale: factor of the whole delta weight, or `learned`; None: 1, or that of the mixture folder to start from.
        initial_logits: [N] logits for all groups (free weights with `normalize: none`), a mixture folder to start from, or a
            JSON file {group: {adapter: logit}}; None: zero, which is uniform composition.
        temperature: of the softmax, v̂ = softmax(v / temperature).
        pull: strength of the pull towards uniform composition: adds pull · N · mean over groups of Σ_n (v̂_n - 1/N)² to the
            loss; None: 0, and from 5 settings on the folds try 0.3.
        interpolation: how far what is trained (weights, head, new adapter) ends between uniform composition with its own trained
            head (0) and what was learned (1), as in WiSE-FT (https://arxiv.org/abs/2109.01903); None: 0.5 where a new head is
            trained on one shot per class, else 1; always 1 from initial logits.
        prune_below: after the fit, weights (free weights: magnitudes) under this are set to zero in their group and the others
            renormalized (free weights stay as they are); an adapter without weight anywhere leaves the mixture.

    How it is judged:
        folds: parts of the shots, each held out once; 0: none. Classes with one shot, and fewer than four different
            examples, are never held out.
        settings: how many settings of the learned method the folds compare at most, in this order: the default, without a new
            adapter (where it has none: with one), the other normalize, the other granularity, with a pull, then two of these at once;
            each costs as many trainings as there are folds. One is taken instead of those before it where it is ahead, with a
            new head by more than two standard errors.

    How long:
        epochs, max_steps: passes over the shots, or optimizer steps; neither: 100 steps where a head is
            trained, 20 passes where not, but 40 steps at least and 100 at most, and fewer if the folds say so.
        max_minutes: wall-clock budget, looked at between steps, evaluations of a search, and trainings, not while examples are
            judged; the folds end after half of it, and what evaluation data judge after three quarters.
        early_stopping: stop when so many evaluations on the evaluation data, one every tenth of the steps, brought no lower
            loss, and keep the best step.

    How it is trained:
        learning_rate of the logits (None: 0.05, of free weights 0.02), head_learning_rate, and new_adapter_learning_rate (AdamW);
        batch_size in examples, of a step divided among the processes; gradient_accumulation_steps: batches in an optimizer step;
        max_length in tokens; seed; device; precision: `float32`, `bf16` (the base is loaded in
        bfloat16; what is trained is float32), or `fp16` mixed; quantize: load the base in `4bit` or
        `8bit` (bitsandbytes); problem_type, as in a transformers config, of a text or image classification: None takes lists for
        multi-label, numbers with fractions for a regression, all else for single-label; label_names, of
        a text-classification: each label's name, as words, is an example of it too, never held out; packing, of a causal-lm: the
        examples of a training batch end to end in one row, to the same loss without padding; gradient_checkpointing: less
        memory, more time; report_to: trackers of accelerate (`tensorboard`, `wandb`, ...), with commas between them.
    """

    method: str = "learned"
    select: str = "method"
    weights: Sequence[float] | None = None
    granularity: str | None = None
    normalize: str | None = None
    new_adapter: int | None = None
    new_adapter_interpolation: float | None = None
    delta_scale: float | str | None = None
    initial_logits: str | Sequence[float] | None = None
    temperature: float = 1.0
    pull: float | None = None
    interpolation: float | None = None
    prune_below: float = 0.0
    folds: int = 3
    settings: int = 2
    epochs: float | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    early_stopping: int | None = None
    learning_rate: float | None = None
    head_learning_rate: float = 0.01
    new_adapter_learning_rate: float = 1e-3
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    quantize: str | None = None
    problem_type: str | None = None
    packing: bool = False
    label_names: bool = False
    gradient_checkpointing: bool = False
    report_to: str = "none"


CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "select": SELECT,
    "granularity": GRANULARITIES,
    "normalize": NORMALIZE,
    "device": DEVICES,
    "precision": PRECISIONS,
    "quantize": QUANTIZE,
    "problem_type": PROBLEM_TYPES,
}
_ABOVE_0 = (
    "temperature", "epochs", "max_steps", "max_minutes", "early_stopping", "learning_rate", "head_learning_rate",
    "new_adapter_learning_rate", "batch_size", "gradient_accumulation_steps", "max_length", "settings", "interpolation",
    "new_adapter_interpolation",
)  # fmt: skip
_AT_LEAST_0 = ("pull", "prune_below", "folds", "new_adapter")
_OF_NEW = ("new_adapter_learning_rate", "new_adapter_interpolation")
_LEARNED_ALONE = (
    "granularity", "pull", "temperature", "initial_logits", "learning_rate", "settings", "new_adapter",
    "new_adapter_learning_rate", "new_adapter_interpolation", "interpolation",
)  # fmt: skip


def fit_options(given: Mapping[str, Any]) -> FitOptions:
    """Options by name; None keeps the default.

    Raises:
        MixtureError: an option that there is not, or a value out of range.
    """
    known = [f.name for f in dataclasses.fields(FitOptions)]
    for name in given:
        if name not in known:
            raise MixtureError(f"fit has no option {name!r}{nearest(name, known)}.")
    chosen = FitOptions(**{name: _plain(name, value) for name, value in given.items() if value is not None})
    for name, choices in CHOICES.items():
        value = getattr(chosen, name)
        if value is not None and value not in choices:
            raise MixtureError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")
    for name in (*_ABOVE_0, *_AT_LEAST_0):
        value = getattr(chosen, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (name in _AT_LEAST_0 and value == 0))):
            raise MixtureError(
                f"{name} is {value}, expected a number {'above' if name in _ABOVE_0 else 'of at least'} 0."
            )
    if not 0 <= chosen.seed < 2**32:
        raise MixtureError(f"seed is {chosen.seed}, expected a whole number from 0 to 2^32 - 1.")
    check_together(chosen)
    return chosen


def _plain(name: str, value: Any) -> Any:
    if name == "weights" or (name == "initial_logits" and not isinstance(value, str | PathLike)):
        value = value.tolist() if hasattr(value, "tolist") else value
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if not listed or not all(isinstance(x, numbers.Real) for x in value):
            raise MixtureError(f"{name} is {value!r}, expected a list of numbers.")
        return value
    return plain_value(FitOptions, name, value, MixtureError)


def plain_value(options: type[Any], name: str, value: Any, error: type[WloraMergeError]) -> Any:
    """The value of an option of a dataclass, as a recipe, a command line or NumPy gives it, in Python's own types.

    Raises:
        error: it is not of the option's type.
    """
    kind = next(f.type for f in dataclasses.fields(options) if f.name == name)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    number = whole or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    fits, expected = {
        "int": (whole, "a whole number"), "float": (number, "a number"), "str": (isinstance(value, str | PathLike), "a text"),
    }.get(str(kind).removesuffix(" | None"), (True, ""))  # fmt: skip
    if not fits:
        raise error(f"{name} is {value!r}, expected {expected}.")
    if hasattr(value, "tolist"):  # numpy's and torch's
        value = value.tolist()
    return fspath(value) if isinstance(value, PathLike) else value


def given_of_new(options: FitOptions) -> list[str]:
    """The flags of a new adapter's own options that are not at their defaults."""
    return [f"--{name.replace('_', '-')}" for name in _OF_NEW if getattr(options, name) != getattr(FitOptions, name)]


def check_for_task(options: FitOptions, task: str, eval_data: Any, eval_split: str | None) -> None:
    """Refuse options that this task, or a fit without evaluation data, does not have.

    Raises:
        MixtureError: with the option's name.
    """
    if options.problem_type and task not in ("text-classification", "image-classification"):
        raise MixtureError(
            f"problem_type is of text-classification and image-classification, not of {task}: leave it out."
        )
    if options.packing and task != "causal-lm":
        raise MixtureError(f"packing is of causal-lm, not of {task}: leave it out.")
    if options.label_names and task != "text-classification":
        raise MixtureError(f"label_names is of text-classification, not of {task}: leave it out.")
    if options.max_length and task == "image-classification":
        raise MixtureError("max_length is of texts, not of images: leave it out.")
    if eval_split and not eval_data:
        raise MixtureError("eval_split is of eval_data: give both, or neither.")
    if options.early_stopping is not None and not eval_data:
        raise MixtureError(
            "early_stopping needs eval_data to look at; on the shots alone, the folds choose the number of steps."
        )


def check_together(options: FitOptions) -> None:
    """Refuse options that exclude each other, or that would have no effect.

    Raises:
        MixtureError: with the options' names.
    """
    if options.folds == 1:
        raise MixtureError("folds is 1, expected 0 (hold nothing out) or 2 and more.")
    if options.folds == 0 and options.settings != FitOptions.settings:
        raise MixtureError("settings are compared on the folds, and folds 0 makes none: leave one of them out.")
    if options.epochs is not None and options.max_steps is not None:
        raise MixtureError("epochs and max_steps both say how long to train: give one.")
    if (options.method == "fixed") != (options.weights is not None):
        raise MixtureError("--method fixed and --weights go together: give both, or neither.")
    for name in ("weights", "initial_logits"):
        row = getattr(options, name)
        if row is not None and not isinstance(row, str) and not all(math.isfinite(x) for x in row):
            raise MixtureError(f"{name} are {', '.join(map(str, row))}, expected finite numbers.")
    if options.prune_below >= 1 and options.normalize != "none" and options.method not in ("fixed", "best-single"):
        raise MixtureError(
            f"prune_below is {options.prune_below}, expected less than 1, as no weight of a softmax is larger; for free weights give "
            "--normalize none too."
        )
    if options.method not in ("learned", "auto"):
        given = [n for n in _LEARNED_ALONE if getattr(options, n) not in (getattr(FitOptions, n), 0)]
        given += ["delta_scale: learned"] * (options.delta_scale == "learned")
        if given:
            raise MixtureError(
                f"method {options.method} learns no weights by gradients, so {', '.join(given)} would have no effect: leave "
                f"{'it' if len(given) == 1 else 'them'} out, or use method learned."
            )
    if options.method == "auto" and options.select == "best":
        raise MixtureError("method auto keeps what is best anyway: leave --select best out.")
    if options.method in ("fixed", "best-single") and options.normalize is not None:
        raise MixtureError(f"method {options.method} uses weights as they are: leave --normalize out.")
    if options.new_adapter == 0 and (idle := given_of_new(options)):
        raise MixtureError(f"new_adapter 0 trains none: leave {idle[0]} out.")
    if options.temperature != 1 and options.normalize == "none":
        raise MixtureError("the temperature is of a softmax, and normalize none has none: leave one of them out.")
    for name in ("interpolation", "new_adapter_interpolation"):
        share = getattr(options, name)
        if (share or 1) > 1:
            raise MixtureError(f"{name} is {share}, expected a share above 0 and at most 1.")
    if options.interpolation is not None and options.initial_logits is not None:
        raise MixtureError(
            "interpolation goes back to uniform composition, not to initial_logits: leave one of them out."
        )
    if options.new_adapter and options.normalize == "present":
        raise MixtureError(
            f"a new adapter is in every module, which normalize present does not know: leave --new-adapter {options.new_adapter} "
            "out, or take --normalize all or none."
        )
    scale = options.delta_scale
    if scale not in (None, "learned") and (isinstance(scale, str) or not math.isfinite(scale)):
        raise MixtureError(f"delta_scale is {scale!r}, expected a finite number, or learned.")
