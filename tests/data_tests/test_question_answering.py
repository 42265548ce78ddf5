"""The task question-answering."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tokenizers import examples, ids, tokenizer

from wlora_merge.data.question_answering import best_span
from wlora_merge.data.tasks import get_task
from wlora_merge.errors import DataError, WloraMergeWarning


def test_an_answer_becomes_its_tokens(tmp_path: Path) -> None:
    task, tok = get_task("question-answering"), tokenizer(bos=True)
    answer = {"text": ["cat sat"], "answer_start": [4]}
    rows = [{"question": "a", "context": "the cat sat .", "answers": answer}]
    rows.append({"question": "a", "context": "the cat .", "answers": {"text": [], "answer_start": []}})
    encoded = task.encode(examples(tmp_path, task.name, *rows), tok)
    assert encoded[0]["input_ids"] == ids("[bos] a the cat sat .")
    assert [(item["start_positions"], item["end_positions"]) for item in encoded] == [(3, 4), (0, 0)]
    with pytest.warns(WloraMergeWarning, match="1 of 2 examples"):
        assert len(task.encode(examples(tmp_path, task.name, *rows), tok, max_length=4)) == 1
    with pytest.raises(DataError, match="no answer"):
        task.encode(examples(tmp_path, task.name, rows[0]), tok, max_length=4)
    with pytest.raises(DataError, match="no room for a context"):
        task.encode(examples(tmp_path, task.name, rows[0]), tok, max_length=2)


def test_answers_lie_in_the_context_whatever_stands_beside_them_in_a_batch(tmp_path: Path) -> None:
    task, tok = get_task("question-answering"), tokenizer(bos=True)
    answer = {"text": ["cat"], "answer_start": [4]}
    rows = [{"question": "a", "context": text, "answers": answer} for text in ("the cat .", "the cat sat . . .")]
    encoded = task.encode(examples(tmp_path, task.name, *rows), tok)
    assert [item["context"] for item in encoded] == [[2, 4], [2, 7]]
    batch = task.collator(tok)(encoded)
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 8, generator=generator), torch.rand(2, 8, generator=generator)
    logits[0][:, 1] = logits[1][:, 7] = 50.0  # the question, and what is padding in one of them
    logits[0][0, 2] = logits[1][0, 4] = logits[0][1, 3] = 20.0  # the best span of either context; the second ends at 7
    spans = [
        task.metric().preprocess(task.allowed(tuple(part[i : i + 1] for part in logits), [encoded[i]])) for i in (0, 1)
    ]
    together = task.metric().preprocess(task.allowed(logits, encoded))
    assert torch.equal(torch.cat(spans), together)
    assert together.tolist() == [[2, 4], [3, 7]]


def test_a_span_has_at_most_thirty_tokens() -> None:
    start, end = torch.zeros(1, 50), torch.zeros(1, 50)
    start[0, 2], end[0, 31], end[0, 32] = 9, 5, 9
    assert best_span((start, end)).tolist() == [[2, 31]]


def test_a_span_never_ends_before_it_starts() -> None:
    start, end = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[4.0, 3.0, 0.0]])
    assert best_span((start, end)).tolist() == [[2, 2]]
    metric = get_task("question-answering").metric()
    labels = (np.array([1, 0]), np.array([2, 0]))
    result = metric.compute(SimpleNamespace(predictions=np.array([[2, 3], [0, 0]]), label_ids=labels))  # type: ignore[arg-type]
    assert result == {"f1": 0.75, "exact": 0.5}
