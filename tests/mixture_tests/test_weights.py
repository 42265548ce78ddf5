"""The maths of mixture weights."""

from __future__ import annotations

import torch

from wlora_merge.mixture.weights import at_module, gains, mixture_weights, uniform


def test_mixture_weights_are_a_softmax_or_the_free_weights() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert mixture_weights(logits, "all")[0].tolist() == uniform(2) == [0.5, 0.5]
    assert torch.equal(mixture_weights(logits, "present"), logits.softmax(-1))
    assert mixture_weights(logits, "none") is logits


def test_present_renormalizes_over_the_adapters_of_a_module_and_keeps_zero_where_nothing_is_left() -> None:
    weights, present = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([True, False, True])
    assert torch.allclose(at_module(weights, present, "present"), torch.tensor([2 / 7, 0, 5 / 7]))
    assert torch.equal(at_module(weights, present, "all"), weights)
    assert at_module(torch.tensor([0.0, 1.0, 0.0]), present, "present").tolist() == [0, 0, 0]


def test_gains_are_the_product_of_delta_scale_weight_and_scaling() -> None:
    found = gains(torch.tensor([0.25, 0.75]), torch.tensor([2.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 0.5)
    assert found.tolist() == [0.25, 0.25, 1.5]
