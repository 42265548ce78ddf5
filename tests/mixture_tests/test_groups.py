"""Groups: which modules share mixture weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.mixtures import delta, made

from wlora_merge.errors import MixtureError
from wlora_merge.mixture.groups import group_of, make_groups, prefixes


@pytest.mark.parametrize(
    ("module", "granularity", "group"),
    [
        ("model.layers.3.self_attn.q_proj", "layer", "model.layers.3"),
        ("model.layers.3.mlp.experts.11.up_proj", "layer", "model.layers.3"),
        ("lm_head", "layer", "lm_head"),
        ("model.layers.3.mlp", "module", "model.layers.3.mlp"),
        ("model.layers.3.mlp", "global", "all"),
    ],
)
def test_the_group_of_a_module(module: str, granularity: str, group: str) -> None:
    assert group_of(module, granularity) == group


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("global", {"all": ["lm_head", "model.layers.2.q", "model.layers.10.k", "model.layers.10.q"]}),
        (
            "layer",
            {
                "lm_head": ["lm_head"],
                "model.layers.2": ["model.layers.2.q"],
                "model.layers.10": ["model.layers.10.k", "model.layers.10.q"],
            },
        ),
        ("module", {m: [m] for m in ("lm_head", "model.layers.2.q", "model.layers.10.k", "model.layers.10.q")}),
    ],
)
def test_groups_stand_in_natural_order(granularity: str, groups: dict[str, list[str]]) -> None:
    modules = ["model.layers.10.q", "model.layers.2.q", "lm_head", "model.layers.10.k"]
    found = make_groups(modules, granularity)
    assert found == groups
    assert list(found) == list(groups)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(MixtureError, match="granularity is 'row', expected one of module, layer, global"):
        make_groups(["a"], "row")


@pytest.mark.parametrize(
    ("in_file", "in_model", "expected"),
    [
        ("a.b", "bert.a.b", ("", "bert.")),
        ("model.a.b", "a.b", ("model.", "")),
        ("a.b", "a.b", ("", "")),
        ("a", "x.a", ("", "x.")),
    ],
)
def test_prefixes_take_one_spelling_to_the_other(in_file: str, in_model: str, expected: tuple[str, str]) -> None:
    assert prefixes([(in_file, in_model)]) == expected
    assert made(prefixes=expected).live_name(replace(delta(in_file, [0]), name=in_model)) == in_model


def test_modules_in_one_tensor_of_the_files_are_in_one_group() -> None:
    stored = {"l.0.q": ["f.0.qkv"], "l.0.v": ["f.0.qkv"], "l.0.o": ["f.0.o"], "l.1.q": ["f.1.qkv"]}
    assert make_groups(stored, "module", stored) == {
        "l.0.o": ["l.0.o"],
        "l.0.q": ["l.0.q", "l.0.v"],
        "l.1.q": ["l.1.q"],
    }
    assert make_groups(stored, "layer", stored) == make_groups(stored, "layer")
    spread = {"a": ["x", "y"], "b": ["y", "z"], "c": ["z"]}
    assert make_groups(spread, "module", spread) == {"a": ["a", "b", "c"]}
