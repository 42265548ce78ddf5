"""Screening: which of many adapters a fit mixes.

An adapter's first-order gain through a module is what a little of it lowers the shots' loss there: minus the derivative by its
mixture weight, where all weights are zero. With the module's inputs x_t and output gradients g_t it is -s·Σ_t ⟨Bᵀ g_t, A x_t⟩ =
-⟨G, s·B A⟩, where G = Σ_t g_t x_tᵀ is the gradient of the base's weight. So one backward pass of the base serves any number of
adapters. Each adapter's factors are read once, one adapter after another, and memory does not grow with their number.

The sum of the gains favours large adapters: on a few shots a large change gains much by chance. So an adapter's score is that sum
in units of the gains' own size, the root of the sum of their squares: high where most modules agree that it helps.

It knows the base with its task, and adapters one at a time. It knows nothing of mixtures.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters.stacking import Stack
from ..errors import MixtureError
from ..mixture.attach import detach
from ..mixture.fold import fold_factor, fold_factors
from ..mixture.live_model import FLOATS, LiveNames, live_modules, live_tensors
from ..mixture.record import Screening
from ..progress import Meter
from .candidates import BASE, MOST_STEPS, Candidate
from .preparation import prepare
from .resume import FitState
from .run import Split

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..adapters.deltas import ModuleDelta
    from ..data.examples import Examples
    from ..data.labels import LabelSet
    from ..distributed import Team
    from ..models.base_model import BaseModel
    from .given import Given
    from .learner import Learner

KEEP = 16
"""How many adapters a fit mixes at most, where it is not said."""


def screened(given: Given, shots: Examples, labels: LabelSet | None, ranks: Team) -> tuple[Given, Screening | None]:
    """What a fit works on with the adapters that help most, where there are more than it is to keep; else as it is, and None.

    Args:
        given: what the fit works on.
        shots: its examples.
        labels: of the shots; None for a task without.
        ranks: the processes that share the work; each screens for itself, and the first one's result counts.

    Raises:
        WloraMergeError: as of `fit`.
        MixtureError: the loss of the shots has no finite gradient.
    """
    options, adapters = given.options, given.adapters
    chooses = options.weights is None and options.initial_logits is None
    keep = options.keep or (KEEP if chooses else len(adapters))
    if len(adapters) <= keep:
        return given, None
    scores = ranks.share(_scores(given, shots, labels, ranks))
    gc.collect()  # the model that was screened on goes before the fit loads its own
    _give_memory_back()
    always = {given.request.modules_to_save, given.request.residual}  # without these the fit would be another
    order = sorted(scores, key=lambda name: (name not in always, -scores[name]))
    kept = [adapter for adapter in adapters if adapter.name in order[:keep]]
    return replace(given, adapters=kept, screened=True), Screening(
        kept=[adapter.name for adapter in kept], scores={name: float(f"{score:.6g}") for name, score in scores.items()}
    )


def _give_memory_back() -> None:
    """Let glibc hand freed memory to the system, which it keeps in pieces otherwise; another C library is left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _scores(given: Given, shots: Examples, labels: LabelSet | None, ranks: Team) -> dict[str, float]:
    """The score of each adapter."""
    one = replace(  # the task's model and head as a fit has them, with no change of any adapter
        given,
        adapters=given.adapters[:1],
        request=replace(given.request, modules_to_save="drop"),
        options=replace(
            given.options, method="uniform", delta_scale=0.0, granularity="global", normalize="none", packing=False
        ),
    )
    ready = prepare(one, shots, None, labels, ranks, FitState(None, "", resume=False))
    learner, rows = ready.learner, range(ready.learner.shots)
    if learner.head and not learner.situation.left_out:
        learner.train(Candidate(BASE, (0.0,), scale=0.0), Split(rows, MOST_STEPS, "screening", "screening"))
    detach(learner.model)
    found = module_gains(learner, given.base, given.adapters, rows)
    scores = {name: score_of(list(of_modules.values())) for name, of_modules in found.items()}
    if not all(map(math.isfinite, scores.values())):
        raise MixtureError(
            "the loss of the shots has no finite gradient on the base: give --precision float32, or other shots."
        )
    return scores


