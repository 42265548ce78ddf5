"""What is read, what is refused, and with which words."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from wlora_merge.constants import MULTI, REGRESSION, SINGLE
from wlora_merge.data.columns import choose_columns
from wlora_merge.data.examples import EVAL_SPLITS, Examples, read_examples
from wlora_merge.data.labels import label_set
from wlora_merge.errors import DataError, UnsupportedError

DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def classes(tmp_path: Path, labels: list[Any]) -> Examples:
    rows = [{"text": f"example {i}", "label": label} for i, label in enumerate(labels)]
    return read_examples(lines(tmp_path / "classes.jsonl", rows), task="text-classification")


def refusal(path: Path | str, task: str = "text-classification", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(path, task=task, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "NA", "label": "01"}\n\n{"text": "one, two", "label": "null"}\n'),
        ("a.json", '[{"text": "NA", "label": "01"}, {"text": "one, two", "label": "null"}]'),
        (
            "b.json",
            '{"canary": "x", "examples": [{"text": "NA", "label": "01"}, {"text": "one, two", "label": "null"}]}',
        ),
        ("c.json", '{"text": "NA", "label": "01"}\n{"text": "one, two", "label": "null"}'),
        ("a.csv", 'text,label\nNA,01\n"one, two",null\n'),
        ("bom.csv", '\ufefftext,label\r\nNA,01\r\n\r\n"one, two",null\r\n'),
        ("a.tsv", "text\tlabel\nNA\t01\none, two\tnull\n"),
    ],
)
def test_every_text_format_gives_the_same_rows_and_guesses_no_types(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / "[odd] *" / name, content)
    examples = read_examples(path, task="text-classification")
    assert list(examples.rows) == [{"text": "NA", "label": "01"}, {"text": "one, two", "label": "null"}]
    assert examples.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_parquet_keeps_class_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(str(tmp_path / "x.parquet"))
    examples = read_examples(tmp_path / "x.parquet", task="text-classification")
    assert examples.column("label") == ["yes", "no"]


def test_a_small_parquet_file_that_means_a_large_table_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("wlora_merge.data.formats.MAX_DATA_BYTES", 16_000_000)

    long, zeros = "x" * 1_000_000, pa.array([0] * 2000, pa.int32())
    repeated = pa.DictionaryArray.from_arrays(zeros, [long])
    bombs = {
        "a string that is repeated": pa.table({"text": repeated, "label": ["a"] * 2000}),
        "the same in lists": pa.table({"text": pa.ListArray.from_arrays([0, 1500, 2000], repeated)}),
        "and in structs": pa.table({"text": pa.StructArray.from_arrays([repeated], names=["inner"])}),
        "a page of zeros": pa.table({"text": ["\0" * 17_000_000]}),
        "numbers": pa.table({"text": pa.nulls(2_100_000, pa.int8())}),
        "wide ones": pa.table({"text": pa.array([b"0" * 1_000_000] * 1, pa.binary(1_000_000)).take(zeros[:17])}),
    }
    for name, table in bombs.items():
        file = tmp_path / "x.parquet"
        pq.write_table(table, file, compression="zstd", use_dictionary=name != "a page of zeros")
        del table
        assert file.stat().st_size < 60_000, name
        with pytest.raises(DataError, match=r"x.parquet: expands to more than 16\.0 MB, the most that is read"):
            read_examples(file, task="text-classification")


def test_parquet_of_every_kind_is_measured_as_it_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [
        pa.string(), pa.large_string(), pa.string_view(), pa.json_(), pa.dictionary(pa.int32(), pa.string()),
    ]  # fmt: skip
    for kind in kinds:
        storage = pa.array(["one", "two", "one"] if kind != pa.json_() else ['"one"', '"two"', '"one"'])
        text = pa.ExtensionArray.from_storage(kind, storage) if kind == pa.json_() else storage.cast(kind)
        extra = pa.array([[{"a": "b"}]] * 3)
        pairs = pa.array([["a", None]] * 3, pa.list_(pa.string(), 2))
        table = pa.table({"text": text, "label": ["a", "b", "a"], "extra": extra, "pairs": pairs, "none": pa.nulls(3)})
        pq.write_table(table, tmp_path / "x.parquet")
        assert read_examples(tmp_path / "x.parquet", task="text-classification").column("text") == ["one", "two", "one"]


def test_a_value_that_its_own_type_does_not_decode_is_one_sentence(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["not JSON"]))
    pq.write_table(pa.table({"text": text, "label": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column 'text' cannot be decoded"):
        read_examples(tmp_path / "x.parquet", task="text-classification")


def test_a_data_file_beyond_the_bound_is_refused_unread(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.parquet"):
        with open(tmp_path / name, "wb") as stream:
            stream.truncate(1 << 40)
        with pytest.raises(DataError, match=r"is longer than 1\.1 GB, the most that is read of such a file"):
            read_examples(tmp_path / name, task="text-classification")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,1\n")
    first = read_examples(path, task="text-classification")
    write(path, "text,label\ny,1\n")
    second = read_examples(path, task="text-classification")
    assert (first[0]["text"], second[0]["text"]) == ("x", "y")
    assert first.sha256 != second.sha256


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read_examples(write(tmp_path / "a.csv", "text,label\nx,1\n"), task="text-classification")
    assert capfd.readouterr() == ("", "")


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


def test_image_paths_in_a_table_are_relative_to_it_and_count_in_the_digest(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (2, 2), "red").save(tmp_path / "1.png")
    path = lines(tmp_path / "x.jsonl", [{"image": "1.png", "label": "a"}])
    first = read_examples(path, task="image-classification")
    image.new("RGB", (2, 2), "blue").save(tmp_path / "1.png")
    assert first.sha256 != read_examples(path, task="image-classification").sha256
    assert "2.png" in refusal(lines(tmp_path / "y.jsonl", [{"image": "2.png", "label": "a"}]), "image-classification")


def test_a_class_folder_without_files_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "texts" / name).mkdir(parents=True)
    write(tmp_path / "texts" / "cat" / "1.txt", "purrs")
    assert "dog: a folder beside those of the classes, and it holds no texts" in refusal(tmp_path / "texts")
    write(tmp_path / "texts" / "dog" / "1.txt", "barks")
    (tmp_path / "texts" / ".cache").mkdir()
    (tmp_path / "texts" / "__MACOSX").mkdir()
    assert read_examples(tmp_path / "texts", task="text-classification").column("label") == ["cat", "dog"]


def test_a_text_of_any_length_is_read_from_csv(tmp_path: Path) -> None:
    text = "word " * 60_000
    file = write(tmp_path / "long.csv", f"text,label\n{text},a\nshort,b\n")
    assert read_examples(file, task="text-classification").column("text")[0] == text


def test_twins_are_equal_rows(tmp_path: Path) -> None:
    rows = [{"text": t, "text_pair": p, "label": y} for t, p, y in (("x", "1", "a"), ("x", "2", "a"), ("x", "1", "b"))]
    rows.append(rows[0])
    assert read_examples(lines(tmp_path / "d.jsonl", rows), task="text-classification").twins == [0, 1, 2, 0]
    chats = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "y"}]} for c in "aba"]
    assert read_examples(lines(tmp_path / "c.jsonl", chats), task="causal-lm").twins == [0, 1, 0]


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


@pytest.mark.parametrize(
    ("task", "found", "chosen"),
    [
        ("causal-lm", ["input", "target"], {"prompt": "input", "completion": "target"}),
        ("causal-lm", ["Messages", "id"], {"messages": "Messages"}),
        ("text-classification", ["sentence1", "sentence2", "label"],
         {"text": "sentence1", "label": "label", "text_pair": "sentence2"}),
        ("seq2seq-lm", ["article", "highlights", "id"], {"source": "article", "target": "highlights"}),
        ("question-answering", ["id", "title", "context", "question", "answers"],
         {"question": "question", "context": "context", "answers": "answers"}),
        ("image-classification", ["img", "label"], {"image": "img", "label": "label"}),
    ],
)  # fmt: skip
def test_conventional_names_are_found(task: str, found: list[str], chosen: dict[str, str]) -> None:
    assert choose_columns(task, found) == chosen


@pytest.mark.parametrize(
    ("task", "found", "given", "words"),
    [
        ("text-classification", ["text", "sentence", "label"], {}, ["'text', 'sentence'", "--column text="]),
        ("text-classification", ["utterance", "label"], {}, ["'utterance', 'label'", "--column text=NAME"]),
        ("text-classification", ["text", "label"], {"text": "txt"}, ["'txt'", "did you mean 'text'"]),
        ("text-classification", ["text", "label"], {"lable": "label"}, ["did you mean 'label'"]),
        ("text-classification", ["text", "label"], {"text": "label", "label": "label"}, ["cannot be both"]),
        ("causal-lm", ["text", "prompt", "completion"], {}, ["text or as prompt + completion"]),
        ("causal-lm", ["instruction", "input", "output"], {}, ["'instruction', 'input'"]),
        ("causal-lm", ["a", "b"], {"text": "a", "prompt": "b"}, ["text together with prompt"]),
        ("token-classification", ["tokens", "pos_tags", "ner_tags"], {}, ["--column tags="]),
        ("text-classification", ["question", "passage", "label"], {}, ["'passage'", "--column text_pair=passage"]),
        (
            "text-classification",
            ["label", "title", "content"],
            {"label": "label"},
            ["'title'", "--column text=content"],
        ),
        ("causal-lm", ["instruction", "context", "response"], {}, ["'context'", "--column prompt=instruction"]),
        ("seq2seq-lm", ["question", "context", "answer"], {}, ["'context'", "--column source=question"]),
        ("seq2seq-lm", ["instruction", "input", "output"], {}, ["'instruction'", "--column source=input"]),
        ("causal-lm", ["document", "summary", "id"], {}, ["'summary'", "--column text=document"]),
        ("text-classification", ["question", "sentence", "label"], {}, ["which leaves the other out"]),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(
    task: str, found: list[str], given: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        choose_columns(task, found, given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_given_column_wins_over_every_guess() -> None:
    found = ["text", "sentence", "label", "target"]
    given = {"text": "sentence", "label": "target"}
    assert choose_columns("text-classification", found, given) == given
    assert choose_columns("causal-lm", ["text", "input", "output"], {"text": "text"}) == {"text": "text"}
    text = {"text": "content", "label": "label"}
    assert choose_columns("text-classification", ["label", "title", "content"], {"text": "content"}) == text
    assert choose_columns("causal-lm", ["prompt", "system", "messages"]) == {"messages": "messages"}


def test_text_that_a_guess_leaves_out_is_said_and_recorded(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = write(tmp_path / "a.csv", "id,sentence1,sent2,label\n17,a b,c d,1\n18,e,f g,0\n")
    found = read_examples(path, task="text-classification")
    assert found.unused == ("id", "sent2")
    (warning,) = recwarn
    assert "'sentence1' is read as text, 'label' is read as label; 'sent2' hold text too" in str(warning.message)
    read_examples(path, task="text-classification", columns={"text": "sentence1"})
    article = lines(tmp_path / "b.jsonl", [{"title": "A title", "text": "a b c"}])
    assert read_examples(article, task="causal-lm").unused == ("title",)
    assert len(recwarn) == 1
    late = [{"prompt": "a", "completion": "b", "more": more} for more in ("", None, ["one", "two words"])]
    read_examples(lines(tmp_path / "c.jsonl", late), task="causal-lm")
    assert "'more' hold text too" in str(recwarn[1].message)


def test_an_unused_column_is_not_decoded(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    import datasets

    rows = {
        "text": ["a", "b"],
        "label": [0, 1],
        "image": [{"bytes": b"no image", "path": None}] * 2,
        "note": ["x y", "z"],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet", task="text-classification").unused == ("image", "note")
    assert "'note' hold text too" in str(recwarn[0].message)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.csv", 'text,label\n"x\ny",1\nz\n', "line 4: the header has 2 fields, this line 1"),
        ("a.csv", "text,label\nx,1\n ,1\n", "line 3: column 'text' is empty"),
        ("a.csv", "text,text\nx,1\n", "'text' twice"),
        ("a.csv", b"text,label\nx,1\ncaf\xe9,1\n", "line 3: byte 0xe9 is not UTF-8"),
        ("a.csv", b"text,label\nx\0,1\n", "line 2: holds a NUL"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', "line 2: expected an object"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', "line 2: column 'label' has no value"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": 5, "label": 1}\n', "column 'text' holds a number, not text"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "label": [1]}\n', "a list, the first example a number"),
        (
            "a.jsonl",
            '{"text": "x", "label": 0}\n{"text": "y", "label": true}\n',
            "true or false, the first example a n",
        ),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": "y", "label": 3}\n', "a number, the first example text"),
        ("a.jsonl", '[{"text": "x", "label": 1}]\n', "got list; name a file that is one JSON array .json"),
        ("a.jsonl", '[\n{"text": "x", "label": 1}]\n', "one JSON array .json"),
        ("a.csv", "text;label\nx;1\n", "the header is the one field 'text;label'; separate fields by commas"),
        ("a.jsonl", '{"text": "x", "label": NaN}\n', "not a finite number"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "surrogate"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of examples: a, b"),
        ("a.json", "[1, 2]", "expected a list of objects"),
        ("a.parquet", "PAR1 or not", "cannot be read as Parquet"),
        (
            "a.csv",
            "text,label\nx,\"['joy', 'anger']\"\n",
            "line 2: column 'label' holds the text \"['joy', 'anger']\", which",
        ),
        ("a.csv", "text,label\nx,[1 0 1]\n", "looks like a list; write lists as JSONL or Parquet"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = write(tmp_path / name, content)
    message = refusal(path)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_missing_files_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.csv")
    assert "does not exist" in refusal(tmp_path / "none" / "folder")
    assert "holds no data files" in refusal(tmp_path)
    with pytest.raises(UnsupportedError, match="not read"):
        read_examples(write(tmp_path / "x.pkl", "x"), task="text-classification")
    with pytest.raises(UnsupportedError, match="reads no examples"):
        read_examples(tmp_path / "x.pkl", task="feature-extraction")
    path = write(tmp_path / "x.csv", "text,label\na,1\n")
    assert "has no split" in refusal(path, split="train")


@pytest.mark.parametrize(
    ("labels", "canonical"),
    [
        ([2, 10], ["2", "10"]),
        ([1, 2.5], [1.0, 2.5]),
        ([True, False], ["True", "False"]),
        (["[PAD]", "[a]", "[1]"], ["[PAD]", "[a]", "[1]"]),
        ([["a"], [], ["a", "b"]], [["a"], [], ["a", "b"]]),
    ],
)
def test_labels_have_one_form(tmp_path: Path, labels: list[Any], canonical: list[Any]) -> None:
    assert classes(tmp_path, labels).column("label") == canonical


def test_conversations_tags_and_answers_are_checked(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "hi"}
    assert "no turn of the assistant" in refusal(lines(tmp_path / "a.jsonl", [{"messages": [turn]}]), "causal-lm")
    shape = [{"messages": [{"from": "human", "value": "hi"}]}]
    assert "`role` and `content`" in refusal(lines(tmp_path / "b.jsonl", shape), "causal-lm")
    turns = [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "has the role 'bot'" in refusal(lines(tmp_path / "e.jsonl", [{"messages": turns}]), "causal-lm")
    tags = [{"tokens": ["a", "b"], "tags": ["O"]}]
    assert "2 tokens but 1 tags" in refusal(lines(tmp_path / "c.jsonl", tags), "token-classification")
    table = write(tmp_path / "c.csv", "tokens,tags\nx y,A B\n")
    assert "use JSONL or Parquet" in refusal(table, "token-classification")
    for start, words in ((1, "not at character 1"), (-3, "one whole number in `answer_start`")):
        answer = [{"question": "q", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [start]}}]
        assert words in refusal(lines(tmp_path / "d.jsonl", answer), "question-answering")


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


@real_data
def test_the_real_data_is_read() -> None:
    banking = read_examples(DATA / "banking77" / "train.csv", task="text-classification")
    assert banking.columns == {"text": "text", "label": "category"}
    assert len(set(banking.column("label"))) == 66
    bbh = read_examples(DATA / "bbh" / "navigate.json", task="causal-lm")
    assert (len(bbh), bbh.columns) == (250, {"prompt": "input", "completion": "target"})
    assert "or one file" in refusal(DATA / "banking77")


def test_a_labels_name_is_an_example_of_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def named(*rows: dict[str, Any], kind: str = SINGLE) -> list[dict[str, Any]]:
        path = tmp_path / "shots.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        examples = read_examples(path, task="text-classification")
        labels = label_set(examples.column("label"), kind)
        found = examples.with_label_names(labels)
        assert list(found.rows)[: len(rows)] == list(rows)
        assert found.sha256 == examples.sha256
        return list(found.rows)[len(rows) :]

    one, two = {"text": "a", "label": "Card_not-working"}, {"text": "b", "label": "don't know/other"}
    assert named(one, two, two) == [
        {"text": "Card not working", "label": "Card_not-working"},
        {"text": "don't know other", "label": "don't know/other"},
    ]
    assert named({"text": "a", "label": ["été", "b"]}, {"text": "c", "label": []}, kind=MULTI) == [
        {"text": "b", "label": ["b"]},
        {"text": "été", "label": ["été"]},
    ]
    for name in ("7", "LABEL_0", "class 3", "?!"):
        with pytest.raises(
            DataError,
            match=rf"shots.jsonl: the label '{re.escape(name)}' says nothing in words: leave --label-names out",
        ):
            named(one, {"text": "b", "label": name})
    with pytest.raises(DataError, match="is pairs of texts, of which a label's name is no example"):
        named(one | {"text_pair": "c"}, two | {"text_pair": "d"})
    with pytest.raises(DataError, match="is a regression"):
        named({"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}, kind=REGRESSION)
    assert capfd.readouterr() == ("", "")  # no progress bar
