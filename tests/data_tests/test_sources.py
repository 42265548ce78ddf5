"""A file, a folder or a hub data set -> a table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.data_files import refusal, write

from wlora_merge.data.examples import EVAL_SPLITS, read_examples
from wlora_merge.errors import UnsupportedError

TASK = "text-classification"


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


def test_what_save_to_disk_writes_is_read_without_the_caches_beside_it(tmp_path: Path) -> None:
    import datasets

    labels = datasets.ClassLabel(names=["no", "yes"])
    rows = datasets.Dataset.from_dict({"text": [f"film {i}" for i in range(6)], "label": [i % 2 for i in range(6)]})
    rows = rows.cast_column("label", labels)
    rows.select([4, 1, 2]).with_format("numpy").save_to_disk(tmp_path / "one", num_shards=2)
    loaded = datasets.load_from_disk(tmp_path / "one")
    loaded.map(lambda row: {"text": "cached"}, load_from_cache_file=False)
    examples = read_examples(tmp_path / "one", task="text-classification")
    assert examples.column("text") == list(loaded.with_format(None)["text"]) == ["film 4", "film 1", "film 2"]
    assert examples.column("label") == ["no", "yes", "no"]
    assert "is one table and has no split 'test'" in refusal(tmp_path / "one", split="test")
    many = datasets.DatasetDict({"train": rows, "dev": rows.select([5])})
    many.save_to_disk(tmp_path / "many")
    assert len(read_examples(tmp_path / "many", task="text-classification")) == 6
    judged = read_examples(tmp_path / "many", task="text-classification", default_splits=EVAL_SPLITS)
    assert judged.column("text") == ["film 5"]
    assert "no split 'test', or none that is clear (it has train, dev)" in refusal(tmp_path / "many", split="test")
    assert f"name its own folder, {tmp_path / 'many'}" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", ".hidden.arrow"])
def test_a_data_set_on_disk_names_no_files_elsewhere(tmp_path: Path, name: str) -> None:
    write(tmp_path / "one" / "state.json", json.dumps({"_data_files": [{"filename": name}]}))
    assert "expected the names of the files" in refusal(tmp_path / "one")
    write(tmp_path / "many" / "dataset_dict.json", json.dumps({"splits": [name]}))
    assert "expected the names of the splits" in refusal(tmp_path / "many")
    for content in ({}, {"_data_files": None}, {"_data_files": ["x"]}, {"_data_files": [{}]}):
        write(tmp_path / "one" / "state.json", json.dumps(content))
        assert "state.json" in refusal(tmp_path / "one")
    write(tmp_path / "one" / "state.json", json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    assert "gone.arrow: cannot be read" in refusal(tmp_path / "one")


def test_rows_in_memory_are_what_a_file_of_them_is(tmp_path: Path) -> None:
    import datasets
    import numpy as np
    import pandas

    rows = [{"text": "a b", "label": 2}, {"text": "c", "label": 10}]
    file = read_examples(write(tmp_path / "a.jsonl", "".join(map(json.dumps, rows)).replace("}{", "}\n{")), task=TASK)
    table = datasets.Dataset.from_list(rows)
    numbers = [row | {"label": np.int64(row["label"])} for row in rows]
    given = [
        rows,
        numbers,
        pandas.DataFrame(rows),
        table,
        table.with_format("torch"),
        table.select([1, 0]).select([1, 0]),
    ]
    found = [read_examples(source, task=TASK) for source in given]
    assert all(list(examples.rows) == list(file.rows) for examples in found)
    assert len({examples.sha256 for examples in found}) == 1
    assert found[3].source == "the Dataset given"
    many = datasets.DatasetDict({"train": table, "test": table.select([1])})
    assert read_examples(many, task=TASK, split="test").column("text") == ["c"]
    lists = pandas.DataFrame({"tokens": [np.array(["a", "b"])], "tags": [["O", "X"]]})
    assert read_examples(lists, task="token-classification")[0] == {"tokens": ["a", "b"], "tags": ["O", "X"]}


def test_what_is_no_table_in_memory_is_refused_with_the_example() -> None:
    import datasets
    import pandas

    for other in (3, {"text": ["a"]}, ["a"], iter([]), datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset()):
        assert "given is not read: expected a path, a hub id, a datasets.Dataset" in refusal(other)
    assert "the list given holds no examples" in refusal([])
    late = [{"text": "a", "label": "x"}, {"text": None, "label": "x"}]
    assert "the list given, example 2: column 'text' has no value" in refusal(late)
    assert "the DataFrame given, example 2: column 'text' has no value" in refusal(pandas.DataFrame(late))
    mixed = pandas.DataFrame({"text": ["a", 1], "label": ["x", "y"]})
    assert "the DataFrame given has a column without a type of its own" in refusal(mixed)
    assert "no split 'test'" in refusal(datasets.DatasetDict({"train": datasets.Dataset.from_list(late)}), split="test")


def test_the_file_of_a_url_is_read_by_its_suffix_and_named_without_its_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    fetched, asked = write(tmp_path / "0a1b2c", "text,label\na,x\nb,y\n"), []
    monkeypatch.setattr(
        datasets, "DownloadManager", lambda: SimpleNamespace(download=lambda url: asked.append(url) or str(fetched))
    )
    for url in ("hf://datasets/owner/name/train.csv", "https://host/train.csv?token=hf_abcdefghijklmnop"):
        assert read_examples(url, task=TASK).column("text") == ["a", "b"]
        assert asked.pop() == url
    write(fetched, "text,label\na,x,y\n")
    assert refusal("https://host/train.csv?token=x").startswith(
        "https://host/train.csv, line 2: the header has 2 fields"
    )
    with pytest.raises(UnsupportedError, match="https://host/train is of a kind that is not read"):
        read_examples("https://host/train", task=TASK)

    def fails(url: str) -> str:
        raise ConnectionError("no route, with hf_abcdefghijklmnop")

    monkeypatch.setattr(datasets, "DownloadManager", lambda: SimpleNamespace(download=fails))
    assert refusal("hf://datasets/a/b/c.csv").endswith("c.csv cannot be fetched: no route, with hf_***.")


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
