"""The mixture: its maths, its groups, and its two files, sound and hostile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.mixtures import delta, made

from wlora_merge.adapters.deltas import TensorDelta
from wlora_merge.errors import MixtureError
from wlora_merge.mixture.groups import prefixes

# ----------------------------------------------------------------------------------------------------- the maths


def test_a_module_reads_the_row_of_its_group() -> None:
    mixture = made()
    assert torch.equal(mixture.weights_of(delta("lm_head", [0, 1, 2])), mixture.mixture_weights[1].double())
    assert torch.equal(mixture.weights_of(delta("model.layers.0.k", [0])), mixture.mixture_weights[0].double())
    expected = mixture.delta_scale * mixture.mixture_weights[1].double()[[0, 2]] * 2
    assert torch.equal(mixture.gains_of(delta("lm_head", [0, 2])), expected)
    with pytest.raises(MixtureError, match="module 'x' belongs to no group"):
        mixture.weights_of(delta("x", [0]))


def test_a_whole_tensor_is_renormalized_over_those_that_carry_it_as_a_module_is() -> None:
    mixture = made(normalize="present")
    whole = TensorDelta("lm_head.weight", (4, 4), {0: torch.ones(4, 4), 2: torch.ones(4, 4)}, 3)
    assert torch.equal(mixture.weights_of(whole), mixture.weights_of(delta("lm_head", [0, 2])))
    assert float(mixture.weights_of(whole).sum()) == pytest.approx(1)


def test_a_module_that_is_renamed_and_not_prefixed_keeps_the_name_that_the_adapters_give_it() -> None:
    assert prefixes([("a.b", "x.a.b"), ("v.l.query", "v.layer.q_proj")]) == ("", "")
    assert prefixes([("model.layers.0", "model.language_model.layers.0"), ("visual.0", "model.visual.0")]) == ("", "")
    assert prefixes([("model.layers.0", "model.language_model.layers.0")]) == ("", "")
    assert (
        made(prefixes=("", "")).live_name(replace(delta("v.l.query", [0]), name="v.layer.q_proj")) == "v.layer.q_proj"
    )


# ----------------------------------------------------------------------------------------------------- the files


# --------------------------------------------------------------------------------------------------- hostile files
