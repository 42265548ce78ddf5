"""Text of a causal language model as token ids, with a loss on the right ones.

Four forms come in (`text`; `prompt` and `completion`; `instruction`, `input` and `completion`; `messages` with `system` and
`tools`), one goes out: `input_ids`, `attention_mask` and `labels`, where a label is -100 wherever nothing is learned. This
room knows tokenizers. It knows neither models nor files.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UnsupportedError, WloraMergeWarning
from ..text import first_line
from .columns import COMPLETION_NAMES, PASSAGE_NAMES, Form
from .labels import LabelSet
from .metrics import IGNORED, Metric, causal_lm_metric
from .task import Encoded, Task, counted, instruction_of, leading_ids, token_limit, warn_cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .examples import Examples

_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class _Sequence:
    """Token ids [T], which of them are learned [T], and how many at the start a cut must keep (a BOS)."""

    ids: list[int]
    learned: list[bool]
    lead: int = 0


def encode_causal_lm(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> list[dict[str, list[int]]]:
    """Token ids and labels for each example.

    All of a `text` is learned, and a `completion` alone of a prompt and completion. Of `messages` the turns of the
    assistant are, where the chat template marks them, else the last turn alone. What is too long loses the start of its
    prompt, or the end of its `text`; never a token of the last completion.

    Args:
        examples: [E] of the task causal-lm.
        tokenizer: of the base model.
        max_length: in tokens; None for what the tokenizer says.

    Raises:
        DataError: a completion that is too long, or an example with nothing to learn; with its number.
        UnsupportedError: messages without a chat template, or with one that rewrites earlier turns.
    """
    limit = token_limit(tokenizer, max_length)
    sequence_of = _form(examples, tokenizer)
    encoded, cut = [], 0
    for number, row in enumerate(examples.rows, start=1):
        where = examples.where(number)
        try:
            sequence = sequence_of(row)
        except (DataError, UnsupportedError) as error:
            raise type(error)(f"{where}: {error}") from error
        if limit is not None and len(sequence.ids) > limit:
            cut += 1
            sequence = _cut(sequence, limit, where)
        if not any(sequence.learned[1:]):
            raise DataError(f"{where} has no token to learn after its first.")
        encoded.append(_model_input(sequence))
    warn_cut(examples, cut, limit)
    for name in {"system", "tools"}.intersection(examples.columns):
        _warn_unread(examples, name, sequence_of)
    return encoded


def _warn_unread(examples: Examples, name: str, sequence_of: Callable[[Mapping[str, Any]], _Sequence]) -> None:
    """Say that the chat template has no place for what a column holds."""
    row = next((row for row in examples.rows if row[name]), None)
    if row is not None and sequence_of(row) == sequence_of({**row, name: ""}):
        text = f"{examples.source}: the chat template does not read {name}, so column {examples.columns[name]!r} is left out."
        warnings.warn(text, WloraMergeWarning, stacklevel=3)


def _form(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Callable[[Mapping[str, Any]], _Sequence]:
    lead = leading_ids(tokenizer)
    if "messages" in examples.columns:
        if not tokenizer.chat_template:
            raise UnsupportedError("the tokenizer has no chat template, so it cannot take `messages`.")
        return lambda row: _chat(row, tokenizer)
    if "text" in examples.columns:
        return lambda row: _plain_text(row["text"], tokenizer, lead)
    if "instruction" in examples.columns:
        return lambda row: _joined(instruction_of(row), row["completion"], tokenizer, lead)
    return lambda row: _joined(row["prompt"], row["completion"], tokenizer, lead)


def _led(ids: list[int], lead: list[int]) -> list[int]:
    """The ids behind the leading ones, which a text that a chat template rendered has already."""
    return ids if ids[: len(lead)] == lead else lead + ids


def _plain_text(text: str, tokenizer: PreTrainedTokenizerBase, lead: list[int]) -> _Sequence:
    ids = _led(_ids(text, tokenizer), lead)
    return _Sequence(ids, [True] * len(ids), len(lead))


def _joined(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, lead: list[int]) -> _Sequence:
    """The prompt's ids are those of the prompt alone, as when the model is used; the completion's follow.

    Where the ids of the whole text start with the prompt's, the completion's are the rest: a SentencePiece tokenizer
    would put a space before a text of its own. Where a merge crosses the boundary, the completion is tokenized alone.
    """
    before, whole = (_led(_ids(text, tokenizer), lead) for text in (prompt, prompt + completion))
    splits = whole[: len(before)] == before and len(whole) > len(before)
    after = whole[len(before) :] if splits else _ids(completion, tokenizer)
    return _Sequence(before + after, [False] * len(before) + [True] * len(after), len(lead))


@dataclass(frozen=True)
class _Template:
    """The chat template of a tokenizer, with the tools of one conversation."""

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None

    def rendered(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """What the template makes of the messages, or a `DataError` with what it says."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=self.tools, **options)
        except Exception as error:  # a template raises whatever its expressions raise
            raise DataError(f"the chat template says: {first_line(error).removesuffix('.')}.") from error

    @property
    def marks_turns(self) -> bool:
        """Whether it says which tokens are the assistant's."""
        try:
            return bool(_MARKS_TURNS.search(self.tokenizer.get_chat_template(tools=self.tools)))
        except ValueError as error:  # several templates, and none by default
            raise UnsupportedError(
                f"the chat template cannot be chosen: {first_line(error).removesuffix('.')}."
            ) from error


