"""Which ways to mix are compared, with which settings, and for how long each is trained.

It knows options and numbers of examples. It knows neither models nor files.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..constants import PRUNING
from ..fit_options import FitOptions
from ..mixture.weights import uniform_start

BEST_SINGLE, AUTO = "best-single", "auto"
"""The methods that choose among candidates; the others are called as the kind of candidate that they give."""
CHECKPOINTS = (0.3, 0.6, 1.0)
"""Shares of the steps after which a candidate is judged, where no head is trained: one that is stopped early is not finished, and
costs more than the weights gain (recipes/bench_fit/README.md)."""
PULLS = (0.0, 0.3)
NEW_RANK = 8
NEW_INTERPOLATIONS = (0.5, 0.25, 1.0)
"""How far the new adapter goes to what was trained, where it is trained to its last step: half-way it keeps what it gains far from
the given adapters, and loses little near them. The folds may prefer less or all of it, but of a language model, whose trainings are
long: there their choice was worth a point (recipes/bench_fit/README.md)."""
ONE_SHOT = 0.5
"""How far from uniform composition a new head and weights go on one shot per class, where nothing can be held out: half-way costs
nothing near the adapters, and has most of the gain far from them (recipes/bench_fit/README.md)."""
START_SCALES = (1.0, 0.0, 2.0)
"""What weights under a solved head are, times uniform composition, where nothing is trained beside them: of these the one whose head
predicts each shot best from the others; on one shot per class the first (recipes/bench_fit/README.md)."""
SCREENED_SCALES = (1.0, 0.0)
"""The same of adapters that were chosen on these shots: they predict these better for that alone, and twice as much misleads
(recipes/bench_fit/README.md)."""
NEAR = 0.8
"""The mean accuracy of the classes, each shot given to the nearest mean of the others, from which on a solved head has no new
adapter: the adapters know the task, and what is trained on few shots loses what they know (recipes/bench_fit/README.md)."""
LEFT_OUT_STEPS, LEFT_OUT_BATCH, BATCH = 15, 24, 8
EPOCHS, FEWEST_STEPS, MOST_STEPS = 20, 40, 100
"""How long a training is: with a head the most, else so many passes within these bounds: eight examples are learned in forty steps,
eighty are not (recipes/bench_fit/README.md)."""


SEARCH_EVALUATIONS = 40


class Kind(enum.Enum):
    """What a candidate is, as tables call it."""

    BASE = "base"
    UNIFORM = "uniform"
    SINGLE = "single"
    FIXED = "fixed"
    SEARCH = "search"
    LEARNED = "learned"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    MAGNITUDE_PRUNE = "magnitude_prune"


@dataclass(frozen=True)
class Contender:
    """Which candidate it is, whatever its settings: its kind and, of one adapter alone, that adapter's name."""

    kind: Kind
    adapter: str = ""

    @property
    def label(self) -> str:
        """What tables call it, and no other: an adapter's own name, unless a kind of candidate has it too."""
        if self.kind is not Kind.SINGLE:
            return str(self.kind.value)
        return f"adapter {self.adapter}" if self.adapter in [kind.value for kind in Kind] else self.adapter

    @property
    def called(self) -> str:
        """What sentences call it."""
        return f"{self.label} alone" if self.kind is Kind.SINGLE else self.label


BASE, UNIFORM, FIXED, SEARCH, LEARNED = map(Contender, (Kind.BASE, Kind.UNIFORM, Kind.FIXED, Kind.SEARCH, Kind.LEARNED))


def single(adapter: str) -> Contender:
    """One adapter alone."""
    return Contender(Kind.SINGLE, adapter)


