"""The task token-classification: a tag for each word."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import DataError, WloraMergeWarning
from .columns import Form
from .labels import LabelSet, order_names
from .metrics import IGNORED, Metric, first_output
from .task import Encoded, Task, counted, needed_labels, refuse_slow, token_limit, warn_cut

if TYPE_CHECKING:
    import torch
    from transformers import EvalPrediction

    from .examples import Examples

OUTSIDE = "O"
BARE = frozenset("BIESLUO")
"""Tags that say where an entity begins and ends, and not of which type it is."""


class TokenClassification(Task):
    """A tag for each word; the first token of a word carries it, the others carry no loss."""

    def labels(self, examples: Examples, *, problem_type: str | None = None) -> LabelSet:
        names = order_names(tag for tags in examples.column("tags") for tag in tags)
        if len(names) < 2:
            raise DataError(
                f"{examples.source}: token-classification needs at least two tags; the only one is {', '.join(names)}."
            )
        return LabelSet(names)

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        """The tokens of the words, and for each its number of a tag, or -100."""
        known = needed_labels(labels, self.name)
        refuse_slow(processor, self.name)
        limit, encoded, cut = token_limit(processor, max_length), [], 0
        for number, row in enumerate(examples.rows, start=1):
            item = processor(row["tokens"], is_split_into_words=True, truncation=limit is not None, max_length=limit)
            numbers = [known.index(tag, examples.where(number)) for tag in row["tags"]]
            words = item.word_ids()
            firsts = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            whole = max((word for word in words if word is not None), default=-1) + 1 == len(numbers)
            cut += limit is not None and len(words) == limit and not whole
            tags = [numbers[word] if first else IGNORED for word, first in zip(words, firsts, strict=True)]
            encoded.append(dict(item) | {"labels": tags})
        warn_cut(examples, cut, limit)
        return encoded

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        import transformers

        return transformers.DataCollatorForTokenClassification(processor, label_pad_token_id=IGNORED)

    def items(self, row: Mapping[str, Any]) -> int:
        return counted(row["labels"])

    def metric(self, labels: LabelSet | None = None) -> Metric:
        """Micro F1 of entities, as seqeval defines it, and token accuracy; accuracy alone where no tag is known to be outside.

        An entity is right where its type, its first and its last word are; tags are IOB1, IOB2 or IOBES, as seqeval reads them
        by default. A tag without a prefix (`B-`) is inside an entity of its type, as in IO. Tags that are numbers, or parts of
        speech, mark no entities.
        """
        names = needed_labels(labels, self.name).names
        name = "f1" if knows_outside(names) else "accuracy"
        if name == "accuracy" and all(tag.isdecimal() for tag in names):
            warnings.warn(
                "the tags are numbers, of which none is known to be the outside one (O): they are judged by accuracy; give the tags' "
                "names (O, B-PER, ...) for the F1 of entities.",
                WloraMergeWarning,
                stacklevel=2,
            )
        score = partial(_score, entities=name == "f1")
        return Metric(name, True, score, lambda logits, labels: count_entities(first_output(logits), labels, names))


def count_entities(logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """For each row: entities predicted right, predicted, and in the labels; tokens tagged right, and counted.

    Args:
        logits: [B, T, K] over the K tags.
        labels: [B, T] int64 numbers of tags, -100 where nothing counts: what stands around it is one sequence.
        names: of the tags, [K].

    Returns:
        [B, 5] float32.
    """
    import torch

    rows = []
    for predicted, wanted in zip(logits.argmax(-1).cpu(), labels.cpu(), strict=True):
        kept = wanted != IGNORED
        found, true = predicted[kept].tolist(), wanted[kept].tolist()
        given, meant = (_entities([names[number] for number in numbers], names) for numbers in (found, true))
        right = sum(a == b for a, b in zip(found, true, strict=True))
        rows.append([len(given & meant), len(given), len(meant), right, len(true)])
    return torch.tensor(rows, dtype=torch.float32)


def _entities(tags: list[str], names: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last position of each entity."""
    from seqeval.metrics.sequence_labeling import get_entities

    bare = BARE.issuperset(names)
    return set(get_entities([tag if bare or tag == OUTSIDE or _has_prefix(tag) else f"I-{tag}" for tag in tags]))


def knows_outside(names: Sequence[str]) -> bool:
    """Whether it is known which tags belong to no entity: `O`, or none as all have a prefix."""
    return OUTSIDE in names or all(map(_has_prefix, names))


def _has_prefix(tag: str) -> bool:
    return tag[:1] in BARE and tag[1:2] == "-"


def _score(prediction: EvalPrediction, entities: bool) -> dict[str, float]:
    import numpy as np

    hits, found, true, right, count = np.asarray(prediction.predictions, np.float64).sum(0)
    f1 = {"f1": float(2 * hits / (found + true)) if found + true else 0.0} if entities else {}
    return f1 | {"accuracy": float(right / count)}


TOKEN_CLASSIFICATION = TokenClassification(
    name="token-classification",
    auto_class_name="AutoModelForTokenClassification",
    pipeline_tag="token-classification",
    peft_task_type="TOKEN_CLS",
    peft_auto_class_name="AutoPeftModelForTokenClassification",
    has_labels=True,
    forms=(Form(("tokens", "tags")),),
    conventions={
        "tokens": ("tokens", "words"),
        "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels"),
    },
)
