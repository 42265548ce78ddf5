"""Where a fit starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.fits import Zoo, fitted
from support.fits import zoo as zoo

from wlora_merge.errors import MixtureError


def test_initial_logits_by_numbers_by_file_and_by_mixture(zoo: Zoo, tmp_path: Path) -> None:
    tiny = {"max_steps": 1, "learning_rate": 1e-9, "folds": 0, "granularity": "global"}
    numbers = fitted(zoo, tmp_path / "m", initial_logits=[1.0, 2.0, 3.0], **tiny)
    assert torch.allclose(numbers.wlora_weights, torch.tensor([[1.0, 2.0, 3.0]]))
    (tmp_path / "logits.json").write_text(json.dumps({"all": {"a2": 3.0, "a0": 1.0, "a1": 2.0}}))
    for source in ("m", "logits.json"):
        again = fitted(zoo, initial_logits=str(tmp_path / source), **tiny)
        assert torch.allclose(again.mixture_weights, numbers.mixture_weights, atol=1e-6)
    with pytest.raises(MixtureError, match="same granularity"):
        fitted(zoo, initial_logits=str(tmp_path / "m"), **(tiny | {"granularity": "layer"}))
    per_module = fitted(zoo, folds=0, max_steps=1, normalize="all").groups
    (tmp_path / "logits.json").write_text(json.dumps({g: {"a0": 1.0, "a1": 2.0, "a2": 3.0} for g in per_module}))
    options = {"normalize": "all", "settings": 6, "max_steps": 1}
    with pytest.raises(MixtureError, match="'a2', and no adapter of that name is given"):
        fitted((zoo[0], zoo[1][:2], zoo[2]), initial_logits=tmp_path / "logits.json", **options)
    assert fitted(zoo, initial_logits=tmp_path / "logits.json", **options).granularity == "module"


def test_a_fit_starts_where_the_mixture_folder_ended_whatever_its_temperature_and_scale(
    zoo: Zoo, tmp_path: Path
) -> None:
    tiny = {"folds": 0, "granularity": "global", "normalize": "all"}
    options = {"temperature": 5.0, "delta_scale": "learned", "initial_logits": [0.0, 4.0, -4.0], "learning_rate": 0.2}
    first = fitted(zoo, tmp_path / "m", **tiny, **options)
    assert first.delta_scale != 1
    still = {"folds": 0, "max_steps": 1, "learning_rate": 1e-9, "initial_logits": str(tmp_path / "m")}
    for scale in (None, "learned"):
        again = fitted(zoo, delta_scale=scale, **still)
        assert torch.allclose(again.mixture_weights, first.mixture_weights, atol=1e-6)
        assert again.delta_scale == pytest.approx(first.delta_scale, abs=1e-6)
    assert fitted(zoo, delta_scale=2.0, **still).delta_scale == 2.0
    fitted(zoo, tmp_path / "free", folds=0, max_steps=1)
    with pytest.raises(MixtureError, match="leave one of them out"):
        fitted(zoo, initial_logits=str(tmp_path / "free"), temperature=2.0)


def test_a_mixture_per_module_continues_a_fit_under_the_files_own_names(zoo: Zoo, tmp_path: Path) -> None:
    first = fitted(zoo, tmp_path / "m", folds=0, learning_rate=0.2)
    again = fitted(zoo, learning_rate=1e-9, max_steps=1, initial_logits=str(tmp_path / "m"))
    assert (again.granularity, again.normalize) == (first.granularity, first.normalize) == ("module", "none")
    assert torch.allclose(again.wlora_weights, first.wlora_weights, atol=1e-6)
    with pytest.raises(MixtureError, match="holds free weights"):
        fitted(zoo, normalize="all", initial_logits=str(tmp_path / "m"))
