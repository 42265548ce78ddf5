"""recipes/zoo: what each adapter has seen, what it learns from, and that a run that was stopped goes on."""

from __future__ import annotations

import csv
import io
import json
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from support.models import tiny_bert, tiny_llama
from support.paths import ROOT, SHARED
from support.shots import save_tokenizer

from wlora_merge.cli.main import main
from wlora_merge.errors import OutputError, WloraMergeError
from wlora_merge.io.locks import locked

RECIPES = ROOT / "recipes"
GROUPS = ("g0", "g1", "g2", "g3", "g4", "g5")
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"needs the data of {SHARED}")


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The recipe's files; a script's folder is on the path, so it is here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("quickstart", "bench_fit", "zoo"):
            patch.syspath_prepend(str(RECIPES / name))
        import design
        import jobs
        import processes
        import texts
        import training

        script = SimpleNamespace(**runpy.run_path(str(RECIPES / "zoo" / "__main__.py")))
        yield SimpleNamespace(
            design=design, jobs=jobs, processes=processes, texts=texts, training=training, script=script
        )


@pytest.fixture(scope="module")
def rows(recipe: Any) -> dict[str, dict[Any, Any]]:
    """What each adapter of both bases learns, and what it is tested on."""
    return {base: {spec: recipe.texts.rows_of(spec) for spec in made()} for base, made in recipe.design.DESIGNS.items()}


def intents(group: str) -> set[str]:
    return set(json.loads((SHARED / "data/banking77/groups.json").read_text())[group])


# ------------------------------------------------------------------------------------------ what an adapter has seen


@needs_data
@pytest.mark.parametrize("group", GROUPS)
def test_no_adapter_that_is_usable_for_a_group_has_seen_a_text_of_it(recipe: Any, rows: Any, group: str) -> None:
    unseen = recipe.design.usable(recipe.design.minilm(), f"banking:{group}")
    judged = set()
    for file in ("train", "test"):
        with open(SHARED / f"data/banking77/{file}.csv", newline="") as lines:
            judged |= {row["text"] for row in csv.DictReader(lines) if row["category"] in intents(group)}
    assert len(judged) > 1000
    for spec in unseen:
        assert not intents(group) & set(spec.labels), spec.name
        # a few texts stand in the data under two intents
        assert sum(text in judged for text, _ in rows["minilm"][spec][0]) <= 2, spec.name
    seen = [spec for spec in recipe.design.minilm() if spec not in unseen]
    assert {spec.part for spec in seen} == {group}
    assert len(seen) == 8


@needs_data
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_64_adapters_of_which_a_dozen_know_other_intents_and_a_fifth_nothing(
    recipe: Any, group: str
) -> None:
    unseen = recipe.design.usable(recipe.design.minilm(), f"banking:{group}")
    assert len(unseen) == 64
    near = [spec for spec in unseen if spec.dataset == "banking77" and len(spec.labels) > 2 and not spec.shuffled]
    assert 12 <= len(near) <= 13
    assert 0.18 <= sum(spec.shuffled for spec in unseen) / 64 <= 0.22


@needs_data
def test_no_task_that_judges_a_language_model_is_among_the_trained_ones(recipe: Any) -> None:
    specs = recipe.design.smollm2()
    trained = {spec.part if spec.dataset == "bbh" else spec.dataset for spec in specs}
    assert not trained & {"mr", "subj", "trec", "navigate", "boolean_expressions", "web_of_lies"}
    assert len(specs) == 24
    assert sum(spec.shuffled for spec in specs) == 5
    for job in ("smollm2:mr", "smollm2:subj", "smollm2:trec", "bbh:navigate"):
        assert recipe.design.usable(specs, job) == specs
    assert len(recipe.design.usable(specs, "smollm2:sst2")) == 20
    assert len(recipe.design.usable(specs, "bbh:hyperbaton")) == 23


