"""The options of a fit, and what goes together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wlora_merge.errors import MixtureError
from wlora_merge.fit_options import fit_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "expected one of learned"),
        ({"method": "fixed"}, "method fixed takes the weights"),
        ({"delta_scale": "big"}, "or learned"),
        ({"prune_below": 1.0}, "less than 1"),
        ({"temperature": 0}, "above 0"),
        ({"pull": -1}, "at least 0"),
        ({"granularty": "module"}, "did you mean|granularity"),
        ({"method": "uniform", "pull": 0.3, "settings": 3}, "so pull, settings would have no effect: leave them out"),
        ({"method": "best-single", "delta_scale": "learned"}, "so delta_scale: learned would have no effect"),
        ({"method": "search", "new_adapter": 4}, "so new_adapter would have no effect"),
        ({"normalize": "none", "temperature": 2.0}, "leave one of them out"),
        ({"method": "fixed", "weights": [1.0, float("nan")]}, "weights are 1.0, nan, expected finite numbers"),
        ({"problem_type": "binary"}, "expected one of single_label_classification"),
        ({"folds": 0, "settings": 3}, "leave one of them out"),
        ({"method": "auto", "select": "best"}, "leave --select best out"),
        ({"method": "best-single", "normalize": "present"}, "leave --normalize out"),
        ({"new_adapter": 0, "new_adapter_learning_rate": 1e-4}, "leave --new-adapter-learning-rate out"),
        ({"new_adapter": 0, "new_adapter_interpolation": 0.5}, "leave --new-adapter-interpolation out"),
        ({"new_adapter_interpolation": 2}, "new_adapter_interpolation is 2, expected a share above 0 and at most 1"),
        ({"seed": -1}, "from 0 to"),
        ({"seed": 2**32}, "from 0 to"),
        ({"max_steps": 2.5}, "max_steps is 2.5, expected a whole number"),
        ({"batch_size": True}, "expected a whole number"),
        ({"temperature": "warm"}, "expected a number"),
        ({"weights": "0.2,0.8", "method": "fixed"}, "expected a list of numbers"),
        ({"epochs": 2, "max_steps": 5}, "give one"),
        ({"normalize": "present", "new_adapter": 4}, "leave --new-adapter 4 out"),
        ({"interpolation": 0}, "interpolation is 0, expected a number above 0"),
        ({"interpolation": 1.5}, "interpolation is 1.5, expected a share above 0 and at most 1"),
        ({"interpolation": 0.5, "method": "uniform"}, "so interpolation would have no effect"),
        ({"interpolation": 0.5, "initial_logits": [1.0, 0.0]}, "goes back to uniform composition"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        fit_options(options)


def test_fixed_weights_of_any_size_can_be_pruned() -> None:
    assert fit_options({"method": "fixed", "weights": [3.0, 0.5], "prune_below": 1.0}).prune_below == 1.0


def test_arrays_are_lists_of_numbers() -> None:
    for row in (np.array([0.25, 0.75]), torch.tensor([0.25, 0.75])):
        assert fit_options({"method": "fixed", "weights": row}).weights == [0.25, 0.75]
        assert fit_options({"initial_logits": row}).initial_logits == [0.25, 0.75]
