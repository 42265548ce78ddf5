"""The fit: what it learns, what it reports, what it writes, on tiny models and on the real ones."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import EVERY_LINEAR, make_adapter, tiny_bert, tiny_llama
from support.shots import WORDS, others, save_tokenizer

from wlora_merge.cli.inspect_tables import mixture_rows, setting_rows
from wlora_merge.errors import DataError, MixtureError, OutputError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.files import read_mixture_record
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training.fit import fit
from wlora_merge.training.learner import Learner
from wlora_merge.training.run import Split


@pytest.fixture(scope="module")
def bert_zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Path]:
    """A headless tiny BERT with a tokenizer, three classifier adapters whose own heads have other labels, and shots."""
    from transformers import AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("bert")
    tiny_bert().save_pretrained(root / "base")
    save_tokenizer(root / "base")
    start = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=5)
    folders = [
        make_adapter(start, root / f"a{i}", i, r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        for i in range(3)
    ]
    rng = random.Random(0)
    with open(root / "shots.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["text", "label"])
        for label, words in {"high": range(30, 60), "low": range(30)}.items():
            for _ in range(8):
                rows.writerow([" ".join(f"w{w}" for w in rng.sample(list(words), 6)), label])
    return root / "base", folders, root / "shots.csv"


def test_a_classifier_fit_trains_a_new_head_judges_every_candidate_and_exports(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, shots = bert_zoo
    seen: list[str] = []
    mixture = fit(
        base, folders, shots, "text-classification", tmp_path / "mixture", max_steps=10, learning_rate=0.2, settings=2, pooling="cls",
        progress=lambda name, *_: seen.append(name),
    )  # fmt: skip
    assert list(mixture.metrics["candidates"]) == ["base", "uniform", "a0", "a1", "a2", "learned"]
    assert all({"loss", "accuracy", "accuracy_se"} == set(row) for row in mixture.metrics["candidates"].values())
    assert mixture.metrics["held_out"] == {"examples": 16, "of": 16, "folds": 3}
    pooler = (
        set()
        if mixture.metrics["chosen"]["pooling"] == "model"
        else {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    )
    assert set(mixture.head) == {"classifier.weight", "classifier.bias"} | pooler
    assert mixture.head["classifier.weight"].shape == (2, 32)
    assert mixture.config["id2label"] == {"0": "high", "1": "low"}
    assert mixture.config["architectures"] == ["BertForSequenceClassification"]
    assert bool(mixture.wlora_weights.any())
    assert {name.removesuffix(", new adapter") for name in seen} == {
        *mixture.metrics["candidates"],
        "learned, all shots",
    }
    assert ["new adapter" in row["setting of learned"] for row in setting_rows(mixture.metrics)] == [True, False]
    names = {p.name.rpartition("/")[2] for p in (tmp_path / "mixture").iterdir()}
    new = {"new_adapter"} if "new" in mixture.adapter_names else set()
    assert names == {"mixture.json", "mixture.safetensors"} | new
    for kind in ("dense", "lora"):
        export(tmp_path / "mixture", kind, tmp_path / kind)
        checked = verify(tmp_path / kind, base=base, adapters=[f"{f.name}={f}" for f in folders])
        assert checked.largest_difference is not None
        assert checked.largest_difference < 1e-5
        assert not checked.skipped


def test_the_lora_with_its_head_loads_with_the_line_that_its_card_shows(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders, shots = bert_zoo
    mixture = fit(base, folders, shots, "text-classification", max_steps=5, pooling="cls")
    export(mixture, "lora", tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    block = next(b.split("```")[0] for b in card.split("```python\n")[1:] if "AutoPeftModelForSequence" in b)
    monkeypatch.chdir(base.parent)  # where the config's `base` can be found under that name
    scope: dict[str, Any] = {}
    exec(block.replace("path/to/this/folder", str(tmp_path / "lora")), scope)
    model = scope["model"].eval()
    head = model.base_model.model.classifier
    weight = head.modules_to_save["default"].weight
    assert torch.equal(weight, mixture.head["classifier.weight"])
    assert {str(i): name for i, name in model.config.id2label.items()} == mixture.config["id2label"]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, shots = bert_zoo
    for name, seed in {"one": 1, "again": 1, "other": 2}.items():
        fit(base, folders, shots, "text-classification", tmp_path / name, max_steps=4, seed=seed, new_adapter=2)
    for file in ("mixture.json", "mixture.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert (tmp_path / "one" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_eval_data_is_judged_on_and_nothing_is_held_out(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, shots = bert_zoo
    held = others(shots, tmp_path)
    seen: list[str] = []
    mixture = fit(
        base,
        folders,
        shots,
        "text-classification",
        eval_data=held,
        max_steps=3,
        new_adapter=2,
        folds=0,
        progress=lambda n, *_: seen.append(n),
    )
    assert seen[0] == "learned, new adapter"  # first what will be kept, as time may end
    assert list(mixture.metrics["candidates"]) == ["base", "uniform", "a0", "a1", "a2", "learned"]
    assert mixture.metrics["held_out"]["examples"] == 16
    assert mixture.metrics["held_out"]["from"]["name"] == "held.csv"


@pytest.mark.parametrize(("method", "first"), [("uniform", "uniform"), ("fixed", "fixed"), ("best-single", "a0")])
def test_evaluation_data_judge_first_what_the_method_gives(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, method: str, first: str
) -> None:
    base, folders, shots = bert_zoo
    seen: list[str] = []
    weights = {"weights": [1.0, 0.0, 0.5]} if method == "fixed" else {}
    fit(
        base, folders, shots, "text-classification", eval_data=others(shots, tmp_path), max_steps=1, method=method,
        progress=lambda name, *_: seen.append(name), **weights,
    )  # fmt: skip
    assert seen[0] == first
    assert len(seen) == 5 + (method == "fixed")  # and no folds, which would decide nothing


@pytest.mark.parametrize("options", [{}, {"problem_type": "regression"}])
def test_a_regression_is_held_out_in_folds_however_its_numbers_are_written(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, options: dict[str, str]
) -> None:
    base, folders, _ = bert_zoo
    rows = [(" ".join(f"w{i + j}" for j in range(4)), f"{i / 7:.3f}") for i in range(12)]
    (tmp_path / "r.csv").write_text("text,label\n" + "\n".join(map(",".join, rows)))
    lines = [json.dumps({"text": text, "label": float(label)}) for text, label in rows]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    for name in ("r.csv", "r.jsonl"):
        mixture = fit(base, folders, tmp_path / name, "text-classification", max_steps=1, settings=1, **options)
        assert mixture.config["problem_type"] == "regression"
        assert mixture.metrics["held_out"] == {"examples": 12, "of": 12, "folds": 3}


def test_classes_written_as_floats_are_stratified(bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    base, folders, _ = bert_zoo
    lines = [json.dumps({"text": f"w{i} w5", "label": x}) for i, x in enumerate([1.0] * 6 + [2.0, 3.0])]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    options = {"problem_type": "single_label_classification", "max_steps": 1, "settings": 1}
    mixture = fit(base, folders, tmp_path / "c.jsonl", "text-classification", **options)
    assert mixture.metrics["held_out"]["examples"] == 6


def test_the_only_example_of_a_label_is_not_held_out_where_examples_have_several(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, _ = bert_zoo
    rows = [["x"], ["x", "y"], ["y"], ["y", "x"], ["z", "x"], []]
    lines = [json.dumps({"text": f"w{i} w5", "label": labels, "note": i}) for i, labels in enumerate(rows)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    mixture = fit(base, folders, tmp_path / "c.jsonl", "text-classification", max_steps=1, settings=1)
    assert mixture.config["problem_type"] == "multi_label_classification"
    assert mixture.metrics["held_out"]["examples"] == 5  # not that of z
    assert mixture.data["data"]["columns"] == {"text": "text", "label": "label"}
    assert mixture.data["data"]["unused_columns"] == ["note"]


def test_an_example_without_a_token_that_counts_is_refused(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    _, folders, _ = bert_zoo
    base = shutil.copytree(bert_zoo[0], tmp_path / "base")
    table = json.loads((base / "tokenizer.json").read_text())
    table["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    (base / "tokenizer.json").write_text(json.dumps(table))
    rows = [{"tokens": [f"w{i}", "w2"], "tags": ["A", "B"]} for i in range(8)] + [{"tokens": ["\u200b"], "tags": ["A"]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"example 9 of .*t.jsonl has no token that the loss counts"):
        fit(base, folders, tmp_path / "t.jsonl", "token-classification", max_steps=2, folds=0)


def test_evaluation_data_with_splits_are_their_validation_split(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, shots = bert_zoo
    rows = [json.dumps({"text": f"w{i} w5", "label": "low" if i % 2 else "high"}) for i in range(9)]
    for name, part in {"train": rows[:5], "validation": rows[5:7], "test": rows[6:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    options = {"eval_data": tmp_path, "max_steps": 1, "folds": 0}
    sizes = {
        split: fit(base, folders, shots, "text-classification", eval_split=split, **options).metrics["held_out"][
            "examples"
        ]
        for split in (None, "test", "train")
    }
    assert sizes == {None: 2, "test": 3, "train": 5}
    mixture = fit(base, folders, tmp_path, "text-classification", split="test", max_steps=1, folds=0)
    assert mixture.data["data"]["examples"] == 3
    with pytest.raises(MixtureError, match="eval_split is of eval_data"):
        fit(base, folders, shots, "text-classification", eval_split="test")


def test_the_shots_are_no_evaluation_data(bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    base, folders, shots = bert_zoo
    header, *rows = shots.read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.csv"
    turned.write_text(header + "".join(reversed(rows)))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"turned.csv: all \d+ examples are among the very shots"):
        fit(base, folders, shots, "text-classification", out, eval_data=turned)
    assert not out.exists()


def test_rows_in_memory_are_fitted_as_their_file_is(bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    import datasets
    import pandas

    base, folders, shots = bert_zoo
    frame = pandas.read_csv(shots, dtype=str)
    sources = [shots, datasets.Dataset.from_pandas(frame), frame.to_dict("records")]
    options = {"max_steps": 1, "folds": 0, "new_adapter": 0, "eval_data": [{"text": "w1 w2", "label": "low"}]}
    mixtures = [fit(base, folders, source, "text-classification", **options) for source in sources]
    assert all(torch.equal(m.mixture_weights, mixtures[0].mixture_weights) for m in mixtures)
    assert mixtures[1].data["data"]["name"] == "the Dataset given"
    mixtures[1].save(tmp_path / "mixture")
    with pytest.raises(DataError, match="the int given is not read"):
        fit(base, folders, 3, "text-classification")


def test_an_output_folder_that_is_taken_is_refused_before_anything_is_loaded(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders, shots = bert_zoo
    monkeypatch.setattr("wlora_merge.training.model.attached_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="is not empty"):
        fit(base, folders, shots, "text-classification", tmp_path / "out")
    with pytest.raises(OutputError, match="input"):
        fit(base, folders, shots, "text-classification", base / "out")


@pytest.mark.parametrize("which", ["data", "eval_data", "initial_logits"])
def test_force_replaces_no_folder_that_holds_what_the_fit_reads(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, which: str
) -> None:
    base, folders, shots = bert_zoo
    out = tmp_path / "mine"
    out.mkdir()
    read = out / ("start.json" if which == "initial_logits" else shots.name)
    read.write_bytes(b"{}" if which == "initial_logits" else shots.read_bytes())
    given: dict[str, Any] = {"data": shots, which: str(read)}
    with pytest.raises(OutputError, match=r"holds the input .* which would be removed with it"):
        fit(base, folders, task="text-classification", out=out, force=True, max_steps=1, **given)
    assert read.is_file()


@pytest.mark.parametrize("name", ["base", "uniform", "learned", "search", "fixed"])
def test_an_adapter_may_be_called_as_a_kind_of_candidate_is(bert_zoo: tuple[Path, list[Path], Path], name: str) -> None:
    base, folders, shots = bert_zoo
    given = [(name, folders[0]), folders[1]]
    mixture = fit(base, given, shots, "text-classification", method="best-single", max_steps=1, folds=2)
    other = folders[1].name
    assert set(mixture.metrics["candidates"]) == {"base", "uniform", f"adapter {name}", other}
    assert mixture.metrics["kept"] in (f"adapter {name}", other)
    assert mixture.adapter_names == [name if mixture.metrics["kept"] != other else other]


def test_ratings_are_classes_or_a_regression_as_the_problem_type_says(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, _ = bert_zoo
    shots = tmp_path / "ratings.csv"
    shots.write_text("text,label\n" + "".join(f"w{i} w{i + 1},{i % 3}\n" for i in range(6)))
    options: dict[str, Any] = {"max_steps": 2, "folds": 2, "settings": 1}
    classes = fit(base, folders, shots, "text-classification", **options)
    assert classes.config["problem_type"] == "single_label_classification"
    numbers = fit(base, folders, shots, "text-classification", problem_type="regression", **options)
    assert numbers.config["problem_type"] == "regression"
    assert numbers.metrics["metric"] == "mse"
    with pytest.raises(MixtureError, match="not of causal-lm"):
        fit(base, folders, shots, "causal-lm", problem_type="regression")


def test_a_class_with_one_shot_is_said_not_to_be_held_out(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, _ = bert_zoo
    shots = tmp_path / "five.csv"
    shots.write_text("text,label\nw1,low\nw2,low\nw3,high\nw4,high\nw5,rare\n")
    mixture = fit(base, folders, shots, "text-classification", max_steps=1, folds=2, settings=1)
    assert "(2 folds of 5 shots, 4 of them held out: the only one of a class never is)" in mixture.metrics["note"]


def test_evaluation_data_judges_and_the_folds_compare_the_settings_alone(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, shots = bert_zoo
    trained: list[str] = []
    fit(
        base, folders, shots, "text-classification", eval_data=others(shots, tmp_path), max_steps=1, folds=2, settings=2,
        progress=lambda name, *_: trained.append(name),
    )  # fmt: skip
    assert trained.count("learned, new adapter") + trained.count("learned") == 2 * 2 + 1
    assert trained.count("learned, new adapter") >= 2 <= trained.count("learned")
    assert trained.count("uniform") == trained.count("base") == 1
    trained.clear()
    mixture = fit(
        base, folders, shots, "text-classification", eval_data=others(shots, tmp_path), max_steps=1, folds=2, new_adapter=0,
        progress=lambda name, *_: trained.append(name),
    )  # fmt: skip
    assert trained.count("learned") == 1  # one setting, one number of steps: nothing to decide
    assert "settings" not in mixture.metrics


def test_label_names_are_what_a_row_of_each_name_would_be_but_never_held_out(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders, _ = bert_zoo
    rows = "text,label\nw1 w2,w7_w8\nw3 w4,w7_w8\nw40 w41,w50-w51\nw42 w43,w50-w51\n"
    (tmp_path / "shots.csv").write_text(rows)
    (tmp_path / "more.csv").write_text(f"{rows}w50 w51,w50-w51\nw7 w8,w7_w8\n")
    named, by_hand = (
        fit(base, folders, tmp_path / name, "text-classification", max_steps=4, folds=0, new_adapter=2, **options)
        for name, options in (("shots.csv", {"label_names": True}), ("more.csv", {}))
    )
    assert torch.equal(named.wlora_weights, by_hand.wlora_weights)
    assert all(torch.equal(tensor, by_hand.head[name]) for name, tensor in named.head.items())
    assert named.new_files == by_hand.new_files
    trained: list[tuple[list[int], list[int]]] = []
    train = Learner.train

    def watched(self: Learner, candidate: Any, split: Split) -> Any:
        trained.append((list(split.rows), list(split.held)))
        return train(self, candidate, split)

    monkeypatch.setattr(Learner, "train", watched)
    mixture = fit(base, folders, tmp_path / "shots.csv", "text-classification", max_steps=1, folds=2, label_names=True)
    assert trained[-1] == ([0, 1, 2, 3, 4, 5], [])
    assert all({4, 5} < set(rows) and not {4, 5} & set(held) for rows, held in trained)
    assert (
        "(2 folds of 4 shots and 2 labels' names, 4 of them held out: a label's name or the only one of a class never is)"
        in mixture.metrics["note"]
    )
    assert mixture.data["fit"]["label_names"] is True
    (tmp_path / "shots.csv").write_text("text,label\nw1,0\nw2,1\n")
    monkeypatch.setattr("wlora_merge.training.model.attached_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="the label '0' says nothing in words"):
        fit(base, folders, tmp_path / "shots.csv", "text-classification", label_names=True)


@pytest.mark.parametrize("meant", [True, False])
def test_names_of_labels_are_examples_where_they_tell_the_shots_apart(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, meant: bool
) -> None:
    base, folders, _ = bert_zoo
    shots = tmp_path / "shots.csv"
    order = range(8) if meant else [3, 6, 0, 1, 7, 2, 5, 4]  # which class has which name
    rows = [f"w{5 * i} w{5 * i + 1} w{5 * i + 2},w{5 * name} w{5 * name + 1}\n" for i, name in enumerate(order)]
    shots.write_text("text,label\n" + "".join(rows))
    found, without, asked = (
        fit(base, folders, shots, "text-classification", label_names=given, pooling="mean")
        for given in (None, False, True)
    )
    told = "The labels' names tell the shots apart, and are examples too (--no-label-names leaves them out)."
    assert (told in found.metrics["note"]) == meant
    assert told not in without.metrics["note"] + asked.metrics["note"]
    expected, other = (asked, without) if meant else (without, asked)
    assert all(torch.equal(tensor, expected.head[name]) for name, tensor in found.head.items())
    assert any(not torch.equal(tensor, other.head[name]) for name, tensor in found.head.items())


def test_labels_that_are_no_words_give_no_examples(bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    base, folders, _ = bert_zoo
    (tmp_path / "shots.csv").write_text("text,label\nw1,0\nw2,1\n")
    mixture = fit(base, folders, tmp_path / "shots.csv", "text-classification")
    assert "The labels' names tell" not in mixture.metrics["note"]


def test_one_shot_per_class_leaves_the_metrics_not_estimated(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, _ = bert_zoo
    shots = tmp_path / "one.csv"
    shots.write_text("text,label\nw1 w2,low\nw40 w41,high\n")
    mixture = fit(base, folders, shots, "text-classification", max_steps=3)
    assert "candidates" not in mixture.metrics
    told = "or two different shots per class or more. If the labels are words, --label-names makes an example of each."
    assert f"Give --eval-data, {told}" in mixture.metrics["note"]
    whole = fit(base, folders, shots, "text-classification", max_steps=3, interpolation=1, label_names=True)
    assert whole.metrics["note"].endswith("shots per class or more.")


@pytest.mark.parametrize("asked", [{"method": "auto"}, {"select": "best"}])
def test_a_choice_without_anything_to_choose_by_is_said(
    bert_zoo: tuple[Path, list[Path], Path], asked: dict[str, str]
) -> None:
    mixture = fit(*bert_zoo, "text-classification", max_steps=1, folds=0, **asked)
    end = "Give --eval-data, or --folds 2 or more. Kept: learned, as there was nothing to choose by."
    assert end in mixture.metrics["note"]


def test_the_seed_alone_decides_a_fit_and_the_callers_generator_goes_on_as_without_it(
    bert_zoo: tuple[Path, list[Path], Path],
) -> None:
    heads, drawn = [], []
    for seed in (5, 9):
        torch.manual_seed(seed)
        heads.append(fit(*bert_zoo, "text-classification", max_steps=1, folds=0).head["classifier.weight"])
        drawn.append(torch.rand(3))
        torch.manual_seed(seed)
        assert torch.equal(drawn[-1], torch.rand(3))
    assert torch.equal(*heads)


def test_a_causal_lm_fit_lowers_the_loss_on_the_completion(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=len(WORDS))
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folders = [
        make_adapter(model, tmp_path / f"a{i}", i, scale=0.4, r=3, target_modules=EVERY_LINEAR[: 2 + i])
        for i in range(3)
    ]
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": " w7"} for i in range(0, 40, 2)]
    (tmp_path / "shots.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    losses: list[float] = []
    mixture = fit(
        tmp_path / "base", folders, tmp_path / "shots.jsonl", "causal-lm", max_steps=30, learning_rate=0.05,
        batch_size=20, folds=0, eval_data=others(tmp_path / "shots.jsonl", tmp_path),
        normalize="none", new_adapter=0,
        progress=lambda name, step, steps, loss, weights: losses.append(loss) if name == "learned" else None,
    )  # fmt: skip
    assert sum(losses[-5:]) < sum(losses[:5])
    assert mixture.head == {}
    assert mixture.config == {}
    assert mixture.metrics["candidates"]["learned"]["loss"] < mixture.metrics["candidates"]["uniform"]["loss"]


def test_a_head_that_the_base_has_for_these_labels_is_kept(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tiny_bert().save_pretrained(tmp_path / "body")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "body", id2label={0: "low", 1: "high", 2: "other"}, label2id={"low": 0, "high": 1, "other": 2}
    )
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query"]) for i in range(2)]
    (tmp_path / "s.csv").write_text(
        "text,label\n" + "".join(f"w{i} w{i},{'low' if i < 9 else 'high'}\n" for i in range(18))
    )
    mixture = fit(tmp_path / "base", folders, tmp_path / "s.csv", "text-classification", max_steps=3)
    assert mixture.head == {}
    export(mixture, "dense", tmp_path / "dense")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert again.config.id2label == {0: "low", 1: "high", 2: "other"}
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("option", "value"), [("learning_rate", 0.0), ("max_steps", -1), ("folds", 1), ("batch_size", float("nan"))]
)
def test_an_option_out_of_range_is_named(
    bert_zoo: tuple[Path, list[Path], Path], option: str, value: float, tmp_path: Path
) -> None:
    base, folders, shots = bert_zoo
    with pytest.raises(MixtureError, match=option):
        fit(base, folders, shots, "text-classification", tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ pooled heads


@pytest.mark.parametrize(("listed", "expected"), [("cls", "cls"), ("mean", "mean"), (None, "mean")])
def test_the_head_sees_what_modules_json_says_or_the_mean(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, listed: str | None, expected: str
) -> None:
    base, folders, shots = bert_zoo
    shutil.copytree(base, tmp_path / "base")
    if listed:
        kinds = ("Transformer", "Pooling")
        rows = [{"type": f"sentence_transformers.models.{k}", "path": f"{n}_{k}" * n} for n, k in enumerate(kinds)]
        (tmp_path / "base" / "modules.json").write_text(json.dumps(rows))
        (tmp_path / "base" / "1_Pooling").mkdir()
        (tmp_path / "base" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": listed}))
    one = tmp_path / "one.csv"
    one.write_text("".join(shots.read_text().splitlines(keepends=True)[i] for i in (0, 1, -1)))
    mixture = fit(tmp_path / "base", folders, one, "text-classification")
    assert mixture.metrics["chosen"]["pooling"] == expected
    assert mixture.pooling == ("mean" if expected == "mean" else None)


def test_a_head_on_the_mean_is_saved_exported_and_verified(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    base, folders, shots = bert_zoo
    mixture = fit(
        base, folders, shots, "text-classification", tmp_path / "m", pooling="mean", new_adapter=2, max_steps=3
    )
    again = Mixture.load(tmp_path / "m")
    assert again.pooling == mixture.pooling == "mean"
    assert {"what": "pooling", "value": "mean"} in mixture_rows(read_mixture_record(tmp_path / "m"), tmp_path / "m")
    new = [f"new={tmp_path / 'm' / 'new_adapter'}"] if "new" in mixture.adapter_names else []
    for kind in ("dense", "onnx"):
        export(tmp_path / "m", kind, tmp_path / kind)
        checked = verify(tmp_path / kind, base=base, adapters=[*(f"{f.name}={f}" for f in folders), *new])
        assert not checked.skipped
        assert checked.largest_difference is not None
        assert checked.largest_difference < 1e-5
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["num_hidden_layers"] == json.loads((base / "config.json").read_text())["num_hidden_layers"] + 1


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_class_that_pools_by_its_config_is_exported_with_that_config(pooling: str, tmp_path: Path) -> None:
    from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModernBertConfig(vocab_size=len(WORDS), pad_token_id=0, max_position_embeddings=64, **sizes)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    start = ModernBertForSequenceClassification.from_pretrained(tmp_path / "base")
    folders = [make_adapter(start, tmp_path / f"a{i}", i, r=2, target_modules=["Wqkv"]) for i in range(2)]
    shots = tmp_path / "shots.csv"
    shots.write_text("text,label\n" + "".join(f"w{i} w{i + 9} w{i + 3},{'ab'[i % 2]}\n" for i in range(8)))
    mixture = fit(tmp_path / "base", folders, shots, "text-classification", pooling=pooling, max_steps=2)
    export(mixture, "dense", tmp_path / "dense")
    model = ModernBertForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    assert model.config.classifier_pooling == pooling
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    with torch.no_grad():
        tokens = model.model(**inputs).last_hidden_state
        rows = [
            t[: m.sum()].mean(0) if pooling == "mean" else t[0]
            for t, m in zip(tokens, inputs["attention_mask"], strict=True)
        ]
        assert torch.allclose(
            model.classifier(model.head(torch.stack(rows))), model(**inputs).logits, rtol=0, atol=1e-5
        )
    with pytest.raises(MixtureError, match="pooling is last"):
        fit(tmp_path / "base", folders, shots, "text-classification", pooling="last")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"l2": 0.0}, "l2 is 0.0"),
        ({"pooling": "max"}, "pooling is 'max', expected one of auto, model, mean, cls, last"),
        ({"head_learning_rate": 0.5}, "its new head is solved, not trained"),
    ],
)
def test_options_of_a_head_that_make_no_sense_are_refused(
    bert_zoo: tuple[Path, list[Path], Path], tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(MixtureError, match=told):
        fit(*bert_zoo, "text-classification", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.fit-state").exists()


def test_a_pooling_is_of_a_head_that_sees_one_vector(bert_zoo: tuple[Path, list[Path], Path]) -> None:
    base, folders, shots = bert_zoo
    with pytest.raises(
        MixtureError, match=r"pooling is of text-classification and image-classification, not of causal-lm"
    ):
        fit(base, folders, shots, "causal-lm", pooling="mean")


def test_a_mixture_that_no_adapter_has_weight_in_says_so(
    bert_zoo: tuple[Path, list[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the shots are predicted best from each other without any adapter."""
    options: dict[str, Any] = {"new_adapter": 0, "pooling": "mean"}
    assert "No adapter has any weight" not in fit(*bert_zoo, "text-classification", **options).metrics["note"]
    monkeypatch.setattr("wlora_merge.training.learner.START_SCALES", (0.0,))
    made = fit(*bert_zoo, "text-classification", **options)
    assert not made.mixture_weights.any()
    assert made.metrics["note"].endswith(
        "No adapter has any weight: this is the base, with its head, which is best without them."
    )


