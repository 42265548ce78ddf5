"""The few-shot tasks: a base, adapters that have not seen the task, examples to draw shots from, examples to judge on."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"
Row = tuple[str, str]
"""(text, label); for a language model (prompt, completion)."""
JUDGED = {"text-classification": 400, "causal-lm": 150}

SENTENCES = {  # file, the words of its labels
    "sst2": ("stsa.binary.train", ["negative", "positive"]),
    "mr": ("rt-polarity.all", ["negative", "positive"]),
    "subj": ("subj.all", ["subjective", "objective"]),
    "trec": ("TREC.train.all", ["description", "entity", "abbreviation", "human", "number", "location"]),
    "mpqa": ("mpqa.all", ["negative", "positive"]),
}
PROMPTS = {  # as the adapters of the zoo were trained
    "sst2": "Review: {}\nSentiment:",
    "mr": "Review: {}\nSentiment:",
    "subj": "Text: {}\nIs this subjective or objective?",
    "trec": "Question: {}\nAnswer type:",
    "mpqa": "Phrase: {}\nPolarity:",
}


@dataclass(frozen=True)
class Job:
    """`labels` are the class names, or the completions that a language model chooses from; `label_names` whether every method takes
    each class's name for one more example of it."""

    name: str
    task: str
    base: Path
    adapters: dict[str, Path]
    pool: list[Row]
    judged: list[Row]
    labels: list[str]
    label_names: bool = False

    def shots(self, per_class: int, seed: int) -> list[Row]:
        """So many examples of each class, drawn with this seed."""
        drawn = random.Random(f"{self.name} {per_class} {seed}")
        rows = [drawn.sample([row for row in self.pool if row[1] == label], per_class) for label in self.labels]
        mixed = [row for part in rows for row in part]
        drawn.shuffle(mixed)
        return mixed

    def write(self, rows: Sequence[Row], folder: Path) -> Path:
        """The shots as a file that `wlora-merge fit` reads."""
        names = ("text", "label") if self.task == "text-classification" else ("prompt", "completion")
        file = folder / "shots.jsonl"
        file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
        return file


def get_job(name: str, models: Path) -> Job:
    """`banking:g5` and `minilm:mr` are text classification with MiniLM, `smollm2:mr` and `bbh:navigate` causal-lm with SmolLM2.

    `banking:g5+names` is the same task and the same shots, with the names of the classes as examples too.
    """
    plain, _, names = name.partition("+")
    family, _, rest = plain.partition(":")
    if family not in FAMILIES or names not in ("", "names"):
        raise SystemExit(f"{name}: expected one of {', '.join(f'{f}:…' for f in FAMILIES)}")
    return replace(FAMILIES[family](plain, rest, models), label_names=bool(names))


def _banking(name: str, group: str, models: Path) -> Job:
    """Intents of one group; the adapters of the other groups."""
    labels = json.loads((SHARED / "data/banking77/groups.json").read_text())[group]
    parts = []
    for file in ("train", "test"):
        with open(SHARED / f"data/banking77/{file}.csv", newline="") as rows:
            parts.append([(r["text"], r["category"]) for r in csv.DictReader(rows) if r["category"] in labels])
    adapters = {k: v for k, v in _zoo("minilm-banking").items() if k != group}
    return _job(name, "text-classification", models / "minilm", adapters, *parts, labels)


def _minilm(name: str, dataset: str, models: Path) -> Job:
    pool, judged = halves(sentences(dataset))
    return _job(
        name,
        "text-classification",
        models / "minilm",
        _zoo("minilm-banking"),
        pool,
        judged,
        SENTENCES[dataset][1],
    )


def _smollm2(name: str, dataset: str, models: Path) -> Job:
    """Sentences; the adapters of the other sentence tasks."""
    adapters = {k: v for k, v in _zoo("smollm2-tasks").items() if k != dataset}
    rows = [(PROMPTS[dataset].format(text), f" {label}") for text, label in sentences(dataset)]
    pool, judged = halves(rows)
    labels = [f" {label}" for label in SENTENCES[dataset][1]]
    return _job(name, "causal-lm", models / "smollm2", adapters, pool, judged, labels)


def _bbh(name: str, dataset: str, models: Path) -> Job:
    examples = json.loads((SHARED / f"data/bbh/{dataset}.json").read_text())["examples"]
    rows = [(f"{e['input']}\nAnswer:", f" {e['target']}") for e in examples]
    pool, judged = halves(rows)
    labels = sorted({label for _, label in rows})
    return _job(name, "causal-lm", models / "smollm2", _zoo("smollm2-tasks"), pool, judged, labels)


FAMILIES: dict[str, Callable[[str, str, Path], Job]] = {
    "banking": _banking,
    "minilm": _minilm,
    "smollm2": _smollm2,
    "bbh": _bbh,
}


def _job(
    name: str, task: str, base: Path, adapters: dict[str, Path], pool: list[Row], judged: list[Row], labels: list[str]
) -> Job:
    judged = random.Random(0).sample(judged, min(JUDGED[task], len(judged)))
    return Job(name, task, base, adapters, pool, judged, labels)


def _zoo(name: str) -> dict[str, Path]:
    return {folder.name: folder for folder in sorted((SHARED / "zoo" / name).iterdir()) if folder.is_dir()}


def sentences(dataset: str) -> list[Row]:
    file, words = SENTENCES[dataset]
    lines = (
        (SHARED / "data/sentences" / file).read_text(encoding="latin-1").split("\n")
    )  # not at latin-1's other line ends
    return [(text.strip(), words[int(label)]) for label, _, text in (line.partition(" ") for line in lines) if text]


def halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    mixed = random.Random(0).sample(rows, len(rows))
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
