"""A word-level tokenizer with chat templates, and examples for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wlora_merge.data.examples import Examples, read_examples

WORDS = [
    "[pad]",
    "[unk]",
    "[bos]",
    "[eos]",
    *["a", "b", "c", "d", "e", "f", "g", "user", ":", "assistant", ".", "cat", "sat", "the"],
]


CHAT = "{% for m in messages %}{{ m['role'] + ' : ' }}{{ m['content'] }}{{ ' . ' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant : {% endif %}"
MARKED = CHAT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}").replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'assistant' %}"
).replace("{% endfor %}", "{% else %}{{ m['role'] + ' : ' + m['content'] + ' . ' }}{% endif %}{% endfor %}")  # fmt: skip


def tokenizer(bos: bool = False, eos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """Whitespace words; with or without a BOS before and an EOS after each text."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("[bos] " if bos else "") + "$A" + (" [eos]" if eos else "")
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B" + (" [eos]" if eos else ""), special_tokens=[("[bos]", 2), ("[eos]", 3)]
    )
    special = {"pad_token": "[pad]", "unk_token": "[unk]", "bos_token": "[bos]", "eos_token": "[eos]"} | options
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def examples(tmp_path: Path, task: str, *rows: dict[str, Any]) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path, task=task)


def learned(item: dict[str, Any]) -> list[int]:
    return [label for label in item["labels"] if label != -100]