# ------------------------------------------------------------------------------------------------- the real ones


@pytest.mark.real
def test_minilm_on_banking77(shared: Path, real_models: Path, tmp_path: Path) -> None:
    group = json.loads((shared / "data/banking77/groups.json").read_text())["g5"]
    with open(shared / "data/banking77/train.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    shots = [row for name in group for row in [r for r in rows if r["category"] == name][:4]]
    with open(tmp_path / "shots.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["text", "category"])
        writer.writeheader()
        writer.writerows(shots)
    adapters = [shared / "zoo/minilm-banking" / f"g{i}" for i in range(5)]
    base = real_models / "minilm"
    mixture = fit(base, adapters, tmp_path / "shots.csv", "text-classification", tmp_path / "m", folds=2)
    assert mixture.head["classifier.weight"].shape == (11, 384)
    candidates = mixture.metrics["candidates"]
    assert candidates["learned"]["accuracy"] > 0.7  # chance is 1/11
    assert Mixture.load(tmp_path / "m").config["id2label"]["0"] == sorted(group)[0]
    names = [f"{a.name}={a}" for a in adapters]
    assert mixture.pooling == "mean"
    for kind in ("dense", "onnx"):
        export(tmp_path / "m", kind, tmp_path / kind)
        checked = verify(tmp_path / kind, base=base, adapters=names)
        assert checked.largest_difference is not None
        assert checked.largest_difference < 1e-4
    with pytest.raises(UnsupportedError, match="export with --format dense or --format onnx"):
        export(tmp_path / "m", "lora", tmp_path / "lora")


@pytest.mark.real
def test_smollm2_on_movie_reviews(shared: Path, real_models: Path, tmp_path: Path) -> None:
    lines = (shared / "data/sentences/rt-polarity.all").read_text(encoding="latin-1").splitlines()
    shots = [line.split(" ", 1) for line in [*lines[:3], *lines[-3:]]]
    rows = [
        {"prompt": f"Review: {text.strip()}\nSentiment:", "completion": [" negative", " positive"][int(label)]}
        for label, text in shots
    ]
    (tmp_path / "shots.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    adapters = [shared / "zoo/smollm2-tasks" / name for name in ("sst2", "subj", "trec", "mpqa")]
    base = real_models / "smollm2"
    settings: dict[str, Any] = {"granularity": "module", "pull": 0.0, "folds": 2, "settings": 1, "max_steps": 3}
    mixture = fit(base, adapters, tmp_path / "shots.jsonl", "causal-lm", tmp_path / "m", **settings)
    assert len(mixture.groups) == 210
    export(tmp_path / "m", "dense", tmp_path / "dense")
    names = [f"{a.name}={a}" for a in adapters]
    checked = verify(tmp_path / "dense", base=base, adapters=names)
    assert checked.largest_difference is not None
    assert checked.largest_difference < 0.05  # the base is bfloat16: rounding of the folded weights
    export(tmp_path / "m", "lora", tmp_path / "lora")
    checked = verify(tmp_path / "lora", base=base, adapters=names)
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-4