@needs_data
@pytest.mark.parametrize("base", ["minilm", "smollm2"])
def test_the_zoo_is_varied(recipe: Any, base: str) -> None:
    specs = recipe.design.DESIGNS[base]()
    assert specs == recipe.design.DESIGNS[base]()
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names) == {"minilm": 72, "smollm2": 24}[base]
    for count in (Counter(spec.r for spec in specs), Counter(spec.targets for spec in specs)):
        assert max(count.values()) == min(count.values())  # as many of each rank, and of each kind of targets
    assert {spec.r for spec in specs} == {2, 4, 8, 16}
    assert any(spec.use_rslora for spec in specs)
    assert any(spec.layers for spec in specs)
    assert sum(spec.use_dora for spec in specs) == {"minilm": 3, "smollm2": 0}[base]
    assert 0.18 <= sum(spec.shuffled for spec in specs) / len(specs) <= 0.22


# ------------------------------------------------------------------------------------------ what an adapter learns from


@needs_data
@pytest.mark.parametrize("base", ["minilm", "smollm2"])
def test_an_adapter_is_tested_on_texts_that_it_has_not_seen(rows: Any, base: str) -> None:
    for spec, (train, test) in rows[base].items():
        assert len(test) >= 50
        assert len(train) >= 100
        assert not {text for text, _ in train} & {text for text, _ in test}, spec.name
        if spec.labels and base == "minilm":
            assert {label for _, label in train} == {label for _, label in test} == set(spec.labels), spec.name


@needs_data
def test_adapters_of_one_dataset_share_no_text(rows: Any) -> None:
    for base, dataset in (("minilm", "trec"), ("minilm", "mpqa"), ("smollm2", "mpqa"), ("smollm2", "sst2")):
        learned = [text for spec, (train, _) in rows[base].items() if spec.dataset == dataset for text, _ in train]
        assert len(learned) > 3000
        assert len(set(learned)) == len(learned)


@needs_data
@pytest.mark.parametrize("base", ["minilm", "smollm2"])
def test_a_shuffled_adapter_learns_the_same_labels_on_other_texts(recipe: Any, rows: Any, base: str) -> None:
    shuffled = {spec: found for spec, found in rows[base].items() if spec.shuffled}
    assert len(shuffled) == {"minilm": 14, "smollm2": 5}[base]
    for spec, (train, test) in shuffled.items():
        true, same = recipe.texts.rows_of(recipe.design.replace(spec, shuffled=False))
        assert same == test
        assert [text for text, _ in train] == [text for text, _ in true]
        assert Counter(label for _, label in train) == Counter(label for _, label in true)
        assert train != true


@needs_data
def test_shuffled_labels_say_nothing_about_the_texts(recipe: Any) -> None:
    (spec,) = [spec for spec in recipe.design.minilm() if spec.name == "subj-6"]
    assert spec.shuffled
    true = dict(recipe.jobs.sentences("subj"))
    train, _ = recipe.texts.rows_of(spec)
    share = sum(true[text] == label for text, label in train) / len(train)
    assert len(train) > 1000
    assert share == pytest.approx(0.5, abs=0.05)


@needs_data
def test_sst2_is_learned_without_the_sentences_of_the_reviews_that_judge(recipe: Any, rows: Any) -> None:
    def words(text: str) -> frozenset[str]:
        return frozenset(text.replace("-lrb-", "(").replace("-rrb-", ")").split())

    judged = [words(text) for text, _ in recipe.jobs.get_job("minilm:mr", Path("models")).judged]
    assert len(judged) == 400
    every = [words(text) for text, _ in recipe.jobs.sentences("sst2")]
    mine = [found for spec, found in rows["minilm"].items() if spec.dataset == "sst2"]
    learned = [words(text) for train, _ in mine for text, _ in train]

    def shared(texts: list[frozenset[str]]) -> int:
        """How many texts of eight words or more have all of them in one review."""
        return sum(any(text <= review for review in judged) for text in texts if len(text) > 7)

    assert shared(every) > 100  # SST-2 was made of these reviews
    assert len(learned) > 3000
    assert shared(learned) == 0
    prompts = {text for spec, (train, _) in rows["smollm2"].items() if spec.dataset == "sst2" for text, _ in train}
    known = {f"Review: {text}\nSentiment:" for train, test in mine for text, _ in [*train, *test]}
    assert prompts <= known


