"""The task token-classification: a tag for each word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .labels import LabelSet, order_names
from .metrics import IGNORED, Metric, tagging_metric
from .task import Encoded, Task, counted, needed_labels, refuse_slow, token_limit, warn_cut

if TYPE_CHECKING:
    from .examples import Examples


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
        return tagging_metric(needed_labels(labels, self.name))