def score_of(gains: Sequence[float]) -> float:
    """How worth mixing an adapter is, by its gain through each of its M modules.

    Returns:
        Σ gains / √Σ gains², from -√M to √M, whatever the adapter's size; 0 where no gain is.
    """
    size = math.hypot(*gains)
    return sum(gains) / size if size else 0.0


def module_gains(
    learner: Learner, base: BaseModel, adapters: Sequence[Adapter], rows: Sequence[int]
) -> dict[str, dict[str, float]]:
    """The first-order gain of each adapter by module.

    Args:
        learner: with the base alone, nothing attached.
        base: whose files it was loaded from.
        adapters: any number.
        rows: the examples whose mean loss counts.

    Returns:
        {adapter: {module: gain}}, positive where a little of the adapter lowers the loss.
    """
    names = LiveNames(learner.model, base)
    find, find_tensor = live_modules(names), live_tensors(names)

    def changes(adapter: Adapter) -> list[ModuleDelta]:
        return Stack.of([adapter], find, find_tensor, model_type=base.model_type).deltas()

    modules = sorted({delta.module for adapter in adapters for delta in changes(adapter)})
    found = {}
    with weight_gradients(learner.model, modules) as gradients:
        learner.backward(rows)
        meter = Meter("screening adapters", 0, len(adapters), "adapters")
        for adapter in adapters:
            found[adapter.name] = {delta.label: _gain(delta, gradients) for delta in changes(adapter)}
            meter.add(0, 1)
    return found


@contextmanager
def weight_gradients(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Have backward passes within the block leave the gradients of modules' weights and biases, [out, in] and [out] as the
    modules have them, in `grad` of what it gives by name.

    A quantized weight has none: beside it stands a zero weight, whose gradient is the same.
    """
    probes: dict[str, nn.Parameter] = {}
    hooks = []
    for name in modules:
        layer: Any = model.get_submodule(name)
        if layer.weight.dtype in FLOATS:
            probes[f"{name}.weight"] = layer.weight
        else:
            zero = torch.zeros(layer.out_features, layer.in_features, device=layer.weight.device)
            probes[f"{name}.weight"] = nn.Parameter(zero)
            hooks.append(layer.register_forward_hook(_adding(probes[f"{name}.weight"])))
        if isinstance(getattr(layer, "bias", None), nn.Parameter):
            probes[f"{name}.bias"] = layer.bias
    for probe in probes.values():
        probe.requires_grad_(True)
    try:
        yield probes
    finally:
        for hook in hooks:
            hook.remove()
        for probe in probes.values():
            probe.requires_grad_(False)
            probe.grad = None


def _adding(weight: nn.Parameter) -> Any:
    """A forward hook that adds the output of one more weight."""
    return lambda layer, args, output: output + F.linear(args[0].to(weight.dtype), weight).to(output.dtype)


def _gain(delta: ModuleDelta, gradients: dict[str, nn.Parameter]) -> float:
    """Minus the derivative of the loss by the mixture weight of one adapter, through one module."""
    found = 0.0
    slope = gradients[f"{delta.module}.weight"].grad if delta.factors else None
    if slope is not None:
        rows = slope.reshape(-1, delta.shape[-1]) if delta.start is not None else slope.reshape(delta.shape[0], -1)
        rows = rows if delta.start is None else rows[delta.start : delta.start + delta.shape[0]]
        left, right = (part.to(rows) for part in fold_factors(delta, delta.scaling))
        found -= float((left * (rows @ right.T)).sum())
        factor = fold_factor(delta, torch.ones(delta.n_adapters))
        if factor is not None and delta.read is not None:
            scaled = (factor - 1) * delta.read().double().reshape(*rows.shape)
            found -= float((rows * scaled.to(rows)).sum())
    if delta.bias is not None and (slope := gradients[delta.bias_name].grad) is not None:
        found -= float((delta.bias.sum(0).to(slope) * slope).sum())
    return found
