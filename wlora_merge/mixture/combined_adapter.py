"""A combination of delta weights as one adapter, so that a model in memory can have it.

Its delta weight is a dense matrix, which no two small factors have. So its factors are that matrix and an identity, in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..adapters.adapter import Adapter
from ..adapters.deltas import ModuleDelta
from ..adapters.factors import Factors
from ..adapters.layouts import Layout, factors_to_file
from ..errors import UnsupportedError
from .combination import Combination
from .mixture import InputRef, Mixture

if TYPE_CHECKING:
    from .inputs import Inputs


def attachable(found: Inputs) -> tuple[Mixture, list[Adapter]]:
    """The mixture and the adapters that can be attached to its base: a weighted sum's own, else the combination with weight 1.

    Raises:
        UnsupportedError: as `combined_adapter`.
    """
    mixture = found.mixture
    if mixture.combination.is_linear:
        return mixture, found.adapters
    adapter = combined_adapter(found)
    weights = torch.ones(len(mixture.groups), 1)
    alone = replace(
        mixture,
        adapters=[InputRef("", None, {}, adapter.name)],
        mixture_weights=weights,
        wlora_weights=weights,
        normalize="none",
        delta_scale=1.0,
        combination=Combination(),
    )
    return alone, [adapter]


def combined_adapter(found: Inputs) -> Adapter:
    """The combination of a mixture's adapters as one adapter: of each module the matrix [out, in] and an identity, in float32.

    No file holds it. Its name is the method's, followed by words, which no adapter's own name has.

    Raises:
        UnsupportedError: such a matrix is a part of a module that no adapter names.
    """
    mixture, modules, layouts = found.mixture, dict[str, Factors](), set[Layout]()
    for delta in found.deltas:
        if not isinstance(delta, ModuleDelta) or not delta.name:
            raise UnsupportedError(
                f"{mixture.combination.method}: module {delta.module!r} is combined in parts, which no adapter can be attached to"
            )
        dense = mixture.fold_of(delta).dense()
        dense = (dense.T if delta.layout.transposed else dense).float().contiguous()  # [out, in]
        out, columns = dense.shape
        pair = (dense, torch.eye(out)) if out < columns else (torch.eye(columns), dense)
        stored = list(factors_to_file(delta.layout, *pair, delta.shape).values())
        modules[delta.name] = Factors(stored[0], stored[1], 1.0, delta.layout is Layout.EMBEDDING)
        layouts.add(delta.layout)
    name = f"{mixture.combination.method} of all"
    return Adapter(name, found.base.source, {"fan_in_fan_out": Layout.CONV1D in layouts}, modules)


def as_combination(mixture: Mixture, combined: Mixture) -> Mixture:
    """A mixture whose last adapter stands for the combination of the others: that combination where it has a weight, else without it.

    Args:
        mixture: with N adapters' weights, and those of the combination behind them.
        combined: the mixture of the N adapters that the combination is.
    """
    used = bool(mixture.mixture_weights[:, -1].any())
    if used:
        return replace(
            mixture,
            granularity=combined.granularity,
            normalize=combined.normalize,
            groups=combined.groups,
            mixture_weights=combined.mixture_weights,
            wlora_weights=combined.wlora_weights,
            combination=combined.combination,
        )
    return replace(
        mixture, mixture_weights=mixture.mixture_weights[:, :-1], wlora_weights=mixture.wlora_weights[:, :-1]
    )
