"""The rows that an adapter learns, and those that say how well: (text, label), of a language model (prompt, completion)."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterable
from functools import cache

from design import Spec
from jobs import PROMPTS, SENTENCES, SHARED, Row, halves, sentences

TESTED = 200


def rows_of(spec: Spec) -> tuple[list[Row], list[Row]]:
    """(training rows, with the labels that the adapter is to learn; at most 200 others, with their true labels)."""
    if spec.dataset in SENTENCES:
        train, test = _sentence_rows(spec)
    else:
        train, test = {"banking77": _banking_rows, "bbh": _bbh_rows}[spec.dataset](spec)
    if spec.base == "smollm2":
        train, test = ([_prompted(spec, row) for row in rows] for rows in (train, test))
    if spec.shuffled:
        labels = [label for _, label in train]
        random.Random(f"labels {spec.seed}").shuffle(labels)
        train = [(text, label) for (text, _), label in zip(train, labels, strict=True)]
    return train, test


def _prompted(spec: Spec, row: Row) -> Row:
    """The prompt and the completion of a row, as bench_fit writes them."""
    template = {"banking77": "Customer: {}\nIntent:", "bbh": "{}\nAnswer:"} | PROMPTS
    text, label = row
    return template[spec.dataset].replace("{}", text), f" {label.replace('_', ' ')}"


def _banking_rows(spec: Spec) -> tuple[list[Row], list[Row]]:
    train, test = (_mixed([row for row in _banking(file) if row[1] in spec.labels]) for file in ("train", "test"))
    return train, test[:TESTED]


@cache
def _banking(file: str) -> list[Row]:
    with open(SHARED / f"data/banking77/{file}.csv", newline="") as rows:
        return [(row["text"], row["category"]) for row in csv.DictReader(rows)]


def _bbh_rows(spec: Spec) -> tuple[list[Row], list[Row]]:
    examples = json.loads((SHARED / f"data/bbh/{spec.part}.json").read_text())["examples"]
    rows = _mixed(_distinct((e["input"], e["target"]) for e in examples))
    return rows[50:], rows[:50]


def _sentence_rows(spec: Spec) -> tuple[list[Row], list[Row]]:
    """The k-th of n parts that share no example with each other or with the test."""
    rows = _mixed(_distinct(_not_judged(spec.dataset)))
    number, parts = map(int, spec.part.split("/"))
    return rows[TESTED:][number - 1 :: parts], rows[:TESTED]


def _mixed(rows: list[Row]) -> list[Row]:
    return random.Random("zoo").sample(rows, len(rows))


def _distinct(rows: Iterable[Row]) -> list[Row]:
    """Each text once."""
    return list(dict(rows).items())


@cache
def _not_judged(dataset: str) -> list[Row]:
    """A dataset's rows; of SST-2 those that no review in the judged half of MR contains, as SST-2 was made of MR's reviews."""
    rows = sentences(dataset)
    if dataset != "sst2":
        return rows
    judged = "|".join(letters(text) for text, _ in halves(sentences("mr"))[1])
    return [row for row in rows if letters(row[0]) not in judged]


def letters(text: str) -> str:
    """A text without what the two datasets write differently: brackets, accents, spaces, case."""
    return re.sub(r"[^a-z]", "", re.sub(r"-[lr]rb-", "", text.lower()))
