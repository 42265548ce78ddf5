"""What a fit compares: methods, settings, pruning, the search; on tiny models, with numpy as an oracle."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import make_adapter, tiny_bert
from safetensors.torch import load
from test_fit import WORDS, others, save_tokenizer

from wlora_merge.constants import SINGLE
from wlora_merge.data.labels import LabelSet, label_set
from wlora_merge.data.metrics import Metric, classification_metric
from wlora_merge.errors import MixtureError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.fit_options import FitOptions, fit_options
from wlora_merge.mixture.attach import attachment_of
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training.candidates import LEARNED, Candidate, learned_settings, steps_of
from wlora_merge.training.cma_es import minimize
from wlora_merge.training.comparison import compare
from wlora_merge.training.fit import fit
from wlora_merge.training.learner import Learner
from wlora_merge.training.loop import Trained
from wlora_merge.training.resume import FitState
from wlora_merge.training.scoring import Judged, pool, score

Zoo = tuple[Path, list[Path], Path]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A tiny BERT, three adapters, and four shots of each of two classes."""
    from transformers import AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("zoo")
    tiny_bert().save_pretrained(root / "base")
    save_tokenizer(root / "base")
    start = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    folders = [
        make_adapter(start, root / f"a{i}", i, r=2, scale=0.4, target_modules=["query", "value"], task_type="SEQ_CLS")
        for i in range(3)
    ]
    lines = [f"{WORDS[4 + i]} {WORDS[5 + i]},{'low' if i < 20 else 'high'}" for i in range(0, 40, 5)]
    (root / "shots.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return root / "base", folders, root / "shots.csv"


def fitted(zoo: Zoo, out: Path | None = None, **options: Any) -> Mixture:
    """Of the given adapters alone, unless `new_adapter` says otherwise."""
    base, folders, shots = zoo
    small = {"max_steps": 4, "folds": 2, "new_adapter": 0}
    return fit(base, folders, shots, "text-classification", out, **(small | options))


def difference(zoo: Zoo, folder: Path, mixture: Mixture) -> float:
    """Between an export and the unmerged mixture."""
    base, folders, _ = zoo
    checked = verify(folder, base=base, adapters=[f"{f.name}={f}" for f in folders if f.name in mixture.adapter_names])
    assert checked.largest_difference is not None
    return checked.largest_difference


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


def test_the_standard_error_does_not_depend_on_the_order_of_the_examples() -> None:
    from wlora_merge.data.metrics import classification_metric

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) // 500
    right = torch.rand(1000, generator=generator) < 0.3 + 0.4 * labels
    logits = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float()
    order = torch.randperm(1000, generator=generator)
    metric = classification_metric(LabelSet(("a", "b"), SINGLE))
    for rows in (torch.arange(1000), order):
        found = score(Judged(logits[rows], labels[rows], 1.0, 1000), metric)
        assert found.standard_error == pytest.approx((found.value * (1 - found.value) / 1000) ** 0.5, rel=0.25)


