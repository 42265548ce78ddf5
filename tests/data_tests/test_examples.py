"""What is read, what is refused, and with which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.data_files import classes, lines, refusal, write
from support.paths import SHARED

from wlora_merge.constants import MULTI, REGRESSION, SINGLE
from wlora_merge.data.examples import read_examples
from wlora_merge.data.labels import label_set
from wlora_merge.errors import DataError, WloraMergeWarning

DATA = SHARED / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")


def test_image_paths_in_a_table_are_relative_to_it_and_count_in_the_digest(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (2, 2), "red").save(tmp_path / "1.png")
    path = lines(tmp_path / "x.jsonl", [{"image": "1.png", "label": "a"}])
    first = read_examples(path, task="image-classification")
    image.new("RGB", (2, 2), "blue").save(tmp_path / "1.png")
    assert first.sha256 != read_examples(path, task="image-classification").sha256
    assert "2.png" in refusal(lines(tmp_path / "y.jsonl", [{"image": "2.png", "label": "a"}]), "image-classification")


def test_twins_are_equal_rows(tmp_path: Path) -> None:
    rows = [{"text": t, "text_pair": p, "label": y} for t, p, y in (("x", "1", "a"), ("x", "2", "a"), ("x", "1", "b"))]
    rows.append(rows[0])
    assert read_examples(lines(tmp_path / "d.jsonl", rows), task="text-classification").twins == [0, 1, 2, 0]
    chats = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "y"}]} for c in "aba"]
    assert read_examples(lines(tmp_path / "c.jsonl", chats), task="causal-lm").twins == [0, 1, 0]


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


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("causal-lm", {"prompt": "a", "completion": "b", "chosen": "c"}, "'chosen' look like answers"),
        ("causal-lm", {"prompt": "a", "completion": "b", "label": 1}, "'label' look like answers"),
        ("causal-lm", {"text": "a", "label": "b"}, "'label' look like answers"),
        ("causal-lm", {"prompt": "a", "completion": "b", "turns": [{"x": "c d"}]}, "'turns' hold text too"),
        ("causal-lm", {"messages": [{"role": "assistant", "content": "b"}], "note": "c d"}, "'note' hold text too"),
        ("question-answering", {"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}, "answer": "b"},
         "'answer' look like answers"),
        ("text-classification", {"text": "a", "label": "b", "gold": "c"}, "'gold' look like answers"),
    ],
)  # fmt: skip
def test_what_looks_like_an_answer_or_holds_text_is_not_left_out_without_a_word(
    tmp_path: Path, task: str, row: dict[str, Any], told: str
) -> None:
    import datasets

    for source in (lines(tmp_path / "a.jsonl", [row]), datasets.Dataset.from_list([row])):
        with pytest.warns(WloraMergeWarning) as found:
            read_examples(source, task=task)
        assert len(found) == 1
        assert told in str(found[0].message)


def test_evaluation_examples_among_the_shots_are_counted_in_any_order_and_file(tmp_path: Path) -> None:
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(6)]
    shots = read_examples(lines(tmp_path / "a.jsonl", rows), task="text-classification")
    text = "label,sentence\n" + "".join(f"{row['label']},{row['text']}\n" for row in reversed(rows))
    same = read_examples(write(tmp_path / "b.csv", text), task="text-classification")
    with pytest.raises(DataError, match=r"b.csv: all 6 examples are among the very shots \(.*a.jsonl\)"):
        same.tell_shots(shots)
    with pytest.raises(DataError, match="all 2 examples"):
        read_examples(rows[4:], task="text-classification").tell_shots(shots)
    more = [*rows[3:], {"text": "film 0", "label": 1}, {"text": "new", "label": 1}]
    with pytest.warns(WloraMergeWarning, match=r"the list given: 3 of 5 examples are among the shots \(.*a.jsonl\)"):
        read_examples(more, task="text-classification").tell_shots(shots)
    read_examples(more[3:], task="text-classification").tell_shots(shots)


def test_images_are_compared_by_their_bytes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for folder, values in (("a", (0, 255, 0)), ("b", (255, 9))):
        for number, value in enumerate(values):
            (tmp_path / folder / "x").mkdir(parents=True, exist_ok=True)
            image.new("L", (4, 4), value).save(tmp_path / folder / "x" / f"{number}.png")
    shots, held = (read_examples(tmp_path / folder, task="image-classification") for folder in "ab")
    assert shots.twins == [0, 1, 0]
    with pytest.warns(WloraMergeWarning, match="1 of 2 examples"):
        held.tell_shots(shots)


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


def test_content_in_parts_of_text_is_one_text(tmp_path: Path) -> None:
    def chat(*content: Any) -> list[dict[str, Any]]:
        return [
            {
                "messages": [
                    {"role": role, "content": part} for role, part in zip(("user", "assistant"), content, strict=True)
                ]
            }
        ]

    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]
    for name, content in (("a.jsonl", (parts, "c")), ("b.jsonl", (parts, [{"type": "text", "text": "c"}]))):
        (said,) = read_examples(lines(tmp_path / name, chat(*content)), task="causal-lm").column("messages")
        assert [turn["content"] for turn in json.loads(said)] == ["a b", "c"]
    for name, part, words in (
        (
            "c.jsonl",
            {"type": "image", "image": "x.png"},
            "a part of type 'image': of content in parts, {type: text, text} alone",
        ),
        ("d.jsonl", {"type": "text", "text": 3}, "a part of type 'text'"),
        ("e.jsonl", "plain", "a part of type 'none'"),
    ):
        assert words in refusal(lines(tmp_path / name, chat([part], "c")), "causal-lm")
    assert "is empty" in refusal(lines(tmp_path / "f.jsonl", chat([], "c")), "causal-lm")


def test_conversations_tags_and_answers_are_checked(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "hi"}
    assert "no turn of the assistant" in refusal(lines(tmp_path / "a.jsonl", [{"messages": [turn]}]), "causal-lm")
    shape = [{"messages": [{"author": "human", "value": "hi"}]}]
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
        return list(examples.label_names(labels).rows)

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
