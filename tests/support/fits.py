"""A BERT classifier of tiny size with adapters and shots, and a fit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.models import make_adapter, tiny_bert
from support.shots import WORDS, save_tokenizer

from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training.fit import fit

Zoo = tuple[Path, list[Path], Path]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A tiny BERT, three adapters, and four shots of each of two classes."""
    from transformers import AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("zoo")
    tiny_bert().save_pretrained(root / "base")
    save_tokenizer(root / "base")
    start = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    folders = [
        make_adapter(start, root / f"a{i}", i, r=2, scale=0.4, target_modules=["query", "value"], task_type="SEQ_CLS")
        for i in range(3)
    ]
    lines = [f"{WORDS[4 + i]} {WORDS[5 + i]},{'low' if i < 20 else 'high'}" for i in range(0, 40, 5)]
    (root / "shots.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return root / "base", folders, root / "shots.csv"


def fitted(zoo: Zoo, out: Path | None = None, **options: Any) -> Mixture:
    """Of the given adapters alone, unless `new_adapter` says otherwise; its head sees the first token, which each format can have."""
    base, folders, shots = zoo
    small = {"max_steps": 4, "folds": 2, "new_adapter": 0, "pooling": "cls"}
    return fit(base, folders, shots, "text-classification", out, **(small | options))


def difference(zoo: Zoo, folder: Path, mixture: Mixture) -> float:
    """Between an export and the unmerged mixture."""
    base, folders, _ = zoo
    checked = verify(folder, base=base, adapters=[f"{f.name}={f}" for f in folders if f.name in mixture.adapter_names])
    assert checked.largest_difference is not None
    return checked.largest_difference
