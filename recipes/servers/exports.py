"""What the servers are asked to load: exports of real models, made with the command line, and what transformers says of them.

Two zoos of LoRA adapters on MiniLM and on SmolLM2, trained with PEFT alone, are mixed; a classifier is fitted on a few examples.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "Question: What is the name of the largest planet? Answer:",
    "Once upon a time, there was a little",
    "Review: a quiet, funny and surprisingly moving film. Sentiment:",
)
TEXTS = (
    "I still have not received my new card, when will it arrive?",
    "My transfer was declined and I do not know why.",
    "How do I change my PIN?",
    "The exchange rate that you charged me is wrong.",
)
NEW_TOKENS = 16
SENTENCE_BASE = "sentence-base"
LM_ADAPTERS, BANKING_ADAPTERS = ("sst2", "trec"), ("g1", "g2")


@dataclass(frozen=True)
class Models:
    """Where the two base models, the zoo and the data lie."""

    real: Path
    shared: Path

    @property
    def smollm2(self) -> Path:
        """A language model of 135 M parameters."""
        return self.real / "smollm2"

    @property
    def minilm(self) -> Path:
        """A sentence encoder."""
        return self.real / "minilm"

    def adapters(self, zoo: str, names: tuple[str, ...]) -> list[str]:
        """Options of the command line that give adapters of a zoo."""
        return [word for name in names for word in ("--adapter", str(self.shared / "zoo" / zoo / name))]


def commands(models: Models) -> dict[str, list[str]]:
    """Folder -> the words that make it, in order; a folder's name stands for its path."""
    lm = ["--base", str(models.smollm2), *models.adapters("smollm2-tasks", LM_ADAPTERS)]
    banking = models.adapters("minilm-banking", BANKING_ADAPTERS)
    fit = ["fit", "--base", str(models.minilm), *banking, "--data", "@shots.jsonl", "--task", "text-classification"]
    onnx = ["--format", "onnx"]
    return {
        "lm-mixture": ["mix", *lm, "--task", "causal-lm"],
        "lm": ["export", "@lm-mixture", "--format", "dense"],
        "lm-lora": ["export", "@lm-mixture", "--format", "lora"],
        "lm-lora-12": ["export", "@lm-mixture", "--format", "lora", "--rank", "12"],
        "lm-onnx": ["export", "@lm-mixture", *onnx, "--quantize", "int8"],
        "lm-onnx-fp16": ["export", "@lm-mixture", *onnx, "--dtype", "float16"],
        "classes-mixture": fit,
        "classes": ["export", "@classes-mixture", "--format", "dense"],
        "classes-onnx": ["export", "@classes-mixture", *onnx, "--quantize", "int8"],
        "first-token-mixture": [*fit, "--pooling", "cls"],
        "first-token": ["export", "@first-token-mixture", "--format", "dense"],
        "classes-lora": ["export", "@first-token-mixture", "--format", "lora"],
        "embeddings-mixture": [
            *(
                "mix",
                "--base",
                f"@{SENTENCE_BASE}",
                *banking,
                "--task",
                "feature-extraction",
                "--modules-to-save",
                "drop",
            ),
        ],
        "embeddings": ["export", "@embeddings-mixture", "--format", "dense"],
        "embeddings-onnx": ["export", "@embeddings-mixture", *onnx, "--quantize", "int8"],
    }


def make(models: Models, out: Path) -> None:
    """Make every export that is not there yet.

    Raises:
        subprocess.CalledProcessError: a command fails; what it says is on stderr.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_shots(models, out / "shots.jsonl")
    _write_sentence_base(models, out / SENTENCE_BASE)
    for name, words in commands(models).items():
        if (out / name).exists():
            continue
        print(f"wlora-merge {words[0]} -> {name}", flush=True)
        words = [str(out / word[1:]) if word.startswith("@") else word for word in words]
        subprocess.run([sys.executable, "-m", "wlora_merge", *words, "--out", str(out / name)], check=True)
    expected = out / "expected.json"
    if not expected.exists():
        expected.write_text(json.dumps(expect(out), indent=1) + "\n", encoding="utf-8")


def _write_sentence_base(models: Models, folder: Path) -> None:
    """MiniLM as sentence-transformers saves it: with the mean of the tokens, normalized."""
    if folder.exists():
        return
    shutil.copytree(models.minilm, folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))


def _write_shots(models: Models, file: Path) -> None:
    """Four examples of each of six intents."""
    rows: dict[str, list[str]] = {}
    source = next((models.shared / "data" / "banking77").glob("train.*"))
    with source.open(encoding="utf-8") as stream:
        table = map(json.loads, stream) if source.suffix == ".jsonl" else csv.DictReader(stream)
        for row in table:
            rows.setdefault(str(row.get("label", row.get("category"))), []).append(str(row["text"]))
    kept = sorted(rows)[::12][:6]
    lines = [json.dumps({"text": text, "label": label}) for label in kept for text in rows[label][:4]]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def expect(out: Path) -> dict[str, Any]:
    """What transformers and sentence-transformers' own formula give on the dense exports, in float32."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "lm")
    model: Any = AutoModelForCausalLM.from_pretrained(out / "lm", dtype=torch.float32).eval()
    tokens = []
    with torch.no_grad():
        for prompt in PROMPTS:
            given = tokenizer(prompt, return_tensors="pt")
            made = model.generate(**given, do_sample=False, max_new_tokens=NEW_TOKENS)
            tokens.append(made[0, given.input_ids.shape[1] :].tolist())
        found: dict[str, Any] = {"tokens": tokens, "texts": [tokenizer.decode(row) for row in tokens]}
        for name in ("classes", "first-token"):
            given = AutoTokenizer.from_pretrained(out / name)(list(TEXTS), padding=True, return_tensors="pt")
            classifier = AutoModelForSequenceClassification.from_pretrained(out / name, dtype=torch.float32).eval()
            names = [classifier.config.id2label[i] for i in range(classifier.config.num_labels)]
            rows = classifier(**given).logits.softmax(1).tolist()
            found[name] = [dict(zip(names, row, strict=True)) for row in rows]
        given = AutoTokenizer.from_pretrained(out / "embeddings")(list(TEXTS), padding=True, return_tensors="pt")
        states = AutoModel.from_pretrained(out / "embeddings", dtype=torch.float32).eval()(**given).last_hidden_state
        mask = given.attention_mask.unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        found["embeddings"] = torch.nn.functional.normalize(mean, dim=1).tolist()
    return found
