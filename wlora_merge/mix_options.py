"""The options of a mixture without fitting, and those that it shares with a fit. This module imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .constants import NORMALIZE
from .data.tasks import TASKS
from .errors import MixtureError
from .option_fields import Topic, checked, option


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
    if not math.isfinite(options.delta_scale):
        raise MixtureError(f"delta_scale is {options.delta_scale}, expected a finite number.")
    return replace(options, weights=weights)
