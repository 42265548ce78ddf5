"""Which adapters a figure shows together, where there are more of them than anyone can read apart.

It knows names, cosines and weights as NumPy arrays. It draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MANY = 24
"""The most rows or columns of adapters that a figure has."""
FEW = 8
"""Of so many adapters each number is written into a figure."""
ALIKE = 0.5
"""Adapters are one group as long as the mean cosine between two parts of it is at least this."""


@dataclass(frozen=True)
class Group:
    """Adapters that a figure shows as one, by their places, and what it calls them."""

    label: str
    members: tuple[int, ...]


def by_weight(names: Sequence[str], weights: NDArray[np.float64]) -> list[Group]:
    """Each adapter by itself; of more than `MANY` those of the largest weights [N], and all others as one group."""
    return _readable([(i,) for i in range(len(names))], names, weights)


def by_likeness(names: Sequence[str], cosines: NDArray[np.float64], weights: NDArray[np.float64]) -> list[Group]:
    """Each adapter by itself; of more than `MANY` those that are alike as one group, and the groups of little weight as another.

    Args:
        names: of the N adapters.
        cosines: between their delta weights, [N, N]; NaN of an adapter that has none, which is like no other.
        weights: of the adapters in the mixture, [N].
    """
    alone: list[tuple[int, ...]] = [(i,) for i in range(len(names))]
    return _readable(clusters(cosines) if len(names) > MANY else alone, names, weights)


def clusters(cosines: NDArray[np.float64]) -> list[tuple[int, ...]]:
    """Agglomerative clustering by average linkage, cut where the mean cosine between two clusters falls under `ALIKE`.

    Args:
        cosines: [N, N]; NaN is taken for 0.

    Returns:
        the members of each cluster, ascending; the clusters by their first member.

    Source: Sokal and Michener 1958 (UPGMA), in the form of Lance and Williams 1967.
    """
    between = np.nan_to_num(cosines, nan=0.0)  # a copy
    np.fill_diagonal(between, -np.inf)
    members = [[i] for i in range(len(between))]
    while len(between) > 1 and between.max() >= ALIKE:
        one, other = sorted(np.unravel_index(between.argmax(), between.shape))
        sizes = len(members[one]), len(members[other])
        mean = np.average(between[[one, other]], axis=0, weights=sizes)
        between[one], between[:, one] = mean, mean
        between[one, one] = -np.inf
        members[one] += members[other]
        members[other] = []
        between[other], between[:, other] = -np.inf, -np.inf
    return [tuple(sorted(found)) for found in members if found]


def _readable(found: list[tuple[int, ...]], names: Sequence[str], weights: NDArray[np.float64]) -> list[Group]:
    """At most `MANY` groups: as they come, or those of the largest weights and the rest as the last one."""
    rest: list[tuple[int, ...]] = []
    if len(names) > MANY:
        found = sorted(found, key=lambda members: -np.abs(weights[list(members)]).sum())
    if len(found) > MANY:
        found, rest = found[: MANY - 1], found[MANY - 1 :]
    groups = [Group(_label(names, members, weights), members) for members in found]
    others = tuple(sorted(i for members in rest for i in members))
    return [*groups, Group(f"mean of {len(others)} others", others)] if others else groups


def _label(names: Sequence[str], members: tuple[int, ...], weights: NDArray[np.float64]) -> str:
    """The name of the member of the largest weight, and how many more there are."""
    first = names[max(members, key=lambda i: abs(weights[i]))]
    return f"{first} +{len(members) - 1}" if len(members) > 1 else first


def mean_columns(table: NDArray[np.float64], groups: Sequence[Group]) -> NDArray[np.float64]:
    """Of a table [rows, N] the mean over each group's columns: [rows, G]."""
    return np.stack([table[:, list(group.members)].mean(axis=1) for group in groups], axis=1)


def mean_cosines(cosines: NDArray[np.float64], groups: Sequence[Group]) -> NDArray[np.float64]:
    """The mean cosine between the members of two groups, and between different members of one: [G, G]; 1 of a single adapter."""
    found = np.empty((len(groups), len(groups)))
    for y, one in enumerate(groups):
        for x, other in enumerate(groups):
            block = cosines[np.ix_(one.members, other.members)]
            if y == x and len(block) > 1:
                block = block[~np.eye(len(block), dtype=bool)]
            found[y, x] = np.nanmean(block) if np.isfinite(block).any() else np.nan
    return found