def test_a_search_is_made_once_and_ends_with_its_time(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = minimize
    monkeypatch.setattr("wlora_merge.training.comparison.minimize", lambda *a, **k: seen.append(1) or real(*a, **k))
    held = others(zoo[2], tmp_path)
    fitted(zoo, method="search", folds=0, eval_data=held, max_steps=1)
    assert seen == [1]
    judged: list[int] = []
    judge = Learner.judge
    monkeypatch.setattr(Learner, "judge", lambda self, *a, **k: judged.append(1) or judge(self, *a, **k))
    with pytest.raises(MixtureError, match="max_minutes left no time"):
        fitted(zoo, method="search", folds=0, max_minutes=1e-9, max_steps=1)
    assert judged == []


def test_a_search_that_time_cut_says_where_it_stopped_and_is_not_taken_for_done(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        ends = False

        def monotonic(self) -> float:
            return 310.0 if self.ends else 0.0  # of ten minutes

    clock, judge, judged, finished = Clock(), Learner.judge, list[int](), list[str]()

    def ending(self: Learner, *args: Any, **options: Any) -> Judged:
        judged.append(1)
        clock.ends = len(judged) >= 7
        return judge(self, *args, **options)

    for module in ("fit", "comparison", "learner"):
        monkeypatch.setattr(sys.modules[f"wlora_merge.training.{module}"], "time", clock)
    monkeypatch.setattr(Learner, "judge", ending)
    monkeypatch.setattr(FitState, "finish", lambda self, key, value: finished.append(key))
    options = {"method": "search", "folds": 0, "max_minutes": 10, "max_steps": 1}
    alone = fitted(zoo, **options).metrics
    assert "The search stopped after 7 of 40 evaluations, for want of time." in alone["note"]
    judged.clear()
    clock.ends = False
    held = fitted(zoo, eval_data=others(zoo[2], tmp_path), **options).metrics
    assert held["kept"] == "search"
    assert list(held["candidates"]) == ["base", "uniform", "a0", "a1", "a2", "search"]
    assert "The search stopped after 7 of 40 evaluations, for want of time." in held["note"]
    assert not any(key.endswith("row") for key in finished)


def test_a_search_is_pulled_towards_small_weights_and_stays_within_its_bound(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "search", "normalize": "none", "folds": 0, "max_steps": 1}
    judge, largest = Learner.judge, list[float]()
    monkeypatch.setattr(Learner, "judge", lambda self, *a, **k: replace(judge(self, *a, **k), loss=1.0))
    assert float(fitted(zoo, **options).mixture_weights.abs().sum()) < 0.9  # it starts at a third each

    def steep(self: Learner, *args: Any, **more: Any) -> Judged:
        weights = attachment_of(self.model).weights
        largest.append(float(weights.abs().max()))
        return replace(judge(self, *args, **more), loss=-10 * float(weights.sum()))

    monkeypatch.setattr(Learner, "judge", steep)
    fitted(zoo, **options)
    assert max(largest) == 1.5


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


def test_the_numbers_of_the_kept_candidate_are_those_of_its_export_on_the_evaluation_data(
    zoo: Zoo, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [(f"{WORDS[5 + i]} {WORDS[7 + i]} {WORDS[3]}", "low" if i % 3 else "high") for i in range(11)]
    (tmp_path / "held.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    mixture = fitted(zoo, tmp_path / "m", eval_data=tmp_path / "held.csv", folds=0, max_steps=20, batch_size=4)
    export(tmp_path / "m", "dense", tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    right, losses = [], []
    for text, label in rows:
        wanted = torch.tensor(model.config.label2id[label])
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        right.append(bool(logits.argmax() == wanted))
        losses.append(float(torch.nn.functional.cross_entropy(logits, wanted)))
    found = mixture.metrics["candidates"][mixture.metrics["kept"]]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_every_candidate_starts_from_the_same_head(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    train = Learner.train

    def seen(self: Learner, candidate: Candidate, *args: Any, **options: Any) -> Trained:
        self.place(candidate)
        starts.append({name: self.model.get_parameter(name).detach().clone() for name in self.start})
        return train(self, candidate, *args, **options)

    monkeypatch.setattr(Learner, "train", seen)
    fitted(zoo)
    assert len(starts) > 3
    assert set(starts[0]) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(start[name], starts[0][name]) for start in starts for name in starts[0])


def test_a_setting_is_kept_only_where_it_is_ahead_of_the_default_by_more_than_two_standard_errors(zoo: Zoo) -> None:
    mixture = fitted(zoo, max_steps=None, settings=3, new_adapter=None)
    settings = mixture.metrics["settings"]
    assert list(settings) == [
        "module, normalize none, pull 0, new adapter of rank 8",
        "module, normalize none, pull 0",
        "module, normalize all, pull 0, new adapter of rank 8",
    ]
    kept = mixture.metrics["chosen"]
    new = ", new adapter of rank 8" if kept["new_adapter"] else ""
    name = f"{kept['granularity']}, normalize {kept['normalize']}, pull {kept['pull']:g}{new}"
    assert kept["steps"] == settings[name]["steps"] == 100  # a head that is stopped early is not finished
    assert mixture.granularity == kept["granularity"]


class Scripted:
    """A learner whose settings do as they are told: for each granularity, which examples are right."""

    options = fit_options({})
    metric = classification_metric(LabelSet(("a", "b"), SINGLE))
    head: ClassVar = ["classifier"]

    def __init__(self, right: dict[str, list[int]]) -> None:
        self.right = right
        self.asked: list[tuple[str, int]] = []
        self.state = FitState(None, "", resume=False)

    def train(self, candidate: Candidate, rows: Sequence[int], steps: int, **_: Any) -> Trained:
        self.asked.append((candidate.name, steps))
        right = torch.tensor(self.right[candidate.granularity])
        logits = torch.stack([1.0 - right, right.float()], dim=1)  # the label is always 1
        judged = Judged(logits, torch.ones(len(right), dtype=torch.long), float(1 - right.float().mean()), len(right))
        return Trained(steps, 0.0, {(steps, 1.0): judged})


class Stopping(Scripted):
    """A learner whose time ends during the training of one candidate."""

    def train(self, candidate: Candidate, rows: Sequence[int], steps: int, **_: Any) -> Trained:
        done = super().train(candidate, rows, steps)
        stops = candidate.granularity == "layer"
        return replace(done, steps=2, judged={}, complete=False) if stops else done

    def judge(self, rows: Sequence[int]) -> Judged:
        return super().train(Candidate(LEARNED, None), rows, 2).judged[2, 1.0]


@pytest.mark.parametrize(("stopped", "judged"), [(0, ["a", "b", "c"]), (1, ["a", "c"]), (2, ["a", "b"])])
def test_of_candidates_that_time_stopped_the_first_alone_is_judged(stopped: int, judged: list[str]) -> None:
    learner = Stopping({key: [1, 1, 0] for key in ("layer", "global", "module")})
    found = [
        Candidate(name, (1.0,), granularity="layer" if i == stopped else "global")
        for i, name in enumerate(("a", "b", "c"))
    ]
    one = compare(learner, found, [(range(3), range(3))], 5, judge_at=(1.0,))  # type: ignore[arg-type]
    assert list(one.scores) == judged
    assert one.skipped == [name for name in ("a", "b", "c") if name not in judged]
    assert one.steps == {name: 2 if name == found[stopped].name else 5 for name in judged}
    folds = compare(learner, found, [(range(3), range(3))] * 2, 5, judge_at=(1.0,))  # type: ignore[arg-type]
    assert folds.skipped == [found[stopped].name]  # parts of different lengths are no score


@pytest.mark.parametrize(
    ("second", "with_head", "without"),
    [
        ([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], "module", "module"),  # as good
        ([1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "module", "global"),  # ahead by one of ten, and so is the standard error
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 0], "module", "global"),  # ahead by three of ten: 1.96 standard errors
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "global", "global"),  # ahead by four of ten: 2.4 standard errors
        ([0, 0, 0, 1, 1, 1, 1, 1, 1, 1], "module", "global"),  # ahead by one, but wrong where the default is right
    ],
)
@pytest.mark.parametrize("head", [True, False])
def test_which_setting_is_kept(second: list[int], with_head: str, without: str, head: bool) -> None:
    expected = with_head if head else without
    learner = Scripted({"module": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0], "global": second})
    learner.head = ["classifier"] if head else []  # type: ignore[misc]
    settings = [Candidate(LEARNED, None, granularity=g) for g in ("module", "global")]
    found = compare(learner, settings, [(range(10), range(10))], 5, judge_at=(1.0,))  # type: ignore[arg-type]
    assert found.learned is not None
    assert found.learned.granularity == expected
    assert found.scores[LEARNED].value == pytest.approx(np.mean(learner.right[expected]))


class Halfway(Scripted):
    """A learner whose new adapter does at each step and interpolation as it is told: which examples are right, and the loss."""

    def __init__(self, points: dict[tuple[int, float], tuple[list[int], float]]) -> None:
        super().__init__({})
        self.points = points

    def train(self, candidate: Candidate, rows: Sequence[int], steps: int, **_: Any) -> Trained:
        judged = {}
        for point, (right, loss) in self.points.items():
            logits = torch.tensor([[1.0 - r, float(r)] for r in right])
            judged[point] = Judged(logits, torch.ones(len(right), dtype=torch.long), loss, len(right))
        return Trained(steps, 0.0, judged)


@pytest.mark.parametrize(
    ("whole", "kept"),
    [
        ([1, 1, 0, 0], (2, 0.5)),  # as good, with a larger loss
        ([1, 0, 0, 0], (2, 0.5)),
        ([1, 1, 1, 0], (4, 1.0)),  # better in the metric, whatever its loss
    ],
)
def test_how_far_a_new_adapter_goes_is_what_the_metric_says_and_for_how_long_what_the_loss_says(
    whole: list[int], kept: tuple[int, float]
) -> None:
    points = {(2, 0.5): ([1, 1, 0, 0], 0.4), (4, 0.5): ([1, 1, 1, 1], 0.5)}
    learner = Halfway(points | {(2, 1.0): ([1, 1, 1, 1], 9.0), (4, 1.0): (whole, 5.0)})
    setting = Candidate(LEARNED, None, new_adapter=8, new_interpolations=(0.5, 1.0))
    found = compare(learner, [setting], [(range(4), range(4))], 4, judge_at=(0.5, 1.0))  # type: ignore[arg-type]
    assert found.learned is not None
    assert (found.steps[LEARNED], *found.learned.new_interpolations) == kept
    ((name, row),) = found.settings.items()
    assert row["steps"] == kept[0]
    assert name.endswith("new adapter of rank 8 at 0.5" if kept[1] == 0.5 else "new adapter of rank 8")


@pytest.mark.parametrize(
    ("shots", "given", "head", "steps"),
    [
        (8, {}, False, 40), (24, {}, False, 60), (36, {}, False, 100), (500, {}, False, 100), (500, {}, True, 100),
        (8, {}, True, 100), (80, {"batch_size": 32}, False, 60), (80, {"gradient_accumulation_steps": 4}, False, 50),
        (80, {"epochs": 1}, False, 10), (8, {"max_steps": 7}, False, 7),
    ],
)  # fmt: skip
def test_how_long_a_training_is(shots: int, given: dict[str, Any], head: bool, steps: int) -> None:
    assert steps_of(FitOptions(**given), shots, head=head) == steps


def test_each_candidate_is_trained_for_its_own_number_of_steps() -> None:
    learner = Scripted({"module": [1, 0]})
    candidates = [Candidate(name, None, granularity="module") for name in ("uniform", LEARNED)]
    parts = [(range(2), range(2))]
    compare(learner, candidates, parts, {"uniform": 3, LEARNED: 7}, judge_at=(1.0,))  # type: ignore[arg-type]
    assert learner.asked == [("uniform", 3), (LEARNED, 7)]


def test_a_strong_pull_keeps_the_weights_near_uniform(zoo: Zoo) -> None:
    def distance(pull: float) -> float:
        options = {"granularity": "module", "folds": 0, "learning_rate": 0.2, "max_steps": 20}
        return float((fitted(zoo, pull=pull, **options).mixture_weights - 1 / 3).abs().max())

    assert distance(100.0) < 0.3 * distance(0.0)


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


def test_what_the_settings_are_follows_from_the_head_and_the_shots() -> None:
    def found(head: bool, enough: bool, **options: Any) -> list[Candidate]:
        return learned_settings(fit_options(options), head=head, enough=enough)

    def settings(head: bool, enough: bool, **options: Any) -> list[tuple[str, int, float]]:
        return [(s.normalize, s.new_adapter, s.interpolation) for s in found(head, enough, **options)]

    def new_interpolations(head: bool, enough: bool, **options: Any) -> list[tuple[float, ...]]:
        return [s.new_interpolations for s in found(head, enough, **options)]

    assert settings(True, True) == [("none", 8, 1.0), ("none", 0, 1.0)]
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
    assert new_interpolations(False, True, new_adapter_interpolation=0.7) == [(0.7,), (1.0,)]
    assert new_interpolations(True, True, new_adapter_interpolation=0.7) == [(0.7,), (1.0,)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "all", "delta_scale": "learned"},
        {"new_adapter": 2},
        {"folds": 2, "settings": 1},
    ],
)
def test_an_interpolation_lies_between_uniform_composition_with_its_own_head_and_what_was_learned(
    zoo: Zoo, options: dict[str, Any]
) -> None:
    learned, part = (
        fitted(zoo, **({"folds": 0, "learning_rate": 0.2, "max_steps": 12} | options | {"interpolation": share}))
        for share in (1, 0.25)
    )
    even = fitted(zoo, method="uniform", folds=0, max_steps=12)
    assert (part.metrics["kept"], part.adapter_names) == ("learned", learned.adapter_names)
    start = 1 / 3 if part.normalize == "none" else 0.0
    expected = 0.75 * start + 0.25 * learned.wlora_weights[:, :3].double()
    assert torch.allclose(part.wlora_weights[:, :3].double(), expected, rtol=0, atol=1e-6)
    assert float((part.wlora_weights[:, :3] - start).abs().max()) > 1e-2
    assert part.delta_scale == pytest.approx(0.75 + 0.25 * learned.delta_scale, abs=1e-6)
    for name, tensor in part.head.items():
        expected = 0.75 * even.head[name].double() + 0.25 * learned.head[name].double()
        assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-6)
        assert not torch.allclose(even.head[name], learned.head[name], rtol=0, atol=1e-3)
    if part.new_files:
        (file,) = (name for name in part.new_files if name.endswith(".safetensors"))
        part_factors, learned_factors = (load(m.new_files[file]) for m in (part, learned))
        for name, tensor in part_factors.items():
            if "lora_B" in name:  # from zero
                assert torch.allclose(tensor, 0.25 * learned_factors[name], rtol=0, atol=1e-7)
                assert bool(tensor.any())
    assert part.metrics["note"].count("0.25 of the way from uniform composition to what was learned") == 1


