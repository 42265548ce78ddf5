"""What a task is: its columns, its model class, its labels, how an example becomes model inputs, and how it is judged.

A task is one object with all facts about it; no other file asks for its name. It knows tokenizers, image processors and collators of
transformers. It knows neither adapters nor mixtures, and it runs no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import BaseModelError, DataError, UnsupportedError, WloraMergeWarning
from ..io.untrusted import read_json
from ..text import first_line
from .columns import Form
from .labels import LabelSet
from .metrics import IGNORED, Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .examples import Examples

Encoded: TypeAlias = "Sequence[dict[str, Any]]"


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A task on text, and the facts about it. The others override what differs.

    Attributes:
        name: as on the command line.
        auto_class_name: of the transformers class that builds its model, body and head.
        pipeline_tag: what the hub calls it.
        peft_task_type: PEFT's word for it; None where PEFT has none.
        peft_auto_class_name: of the PEFT class that loads an adapter with its base.
        has_head: whether its model has a head of its own, which a base may lack.
        is_body: whether its model is a base's body alone, whatever head the base's files hold.
        has_labels: whether the head has one output for each label that `id2label` of the config names.
        classifies_examples: whether a label belongs to a whole example. It has a problem type then, and the head sees one vector
            for each example.
        needs_pad_token: whether its decoders read the last token that is not padding, and so must know which token that is.
        takes_images: instead of text.
        takes_packing: whether its examples can stand end to end in one row.
        takes_label_names: whether the name of a label, as words, is an example of it.
        is_decoder: whether its model predicts the next token of what it reads, and keeps a cache of it.
        is_encoder_decoder: whether its model reads one text and writes another.
        outputs: what its model gives, by transformers' names, without the cache.
        forms: the ways to lay out its examples in columns; empty: it reads none, and cannot be fitted.
        conventions: {column: what files call it}.
        more_text: {column: what files call other columns that often hold a part of the same example}.
        spread_columns: those whose text may stand in several columns of a file. A document, all text, may have a title beside it.
    """

    name: str
    auto_class_name: str
    pipeline_tag: str
    peft_task_type: str | None = None
    peft_auto_class_name: str | None = None
    has_head: bool = True
    is_body: bool = False
    has_labels: bool = False
    classifies_examples: bool = False
    needs_pad_token: bool = False
    takes_images: bool = False
    takes_packing: bool = False
    takes_label_names: bool = False
    is_decoder: bool = False
    is_encoder_decoder: bool = False
    outputs: tuple[str, ...] = ("logits",)
    forms: tuple[Form, ...] = ()
    conventions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    more_text: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spread_columns: tuple[str, ...] = ()

    @property
    def generates(self) -> bool:
        """Whether its model writes text token by token."""
        return self.is_decoder or self.is_encoder_decoder

    def auto_class(self) -> type[Any]:
        """The transformers class that builds the model of this task."""
        import transformers

        cls: type[Any] = getattr(transformers, self.auto_class_name)
        return cls

    def labels(self, examples: Examples, *, problem_type: str | None = None) -> LabelSet | None:
        """The labels found in the examples, or None for a task without a head of its own.

        Args:
            examples: all that there are, so that no class is missed.
            problem_type: as a transformers config spells it; None: told by the labels. For text and image classification only.
        """
        return None

    def config_changes(self, labels: LabelSet | None, processor: Any = None) -> dict[str, Any]:
        """The config keys that this task sets: `id2label` (int keys), `label2id`, `problem_type`, `pad_token_id`.

        The number of labels follows from `id2label`. `pad_token_id` comes from the processor where the model needs it.
        """
        if labels is None:
            return {}
        names = labels.names or ("LABEL_0",)  # what transformers calls the one output of a regression
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

    def load_processor(self, base_folder: str | Path) -> Any:
        """The tokenizer in a local folder, padding on the right, with a token to pad with.

        Raises:
            BaseModelError: there is none, or it is broken, or has no token to pad with.
        """
        tokenizer = load_auto("AutoTokenizer", base_folder, "tokenizer")
        tokenizer.padding_side = "right"  # positions are counted from the left when none are given
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise BaseModelError(f"the tokenizer in {base_folder} has no pad, EOS or unknown token to pad with.")
        _pad_within(tokenizer, Path(base_folder))
        return tokenizer

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        """Model inputs for each example, as `Trainer` takes them for a data set.

        Args:
            examples: [E].
            processor: from `load_processor`.
            max_length: in tokens; None for what the tokenizer says. What is cut is counted in a `WloraMergeWarning`.
            labels: from `labels`, of the examples that the head is fitted on.

        Raises:
            DataError: a label that `labels` lacks, or an example that cannot be encoded; with its number.
        """
        raise UnsupportedError(f"{self.name} cannot be fitted: it has no loss; use mix or export.")

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Encoded examples -> one padded batch of tensors."""
        import transformers

        return transformers.DataCollatorWithPadding(processor)

    def items(self, row: Mapping[str, Any]) -> int:
        """How many predictions of an encoded example the model's mean loss counts."""
        return 1

    def allowed(self, logits: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The logits [B, ...] of some encoded examples with what no answer can be at the lowest number."""
        return logits

    def metric(self, labels: LabelSet | None = None) -> Metric:
        """How the task is judged."""
        raise UnsupportedError(f"{self.name} has no metric.")


def tokenized(
    examples: Examples, tokenizer: Any, max_length: int | None, text_of: Callable[[Mapping[str, Any]], Sequence[str]]
) -> list[dict[str, Any]]:
    """Model inputs for one or two texts of each row, cut from the right to `max_length` tokens, which is warned of."""
    limit, encoded, cut = token_limit(tokenizer, max_length), [], 0
    lead = leading_ids(tokenizer)
    for row in examples.rows:
        texts = text_of(row)
        item = tokenizer(*texts, verbose=False)
        twice = len(lead) if item["input_ids"][len(lead) : 2 * len(lead)] == lead else 0  # the text has them already
        if limit is not None and len(item["input_ids"]) - twice > limit:
            cut += 1
            item = tokenizer(*texts, truncation=True, max_length=limit + twice)
        encoded.append({name: values[twice:] for name, values in item.items()})
    warn_cut(examples, cut, limit)
    return encoded


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that this tokenizer puts before a text (a BOS, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def instruction_of(row: Mapping[str, Any]) -> str:
    """An instruction and, where there is one, its input on the next line, as LLaMA-Factory joins those of Alpaca."""
    return "\n".join(part for part in (row["instruction"], row["input"]) if part)


def counted(labels: Sequence[int]) -> int:
    """How many of the labels a loss counts."""
    return sum(label != IGNORED for label in labels)


def needed_labels(labels: LabelSet | None, task: str) -> LabelSet:
    """The labels, or a `ValueError`: a caller left them out."""
    if labels is None:
        raise ValueError(f"{task} needs labels: pass what Task.labels returned.")
    return labels


def _pad_within(tokenizer: Any, folder: Path) -> None:
    """Pad with a token that the base has an embedding for: padding is masked, and looked up all the same.

    Raises:
        BaseModelError: the base has none for any token to pad with.
    """
    config: Any = read_json(folder / "config.json", BaseModelError) if (folder / "config.json").is_file() else {}
    size = (config.get("text_config") or config).get("vocab_size")
    tokens = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token)
    known = [t for t in tokens if t and (size is None or tokenizer.convert_tokens_to_ids(t) < size)]
    if not known:
        raise BaseModelError(f"{_beyond(tokenizer, tokenizer.pad_token_id, size)}, and no other token to pad with is.")
    if known[0] != tokenizer.pad_token:
        tokenizer.pad_token = known[0]


def refuse_unknown_tokens(task: Task, examples: Examples, rows: Encoded, tokenizer: Any, model: Any) -> None:
    """Refuse encoded examples with a token that the model has no embedding for.

    Args:
        task: of the examples.
        examples: [E].
        rows: what they are encoded as; of images, nothing is looked at.
        tokenizer: which made the tokens.
        model: a transformers model.

    Raises:
        DataError: with the example, the token and its number.
    """
    if task.takes_images:
        return
    sizes = {"input_ids": getattr(model.get_input_embeddings(), "num_embeddings", None)}
    if task.is_encoder_decoder:
        sizes["labels"] = getattr(model.get_output_embeddings(), "out_features", None)
    for number, row in enumerate(rows, start=1):
        for name, size in sizes.items():
            if size is not None and (largest := max(row[name], default=0)) >= size:
                raise DataError(
                    f"{examples.where(number)}: {_beyond(tokenizer, largest, size)}: leave the example out, or give a base whose "
                    "embeddings were resized to its tokenizer."
                )


def _beyond(tokenizer: Any, number: int, size: int) -> str:
    return f"the token {tokenizer.convert_ids_to_tokens(number)!r} ({number}) is not among the base's {size} embeddings"


def refuse_slow(tokenizer: Any, task: str) -> None:
    """Refuse a tokenizer that does not say which characters a token covers.

    Raises:
        UnsupportedError: it has no tokenizer.json.
    """
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{task} needs a tokenizer with a tokenizer.json, which says where each token comes from."
        )


def load_auto(auto_class: str, folder: str | Path, what: str) -> Any:
    """A tokenizer or processor out of a local folder; `what` is how an error calls it.

    Raises:
        BaseModelError: there is none, or it does not load.
    """
    import transformers

    if not Path(folder).is_dir():
        raise BaseModelError(f"base model folder {folder} does not exist.")
    try:
        return getattr(transformers, auto_class).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exceptions; whatever it is, the files are at fault
        raise BaseModelError(f"{folder} has no {what} that loads: {first_line(error)}.") from error


def token_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """The most tokens of one example; None without a limit (tokenizers say 10^30 then)."""
    if max_length is not None:
        return max_length
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 1_000_000 else None


def warn_cut(examples: Examples, count: int, limit: int | None) -> None:
    """Say how many examples were shortened."""
    if count:
        text = f"{count} of {len(examples)} examples of {examples.source} were shortened to {limit} tokens."
        warnings.warn(text, WloraMergeWarning, stacklevel=3)
