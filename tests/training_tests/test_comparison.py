"""Candidates trained and judged on the same examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fits import Zoo, difference, fitted
from support.fits import zoo as zoo
from support.models import make_adapter, tiny_bert
from support.scripted import Halfway, Scripted, Stopping, contender
from support.shots import WORDS, save_tokenizer

from wlora_merge.exporters.export import export
from wlora_merge.mixture.attachment import attachment_of
from wlora_merge.training.candidates import LEARNED, UNIFORM, Candidate
from wlora_merge.training.comparison import Judging, compare
from wlora_merge.training.learner import Learner
from wlora_merge.training.scoring import Judged


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


def test_a_setting_is_kept_only_where_it_is_ahead_of_the_default_by_more_than_two_standard_errors(zoo: Zoo) -> None:
    mixture = fitted(zoo, max_steps=3, settings=3, new_adapter=4)
    settings = mixture.metrics["settings"]
    assert [name.removesuffix(" at 0.5") for name in settings] == [
        "module, normalize none, pull 0, new adapter of rank 4",
        "module, normalize all, pull 0, new adapter of rank 4",
        "global, normalize none, pull 0, new adapter of rank 4",
    ]
    kept = mixture.metrics["chosen"]
    name = f"{kept['granularity']}, normalize {kept['normalize']}, pull {kept['pull']:g}, new adapter of rank 4"
    (row,) = (row for called, row in settings.items() if called.startswith(name))
    assert kept["steps"] == row["steps"] == 3
    assert mixture.granularity == kept["granularity"]


@pytest.mark.parametrize(("stopped", "judged"), [(0, ["a", "b", "c"]), (1, ["a", "c"]), (2, ["a", "b"])])
def test_of_candidates_that_time_stopped_the_first_alone_is_judged(stopped: int, judged: list[str]) -> None:
    learner = Stopping({key: [1, 1, 0] for key in ("layer", "global", "module")})
    found = [
        Candidate(contender(name), (1.0,), granularity="layer" if i == stopped else "global")
        for i, name in enumerate(("a", "b", "c"))
    ]
    one = compare(learner, found, Judging([(range(3), range(3))], 5, (1.0,)))  # type: ignore[arg-type]
    assert [who.label for who in one.scores] == judged
    assert one.skipped == [name for name in ("a", "b", "c") if name not in judged]
    cut = found[stopped].contender.label
    assert one.steps == {contender(name): 2 if name == cut else 5 for name in judged}
    folds = compare(learner, found, Judging([(range(3), range(3))] * 2, 5, (1.0,)))  # type: ignore[arg-type]
    assert folds.skipped == [cut]  # parts of different lengths are no score


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
    found = compare(learner, settings, Judging([(range(10), range(10))], 5, (1.0,)))  # type: ignore[arg-type]
    assert found.learned is not None
    assert found.learned.granularity == expected
    assert found.scores[LEARNED].value == pytest.approx(np.mean(learner.right[expected]))


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
    found = compare(learner, [setting], Judging([(range(4), range(4))], 4, (0.5, 1.0)))  # type: ignore[arg-type]
    assert found.learned is not None
    assert (found.steps[LEARNED], *found.learned.new_interpolations) == kept
    ((name, row),) = found.settings.items()
    assert row["steps"] == kept[0]
    assert name.endswith("new adapter of rank 8 at 0.5" if kept[1] == 0.5 else "new adapter of rank 8")


def test_each_candidate_is_trained_for_its_own_number_of_steps() -> None:
    learner = Scripted({"module": [1, 0]})
    candidates = [Candidate(who, None, granularity="module") for who in (UNIFORM, LEARNED)]
    judging = Judging([(range(2), range(2))], {UNIFORM: 3, LEARNED: 7}, (1.0,))
    compare(learner, candidates, judging)  # type: ignore[arg-type]
    assert learner.asked == [("uniform", 3), ("learned", 7)]


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