def loss_of(dense: Path, rows: Path) -> float:
    """The loss of an export on a file of examples, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (c.from_pretrained(dense) for c in (AutoModelForSequenceClassification, AutoTokenizer))
    texts, labels = zip(*(line.split(",") for line in rows.read_text().splitlines()[1:]), strict=True)
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    wanted = torch.tensor([model.config.label2id[label] for label in labels])
    with torch.no_grad():
        return float(model.eval()(**batch, labels=wanted).loss)


def test_what_is_judged_is_the_interpolation(zoo: Zoo, tmp_path: Path) -> None:
    held = tmp_path / "held.csv"
    held.write_text("text,label\nw9 w30,low\nw33 w12,high\nw35 w8,high\n")
    given = {"eval_data": held, "folds": 0, "learning_rate": 0.2, "max_steps": 12}
    for options in ({}, {"early_stopping": 20}, {"new_adapter": 2, "new_adapter_interpolation": 0.5}):
        mixture = fitted(zoo, **given, **options, interpolation=0.25)
        said = mixture.metrics["candidates"]["learned"]["loss"]
        export(mixture, "dense", tmp_path / "dense", force=True)
        loss = loss_of(tmp_path / "dense", held)
        assert said == pytest.approx(loss, abs=1e-5)
    whole = fitted(zoo, **given, interpolation=1).metrics["candidates"]["learned"]["loss"]
    assert abs(whole - said) > 1e-3


# ------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
def test_pruned_weights_are_zero_the_others_renormalized_and_the_cost_is_said(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: str
) -> None:
    judge = Learner.judge

    def told(self: Learner, *args: Any, **options: Any) -> Judged:
        weights = attachment_of(self.model).weights
        pruned = (weights == 0) if normalize == "none" else torch.isinf(weights)
        return replace(judge(self, *args, **options), loss=5.0 if bool(pruned.any()) else 2.0)

    monkeypatch.setattr(Learner, "judge", told)
    start = {"initial_logits": [2.0, 1.0, -3.0], "granularity": "module", "normalize": normalize, "new_adapter": 0}
    kept = fitted(zoo, **start)
    mixture = fitted(zoo, tmp_path / "m", **start, prune_below=0.1 if normalize != "none" else 1.5)
    expected = kept.mixture_weights.clone()
    if normalize == "none":
        expected[(expected.abs() < 1.5)] = 0
        expected = torch.where(expected.any(-1, keepdim=True), expected, kept.mixture_weights)
    else:
        expected[expected < 0.1] = 0
        expected /= expected.sum(-1, keepdim=True)
    used = expected.any(0)
    assert mixture.adapter_names == [n for n, keep in zip(("a0", "a1", "a2"), used.tolist(), strict=True) if keep]
    assert len(mixture.adapter_names) < 3
    assert torch.allclose(mixture.mixture_weights, expected[:, used], atol=1e-6)
    assert mixture.metrics["pruned"]["on"] == "held-out folds"
    assert mixture.metrics["pruned"]["loss_added"] == pytest.approx(3.0)
    assert mixture.metrics["pruned"]["left"] == [n for n in ("a0", "a1", "a2") if n not in mixture.adapter_names]
    said = f"weights to zero and added 3 to the loss on held-out folds. {mixture.metrics['pruned']['left'][0]}"
    assert said in mixture.metrics["note"]
    assert mixture.metrics["note"].endswith("left the mixture. The scores are those before it.")
    export(tmp_path / "m", "dense", tmp_path / "dense")
    assert difference(zoo, tmp_path / "dense", mixture) < 1e-5


def test_what_is_pruned_is_small_as_a_weight_at_the_temperature_of_the_mixture(zoo: Zoo) -> None:
    tiny = {"folds": 0, "max_steps": 1, "learning_rate": 1e-9, "granularity": "global", "normalize": "all"}
    mixture = fitted(zoo, initial_logits=[2.0, 1.0, -3.0], temperature=5.0, prune_below=0.1, **tiny)
    assert mixture.adapter_names == ["a0", "a1", "a2"]


def test_what_is_pruned_is_small_where_modules_use_it_and_none_loses_its_only_adapter(tmp_path: Path) -> None:
    """Of two adapters of which one changes the values alone, shares are renormalized at each module."""
    from transformers import AutoModelForSequenceClassification

    tiny_bert().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    folders = [
        make_adapter(start, tmp_path / name, seed, r=2, scale=0.4, target_modules=targets, task_type="SEQ_CLS")
        for seed, (name, targets) in enumerate(
            {"a": ["query"], "b": ["query", "value"], "c": ["query", "value"]}.items()
        )
    ]
    shots = tmp_path / "shots.csv"
    shots.write_text("text,label\nw1 w2,low\nw9 w8,high\n")
    tiny = {"max_steps": 1, "learning_rate": 1e-9, "normalize": "present", "granularity": "global", "prune_below": 0.1}
    # shares 0.93, 0.065, 0.005: of the values b has 0.93 and c 0.07, of the queries b has 0.065
    row = np.log([0.93, 0.065, 0.005]).tolist()
    mixture = fitted((tmp_path / "base", folders, shots), initial_logits=row, **tiny)
    assert mixture.adapter_names == ["a", "b"]
    assert mixture.metrics["pruned"]["weights_set_to_zero"] == 1
    assert mixture.metrics["pruned"]["left"] == ["c"]
    assert "to the loss on the shots themselves. c left the mixture." in mixture.metrics["note"]


# -------------------------------------------------------------------------------------------------- scores, search


def test_a_score_has_the_jackknife_error_which_for_a_mean_is_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    logits = torch.zeros(40, 2)
    logits[torch.arange(40), torch.tensor(right).long()] = 1.0
    halves = [
        Judged(logits[part], torch.ones(len(logits[part]), dtype=torch.long), 1.0, 20)
        for part in (slice(20), slice(20, 40))
    ]
    found = score(pool(halves), Metric("accuracy", True, accuracy))
    assert found.value == pytest.approx(right.mean())
    assert found.standard_error == pytest.approx(right.std(ddof=1) / np.sqrt(40))
    assert found.ahead_of(found) == (0.0, 0.0)


def test_the_loss_of_pooled_folds_is_the_mean_over_their_examples() -> None:
    folds = [Judged(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), loss, n) for n, loss in ((1, 1.0), (3, 4.0))]
    assert pool(folds).loss == pytest.approx(3.25)


def test_the_note_says_first_what_did_better_and_what_was_kept(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "wlora_merge.training.selection.rivals", lambda *_: ({"a1": (0.1, 0.05)}, {"uniform": (-0.01, 0.02)})
    )
    learned = fitted(zoo).metrics
    assert (learned["better"], learned["as_good"]) == (["a1"], ["uniform"])
    better, good, kept = (
        learned["note"].index(w) for w in ("a1 alone (+0.100 ±", "uniform (-0.010 ±", "Kept: learned;")
    )
    assert better < good < kept
    assert "Kept: learned; --select best keeps a1 alone." in learned["note"]
    best = fitted(zoo, select="best").metrics
    assert best["kept"] == "a1"
    assert (best["better"], best["as_good"]) == (["a1"], ["uniform"])
    assert "Better than learned in accuracy: a1 alone (+0.100 ± 0.050)." in best["note"]
    assert "Kept: a1 alone." in best["note"]
    single = fitted(zoo, method="best-single").metrics
    assert f"Kept: {single['kept']} alone." in single["note"]


def test_options_that_come_to_nothing_are_said(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\nw1 w2,low\nw9 w8,high\n")
    options = {"settings": 5, "new_adapter": None, "new_adapter_learning_rate": 1e-4}
    note = fitted((*zoo[:2], tmp_path / "one.csv"), **options).metrics["note"]
    assert (
        "Without effect: --settings (there were no folds), --new-adapter-learning-rate (no new adapter was kept)."
        in note
    )
    assert (
        "Without effect"
        not in fitted(zoo, **(options | {"new_adapter": 2, "settings": 1, "max_steps": 1})).metrics["note"]
    )


def test_a_check_predicts_as_many_trainings_as_a_fit_makes(zoo: Zoo, tmp_path: Path) -> None:
    from wlora_merge.cli.costs import _trainings
    from wlora_merge.cli.recipe import FitRecipe
    from wlora_merge.data.examples import read_examples

    examples = read_examples(zoo[2], task="text-classification")
    for given in (
        {"settings": 1},
        {"settings": 3, "method": "auto"},
        {"method": "best-single", "folds": 0},
        {"folds": 0},
        {"folds": 0, "interpolation": 0.5},
        {"settings": 2, "interpolation": 0.5},
        {"settings": 2, "eval_data": others(zoo[2], tmp_path)},
        {"settings": 1, "eval_data": others(zoo[2], tmp_path)},
        {"method": "uniform", "eval_data": others(zoo[2], tmp_path)},
    ):
        trained: list[str] = []
        fitted(zoo, progress=lambda n, step, *_, to=trained: to.append(n) if step == 1 else None, **given)
        options = fit_options({"folds": 2, "max_steps": 4} | {k: v for k, v in given.items() if k != "eval_data"})
        fit_recipe = FitRecipe(data="shots.csv", task="text-classification", eval_data=given.get("eval_data"))
        labels = label_set(examples.column("label"))
        learned, heads, _ = _trainings(options, fit_recipe, examples, labels, ["a0", "a1", "a2"], True)
        assert abs(learned + heads - len(trained)) <= (1 if options.method == "auto" else 0), (given, trained)


def test_cma_es_finds_the_minimum_of_a_rotated_ellipsoid() -> None:
    rng = np.random.default_rng(1)
    Q, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    target = np.array([0.3, -0.7, 1.1, 0.2])
    calls: list[int] = []

    def loss(x: Any) -> float:
        calls.append(1)
        return float((np.array([1.0, 3.0, 10.0, 30.0]) * (Q @ (np.asarray(x) - target)) ** 2).sum())

    found = minimize(loss, [0.0] * 4, sigma=0.5, evaluations=600, seed=0)
    assert np.allclose(found, target, atol=1e-3)
    assert len(calls) == 600
    assert found == minimize(loss, [0.0] * 4, sigma=0.5, evaluations=600, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "expected one of learned"),
        ({"method": "fixed"}, "go together"),
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
