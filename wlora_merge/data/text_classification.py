"""The task text-classification: one text or a pair, and what the head is to give for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..constants import MULTI, REGRESSION
from ..errors import DataError
from .columns import LABEL_NAMES, PASSAGE_NAMES, Form
from .labels import LabelSet, class_name, label_set, to_number
from .metrics import Metric, classification_metric
from .task import Encoded, Task, needed_labels, tokenized

if TYPE_CHECKING:
    from .examples import Examples


class TextClassification(Task):
    """One text or a pair: one of several classes, several of them, or a number."""

    def labels(self, examples: Examples, *, problem_type: str | None = None) -> LabelSet:
        try:
            return label_set(examples.column("label"), problem_type)
        except DataError as error:
            raise DataError(f"{examples.source}: {error}") from error

    def config_changes(self, labels: LabelSet | None, processor: Any = None) -> dict[str, Any]:
        # decoders read the class off the last token that is not padding
        pad = {} if processor is None else {"pad_token_id": processor.pad_token_id}
        return super().config_changes(labels) | problem_type_of(labels) | pad

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        """The tokens of a text or a pair, and what the head is to give for it."""
        columns = ("text", "text_pair") if "text_pair" in examples.columns else ("text",)
        encoded = tokenized(examples, processor, max_length, lambda row: [row[column] for column in columns])
        for item, target in zip(encoded, targets(examples, labels), strict=True):
            item["labels"] = target
        return encoded

    def metric(self, labels: LabelSet | None = None) -> Metric:
        return classification_metric(needed_labels(labels, self.name))


def targets(examples: Examples, labels: LabelSet | None) -> list[Any]:
    """What the head is to give for each example: a class number, a standardized number, or a 0/1 vector (float) over the classes."""
    known, task = needed_labels(labels, examples.task), examples.task
    numbers: list[Any] = []
    for number, value in enumerate(examples.column("label"), start=1):
        where = f"{task} {examples.where(number)}"
        if known.problem_type == REGRESSION:
            numbers.append((to_number(value, where) - known.mean) / known.spread)
        elif known.problem_type == MULTI:
            present = {known.index(name, where) for name in value}
            numbers.append([float(index in present) for index in range(known.size)])
        else:
            numbers.append(known.index(class_name(value), where))
    return numbers


def problem_type_of(labels: LabelSet | None) -> dict[str, Any]:
    """The config key that says what kind of problem the head solves."""
    return {"problem_type": labels.problem_type} if labels else {}


TEXT_CLASSIFICATION = TextClassification(
    name="text-classification",
    auto_class_name="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    peft_task_type="SEQ_CLS",
    peft_auto_class_name="AutoPeftModelForSequenceClassification",
    has_labels=True,
    classifies_examples=True,
    needs_pad_token=True,
    takes_label_names=True,
    forms=(Form(("text", "label"), ("text_pair",)),),
    conventions={
        "text": ("text", "sentence", "content", "input", "question", "sentence1", "premise", "question1"),
        "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
        "label": LABEL_NAMES,
    },
    more_text={
        "text": (
            *PASSAGE_NAMES,
            "title",
            "body",
            "headline",
            "instruction",
            "prompt",
            "answer",
            "response",
            "completion",
        )
    },
    spread_columns=("text",),
)
