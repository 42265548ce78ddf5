"""A search without gradients over a handful of numbers. It knows a function to minimize and nothing else.

Source: CMA-ES (Hansen 2016, https://arxiv.org/abs/1604.00772), by the package `cmaes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def minimize(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], *, sigma: float, evaluations: int, seed: int
) -> list[float]:
    """The best point found; the same seed gives the same.

    Args:
        loss: [D] -> a number.
        start: [D], evaluated first; D of 2 or more.
        sigma: standard deviation of the first generation.
        evaluations: of `loss`, in all.
        seed: decides every draw.
    """
    from cmaes import CMA

    search = CMA(mean=np.asarray(start, np.float64), sigma=sigma, seed=seed)
    tried = [(loss(list(map(float, start))), list(map(float, start)))]
    while len(tried) < evaluations:
        points = [search.ask() for _ in range(min(search.population_size, evaluations - len(tried)))]
        found = [(loss(point.tolist()), point) for point in points]
        tried += [(value, point.tolist()) for value, point in found]
        if len(found) == search.population_size:
            search.tell([(point, value) for value, point in found])
    return min(tried, key=lambda pair: pair[0])[1]