@dataclass(frozen=True)
class Candidate:
    """One way to mix: a row of weights for all groups, or (`row` None) weights learned from the start.

    `scale` 0 is the base model alone. `new_adapter` is the rank of a LoRA that is trained beside them. `interpolation` is how far it
    goes from uniform composition (0) to what was learned (1). `new_interpolations` is how far the new adapter may go, from nothing.
    `trains_weights` says whether gradients train the weights; else their start is all that is chosen.
    """

    contender: Contender
    row: tuple[float, ...] | None = None
    normalize: str = "none"
    granularity: str = "global"
    pull: float = 0.0
    scale: float | None = None
    new_adapter: int = 0
    interpolation: float = 1.0
    new_interpolations: tuple[float, ...] = (1.0,)
    trains_weights: bool = True

    @property
    def trained(self) -> bool:
        """Whether gradients train something of it besides a head."""
        return self.learned and (self.trains_weights or self.new_adapter > 0)

    @property
    def learned(self) -> bool:
        """Whether its weights are trained."""
        return self.row is None

    @property
    def new_interpolation(self) -> float:
        """How far its new adapter goes: of several the first, where the folds have not chosen."""
        return self.new_interpolations[0]


def fixed_candidates(names: Sequence[str], options: FitOptions) -> list[Candidate]:
    """The base, uniform composition, each adapter alone, and the weights given, or the combination of all.

    Args:
        names: of the adapters given; a combination of all is one more adapter of the model, behind them.
        options: of the fit.
    """
    n, combines = len(names), options.method in PRUNING
    normalize = "none" if combines else options.normalize or "all"
    none, behind = (0.0,) * n, (0.0,) if combines else ()
    return [
        Candidate(BASE, none + behind, scale=0.0),
        Candidate(UNIFORM, (*uniform_start(n, normalize), *behind), normalize),
        *(Candidate(single(name), (*none[:i], 1.0, *none[i + 1 :], *behind)) for i, name in enumerate(names)),
        *([Candidate(FIXED, tuple(map(float, options.weights or ())))] if options.method == FIXED.label else []),
        *([Candidate(Contender(Kind(options.method)), (*none, 1.0))] if combines else []),
    ]


@dataclass(frozen=True)
class Situation:
    """What decides the defaults of a fit.

    Attributes:
        head: whether the task brings a new head.
        enough: whether the examples are enough for a new adapter (`cross_validation.enough`).
        solved: whether that head is solved and not trained.
        left_out: whether what is learned under it is trained by how each example is predicted from the others.
        generates: whether it is a language model.
        choice: whether that chooses among completions that repeat.
        near: the mean accuracy of the classes, each shot given to the nearest mean of the others; None where it is not known.
    """

    head: bool
    enough: bool
    solved: bool = False
    left_out: bool = False
    generates: bool = False
    choice: bool = False
    near: float | None = None

    @property
    def stops(self) -> bool:
        """Whether a training stops once it tells the shots apart: then all of it is kept, and nothing is left to the folds."""
        return self.left_out or self.choice


def learned_settings(options: FitOptions, now: Situation) -> list[Candidate]:
    """What the folds compare for the learned method: the default, then what differs from it in one option, then in more.

    Empty for a method that learns nothing by gradients. The default is free weights where there is a new head, and a softmax where
    the base already does the task. It has a new adapter where the examples are enough for one. Under a solved head they must not
    tell their classes yet, too (recipes/bench_fit/README.md says what was measured).

    Args:
        options: the options of the fit.
        now: what decides the defaults.
    """
    if options.method not in (Kind.LEARNED.value, AUTO):
        return []
    share, new = _interpolations(options, now)
    table = itertools.product(
        enumerate(_pulls(options)),
        enumerate(_granularities(options)),
        enumerate(_normalizes(options, head=now.head)),
        enumerate(_ranks(options, now)),
    )
    ordered = sorted(table, key=lambda row: sum(number for number, _ in row))
    settings = [
        Candidate(
            LEARNED, None, m, g, p, new_adapter=r, interpolation=share, new_interpolations=new if r else (1.0,),
            trains_weights=not now.left_out or p > 0 or m != "none" or _asks_for_weights(options),
        )
        for (_, p), (_, g), (_, m), (_, r) in ordered
    ]  # fmt: skip
    return [s for s in settings if not (s.new_adapter and s.normalize == "present")][: options.settings]


