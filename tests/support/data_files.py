"""Small data files, and what is said of broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wlora_merge.data.examples import Examples, read_examples
from wlora_merge.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def classes(tmp_path: Path, labels: list[Any]) -> Examples:
    rows = [{"text": f"example {i}", "label": label} for i, label in enumerate(labels)]
    return read_examples(lines(tmp_path / "classes.jsonl", rows), task="text-classification")


def refusal(path: Any, task: str = "text-classification", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(path, task=task, **options)
    return str(caught.value)
