"""Extractive question answering: an answer's characters in a context -> its first and last token.

This room knows tokenizers that say which characters a token covers. It knows neither models nor files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError, WloraMergeWarning
from .columns import Form
from .labels import LabelSet
from .metrics import Metric
from .task import Encoded, Task, refuse_slow, token_limit

if TYPE_CHECKING:
    import torch
    from transformers import EvalPrediction

    from .examples import Examples

MAX_ANSWER_TOKENS = 30


def encode_answers(examples: Examples, tokenizer: Any, limit: int | None) -> list[dict[str, Any]]:
    """Model inputs with `start_positions` and `end_positions`: of the first answer, or of the first token without one; and
    `context`, its first and last token, which no model takes.

    A context is cut from the right. An example whose answer is cut off cannot be learned from, nor judged: it is left
    out, and counted in a `WloraMergeWarning`, so the result may be shorter than `examples`.

    Args:
        examples: [E] of the task question-answering.
        tokenizer: a fast one.
        limit: in tokens; None for no limit.

    Raises:
        DataError: a question that leaves no room for its context, or no example whose answer fits.
    """
    found = [
        _encode(row, tokenizer, limit, examples.where(number)) for number, row in enumerate(examples.rows, start=1)
    ]
    encoded = [item for item in found if item is not None]
    lost = len(found) - len(encoded)
    if not encoded:
        raise DataError(f"no answer of {examples.source} lies within {limit} tokens; raise the maximum length.")
    if lost:
        text = (
            f"{lost} of {len(found)} examples of {examples.source} left out: their answers lie beyond {limit} tokens."
        )
        warnings.warn(text, WloraMergeWarning, stacklevel=3)
    return encoded


def _encode(row: Mapping[str, Any], tokenizer: Any, limit: int | None, where: str) -> dict[str, Any] | None:
    question = tokenizer(row["question"], add_special_tokens=False, verbose=False)["input_ids"]
    if limit is not None and len(question) + tokenizer.num_special_tokens_to_add(pair=True) >= limit:
        raise DataError(f"{where}: its question of {len(question)} tokens leaves no room for a context in {limit}.")
    options = {"truncation": "only_second", "max_length": limit} if limit is not None else {"verbose": False}
    item = tokenizer(row["question"], row["context"], return_offsets_mapping=True, **options)
    span = _span(row["answers"], item.sequence_ids(), item["offset_mapping"])
    if span is None:
        return None
    inputs = {name: value for name, value in item.items() if name != "offset_mapping"}
    context = [index for index, part in enumerate(item.sequence_ids()) if part == 1]
    ends = [context[0], context[-1]] if context else [0, 0]
    return inputs | {"start_positions": span[0], "end_positions": span[1], "context": ends}


def _span(
    answers: Mapping[str, Any], sequence: list[int | None], offsets: list[tuple[int, int]]
) -> tuple[int, int] | None:
    """First and last token of the first answer; None where it is cut off."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [
        index
        for index, (part, (first, last)) in enumerate(zip(sequence, offsets, strict=True))
        if part == 1 and first < end and last > start
    ]
    return (inside[0], inside[-1]) if inside and offsets[inside[-1]][1] >= end else None


def best_span(logits: Any, labels: Any = None) -> torch.Tensor:
    """The most likely span that does not end before it starts, nor has over `MAX_ANSWER_TOKENS` tokens.

    Args:
        logits: start and end logits, each [B, T].
        labels: the labels, in the head's order.

    Returns:
        [B, 2] int64: first and last token.
    """
    import torch

    start, end = logits[0].float(), logits[1].float()
    length = start.shape[1]
    allowed = torch.ones(length, length, device=start.device).triu().tril(MAX_ANSWER_TOKENS - 1).bool()
    scores = (start[:, :, None] + end[:, None, :]).masked_fill(~allowed, float("-inf"))  # [B, T, T]
    best = scores.flatten(1).argmax(1)
    return torch.stack([best // length, best % length], dim=1)


def _score(prediction: EvalPrediction) -> dict[str, float]:
    import numpy as np

    spans = np.asarray(prediction.predictions)  # [E, 2]
    wanted = np.stack([np.asarray(part) for part in prediction.label_ids], axis=1)  # [E, 2]
    common = np.minimum(spans[:, 1], wanted[:, 1]) - np.maximum(spans[:, 0], wanted[:, 0]) + 1
    sizes = (spans[:, 1] - spans[:, 0] + 1) + (wanted[:, 1] - wanted[:, 0] + 1)
    return {"f1": float((2 * common.clip(min=0) / sizes).mean()), "exact": float((spans == wanted).all(1).mean())}


class QuestionAnswering(Task):
    """The span of a context that answers a question; the first token where there is no answer."""

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        refuse_slow(processor, self.name)
        return encode_answers(examples, processor, token_limit(processor, max_length))

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        padded = super().collator(processor)
        return lambda rows: padded([{name: value for name, value in row.items() if name != "context"} for row in rows])

    def allowed(self, logits: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Start and end lie in the context, or at the first token, which says that there is no answer."""
        import torch

        inside = torch.zeros(logits[0].shape, dtype=torch.bool, device=logits[0].device)
        for kept, row in zip(inside, rows, strict=True):
            kept[0] = True
            kept[row["context"][0] : row["context"][1] + 1] = True
        return tuple(part.float().masked_fill(~inside, torch.finfo(torch.float32).min / 4) for part in logits)

    def metric(self, labels: LabelSet | None = None) -> Metric:
        """Exact match and F1 of the predicted span with the first answer. Spans are compared as tokens, not as text."""
        return Metric("f1", True, _score, best_span)


QUESTION_ANSWERING = QuestionAnswering(
    name="question-answering",
    auto_class_name="AutoModelForQuestionAnswering",
    pipeline_tag="question-answering",
    peft_task_type="QUESTION_ANS",
    peft_auto_class_name="AutoPeftModelForQuestionAnswering",
    outputs=("start_logits", "end_logits"),
    forms=(Form(("question", "context", "answers")),),
    conventions={"question": ("question",), "context": ("context", "passage"), "answers": ("answers",)},
)
