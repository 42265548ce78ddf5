"""What the servers are asked to load: exports of real models, made with the command line, and what transformers says of them.

Two zoos of LoRA adapters on MiniLM and on SmolLM2, trained with PEFT alone, are mixed; a classifier is fitted on a few examples.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "ask"))
from common import continued, probabilities
from environments import python_of

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
SOURCES = {name: name for name in ("classes", "first-token", "embeddings")} | {
    "texts": "lm", "texts-12": "lm-lora-12", "lm-classes": "lm-classes-lora",
}  # fmt: skip
"""What answers are expected of -> the export that transformers, or PEFT, gives them on."""
SENTENCE_BASE, OLDER_BASE = "sentence-base", "older-base"
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
        "lm-genai": ["export", "@lm-mixture", *onnx, "--onnx-runtime", "genai"],
        "classes-mixture": fit,
        "classes": ["export", "@classes-mixture", "--format", "dense"],
        "classes-onnx": ["export", "@classes-mixture", *onnx, "--quantize", "int8"],
        "first-token-mixture": [*fit, "--pooling", "cls"],
        "first-token": ["export", "@first-token-mixture", "--format", "dense"],
        "classes-lora": ["export", "@first-token-mixture", "--format", "lora"],
        "lm-classes-mixture": [
            *("fit", *lm, "--data", "@shots.jsonl", "--task", "text-classification"),
            *("--pooling", "model", "--modules-to-save", "drop", "--folds", "0"),
        ],
        "lm-classes-lora": ["export", "@lm-classes-mixture", "--format", "lora"],
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


def make(models: Models, out: Path, wanted: Collection[str]) -> None:
    """Make the exports wanted, and what they are made of, where they are not there yet.

    Raises:
        subprocess.CalledProcessError: a command fails; what it says is on stderr.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_shots(models, out / "shots.jsonl")
    _write_sentence_base(models, out / SENTENCE_BASE)
    _write_older_base(models, out / OLDER_BASE)
    known = commands(models)
    mixtures = {word[1:] for name in wanted for word in known[name] if word[:1] == "@"}
    for name, words in known.items():
        if (out / name).exists() or name not in {*wanted, *mixtures}:
            continue
        print(f"wlora-merge {words[0]} -> {name}", flush=True)
        words = [str(out / word[1:]) if word.startswith("@") else word for word in words]
        python = python_of("onnxruntime-genai") if name == "lm-genai" else sys.executable
        subprocess.run([python, "-m", "wlora_merge", *words, "--out", str(out / name)], check=True)


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


def _write_older_base(models: Models, folder: Path) -> None:
    """SmolLM2 with a config that transformers 4 reads right: it takes rope_theta for 10000 where `rope_parameters` alone has it."""
    if folder.exists():
        return
    shutil.copytree(models.smollm2, folder, copy_function=os.link)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))


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


def expectations(models: Models, out: Path, wanted: Collection[str]) -> dict[str, Any]:
    """What transformers gives on the dense exports, in float32: key -> one answer for each input; kept in expected.json."""
    file = out / "expected.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for key in wanted - found.keys():
        found[key] = _expected(models, out, key)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _expected(models: Models, out: Path, key: str) -> list[Any]:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    with torch.no_grad():
        if key.startswith("texts"):
            folder = models.smollm2 if key == "texts-12" else out / "lm"
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            if key == "texts-12":
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, out / "lm-lora-12").eval()
            return [continued(model, tokenizer, prompt, NEW_TOKENS) for prompt in PROMPTS]
        given = AutoTokenizer.from_pretrained(out / SOURCES[key])(list(TEXTS), padding=True, return_tensors="pt")
        if key == "lm-classes":
            from peft import PeftModel

            config = json.loads((out / "lm-classes-mixture" / "mixture.json").read_text())["config"]
            config["id2label"] = {int(number): name for number, name in config["id2label"].items()}
            kept = {key: config[key] for key in ("id2label", "label2id", "pad_token_id")}
            model = AutoModelForSequenceClassification.from_pretrained(models.smollm2, dtype=torch.float32, **kept)
            return probabilities(PeftModel.from_pretrained(model, out / "lm-classes-lora").eval(), given)
        if key == "embeddings":
            states = AutoModel.from_pretrained(out / key, dtype=torch.float32).eval()(**given).last_hidden_state
            mask = given.attention_mask.unsqueeze(-1)
            return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).tolist()
        classifier = AutoModelForSequenceClassification.from_pretrained(out / key, dtype=torch.float32).eval()
        return probabilities(classifier, given)
