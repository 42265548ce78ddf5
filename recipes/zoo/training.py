"""One adapter, trained and saved by PEFT alone: the folder is what one finds on the hub. This file does not import wlora_merge."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from design import Spec
from jobs import Row
from texts import rows_of

RECORD = "training.json"
RATES = {"minilm": (2e-3, 5e-3), "smollm2": (1e-3, 1e-3)}
"""Of lora_A and lora_B, and of a head; AdamW, falling linearly to zero."""
MAX_TOKENS = {"minilm": 64, "smollm2": 160}
"""Longer texts are cut for a classifier. A language model does not learn them: their question stands at the end."""
MEASURED = {"minilm": 100, "smollm2": 50}
"""Rows of which an accuracy is measured, at most."""
Encoded = tuple[list[int], list[int]]
"""(token ids of the text, the class as one number, or the token ids of the completion)"""


@dataclass(frozen=True)
class Kind:
    """How a model of a kind is made, and what a batch of it gives: logits [M, C] and the classes [M] that they should say."""

    load: Callable[[Path, Spec], torch.nn.Module]
    encode: Callable[[Any, Spec, Sequence[Row]], list[Encoded]]
    forward: Callable[[torch.nn.Module, list[Encoded], int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    task_type: str


def make_adapter(spec: Spec, base: Path, folder: Path) -> dict[str, Any]:
    """Train one adapter and put it in `folder/NAME`, whole or not at all; its record, which lies there too."""
    start = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as scratch:
        made = Path(scratch) / spec.name
        measured = train(spec, base, *rows_of(spec), made)
        record = spec.as_json() | measured | {"cpu_seconds": round(time.process_time() - start, 1)}
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if (folder / spec.name).exists():  # of other settings
            shutil.rmtree(folder / spec.name)
        made.rename(folder / spec.name)
    return record


def train(spec: Spec, base: Path, rows: Sequence[Row], test: Sequence[Row], out: Path) -> dict[str, Any]:
    """Train on the rows and save to `out`; the numbers of the record.

    `train_accuracy` is of some of the rows, with the labels that were learned. `test_accuracy` is of rows that it has not seen, with
    their true labels. A completion is right where each of its tokens is the likeliest.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    kind, tokenizer = KINDS[spec.base], AutoTokenizer.from_pretrained(base)
    learned, held_out = (kind.encode(tokenizer, spec, part) for part in (rows, test))
    torch.manual_seed(spec.seed)
    config = LoraConfig(
        task_type=kind.task_type,
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=spec.target_modules,
        layers_to_transform=list(spec.layers) if spec.layers else None,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
    )
    model = get_peft_model(kind.load(base, spec), config)
    pad = tokenizer.pad_token_id
    lengths = [len(text) + len(answer) for text, answer in learned]
    optimizer = _optimizer(model, *RATES[spec.base])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, spec.steps)
    model.train()
    for batch in batches(lengths, spec.batch_size, spec.steps, spec.seed):
        logits, classes, _ = kind.forward(model, [learned[i] for i in batch], pad)
        torch.nn.functional.cross_entropy(logits, classes).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    some = MEASURED[spec.base]
    model.peft_config["default"].base_model_name_or_path = spec.base
    model.save_pretrained(out)
    return {
        "examples": len(learned),
        "train_accuracy": _accuracy(kind, model, learned[:some], pad),
        "test_accuracy": _accuracy(kind, model, held_out[:some], pad),
    }


def batches(lengths: Sequence[int], size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of rows of alike lengths, drawn with this seed; each pass takes every row at most once."""
    rng, given = random.Random(seed), 0
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        near = [sorted(order[i : i + 16 * size], key=lengths.__getitem__) for i in range(0, len(order), 16 * size)]
        cut = [part[i : i + size] for part in near for i in range(0, len(part), size)]
        rng.shuffle(cut)
        for batch in cut:
            if given == steps:
                return
            given += 1
            yield batch


def _optimizer(model: torch.nn.Module, rate: float, head_rate: float) -> torch.optim.Optimizer:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lora = [p for name, p in trained if "lora_" in name]
    head = [p for name, p in trained if "lora_" not in name]
    groups = [{"params": lora, "lr": rate}, {"params": head, "lr": head_rate}]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)


@torch.no_grad()
def _accuracy(kind: Kind, model: torch.nn.Module, rows: list[Encoded], pad: int) -> float:
    """In percent."""
    right, ordered = 0, sorted(rows, key=lambda row: len(row[0]))
    for i in range(0, len(ordered), 16):
        logits, classes, example = kind.forward(model, ordered[i : i + 16], pad)
        wrong = torch.zeros(len(ordered[i : i + 16])).index_add_(0, example, (logits.argmax(-1) != classes).float())
        right += int((wrong == 0).sum())
    return round(100 * right / len(ordered), 1)


# --------------------------------------------------------------------------------------------------- a classifier


def _load_classifier(base: Path, spec: Spec) -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(spec.labels))
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()}
    )
    return model


def _encode_classes(tokenizer: Any, spec: Spec, rows: Sequence[Row]) -> list[Encoded]:
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_TOKENS[spec.base]).input_ids
    return [(text, [spec.labels.index(label)]) for text, (_, label) in zip(ids, rows, strict=True)]


def _classify(
    model: torch.nn.Module, batch: list[Encoded], pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(text) for text, _ in batch)
    ids = torch.tensor([text + [pad] * (longest - len(text)) for text, _ in batch])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text, _ in batch])
    return (
        model(input_ids=ids, attention_mask=mask).logits,
        torch.tensor([answer[0] for _, answer in batch]),
        torch.arange(len(batch)),
    )


# ----------------------------------------------------------------------------------------------- a language model


def _load_language_model(base: Path, spec: Spec) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_cache=False)
    return model


def _encode_completions(tokenizer: Any, spec: Spec, rows: Sequence[Row]) -> list[Encoded]:
    texts, answers = (tokenizer([row[i] for row in rows]).input_ids for i in (0, 1))
    both = zip(texts, answers, strict=True)
    return [(text, answer) for text, answer in both if len(text) + len(answer) <= MAX_TOKENS[spec.base]]


def _complete(
    model: torch.nn.Module, batch: list[Encoded], pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded on the left, so that every completion stands at the end; logits of the completions' tokens alone."""
    longest = max(len(text) + len(answer) for text, answer in batch)
    gaps = [longest - len(text) - len(answer) for text, answer in batch]
    ids = torch.tensor([[pad] * gap + text + answer for gap, (text, answer) in zip(gaps, batch, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    last = max(len(answer) for _, answer in batch)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=last + 1).logits[:, :-1]
    asked = torch.tensor([[False] * (last - len(answer)) + [True] * len(answer) for _, answer in batch])
    return logits[asked], ids[:, -last:][asked], asked.nonzero()[:, 0]


KINDS = {
    "minilm": Kind(_load_classifier, _encode_classes, _classify, "SEQ_CLS"),
    "smollm2": Kind(_load_language_model, _encode_completions, _complete, "CAUSAL_LM"),
}
