"""Text of a causal language model as token ids, with a loss on the right ones.

Three forms come in (`text`; `prompt` and `completion`; `messages`), one goes out: `input_ids`, `attention_mask` and
`labels`, where a label is -100 wherever nothing is learned. This room knows tokenizers. It knows neither models nor
files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UnsupportedError
from .columns import COMPLETION_NAMES, PASSAGE_NAMES, Form
from .labels import LabelSet
from .metrics import IGNORED, Metric, causal_lm_metric
from .task import Encoded, Task, counted, token_limit, warn_cut

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

    All of a `text` is learned, a `completion` alone of a prompt and completion, and of `messages` the turns of the
    assistant where the chat template marks them, else the last turn alone. What is too long loses the start of its
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
    return encoded


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that this tokenizer puts before a text (a BOS, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def _form(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Callable[[Mapping[str, Any]], _Sequence]:
    lead = leading_ids(tokenizer)
    if "messages" in examples.columns:
        if not tokenizer.chat_template:
            raise UnsupportedError("the tokenizer has no chat template, so it cannot take `messages`.")
        marked = bool(_MARKS_TURNS.search(tokenizer.get_chat_template()))
        return lambda row: _marked_chat(row, tokenizer) if marked else _last_turn(row, tokenizer)
    if "text" in examples.columns:
        return lambda row: _plain_text(row["text"], tokenizer, lead)
    return lambda row: _joined(row["prompt"], row["completion"], tokenizer, lead)


def _plain_text(text: str, tokenizer: PreTrainedTokenizerBase, lead: list[int]) -> _Sequence:
    ids = lead + _ids(text, tokenizer)
    return _Sequence(ids, [True] * len(ids), len(lead))


def _joined(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, lead: list[int]) -> _Sequence:
    """The prompt's ids are those of the prompt alone, as when the model is used; the completion's follow.

    Where the ids of the whole text start with the prompt's, the completion's are the rest: a SentencePiece tokenizer
    would put a space before a text of its own. Where a merge crosses the boundary, the completion is tokenized alone.
    """
    before, whole = _ids(prompt, tokenizer), _ids(prompt + completion, tokenizer)
    splits = whole[: len(before)] == before and len(whole) > len(before)
    after = whole[len(before) :] if splits else _ids(completion, tokenizer)
    learned = [False] * len(lead + before) + [True] * len(after)
    return _Sequence(lead + before + after, learned, len(lead))


def _last_turn(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Sequence:
    """The last turn of the assistant: what the template adds to the conversation before it."""
    messages = _messages(row)
    if messages[-1]["role"] != "assistant":
        raise DataError("a conversation must end with a turn of the assistant, as this chat template marks none.")
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not whole.startswith(prompt):
        raise UnsupportedError(
            "the chat template does not render a conversation as its start plus an answer; use prompt/completion."
        )
    return _with_lead(_joined(prompt, whole[len(prompt) :], tokenizer, []), tokenizer)


def _marked_chat(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Sequence:
    encoded: Any = tokenizer.apply_chat_template(
        _messages(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [bool(mark) for mark in encoded["assistant_masks"]]
    return _with_lead(_Sequence(list(encoded["input_ids"]), learned), tokenizer)


def _with_lead(sequence: _Sequence, tokenizer: PreTrainedTokenizerBase) -> _Sequence:
    """The same, a cut of which keeps the BOS that the chat template begins with."""
    starts = (leading_ids(tokenizer), [tokenizer.bos_token_id])
    lead = next((len(start) for start in starts if start and sequence.ids[: len(start)] == start), 0)
    return replace(sequence, lead=lead)


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]


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
    servers=("vllm", "tgi"),
    has_head=False,
    takes_packing=True,
    is_decoder=True,
    forms=(Form(("text",)), Form(("prompt", "completion")), Form(("messages",))),
    conventions={
        "text": ("text", "content", "document"),
        "prompt": ("prompt", "instruction", "input", "question"),
        "completion": COMPLETION_NAMES,
        "messages": ("messages", "conversation", "conversations"),
    },
    more_text={
        "text": (*COMPLETION_NAMES, "summary", "highlights"),
        "prompt": (*PASSAGE_NAMES, "system", "system_prompt"),
    },
    spread_column="prompt",
)
