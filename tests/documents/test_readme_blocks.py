"""Every command and code block that the README shows, run as it stands; what needs a network has a tiny stand-in here.

A command that is not run stands in NOT_RUN, with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.models import make_adapter, tiny_llama
from support.paths import ROOT

from wlora_merge.cli.main import main

README = ROOT / "README.md"
WORDS = ["[PAD]", "[UNK]", "Review", "a", "gem", "bore", "Sentiment", "positive", "negative", ":", "."]
NOT_RUN = {
    "make quickstart": "makes a virtual environment; the parts that it runs are tested in test_quickstart.py",
    "make test": "is what runs this test",
    "pip install": "needs a network",
    "vllm serve": "needs vLLM and a GPU; that the folder is what save_pretrained gives is tested in test_writers_dense.py",
}
OTHERS = ("make", "torchrun", "accelerate", "--use_fsdp", "pip", "cp")  # spans that show another program's options
STAND_INS = {
    "facebook/opt-350m": "base",
    "varun-v-rao/opt-350m-lora-1.57M-squad-model3": "a0",
    "renyulin/finetune_fp4_opt_bnb_peft_opt-350m-lora": "a1",
}


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins: a tiny base with a tokenizer, two adapters, shots."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("readme")
    model = tiny_llama(vocab_size=16)
    model.save_pretrained(root / "base")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(root / "base")
    for i in range(2):
        make_adapter(model, root / f"a{i}", i, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    line = re.search(r'`(\{"prompt".*?\})`', README.read_text())
    assert line
    shown = json.loads(line[1])
    other = {"prompt": shown["prompt"].replace("gem", "bore"), "completion": " negative"}
    (root / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [shown, other] * 4))
    return root


def test_every_command_is_run_or_stands_in_the_list_with_a_reason(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    ran = []
    for line in commands():
        if any(line.startswith(known) for known in NOT_RUN):
            continue
        for hub_id, folder in STAND_INS.items():
            line = line.replace(hub_id, f"./{folder}")
        program, *words = shlex.split(line, comments=True)
        assert program == "wlora-merge", f"{line}: neither run nor in NOT_RUN"
        if words[0] == "fit":
            words += ["--max-steps", "2", "--folds", "2", "--settings", "1"]  # as it stands, but for how long it takes
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, (line, done.output)
        ran.append(words[0])
    assert {"fit", "export", "verify"} <= set(ran)
    assert all(any(line.startswith(known) for line in commands()) for known in NOT_RUN)


def test_every_python_block_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(2, 8)
    names: dict[str, Any] = {
        "base": place / "base", "adapter_a": str(place / "a0"), "adapter_b": str(place / "a1"),
        "rows": [{"input_ids": ids, "labels": ids}] * 8,
    }  # fmt: skip
    found = blocks("python")
    assert found
    for block in found:
        exec(block, names)
    assert (tmp_path / "served-of-loop" / "model.safetensors").is_file()
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "served-of-loop")])
    assert done.exit_code == 0, done.output


def test_every_inline_command_names_options_that_exist() -> None:
    known = {
        word
        for command in [main, *main.commands.values()]
        for p in command.params
        for word in [*p.opts, *p.secondary_opts]
    } | {"--help", "--help-all"}
    text = re.sub(r"^```.*?^```$", "", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`]+)`", text) if not span.startswith(OTHERS)]
    used = {word for span in spans for word in re.findall(r"(?<![\w-])--[a-z][\w-]+", span)}
    assert used
    assert used <= known


def test_every_file_that_the_tree_names_exists() -> None:
    root = README.parent
    (tree,) = re.findall(r"^```\n(.*?)^```$", (root / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    rooms, rest = tree.split("recipes/\n")
    for name in re.findall(r"\b([\w]+\.py)\b", rooms):
        assert list((root / "wlora_merge").rglob(name)), name
    for name in re.findall(r"^  ([\w.-]+\.(?:py|sh)|[\w.-]+\.yaml)", rest, re.MULTILINE):
        assert (root / "recipes" / name).exists(), name
    shown = set(re.findall(r"[\w.-]+\.yaml", rest))
    assert shown == {p.name for p in (root / "recipes").glob("*.yaml")}


def test_help_of_the_package_teaches_the_api() -> None:
    import pydoc

    import wlora_merge

    text = pydoc.plain(pydoc.render_doc(wlora_merge))
    for name in ("attach", "fit", "mix", "export", "verify", "Mixture"):
        assert name in text
        assert getattr(wlora_merge, name).__doc__
    assert "Fold a mixture and write it" in text
    assert "Args:" in text
