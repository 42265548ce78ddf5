"""The tasks: for each, its model class, its labels, how an example becomes model inputs, and how it is judged.

A `Task` is what a fit asks about the task and nothing else. This room knows tokenizers, image processors and collators
of transformers. It knows neither adapters nor mixtures, and it runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from .constants import MULTI, REGRESSION, TASKS
from .encoding import encode_causal_lm, token_limit, warn_cut
from .errors import BaseModelError, DataError, UnsupportedError, WloraMergeError
from .images import EncodedImages
from .labels import LabelSet, class_name, label_set, order_names, to_number
from .metrics import (
    IGNORED,
    Metric,
    answering_metric,
    causal_lm_metric,
    classification_metric,
    seq2seq_metric,
    tagging_metric,
)
from .spans import encode_answers
from .text import first_line, nearest

if TYPE_CHECKING:
    from .data import Examples

Encoded: TypeAlias = "Sequence[dict[str, Any]]"


@dataclass(frozen=True)
class Task:
    """A task on text. The others override what differs.

    Attributes:
        name: as on the command line.
        auto_class_name: of the transformers class that builds its model, body and head.
    """

    has_head: ClassVar[bool] = True  # that a base may lack
    name: str
    auto_class_name: str

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
        tokenizer = _load("AutoTokenizer", base_folder, "tokenizer")
        tokenizer.padding_side = "right"  # positions are counted from the left when none are given
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise BaseModelError(f"the tokenizer in {base_folder} has no pad, EOS or unknown token to pad with.")
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


class CausalLM(Task):
    """Next-token prediction; the loss is on completions alone.

    No EOS is put behind a completion or a text (chat templates end turns themselves): the weights of a mixture are too few to teach
    a model to stop, and adapters made for short answers were trained without. Data may spell one.
    """

    has_head = False

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        return encode_causal_lm(examples, processor, max_length=max_length)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        import transformers

        return transformers.DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    def items(self, row: Mapping[str, Any]) -> int:
        return _counted(row["labels"][1:])

    def metric(self, labels: LabelSet | None = None) -> Metric:
        return causal_lm_metric()


class Seq2SeqLM(CausalLM):
    """Source to target; the source is cut from the right when too long, the target never."""

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        encoded = _tokenized(examples, processor, max_length, "source")
        for number, (item, target) in enumerate(zip(encoded, examples.column("target"), strict=True), start=1):
            item["labels"] = list(processor(text_target=target, verbose=False)["input_ids"])
            if max_length is not None and len(item["labels"]) > max_length:
                where, size = examples.where(number), len(item["labels"])
                raise DataError(f"{where}: its target has {size} tokens, over {max_length}.")
        return encoded

    def items(self, row: Mapping[str, Any]) -> int:
        return _counted(row["labels"])

    def metric(self, labels: LabelSet | None = None) -> Metric:
        return seq2seq_metric()


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
        return super().config_changes(labels) | _problem_type(labels) | pad

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        columns = ("text", "text_pair") if "text_pair" in examples.columns else ("text",)
        encoded = _tokenized(examples, processor, max_length, *columns)
        for item, target in zip(encoded, targets(examples, labels), strict=True):
            item["labels"] = target
        return encoded

    def metric(self, labels: LabelSet | None = None) -> Metric:
        return classification_metric(_needed(labels, self.name))


class ImageClassification(TextClassification):
    """One image: a class, several, or a number."""

    def config_changes(self, labels: LabelSet | None, processor: Any = None) -> dict[str, Any]:
        return super().config_changes(labels)

    def load_processor(self, base_folder: str | Path) -> Any:
        return _load("AutoImageProcessor", base_folder, "image processor")

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        return EncodedImages(examples, processor, targets(examples, labels))

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        import transformers

        return transformers.DefaultDataCollator()


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
        known = _needed(labels, self.name)
        _need_fast(processor, self.name)
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
        return _counted(row["labels"])

    def metric(self, labels: LabelSet | None = None) -> Metric:
        return tagging_metric(_needed(labels, self.name))


class QuestionAnswering(Task):
    """The span of a context that answers a question; the first token where there is no answer."""

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        _need_fast(processor, self.name)
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
        return answering_metric()


_TASKS = (
    CausalLM("causal-lm", "AutoModelForCausalLM"),
    Seq2SeqLM("seq2seq-lm", "AutoModelForSeq2SeqLM"),
    TextClassification("text-classification", "AutoModelForSequenceClassification"),
    TokenClassification("token-classification", "AutoModelForTokenClassification"),
    QuestionAnswering("question-answering", "AutoModelForQuestionAnswering"),
    ImageClassification("image-classification", "AutoModelForImageClassification"),
    Task("feature-extraction", "AutoModel"),
)


def get_task(name: str) -> Task:
    """The task of that name.

    Args:
        name: one of `names.TASKS`.

    Raises:
        WloraMergeError: there is none; with the nearest name.
    """
    for task in _TASKS:
        if task.name == name:
            return task
    raise WloraMergeError(f"no task {name!r}; tasks are {', '.join(TASKS)}{nearest(name, TASKS)}.")


def task_of(model: Any) -> str | None:
    """The task of which the model's class is, by transformers' own tables; None where they have it for none or for several.

    Args:
        model: a transformers model (`LlamaForCausalLM`, `BertForSequenceClassification`, ...), or any other object.
    """
    if not hasattr(model, "config"):
        return None
    classes = type(model).__mro__  # FSDP and the like make subclasses
    name = next((c.__name__ for c in classes if c.__module__.startswith("transformers.models.")), "")
    found = [task.name for task in _TASKS if name in _class_names(task.auto_class())]
    return found[0] if len(found) == 1 else None


def _class_names(auto: Any) -> set[str]:
    """Names of the model classes that an auto class gives."""
    rows = auto._model_mapping._model_mapping.values()
    return {name for row in rows for name in ([row] if isinstance(row, str) else row)}


def targets(examples: Examples, labels: LabelSet | None) -> list[Any]:
    """What the head is to give for each example: a class number, a number, or a 0/1 vector (float) over the classes."""
    known, task = _needed(labels, examples.task), examples.task
    numbers: list[Any] = []
    for number, value in enumerate(examples.column("label"), start=1):
        where = f"{task} {examples.where(number)}"
        if known.problem_type == REGRESSION:
            numbers.append(to_number(value, where))
        elif known.problem_type == MULTI:
            present = {known.index(name, where) for name in value}
            numbers.append([float(index in present) for index in range(known.size)])
        else:
            numbers.append(known.index(class_name(value), where))
    return numbers


def _tokenized(examples: Examples, tokenizer: Any, max_length: int | None, *columns: str) -> list[dict[str, Any]]:
    limit, encoded, cut = token_limit(tokenizer, max_length), [], 0
    for row in examples.rows:
        texts = [row[column] for column in columns]
        item = tokenizer(*texts, verbose=False)
        if limit is not None and len(item["input_ids"]) > limit:
            cut += 1
            item = tokenizer(*texts, truncation=True, max_length=limit)
        encoded.append(dict(item))
    warn_cut(examples, cut, limit)
    return encoded


def _counted(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels)


def _problem_type(labels: LabelSet | None) -> dict[str, Any]:
    return {"problem_type": labels.problem_type} if labels else {}


def _needed(labels: LabelSet | None, task: str) -> LabelSet:
    if labels is None:
        raise ValueError(f"{task} needs labels: pass what Task.labels returned.")
    return labels


def _need_fast(tokenizer: Any, task: str) -> None:
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{task} needs a tokenizer with a tokenizer.json, which says where each token comes from."
        )


def _load(auto_class: str, folder: str | Path, what: str) -> Any:
    import transformers

    if not Path(folder).is_dir():
        raise BaseModelError(f"base model folder {folder} does not exist.")
    try:
        return getattr(transformers, auto_class).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exceptions; whatever it is, the files are at fault
        raise BaseModelError(f"{folder} has no {what} that loads: {first_line(error)}.") from error