def test_batches_have_rows_of_alike_lengths_and_a_pass_takes_each_once(recipe: Any) -> None:
    lengths = [3 + (7 * i) % 40 for i in range(100)]
    drawn = list(recipe.training.batches(lengths, 4, 60, seed=1))
    assert drawn == list(recipe.training.batches(lengths, 4, 60, seed=1))
    assert drawn != list(recipe.training.batches(lengths, 4, 60, seed=2))
    assert len(drawn) == 60
    assert sorted(i for batch in drawn[:25] for i in batch) == list(range(100))
    assert sorted(i for batch in drawn[25:50] for i in batch) == list(range(100))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in drawn]
    assert sum(spread) / len(spread) < 5  # of 39


# ------------------------------------------------------------------------------------------------- a language model


def test_the_loss_of_completions_is_that_of_transformers(recipe: Any) -> None:
    model = tiny_llama()
    rows = [([5, 17, 3, 80], [41, 2]), ([9, 60], [1]), ([7, 33, 8, 8, 21], [4, 5, 6])]
    logits, classes, example = recipe.training.KINDS["smollm2"].forward(model, rows, 0)
    assert example.tolist() == [0, 0, 1, 2, 2, 2]
    for i, (text, answer) in enumerate(rows):
        labels = torch.tensor([[-100] * len(text) + answer])
        expected = model(input_ids=torch.tensor([text + answer]), labels=labels).loss
        mine = torch.nn.functional.cross_entropy(logits[example == i], classes[example == i])
        assert mine.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_completion_is_right_where_generate_gives_it(recipe: Any) -> None:
    model = tiny_llama()
    texts = [[5, 17, 3, 80], [9, 60], [7, 33, 8, 8, 21], [11, 12, 13]]
    ids = [torch.tensor([text]) for text in texts]
    given = [model.generate(x, max_new_tokens=2, do_sample=False, eos_token_id=None)[0, -2:].tolist() for x in ids]
    rows = [(text, [a, b]) for text, (a, b) in zip(texts, given, strict=True)]
    rows[1] = (texts[1], [given[1][0], (given[1][1] + 1) % 96])  # one of its two tokens is another
    kind = recipe.training.KINDS["smollm2"]
    assert recipe.training._accuracy(kind, model, rows, 0) == 75.0


# ------------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def small(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny BERT, three adapters for it, and rows of two words each that tell the class."""
    texts = [(f"w{i % 30} w{50 + i % 2}", "ab"[i % 2]) for i in range(40)]
    monkeypatch.setattr(recipe.training, "rows_of", lambda spec: (texts, texts[:10]))
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    save_tokenizer(base)
    specs = [
        recipe.design.Spec(
            name, "minilm", "trec", "1/1", ("a", "b"), (f"minilm:{name}",), 12, 8, r=2, targets=targets, seed=seed, **more
        )
        for seed, (name, targets, more) in enumerate(
            [("one", "qv", {}), ("two", "qkvo", {"use_rslora": True, "layers": (1,)}), ("three", "all", {"use_dora": True})]
        )
    ]  # fmt: skip
    return SimpleNamespace(base=base, folder=tmp_path / "zoo", specs=specs)


def make(recipe: Any, small: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = recipe.script.make_zoo(
        small.specs, small.base, small.folder, recipe.processes.workers(1)
    )
    return made


def weights(small: Any) -> dict[str, tuple[int, bytes]]:
    files = {spec.name: small.folder / spec.name / "adapter_model.safetensors" for spec in small.specs}
    return {name: (file.stat().st_mtime_ns, file.read_bytes()) for name, file in files.items() if file.exists()}


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT among themselves
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    recipe: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = recipe.training.train, []

    def stopped(spec: Any, base: Path, rows: Any, test: Any, out: Path) -> Any:
        calls.append(spec.name)
        measured = train(spec, base, rows, test, out)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return measured

    monkeypatch.setattr(recipe.training, "train", stopped)
    (small.folder / ".making-of-a-killed-run").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="power cut"):
        make(recipe, small)
    assert sorted(path.name for path in small.folder.iterdir()) == ["one", "two"]
    before = weights(small)
    records = make(recipe, small)
    assert calls == ["one", "two", "three", "three"]
    after = weights(small)
    assert {name: after[name] for name in before} == before
    assert [record["name"] for record in records] == ["one", "two", "three"]
    assert json.loads((small.folder / "zoo.json").read_text())["adapters"] == records
    small.folder.rename(small.folder.with_name("first"))
    make(recipe, small)
    assert {name: data for name, (_, data) in weights(small).items()} == {n: data for n, (_, data) in after.items()}


