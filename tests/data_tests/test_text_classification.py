"""The task text-classification."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tokenizers import examples, ids, tokenizer

from wlora_merge.constants import SINGLE
from wlora_merge.data.labels import LabelSet
from wlora_merge.data.tasks import get_task
from wlora_merge.errors import DataError, WloraMergeWarning


def test_texts_become_inputs_and_class_numbers(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer(bos=True)
    data = examples(tmp_path, task.name, {"text": "a b", "label": "y"}, {"text": "a b c", "label": "x"})
    labels = task.labels(data)
    batch = task.collator(tok)(list(task.encode(data, tok, labels=labels)))
    assert batch["input_ids"].tolist() == [ids("[bos] a b [pad]"), ids("[bos] a b c")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert task.config_changes(labels, tok) == {
        "id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}, "problem_type": SINGLE, "pad_token_id": 0,
    }  # fmt: skip


def test_targets_of_a_regression_are_standardized_and_of_several_classes_floats(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer()
    data = examples(tmp_path, task.name, {"text": "a", "label": 1.5}, {"text": "b", "label": 2})
    batch = task.collator(tok)(list(task.encode(data, tok, labels=task.labels(data))))
    assert torch.equal(batch["labels"], torch.tensor([-1.0, 1.0]))
    assert task.config_changes(task.labels(data))["id2label"] == {0: "LABEL_0"}
    data = examples(tmp_path, task.name, {"text": "a", "label": ["x"]}, {"text": "b", "label": ["y", "x"]})
    batch = task.collator(tok)(list(task.encode(data, tok, labels=task.labels(data))))
    assert torch.equal(batch["labels"], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_an_unknown_label_in_other_data_is_refused_and_a_cut_is_counted(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer()
    data = examples(tmp_path, task.name, {"text": "a b c", "label": "z"}, {"text": "a", "label": "x"})
    with pytest.warns(WloraMergeWarning, match="1 of 2 examples"):
        encoded = task.encode(data, tok, max_length=2, labels=task.labels(data))
    assert encoded[0]["input_ids"] == ids("a b")
    with pytest.raises(DataError, match=r"example 1 of .* 'z', which is not one of 'x', 'y'"):
        task.encode(data, tok, labels=LabelSet(("x", "y")))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("text-classification", {"text": "a", "label": "x"}, "two classes or more; the only label is x"),
        ("token-classification", {"tokens": ["a", "b"], "tags": ["O", "O"]}, "two tags; the only one is O"),
    ],
)
def test_a_single_class_is_refused_with_the_name_of_the_file(
    tmp_path: Path, task: str, row: dict[str, Any], message: str
) -> None:
    data = examples(tmp_path, task, row, row)
    with pytest.raises(DataError, match=rf"{re.escape(data.source)}: .* {message}"):
        get_task(task).labels(data)


def test_text_pairs_are_encoded_together(tmp_path: Path) -> None:
    task, tok = get_task("text-classification"), tokenizer(eos=True)
    data = examples(tmp_path, task.name, {"premise": "a", "hypothesis": "b", "label": 0})
    encoded = task.encode(data, tok, labels=LabelSet(("0", "1")))
    assert encoded[0]["input_ids"] == ids("a [eos] b [eos]")
