"""CMA-ES, a search without gradients over a handful of numbers. It knows a function to minimize and nothing else.

Source: Hansen 2016, The CMA Evolution Strategy: A Tutorial, https://arxiv.org/abs/1604.00772, with its default constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def minimize(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], *, sigma: float, evaluations: int, seed: int
) -> list[float]:
    """The best point found; the same seed gives the same.

    Args:
        loss: [D] -> a number.
        start: [D], evaluated first.
        sigma: standard deviation of the first generation.
        evaluations: of `loss`, in all.
    """
    n, rng = len(start), np.random.default_rng(seed)
    size = 4 + int(3 * math.log(n))
    parents = size // 2
    w = math.log(parents + 0.5) - np.log(np.arange(1, parents + 1))
    w /= w.sum()
    mu = 1 / float((w**2).sum())
    c_sigma, c_c = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n)
    c_1 = 2 / ((n + 1.3) ** 2 + mu)
    c_mu = min(1 - c_1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
    damping = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (n + 1)) - 1) + c_sigma
    length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # of a standard normal vector, expected
    mean, C = np.asarray(start, np.float64), np.eye(n)
    path_sigma, path_c = np.zeros(n), np.zeros(n)
    best, lowest, used = list(map(float, start)), loss(start), 1
    while used < evaluations:
        values, B = np.linalg.eigh(C)
        D = np.sqrt(np.maximum(values, 1e-20))
        steps: NDArray[np.float64] = (
            rng.standard_normal((min(size, evaluations - used), n)) * D
        ) @ B.T  # rows ~ N(0, C)
        points = mean + sigma * steps
        losses = [loss(point.tolist()) for point in points]
        used += len(losses)
        order = np.argsort(losses, kind="stable")
        if losses[order[0]] < lowest:
            best, lowest = points[order[0]].tolist(), losses[order[0]]
        if len(losses) < size:
            break
        chosen = steps[order[:parents]]
        move = w @ chosen
        mean = mean + sigma * move
        path_sigma = (1 - c_sigma) * path_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mu) * ((move @ B / D) @ B.T)
        norm = float(np.linalg.norm(path_sigma))
        calm = norm / math.sqrt(1 - (1 - c_sigma) ** (2 * used / size)) < (1.4 + 2 / (n + 1)) * length
        path_c = (1 - c_c) * path_c + calm * math.sqrt(c_c * (2 - c_c) * mu) * move
        rank_one = np.outer(path_c, path_c) + (not calm) * c_c * (2 - c_c) * C
        C = (1 - c_1 - c_mu) * C + c_1 * rank_one + c_mu * (chosen.T * w) @ chosen
        sigma *= math.exp(c_sigma / damping * (norm / length - 1))
    return best