def _chat(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Sequence:
    messages = json.loads(row["messages"])
    if row.get("system"):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    template = _Template(tokenizer, json.loads(row["tools"]) if row.get("tools") else None)
    return _marked_chat(messages, template) if template.marks_turns else _last_turn(messages, template)


def _last_turn(messages: list[dict[str, Any]], template: _Template) -> _Sequence:
    """The last turn of the assistant: what the template adds to the conversation before it."""
    if messages[-1]["role"] != "assistant":
        raise DataError("a conversation must end with a turn of the assistant, as this chat template marks none.")
    whole = str(template.rendered(messages, tokenize=False))
    prompt = str(template.rendered(messages[:-1], tokenize=False, add_generation_prompt=True))
    if not whole.startswith(prompt):
        raise UnsupportedError(
            "the chat template does not render a conversation as its start plus an answer; use prompt/completion."
        )
    return _with_lead(_joined(prompt, whole[len(prompt) :], template.tokenizer, []), template.tokenizer)


def _marked_chat(messages: list[dict[str, Any]], template: _Template) -> _Sequence:
    encoded = template.rendered(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    learned = [bool(mark) for mark in encoded["assistant_masks"]]
    return _with_lead(_Sequence(list(encoded["input_ids"]), learned), template.tokenizer)


def _with_lead(sequence: _Sequence, tokenizer: PreTrainedTokenizerBase) -> _Sequence:
    """The same, a cut of which keeps the BOS that the chat template begins with."""
    starts = (leading_ids(tokenizer), [tokenizer.bos_token_id])
    lead = next((len(start) for start in starts if start and sequence.ids[: len(start)] == start), 0)
    return replace(sequence, lead=lead)


def _cut(sequence: _Sequence, limit: int, where: str) -> _Sequence:
    """At most `limit` tokens: from the left up to the last run of learned ones; a text, all learned, from the right."""
    ids, learned, lead = sequence.ids, sequence.learned, sequence.lead
    if all(learned):
        return _Sequence(ids[:limit], learned[:limit], lead)
    last = max(i for i, learn in enumerate(learned) if learn) if any(learned) else len(ids) - 1
    start = next((i + 1 for i in range(last, -1, -1) if not learned[i]), 0)  # of the last run
    drop = len(ids) - limit
    if lead + drop > start - 1:  # at least one token of the prompt predicts the first of the completion
        raise DataError(f"{where}: its completion of {len(ids) - start} tokens leaves no room for a prompt in {limit}.")
    return _Sequence(ids[:lead] + ids[lead + drop :], learned[:lead] + learned[lead + drop :], lead)


def _model_input(sequence: _Sequence) -> dict[str, list[int]]:
    labels = [i if learn else IGNORED for i, learn in zip(sequence.ids, sequence.learned, strict=True)]
    return {"input_ids": sequence.ids, "attention_mask": [1] * len(sequence.ids), "labels": labels}


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: the tokenizer's own note on long inputs is ours to give
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class CausalLM(Task):
    """Next-token prediction; the loss is on completions alone.

    No EOS is put behind a completion or a text (chat templates end turns themselves): the weights of a mixture are too few to teach
    a model to stop, and adapters made for short answers were trained without. Data may spell one.
    """

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        return encode_causal_lm(examples, processor, max_length=max_length)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        import transformers

        return transformers.DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    def items(self, row: Mapping[str, Any]) -> int:
        return counted(row["labels"][1:])

    def metric(self, labels: LabelSet | None = None) -> Metric:
        return causal_lm_metric()


CAUSAL_LM = CausalLM(
    name="causal-lm",
    auto_class_name="AutoModelForCausalLM",
    pipeline_tag="text-generation",
    peft_task_type="CAUSAL_LM",
    peft_auto_class_name="AutoPeftModelForCausalLM",
    has_head=False,
    takes_packing=True,
    is_decoder=True,
    forms=(
        Form(("text",)),
        Form(("prompt", "completion")),
        Form(("instruction", "input", "completion")),
        Form(("messages",), ("system", "tools")),
    ),
    conventions={
        "text": ("text", "content", "document"),
        "prompt": ("prompt", "instruction", "input", "question"),
        "instruction": ("instruction",),
        "input": ("input",),
        "completion": COMPLETION_NAMES,
        "messages": ("messages", "conversation", "conversations"),
        "system": ("system", "system_prompt"),
        "tools": ("tools",),
    },
    more_text={
        "text": (*COMPLETION_NAMES, "summary", "highlights", "role"),
        "prompt": (*PASSAGE_NAMES, "system", "system_prompt", "tools"),
        "instruction": (*PASSAGE_NAMES, "system", "system_prompt", "tools"),
        "messages": ("documents", "history"),
    },
    spread_columns=("prompt", "instruction", "messages"),
)
