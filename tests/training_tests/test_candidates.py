"""What a fit compares: methods, settings, pruning, the search; on tiny models, with numpy as an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from support.fits import Zoo, difference, fitted
from support.fits import zoo as zoo

from wlora_merge.exporters.export import export
from wlora_merge.fit_options import FitOptions, fit_options
from wlora_merge.training.candidates import Candidate, Situation, learned_settings, on_folds, steps_of

# ---------------------------------------------------------------------------------------------------- the methods


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "uniform"}, [1 / 3] * 3),
        ({"method": "uniform", "normalize": "none"}, [1 / 3] * 3),
        ({"method": "fixed", "weights": [0.7, -0.2, 0.1]}, [0.7, -0.2, 0.1]),
    ],
)
def test_uniform_and_fixed_weights_stay_what_they_are_while_the_head_is_trained(
    zoo: Zoo, tmp_path: Path, options: dict[str, Any], expected: list[float]
) -> None:
    mixture = fitted(zoo, tmp_path / "m", **options)
    assert torch.allclose(mixture.mixture_weights, torch.tensor([expected]))
    assert mixture.metrics["kept"] == options["method"]
    export(tmp_path / "m", "lora", tmp_path / "lora")
    assert difference(zoo, tmp_path / "lora", mixture) < 1e-5


def test_best_single_keeps_one_adapter_and_drops_the_others(zoo: Zoo, tmp_path: Path) -> None:
    mixture = fitted(zoo, tmp_path / "m", method="best-single")
    best = max(
        ("a0", "a1", "a2"),
        key=lambda n: (mixture.metrics["candidates"][n]["accuracy"], -mixture.metrics["candidates"][n]["loss"]),
    )
    assert mixture.adapter_names == [best]
    assert mixture.mixture_weights.tolist() == [[1.0]]
    for kind in ("dense", "lora"):
        export(tmp_path / "m", kind, tmp_path / kind)
        assert difference(zoo, tmp_path / kind, mixture) < 1e-5


def test_search_finds_global_weights_and_auto_keeps_what_is_best_on_the_folds(zoo: Zoo) -> None:
    found = fitted(zoo, method="search", normalize="none", max_steps=2)
    assert found.granularity == "global"
    assert not torch.allclose(found.mixture_weights, torch.full((1, 3), 1 / 3))
    assert bool((found.mixture_weights.abs() <= 1.5).all())
    auto = fitted(zoo, method="auto", max_steps=2)
    table = auto.metrics["candidates"]
    best = max((n for n in table if n != "base"), key=lambda n: (table[n]["accuracy"], -table[n]["loss"]))
    assert {"search", "learned", "uniform"} < set(table)
    assert auto.metrics["kept"] == best


BARE, HEAD, SOLVED = Situation(False, True), Situation(True, True), Situation(True, True, solved=True, left_out=True)
TAGS = Situation(True, True, solved=True)


@pytest.mark.parametrize(
    ("shots", "given", "now", "steps"),
    [
        (8, {}, BARE, 40), (24, {}, BARE, 60), (36, {}, BARE, 100), (500, {}, BARE, 100), (500, {}, HEAD, 100),
        (8, {}, HEAD, 100), (500, {}, SOLVED, 15), (8, {}, TAGS, 40), (80, {"batch_size": 32}, BARE, 60),
        (80, {"gradient_accumulation_steps": 4}, BARE, 50), (80, {"epochs": 1}, BARE, 10), (80, {"epochs": 2}, SOLVED, 8),
        (8, {"max_steps": 7}, BARE, 7), (8, {"max_steps": 7}, SOLVED, 7),
    ],
)  # fmt: skip
def test_how_long_a_training_is(shots: int, given: dict[str, Any], now: Situation, steps: int) -> None:
    assert steps_of(FitOptions(**given), shots, now) == steps


def test_a_strong_pull_keeps_the_weights_near_uniform(zoo: Zoo) -> None:
    def distance(pull: float) -> float:
        options = {"granularity": "module", "folds": 0, "learning_rate": 0.2, "max_steps": 20}
        return float((fitted(zoo, pull=pull, **options).mixture_weights - 1 / 3).abs().max())

    assert distance(100.0) < 0.3 * distance(0.0)


def test_what_the_settings_are_follows_from_the_head_and_the_shots() -> None:
    def found(head: bool, enough: bool, **options: Any) -> list[Candidate]:
        several = {} if options.get("method") == "uniform" else {"settings": 2}
        return learned_settings(fit_options(several | options), Situation(head, enough))

    def settings(head: bool, enough: bool, **options: Any) -> list[tuple[str, int, float]]:
        return [(s.normalize, s.new_adapter, s.interpolation) for s in found(head, enough, **options)]

    def new_interpolations(head: bool, enough: bool, **options: Any) -> list[tuple[float, ...]]:
        return [s.new_interpolations for s in found(head, enough, **options)]

    assert settings(True, True) == [("none", 8, 1.0), ("none", 0, 1.0)]
    assert settings(True, True, settings=1) == settings(True, True)[:1]
    assert settings(True, False) == [("none", 0, 0.5), ("none", 8, 0.5)]
    assert settings(False, True) == [("all", 8, 1.0), ("all", 0, 1.0)]
    assert settings(False, False) == [("all", 0, 1.0), ("all", 8, 1.0)]
    assert settings(True, True, new_adapter=0) == [("none", 0, 1.0), ("all", 0, 1.0)]
    assert settings(True, True, normalize="present") == [("present", 0, 1.0)] * 2  # the other granularity
    assert settings(True, True, method="uniform") == []
    assert settings(True, False, interpolation=1)[0] == ("none", 0, 1.0)
    assert settings(False, True, interpolation=0.2)[0] == ("all", 8, 0.2)
    assert settings(True, False, initial_logits=[1.0, 0.0])[0] == ("all", 0, 1.0)
    assert new_interpolations(False, True) == [(0.5, 0.25, 1.0), (1.0,)]  # none is trained in the second
    assert new_interpolations(True, True) == [(1.0,), (1.0,)]
    writes, chooses = (Situation(False, True, generates=True, choice=choice) for choice in (False, True))
    assert learned_settings(FitOptions(), writes)[0].new_interpolations == (0.5,)
    assert learned_settings(FitOptions(), chooses)[0].new_interpolations == (1.0,)
    assert on_folds(FitOptions(), learned_settings(FitOptions(), writes), writes) == []
    assert len(on_folds(FitOptions(folds=3), learned_settings(FitOptions(), writes), writes)) == 1
    assert new_interpolations(False, True, new_adapter_interpolation=0.7) == [(0.7,), (1.0,)]
    assert new_interpolations(True, True, new_adapter_interpolation=0.7) == [(0.7,), (1.0,)]


@pytest.mark.parametrize(
    ("near", "options", "expected"),
    [
        (0.6, {}, (8, False, True)),
        (0.9, {}, (0, False, False)),
        (0.9, {"new_adapter": 4}, (4, False, True)),
        (0.9, {"max_steps": 3}, (0, True, True)),
        (0.9, {"normalize": "all"}, (0, True, True)),
        (0.6, {"granularity": "layer"}, (8, True, True)),
        (0.6, {"pull": 0.1, "new_adapter": 0}, (0, True, True)),
        (0.6, {"new_adapter": 0}, (0, False, False)),
    ],
)
def test_under_a_solved_head_a_training_has_to_earn_its_place(
    near: float, options: dict[str, Any], expected: tuple[int, bool, bool]
) -> None:
    now = Situation(True, True, solved=True, left_out=True, near=near)
    (found,) = learned_settings(fit_options(options), now)
    assert (found.new_adapter, found.trains_weights, found.trained) == expected
    assert (found.interpolation, found.new_interpolations) == (1.0, (1.0,))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "all", "delta_scale": "learned"},
        {"new_adapter": 2},
        {"folds": 2, "settings": 1},
    ],
)
def test_an_interpolation_lies_between_uniform_composition_and_what_was_learned(
    zoo: Zoo, options: dict[str, Any]
) -> None:
    learned, part = (
        fitted(
            zoo,
            **(
                {"folds": 0, "learning_rate": 0.2, "max_steps": 12, "delta_scale": 1}
                | options
                | {"interpolation": share}
            ),
        )
        for share in (1, 0.25)
    )
    assert (part.metrics["kept"], part.adapter_names) == ("learned", learned.adapter_names)
    start = 1 / 3 if part.normalize == "none" else 0.0
    changed = learned.mixture_weights[:, :3].any(1)  # a new adapter alone changes the other modules
    assert int(changed.sum()) == 4
    expected = 0.75 * start + 0.25 * learned.wlora_weights[changed, :3].double()
    assert torch.allclose(part.wlora_weights[changed, :3].double(), expected, rtol=0, atol=1e-6)
    assert float((part.wlora_weights[changed, :3] - start).abs().max()) > 1e-2
    assert part.delta_scale == pytest.approx(0.75 + 0.25 * learned.delta_scale, abs=1e-6)
    assert all(
        not torch.equal(part.head[name], learned.head[name]) for name in part.head if "classifier" in name
    )  # solved again
    if part.new_files:
        (file,) = (name for name in part.new_files if name.endswith(".safetensors"))
        part_factors, learned_factors = (load(m.new_files[file]) for m in (part, learned))
        for name, tensor in part_factors.items():
            if "lora_B" in name:  # from zero
                assert torch.allclose(tensor, 0.25 * learned_factors[name], rtol=0, atol=1e-7)
                assert bool(tensor.any())
    assert part.metrics["note"].count("0.25 of the way from uniform composition to what was learned") == 1


# ------------------------------------------------------------------------------------------------------- pruning


# -------------------------------------------------------------------------------------------------- scores, search