@pytest.mark.filterwarnings("ignore")
def test_training_learns_and_says_how_well(recipe: Any, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test rows are the training rows with the other label, so that both accuracies are known from one."""
    train = [(f"w{i % 30} w{50 + i % 2}", "ab"[i % 2]) for i in range(40)]
    test = [(text, {"a": "b", "b": "a"}[label]) for text, label in train]
    monkeypatch.setattr(recipe.training, "rows_of", lambda spec: (train, test))
    small.specs[:] = [recipe.design.replace(small.specs[2], steps=150, r=4, lora_alpha=16, use_dora=False)]
    monkeypatch.setitem(recipe.training.RATES, "minilm", (2e-2, 2e-2))
    (record,) = make(recipe, small)
    assert record["train_accuracy"] > 90
    assert record["test_accuracy"] == pytest.approx(100 - record["train_accuracy"])
    assert record["examples"] == 40


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_other_settings_is_made_again_and_a_stranger_refused(recipe: Any, small: Any) -> None:
    make(recipe, small)
    before = weights(small)
    small.specs[1] = recipe.design.replace(small.specs[1], steps=13)
    make(recipe, small)
    assert [name for name, found in weights(small).items() if found != before[name]] == ["two"]
    (small.folder / "one").rename(small.folder / "other")
    with pytest.raises(
        WloraMergeError, match=r"other: is no adapter of this zoo: move it away, or give another --out\."
    ):
        make(recipe, small)


def test_two_runs_at_once_are_refused(recipe: Any, small: Any) -> None:
    with locked(small.folder, small.folder), pytest.raises(OutputError, match="another run"):
        make(recipe, small)
    assert not list(small.folder.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_the_adapters_and_wlora_merge_mixes_those_of_a_list(recipe: Any, small: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    make(recipe, small)
    for spec in small.specs:
        plain = AutoModelForSequenceClassification.from_pretrained(small.base, num_labels=2)
        model = PeftModel.from_pretrained(plain, small.folder / spec.name)
        config = model.peft_config["default"]
        assert (config.r, config.use_rslora, config.use_dora) == (spec.r, spec.use_rslora, spec.use_dora)
        assert (config.lora_alpha, config.base_model_name_or_path) == (spec.lora_alpha, "minilm")
        changed = [name for name, p in model.named_parameters() if "lora_B" in name and p.any()]
        modules = {"qv": 2, "qkvo": 4, "all": 6}[spec.targets]
        assert len(changed) == modules * (len(spec.layers) if spec.layers else 2)
    run = CliRunner()
    for given, count in ((small.folder, 3), (small.folder / "unseen" / "minilm-two.txt", 2)):
        out = tmp_path / f"mixture{count}"
        asked = ["mix", "--base", str(small.base), "--adapters", str(given), "--out", str(out)]
        done = run.invoke(main, [*asked, "--modules-to-save", "drop"])
        assert done.exit_code == 0, done.output
        names = [adapter["name"] for adapter in json.loads((out / "mixture.json").read_text())["adapters"]]
        assert sorted(names) == {3: ["one", "three", "two"], 2: ["one", "three"]}[count]


def test_the_table_has_a_row_for_each_kind(recipe: Any) -> None:
    base = {"base": "minilm", "labels": ["a"] * 2, "r": 2, "test_accuracy": 50.0, "cpu_seconds": 10.0}
    rows = [
        base | {"dataset": "banking77", "shuffled": False, "train_accuracy": 80.0},
        base | {"dataset": "banking77", "shuffled": False, "train_accuracy": 90.0, "r": 16},
        base | {"dataset": "trec", "shuffled": True, "train_accuracy": 40.0},
    ]
    page = Console(width=120, record=True, file=io.StringIO())
    page.print(recipe.script.table("zoo", rows))
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in page.export_text().splitlines() if "│" in line
    ]
    assert cells == [
        ["banking77, 2 intents", "2", "true", "2–16", "85", "50", "10", "20"],
        ["trec", "1", "shuffled", "2", "40", "50", "10", "10"],
    ]
