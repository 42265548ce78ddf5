"""Which adapters a figure shows as one: SciPy's average linkage is the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wlora_merge.exporters.report_groups import (
    ALIKE,
    MANY,
    by_likeness,
    by_weight,
    clusters,
    mean_columns,
    mean_cosines,
)


def cosines(count: int, kinds: int, seed: int = 0, spread: float = 0.4) -> Any:
    """Of vectors around so many directions."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((kinds, 12))
    vectors = centres[random.integers(kinds, size=count)] + spread * random.standard_normal((count, 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "kinds"), [(1, 1), (30, 3), (64, 8), (200, 40)])
def test_clusters_are_those_of_scipys_average_linkage(count: int, kinds: int, seed: int) -> None:
    found = cosines(count, kinds, seed)
    mine = clusters(found)
    assert sorted(i for members in mine for i in members) == list(range(count))
    if count == 1:
        return
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distances = (1 - found)[np.triu_indices(count, k=1)]
    labels = hierarchy.fcluster(hierarchy.linkage(distances, "average"), 1 - ALIKE, "distance")
    assert {frozenset(members) for members in mine} == {frozenset(np.flatnonzero(labels == k)) for k in set(labels)}


def test_few_adapters_are_shown_as_they_come() -> None:
    names = [f"n{i}" for i in range(MANY)]
    weights = np.arange(MANY) / MANY
    for groups in (by_weight(names, weights), by_likeness(names, np.ones((MANY, MANY)), weights)):
        assert [(g.label, g.members) for g in groups] == [(name, (i,)) for i, name in enumerate(names)]


@pytest.mark.parametrize("count", [MANY + 1, 64, 500])
def test_of_many_the_weightiest_are_shown_and_the_rest_is_one(count: int) -> None:
    names, weights = [f"n{i}" for i in range(count)], np.linspace(-1, 0.5, count)
    groups = by_weight(names, weights)
    assert len(groups) == MANY
    assert groups[0].label == "n0"
    assert groups[-1].label == f"mean of {count - MANY + 1} others"
    assert sorted(i for g in groups for i in g.members) == list(range(count))
    shown = {i for g in groups[:-1] for i in g.members}
    assert min(abs(weights[i]) for i in shown) >= max(abs(weights[i]) for i in groups[-1].members)


def test_of_many_those_that_are_alike_are_one_called_by_the_weightiest() -> None:
    kinds = np.arange(60) % 3
    alike = (kinds[:, None] == kinds).astype(float)
    weights = np.zeros(60)
    weights[[4, 2]] = 0.7, 0.2
    groups = by_likeness([f"n{i}" for i in range(60)], alike, weights)
    assert [g.label for g in groups] == ["n4 +19", "n2 +19", "n0 +19"]
    assert np.array_equal(mean_cosines(alike, groups), np.eye(3))


def test_adapters_without_a_cosine_are_like_no_other() -> None:
    alike = np.ones((40, 40))
    alike[7], alike[:, 7] = np.nan, np.nan
    groups = by_likeness([f"n{i}" for i in range(40)], alike, np.full(40, 1 / 40))
    assert [g.members for g in groups if 7 in g.members] == [(7,)]
    means = mean_cosines(alike, groups)
    assert means[0, 0] == 1
    assert np.isnan(means[0, 1])


def test_means_over_groups_are_those_of_plain_loops() -> None:
    found = cosines(50, 10, spread=3.0)
    groups = by_likeness([f"n{i}" for i in range(50)], found, np.linspace(0, 1, 50))
    assert len(groups) == MANY
    means = mean_cosines(found, groups)
    for y, one in enumerate(groups):
        for x, other in enumerate(groups):
            pairs = [found[i, j] for i in one.members for j in other.members if i != j]
            assert means[y, x] == pytest.approx(np.mean(pairs) if pairs else 1.0)
    table = np.random.default_rng(1).random((3, 50))
    expected = [[np.mean([row[i] for i in g.members]) for g in groups] for row in table]
    assert np.allclose(mean_columns(table, groups), expected)
