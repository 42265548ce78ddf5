"""The task token-classification."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tokenizers import examples
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wlora_merge.data.labels import LabelSet
from wlora_merge.data.tasks import get_task
from wlora_merge.errors import WloraMergeWarning


def test_a_tag_lies_on_the_first_token_of_its_word(tmp_path: Path) -> None:
    inner = Tokenizer(
        models.WordPiece({"[unk]": 0, "[pad]": 1, "[cls]": 2, "ca": 3, "##t": 4, "a": 5}, unk_token="[unk]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="[cls] $A", special_tokens=[("[cls]", 2)])
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[pad]", unk_token="[unk]")
    task = get_task("token-classification")
    data = examples(tmp_path, task.name, {"tokens": ["cat", "a"], "tags": ["B", "O"]}, {"tokens": ["a"], "tags": ["O"]})
    labels = task.labels(data)
    batch = task.collator(tok)(list(task.encode(data, tok, labels=labels)))
    assert batch["input_ids"].tolist() == [[2, 3, 4, 5], [2, 5, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 0, -100, 1], [-100, 1, -100, -100]]
    assert task.config_changes(labels) == {"id2label": {0: "B", 1: "O"}, "label2id": {"B": 0, "O": 1}}
    with pytest.warns(WloraMergeWarning, match="1 of 2"):
        task.encode(data, tok, labels=labels, max_length=3)


def judge_tags(names: tuple[str, ...], predicted: list[list[int]], wanted: list[list[int]]) -> dict[str, float]:
    """The metric of token-classification on numbers of tags [E, T], the second batch of sentences apart from the first."""
    metric = get_task("token-classification").metric(LabelSet(names))
    logits, labels = torch.nn.functional.one_hot(torch.tensor(predicted), len(names)).float(), torch.tensor(wanted)
    assert metric.preprocess is not None
    rows = torch.cat([metric.preprocess((logits[part], None), labels[part]) for part in (slice(0, 1), slice(1, None))])
    return metric.compute(SimpleNamespace(predictions=rows.numpy(), label_ids=labels.numpy()))  # type: ignore[arg-type]


def test_the_f1_of_tags_does_not_count_the_outside() -> None:
    for tags in (("B", "I", "O"), ("MISC", "PER", "O")):
        assert judge_tags(tags, [[0, 2, 2, 1, 0]], [[0, 2, 1, 2, -100]]) == {"f1": 0.5, "accuracy": 0.5}


def test_the_f1_of_entities_is_counted_by_hand() -> None:
    names = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
    loc, per, in_loc, in_per, out = range(5)
    # a person of two words found whole; a place of two words found short; a place called a person; one entity too many
    wanted = [[per, in_per, out, loc, in_loc], [loc, out, out, -100, -100]]
    predicted = [[per, in_per, out, loc, out], [per, out, loc, loc, loc]]
    assert judge_tags(names, predicted, wanted) == {"f1": 2 * 1 / (4 + 3), "accuracy": 5 / 8}


@pytest.mark.parametrize(
    "names",
    [
        ("B-A-B", "B-C", "I-A-B", "I-C", "O"), ("I-A", "I-C", "B-A", "B-C", "O"), ("B-A", "E-A", "I-A", "O", "S-A"), ("B", "I", "O"),
        ("B-A", "I-A", "MISC", "O"), ("B-A", "I-A", "L-A", "O", "U-A"),
    ],
    ids=["IOB2", "IOB1", "IOBES", "bare", "one without a prefix", "BILOU"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*seems not to be NE tag")
def test_the_f1_of_entities_is_seqevals(names: tuple[str, ...]) -> None:
    from seqeval.metrics import accuracy_score, f1_score

    draw = np.random.default_rng(0)
    wanted = draw.integers(len(names), size=(40, 9))
    predicted = np.where(draw.random(wanted.shape) < 0.7, wanted, draw.integers(len(names), size=wanted.shape))
    wanted[draw.random(wanted.shape) < 0.3] = -100  # word pieces, and padding
    tags = [
        [[names[n] for n, counts in zip(row, kept, strict=True) if counts] for row, kept in zip(table, wanted != -100, strict=True)]
        for table in (wanted, predicted)
    ]  # fmt: skip
    expected = {"f1": f1_score(*tags), "accuracy": accuracy_score(*tags)}
    assert judge_tags(names, predicted.tolist(), wanted.tolist()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("names", [("LOC", "O", "PER"), ("EVENT", "O", "ORG"), ("B-PER", "BRAND", "I-PER", "O")])
def test_a_tag_without_a_prefix_is_inside_an_entity_as_seqeval_counts_io(names: tuple[str, ...]) -> None:
    from seqeval.metrics import f1_score

    draw = np.random.default_rng(1)
    wanted = draw.integers(len(names), size=(40, 9))
    predicted = np.where(draw.random(wanted.shape) < 0.7, wanted, draw.integers(len(names), size=wanted.shape))
    marked = [name if name == "O" or "-" in name else f"I-{name}" for name in names]
    tags = [[[marked[n] for n in row] for row in table] for table in (wanted, predicted)]
    assert judge_tags(names, predicted.tolist(), wanted.tolist())["f1"] == pytest.approx(f1_score(*tags), rel=1e-12)


def test_without_an_outside_tag_no_f1_is_reported() -> None:
    with pytest.warns(WloraMergeWarning, match="the tags are numbers"):
        assert judge_tags(("0", "1"), [[0, 0, 0, 1]], [[0, 0, 1, 1]]) == {"accuracy": 3 / 4}
    assert judge_tags(("NN", "VB"), [[0, 0, 1, 1]], [[0, 0, 1, -100]]) == {"accuracy": 1.0}
    assert judge_tags(("B-PER", "I-PER", "_"), [[0, 1, 2]], [[0, 1, 2]]) == {"accuracy": 1.0}
    assert judge_tags(("B-PER", "I-PER"), [[0, 1, 0]], [[0, 1, 0]]) == {"f1": 1.0, "accuracy": 1.0}
    assert get_task("token-classification").metric(LabelSet(("NN", "VB"))).name == "accuracy"
