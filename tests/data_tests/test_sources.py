"""A file, a folder or a hub data set -> a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.data_files import refusal, write

from wlora_merge.data.examples import EVAL_SPLITS, read_examples
from wlora_merge.errors import UnsupportedError


def test_a_text_file_is_one_example_a_line_and_a_folder_one_a_file(tmp_path: Path) -> None:
    single = read_examples(write(tmp_path / "t.txt", "one\n\ntwo\n"), task="causal-lm")
    assert single.column("text") == ["one", "two"]
    write(tmp_path / "docs" / "a.txt", "one\ntwo\n")
    write(tmp_path / "docs" / "b.txt", "three")
    assert read_examples(tmp_path / "docs", task="causal-lm").column("text") == ["one\ntwo\n", "three"]
    write(tmp_path / "classes" / "good" / "a.txt", "nice")
    write(tmp_path / "classes" / "bad" / "a.txt", "awful")
    rows = read_examples(tmp_path / "classes", task="text-classification").rows
    assert list(rows) == [{"text": "awful", "label": "bad"}, {"text": "nice", "label": "good"}]


def test_an_image_folder_has_a_class_for_each_folder_even_one_called_train(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, value in (("train", 0), ("car", 255)):
        (tmp_path / "set" / name).mkdir(parents=True)
        image.new("L", (4, 4), value).save(tmp_path / "set" / name / "1.png")
    examples = read_examples(tmp_path / "set", task="image-classification")
    assert examples.column("label") == ["car", "train"]
    assert examples[0]["image"].getpixel((0, 0)) == 255
    write(tmp_path / "set" / "car" / "2.png", b"no image")
    assert "2.png" in refusal(tmp_path / "set", "image-classification")


def test_a_class_folder_without_files_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "texts" / name).mkdir(parents=True)
    write(tmp_path / "texts" / "cat" / "1.txt", "purrs")
    assert "dog: a folder beside those of the classes, and it holds no texts" in refusal(tmp_path / "texts")
    write(tmp_path / "texts" / "dog" / "1.txt", "barks")
    (tmp_path / "texts" / ".cache").mkdir()
    (tmp_path / "texts" / "__MACOSX").mkdir()
    assert read_examples(tmp_path / "texts", task="text-classification").column("label") == ["cat", "dog"]


def test_splits_of_a_folder_are_its_train_files_unless_another_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train-0.csv", "text,label\na,1\n")
    write(tmp_path / "train-1.csv", "text,label\nb,1\n")
    write(tmp_path / "test.csv", "text,label\nc,1\n")
    assert read_examples(tmp_path, task="text-classification").column("text") == ["a", "b"]
    assert read_examples(tmp_path, task="text-classification", split="test").column("text") == ["c"]
    assert "'validation'" in refusal(tmp_path, split="validation")
    judged = read_examples(tmp_path, task="text-classification", default_splits=EVAL_SPLITS)
    assert judged.column("text") == ["c"]
    write(tmp_path / "more.csv", "text,label\nd,1\n")
    assert "more.csv" in refusal(tmp_path)


def test_a_hub_data_set_of_an_unusual_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Builder:
        __module__ = "datasets.packaged_modules.pandas.pandas"  # reads pickles

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: Builder())
    with pytest.raises(UnsupportedError, match="'pandas'"):
        read_examples("someone/something", task="causal-lm")


def test_a_hub_data_set_is_read_by_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})

    class Builder:
        __module__ = "datasets.packaged_modules.parquet.parquet"
        info = type("Info", (), {"splits": {"test": None}})

        def download_and_prepare(self) -> None: ...

        def as_dataset(self, split: str) -> datasets.Dataset:
            assert split == "test"
            return rows

    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: asked.append(args) or Builder())
    examples = read_examples("owner/name:config", task="causal-lm")
    assert asked == [("owner/name", "config")]
    assert examples.column("text") == ["a", "b"]
    rows = datasets.Dataset.from_dict({"text": ["a", "c"]})
    other = read_examples("owner/name:config", task="causal-lm")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    again = read_examples("owner/name:config", task="causal-lm")
    assert examples.sha256 == again.sha256 != other.sha256
