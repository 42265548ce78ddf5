"""README.md and the pages in docs: their blocks, and a folder with tiny stand-ins for the inputs that they name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from support.models import make_adapter, tiny_llama
from support.paths import ROOT

PAGES = {
    page.relative_to(ROOT).as_posix(): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
WORDS = ["[PAD]", "[UNK]", "Review", "a", "gem", "bore", "Sentiment", "positive", "negative", ":", "."]
STAND_INS = {
    "facebook/opt-350m": "base",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "base",
    "varun-v-rao/opt-350m-lora-1.57M-squad-model3": "a",
    "renyulin/finetune_fp4_opt_bnb_peft_opt-350m-lora": "b",
}
"""Hub id -> the folder that stands in its place."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, each whole."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def shots() -> list[dict[str, str]]:
    """Two examples: the one that README.md shows, and another."""
    shown = json.loads(re.findall(r'`(\{"prompt".*?\})`', (ROOT / "README.md").read_text("utf-8"))[0])
    return [shown, {"prompt": shown["prompt"].replace("gem", "bore"), "completion": " negative"}]


def make_place(root: Path) -> Path:
    """A base with a tokenizer, two adapters, data of two tasks, and a recipe, under the names that the pages use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tiny_llama(vocab_size=16)
    model.save_pretrained(root / "base")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(root / "base")
    for i, name in enumerate("ab"):
        make_adapter(model, root / name, i, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
        shutil.copytree(root / name, root / "zoo" / name)
    (root / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shots() * 4))
    rows = [f"a {word} .,{label}" for word, label in (("gem", "positive"), ("bore", "negative"))] * 4
    (root / "reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    (root / "shots.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (root / "recipe.yaml").write_text(recipe())
    return root


def recipe() -> str:
    """The recipe that docs/recipes.md shows."""
    return blocks(ROOT / "docs" / "recipes.md", "yaml")[0]
