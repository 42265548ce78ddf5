"""The task seq2seq-lm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tokenizers import WORDS, examples, ids, tokenizer

from wlora_merge.data.tasks import get_task
from wlora_merge.errors import DataError, WloraMergeWarning


def test_seq2seq_targets_are_labels_and_are_never_cut(tmp_path: Path) -> None:
    task, tok = get_task("seq2seq-lm"), tokenizer(eos=True)
    data = examples(tmp_path, task.name, {"source": "a b c", "target": "d"}, {"source": "a", "target": "d e"})
    batch = task.collator(tok)(list(task.encode(data, tok)))
    assert batch["labels"].tolist() == [[*ids("d [eos]"), -100], ids("d e [eos]")]
    with pytest.raises(DataError, match=r"example 2 of .*: its target has 3 tokens"), pytest.warns(WloraMergeWarning):
        task.encode(data, tok, max_length=2)
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), len(WORDS)) * 50.0
    metric = task.metric()
    rows = metric.preprocess((logits, None), batch["labels"])  # type: ignore[misc]
    result = metric.compute(SimpleNamespace(predictions=rows.numpy(), label_ids=batch["labels"].numpy()))  # type: ignore[arg-type]
    assert (result["accuracy"], result["exact"]) == (1.0, 1.0)
