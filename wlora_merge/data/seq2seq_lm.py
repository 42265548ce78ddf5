"""The task seq2seq-lm: a source, which may be an instruction and its input, and its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .causal_lm import CausalLM
from .columns import PASSAGE_NAMES, Form
from .labels import LabelSet
from .metrics import Metric, seq2seq_metric
from .task import Encoded, counted, instruction_of, tokenized

if TYPE_CHECKING:
    from .examples import Examples


class Seq2SeqLM(CausalLM):
    """Source to target; the source is cut from the right when too long, the target never."""

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        """The tokens of the source, and as labels those of the target.

        Raises:
            DataError: a target of more than `max_length` tokens.
        """
        spread = "instruction" in examples.columns
        encoded = tokenized(
            examples, processor, max_length, lambda row: [instruction_of(row) if spread else row["source"]]
        )
        for number, (item, target) in enumerate(zip(encoded, examples.column("target"), strict=True), start=1):
            item["labels"] = list(processor(text_target=target, verbose=False)["input_ids"])
            if max_length is not None and len(item["labels"]) > max_length:
                where, size = examples.where(number), len(item["labels"])
                raise DataError(f"{where}: its target has {size} tokens, over {max_length}.")
        return encoded

    def items(self, row: Mapping[str, Any]) -> int:
        return counted(row["labels"])

    def metric(self, labels: LabelSet | None = None) -> Metric:
        return seq2seq_metric()


SEQ2SEQ_LM = Seq2SeqLM(
    name="seq2seq-lm",
    auto_class_name="AutoModelForSeq2SeqLM",
    pipeline_tag="text2text-generation",
    peft_task_type="SEQ_2_SEQ_LM",
    peft_auto_class_name="AutoPeftModelForSeq2SeqLM",
    has_head=False,
    is_encoder_decoder=True,
    forms=(Form(("source", "target")), Form(("instruction", "input", "target"))),
    conventions={
        "source": ("source", "input", "text", "document", "article", "question", "dialogue"),
        "instruction": ("instruction",),
        "input": ("input",),
        "target": ("target", "summary", "highlights", "completion", "response", "output", "answer"),
    },
    more_text={"source": (*PASSAGE_NAMES, "instruction", "prompt"), "instruction": PASSAGE_NAMES},
    spread_columns=("source", "instruction"),
)
