"""The options of a mixture without fitting, and those that it shares with a fit. This module imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .constants import COMBINATIONS, LINEAR, MAJORITY_SIGNS, NORMALIZE, PRUNING
from .data.tasks import TASKS
from .errors import MixtureError
from .option_fields import SEED, SHARE, Rule, Topic, checked, option, refuse


def density_option() -> Any:
    """`density`, of a mix and of a fit."""
    return option(
        None, Topic.MIXED, bounds=SHARE, of=PRUNING,
        help="The share of each adapter's delta weight, tensor by tensor, that is kept.")  # fmt: skip


def majority_sign_option() -> Any:
    """`majority_sign`, of a mix and of a fit."""
    return option(
        None, Topic.MIXED, choices=MAJORITY_SIGNS, of=("ties", "dare_ties"),
        help="Elect by the total of the numbers, or by how many have a sign. Default: total.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """Which weights a mixture without fitting has."""

    # fmt: off
    task: str | None = option(
        None, Topic.INPUTS, common=True, choices=tuple(TASKS),
        help="What the exported model is for. Default: as the inputs say, for onnx.",
    )
    weights: Sequence[float] | None = option(
        None, Topic.MIXED, common=True, metavar="W,W,...", help="One weight for each adapter. Default: uniform composition."
    )
    normalize: str | None = option(
        None, Topic.MIXED, choices=NORMALIZE[:2], help="For uniform composition. Default: all."
    )
    method: str = option(
        LINEAR, Topic.MIXED, choices=COMBINATIONS,
        help="How delta weights become one: summed as they are; pruned first, to the largest (magnitude_prune) or at random "
        "(dare_linear); and of one sign where they disagree (ties, dare_ties).",
        detail="As PEFT's functions of these names do it, on the dense delta weight of each tensor and adapter. All but linear are "
        "exported dense or to ONNX, or come near as a LoRA of --rank K. ties and dare_ties average what agrees: their default "
        "weights are 1. TIES: https://arxiv.org/abs/2306.01708; DARE: https://arxiv.org/abs/2311.03099.")
    density: float | None = density_option()
    majority_sign: str | None = majority_sign_option()
    seed: int | None = option(
        None, Topic.MIXED, bounds=SEED, of=("dare_linear", "dare_ties"), help="Of what is kept at random. Default: 0.")
    delta_scale: float = option(1.0, Topic.MIXED, common=True, help="Factor of the whole delta weight.")
    resize_vocab: str | None = option(
        None,
        Topic.INPUTS,
        metavar="NAME",
        help="Give the export the vocabulary that adapter NAME was trained with, larger or smaller: its rows beyond the base's, "
        "and its tokenizer.",
    )
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What a fit and a mix do with adapters that carry whole tensors, or that belong to another base."""

    # fmt: off
    modules_to_save: str | None = option(
        None, Topic.INPUTS, metavar="NAME|drop|mix",
        help="What becomes of whole tensors that adapters carry (their heads): take adapter NAME's, drop them, or mix them "
        "against the base's. Default: refuse those that a trained head does not replace.")
    residual: str | None = option(
        None, Topic.INPUTS, flag="--base-is-residual", metavar="NAME",
        help="The base given is the residual of adapter NAME (PiSSA and its kind).")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class MixOptions(AdapterOptions, WeightOptions):
    """The `mix` section: a mixture without fitting."""


# fmt: off
PRUNING_RULES: list[Rule] = [
    (lambda o: o.method in PRUNING and o.density is None,
     "method {o.method} prunes the delta weights: say --density, the share of them that is kept, as 0.2."),
    (lambda o: o.method not in PRUNING and o.density is not None,
     "density is of a method that prunes, and method {o.method} does not: say --method ties too, or leave it out."),
    (lambda o: o.majority_sign is not None and not o.method.endswith("ties"),
     "majority_sign is of ties and dare_ties, and method {o.method} elects no sign: leave it out."),
]
"""What a mix and a fit ask of the numbers of a method that prunes."""
_RULES: list[Rule] = [
    *PRUNING_RULES,
    (lambda o: o.seed is not None and not o.method.startswith("dare"),
     "seed is of dare_linear and dare_ties, and method {o.method} draws nothing at random: leave it out."),
    (lambda o: o.normalize is not None and o.method.endswith("ties"),
     "normalize is of uniform composition, and method {o.method} averages what agrees by itself: leave it out."),
]
# fmt: on


def mix_options(given: Mapping[str, Any]) -> MixOptions:
    """Options by name; None keeps the default. Whether the weights are one for each adapter is seen once those are read.

    Raises:
        MixtureError: an option that there is not, a value out of range, or options that exclude each other.
    """
    weights, normalize = given.get("weights"), given.get("normalize")
    if weights is not None and normalize not in (None, "none"):
        raise MixtureError(
            f"normalize is {normalize!r}, but weights that are given are used as they are: leave it out."
        )
    if weights is None and normalize not in (None, *NORMALIZE[:2]):
        raise MixtureError(f"normalize is {normalize!r}, expected {' or '.join(NORMALIZE[:2])}.")
    apart = {"weights", "normalize"} if weights is not None else {"weights"}
    rest = {name: value for name, value in given.items() if name not in apart}
    options: MixOptions = checked(MixOptions, rest, "mix", MixtureError)
    refuse(_RULES, MixtureError, options)
    if not math.isfinite(options.delta_scale):
        raise MixtureError(f"delta_scale is {options.delta_scale}, expected a finite number.")
    return replace(options, weights=weights)
