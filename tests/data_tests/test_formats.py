"""One file of data -> a table."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from support.data_files import refusal, write

from wlora_merge.data.examples import read_examples
from wlora_merge.errors import DataError, UnsupportedError


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


GLUE = [
    'sentence\tlabel\n" the film was bad\t0\n the film was good\t1\n" the plot was bad\t0\n',
    'sentence\tlabel\n"bad" , he said\t0\n5" screen\t1\n',
    'sentence\tlabel\nit is "good"\t1\nso "bad\t0\n',
]


@pytest.mark.parametrize("text", GLUE)
def test_tsv_holds_quotes_as_glue_writes_them(tmp_path: Path, text: str) -> None:
    import pandas

    path = write(tmp_path / "a.tsv", text)
    wanted = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False)
    assert read_examples(path, task="text-classification").column("text") == wanted["sentence"].tolist()


def test_tsv_that_may_be_quoted_or_not_is_refused_at_the_line(tmp_path: Path) -> None:
    inline = refusal(write(tmp_path / "a.tsv", 'text\tlabel\ngood\t1\n"bad ."\t0\n'))
    assert "a.tsv, line 3: the field '\"bad .\"' begins with a quote" in inline
    across = refusal(write(tmp_path / "b.tsv", 'text\tlabel\n"a\t0\nb\t1\nc"\t0\n'))  # three rows, or one
    assert "b.tsv, line 2: the field '\"a' begins with a quote" in across


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_what_pandas_writes_is_read_or_refused_at_a_line_but_never_altered(
    tmp_path: Path, suffix: str, delimiter: str, quoting: int
) -> None:
    import pandas

    draw, refusals, path = random.Random(0), list[str](), tmp_path / f"a.{suffix}"
    for _ in range(200):
        texts = ["".join(draw.choices('ab ,"\t\n;é', k=draw.randint(1, 8))) + "x" for _ in range(draw.randint(1, 4))]
        pandas.DataFrame({"text": texts, "label": "a"}).to_csv(path, sep=delimiter, index=False, quoting=quoting)
        try:
            assert read_examples(path, task="text-classification").column("text") == texts
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) < (1 if suffix == "csv" else 50)
    assert all("a.tsv, line " in message for message in refusals)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('text,label\n"he said "ok" to me",pos\nbad,neg\n', "line 2: a field begins with a quote, and text follows"),
        ('text,label\nfine,pos\n"bad,neg\nfine,pos\n', "line 3: a field begins with a quote, and no quote ends it"),
        (
            'text,label\n"bad,neg\nfine,pos\n"bad,neg\n',
            "line 2: a field begins with a quote, and text follows the quote that",
        ),
    ],
)
def test_csv_quotes_that_do_not_pair_are_refused_at_the_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(csv.Error):
        list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert words in refusal(write(tmp_path / "a.csv", text))


def test_spaces_after_a_delimiter_are_no_part_of_a_class_or_of_a_file_written_so(tmp_path: Path) -> None:
    import pandas

    path = write(tmp_path / "a.csv", 'label, text\n neg, "film 0, ok"\npos, film 1\n')
    wanted = pandas.read_csv(path, skipinitialspace=True)
    examples = read_examples(path, task="text-classification")
    assert (examples.column("text"), examples.column("label")) == (wanted["text"].tolist(), ["neg", "pos"])
    path = write(tmp_path / "b.csv", "text,label\nx, pos\ny,neg \n")
    assert read_examples(path, task="text-classification").column("label") == ["pos", "neg"]
    path = write(tmp_path / "c.csv", "prompt,completion\nthe film was, positive\n")
    assert read_examples(path, task="causal-lm").column("completion") == [" positive"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_every_unicode_encoding_is_read(tmp_path: Path, name: str, encoding: str) -> None:
    texts = {
        "a.jsonl": '{"text": "é 名", "label": "a"}\n', "a.json": '[{"text": "é 名", "label": "a"}]',
        "a.csv": "text,label\r\né 名,a\r\n", "a.tsv": "text\tlabel\né 名\ta\n",
    }  # fmt: skip
    path = write(tmp_path / name, texts[name].encode(encoding))
    assert read_examples(path, task="text-classification").column("text") == ["é 名"]


def test_broken_utf_16_is_named_with_its_line(tmp_path: Path) -> None:
    data = "text,label\nx,1\n".encode("utf-16") + b"\x00\xd8,\x00"
    assert "line 3: byte 0x00 is not UTF-16; convert the file to UTF-8." in refusal(write(tmp_path / "a.csv", data))
    assert "is empty" in refusal(write(tmp_path / "b.csv", "".encode("utf-16")))


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


def zipped(data: bytes, *names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("folder")
        for name in names or ("folder/rows.jsonl",):
            archive.writestr(name, data)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd), ("zip", zipped)],
)
def test_compressed_files_are_read_within_the_bound(
    tmp_path: Path, suffix: str, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
    path = write(tmp_path / f"train.jsonl.{suffix}", pack(text))
    examples = read_examples(path, task="text-classification")
    assert examples.column("text") == ["a", "b"]
    assert examples.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_examples(tmp_path, task="text-classification").column("text") == ["a", "b"]
    assert "line 3: not JSON" in refusal(write(tmp_path / f"b.jsonl.{suffix}", pack(text + b"{")))
    for broken in (pack(text)[:-6], b"no archive"):
        assert "cannot be unpacked" in refusal(write(tmp_path / f"c.jsonl.{suffix}", broken))
    monkeypatch.setattr("wlora_merge.data.formats.MAX_DATA_BYTES", 1_000_000)
    bomb = write(tmp_path / f"d.csv.{suffix}", pack(b"text,label\n" + b"x" * 2_000_000))
    assert "expands to more than 1.0 MB" in refusal(bomb)


def test_an_archive_of_several_files_and_one_of_no_kind_are_refused(tmp_path: Path) -> None:
    several = write(tmp_path / "a.jsonl.zip", zipped(b"{}", "a.jsonl", "b.jsonl"))
    assert "cannot be unpacked (it holds 2 files, expected one)" in refusal(several)
    assert "cannot be unpacked (it holds 0 files" in refusal(write(tmp_path / "c.jsonl.zip", b"PK\5\6" + bytes(18)))
    unsaid = write(tmp_path / "a.zip", zipped(b"{}"))
    with pytest.raises(
        UnsupportedError, match=r"not read; use one of \.jsonl, .* also with \.gz, .*\.zst, \.zip behind it"
    ):
        read_examples(unsaid, task="text-classification")
    two = write(
        tmp_path / "b.jsonl.zst", zstd(b'{"text": "a", "label": "x"}\n') + zstd(b'{"text": "b", "label": "y"}\n')
    )
    assert read_examples(two, task="text-classification").column("text") == ["a", "b"]


def test_json_objects_of_columns_are_read_as_pandas_and_datasets_write_them(tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b", "c"], "label": ["x", "y", "x"]})
    rows = frame.to_dict("records")
    for orient in ("columns", "records", "table"):
        frame.to_json(tmp_path / "a.json", orient=orient)
        assert list(read_examples(tmp_path / "a.json", task="text-classification").rows) == rows
    write(tmp_path / "b.json", json.dumps(frame.to_dict("list")))
    assert list(read_examples(tmp_path / "b.json", task="text-classification").rows) == rows
    uneven = write(tmp_path / "c.json", json.dumps({"text": ["a", "b"], "label": ["x"]}))
    assert "c.json: expected columns of one length, got 'text' 2, 'label' 1 values" in refusal(uneven)


def test_arrow_files_and_streams_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.feather

    table = pa.table({"text": ["one", "two"], "label": ["a", "b"]})
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.feather", "file.arrow", "stream.arrow"):
        examples = read_examples(tmp_path / name, task="text-classification")
        assert list(examples.rows) == table.to_pylist()
        whole = (tmp_path / name).read_bytes()
        for broken in (b"ARROW1 or not", whole[: len(whole) // 2], b"ARROW1\0\0" + whole[:40]):
            assert "cannot be read as Arrow" in refusal(write(tmp_path / "b.arrow", broken))
    outside = whole.replace(
        pa.array(["one", "two"]).buffers()[1].to_pybytes(), pa.array([0, 3, 1 << 30], pa.int32()).buffers()[1]
    )
    assert "cannot be read as Arrow" in refusal(write(tmp_path / "d.arrow", outside))
    monkeypatch.setattr("wlora_merge.data.formats.MAX_DATA_BYTES", 16_000_000)
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 1_000_000])
    with pa.ipc.new_file(tmp_path / "c.arrow", pa.schema({"text": repeated.type})) as writer:
        writer.write_table(pa.table({"text": repeated}))
    assert "expands to more than 16.0 MB" in refusal(tmp_path / "c.arrow")


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


def test_a_text_of_any_length_is_read_from_csv(tmp_path: Path) -> None:
    text = "word " * 60_000
    file = write(tmp_path / "long.csv", f"text,label\n{text},a\nshort,b\n")
    assert read_examples(file, task="text-classification").column("text")[0] == text


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
        ("a.json", '[{"text": "x", "text": "y", "label": 1}]', "an object has the key 'text' twice"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1, "label": 2}\n',
            "line 1: not JSON (an object has the key 'label' twice)",
        ),
        ("a.txt", b"x\0y", "line 1: holds a NUL"),
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
