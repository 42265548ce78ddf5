"""Names of one spelling among those of another."""

from __future__ import annotations

import pytest

from wlora_merge.errors import WloraMergeError
from wlora_merge.models.names import NameResolver, natural_key


def test_a_name_is_found_with_without_and_despite_a_leading_part() -> None:
    names = NameResolver(["encoder.layer.0.query", "pooler.dense", "head.score", "tail.score"])
    assert names.find("encoder.layer.0.query") == "encoder.layer.0.query"
    assert names.find("bert.encoder.layer.0.query") == "encoder.layer.0.query"
    assert names.find("dense") == "pooler.dense"
    assert names.find("layer.0.key") is None
    with pytest.raises(WloraMergeError, match=r"head\.score, tail\.score"):
        names.find("score")


def test_layer_2_sorts_before_layer_10() -> None:
    assert sorted(["h.10.a", "h.2.b", "h.2.a", "a"], key=natural_key) == ["a", "h.2.a", "h.2.b", "h.10.a"]