def _asks_for_weights(options: FitOptions) -> bool:
    """Whether an option is given that weights have only where gradients train them."""
    names = ("granularity", "initial_logits", "max_steps", "epochs", "learning_rate", "interpolation")
    return any(getattr(options, name) is not None for name in names) or options.delta_scale == "learned"


def _pulls(options: FitOptions) -> list[float]:
    return list(PULLS) if options.pull is None else [options.pull]


def _granularities(options: FitOptions) -> list[str]:
    if options.granularity or isinstance(options.initial_logits, str):  # a file has its own groups
        return [options.granularity or "module"]
    return ["module", "global"]


def _normalizes(options: FitOptions, *, head: bool) -> list[str]:
    if options.normalize:
        return [options.normalize]
    if options.initial_logits is not None or options.temperature != 1:
        return ["all"]
    return ["none", "all"] if head else ["all", "none"]


def _ranks(options: FitOptions, now: Situation) -> list[int]:
    """Ranks of the new adapter; 0: none."""
    if options.new_adapter is not None:
        return [options.new_adapter]
    wanted = now.enough and not (now.near is not None and now.near >= NEAR)
    return [NEW_RANK, 0] if wanted else [0, NEW_RANK]


def _interpolations(options: FitOptions, now: Situation) -> tuple[float, tuple[float, ...]]:
    """How far the mixture goes from uniform composition, and how far the new adapter may go besides."""
    half = now.head and not now.enough and not now.solved and options.initial_logits is None
    share = options.interpolation if options.interpolation is not None else ONE_SHOT if half else 1.0
    given = options.new_adapter_interpolation
    if given is not None:
        return share, (given,)
    if now.head or now.stops:
        return share, (1.0,)
    return share, NEW_INTERPOLATIONS[:1] if now.generates else NEW_INTERPOLATIONS


def setting_name(candidate: Candidate) -> str:
    """A learned setting as tables show it, with how far a new adapter goes, where that has been chosen."""
    share, *others = candidate.new_interpolations
    far = f" at {share:g}" if share != 1 and not others else ""
    new = f", new adapter of rank {candidate.new_adapter}{far}" if candidate.new_adapter else ""
    between = f", interpolation {candidate.interpolation:g}" if candidate.interpolation != 1 else ""
    return f"{candidate.granularity}, normalize {candidate.normalize}, pull {candidate.pull:g}{new}{between}"


def batch_size(options: FitOptions, now: Situation) -> int:
    """Examples in a batch: as asked, else so many that classes meet in one, or few."""
    return options.batch_size or (LEFT_OUT_BATCH if now.left_out else BATCH)


def steps_of(options: FitOptions, shots: int, now: Situation) -> int:
    """Optimizer steps on so many shots."""
    if options.max_steps is not None:
        return options.max_steps
    batches, each = -(-shots // batch_size(options, now)), options.gradient_accumulation_steps
    if options.epochs is not None:
        return max(1, round(options.epochs * batches / each))
    if now.left_out:
        return LEFT_OUT_STEPS
    most = now.head and not now.solved
    return MOST_STEPS if most else min(MOST_STEPS, max(FEWEST_STEPS, round(EPOCHS * batches / each)))


def checkpoints(options: FitOptions, now: Situation) -> tuple[float, ...]:
    """Shares of the steps after which the folds judge a candidate."""
    once = now.head or now.generates or options.max_steps is not None or options.epochs is not None
    return (1.0,) if once else CHECKPOINTS


def judgements(options: FitOptions, settings: Sequence[Candidate], now: Situation) -> int:
    """How often the folds judge each example by settings of the learned method: at every number of steps and every interpolation."""
    return sum(len(s.new_interpolations) for s in settings) * len(checkpoints(options, now))


def on_folds(options: FitOptions, settings: Sequence[Candidate], now: Situation) -> list[Candidate]:
    """The settings of the learned method that the folds judge.

    Those that are trained only where the folds decide something by it, or were asked for: each costs a training for each fold.
    """
    asked = options.folds is not None or options.method == AUTO or options.select == "best"
    return [s for s in settings if asked or not s.trained or judgements(options, settings, now) > 1]
