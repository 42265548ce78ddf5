"""Every command that a help text shows, run as it stands, where its inputs lie under the names that it uses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from inspect import cleandoc
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from support.commands import run
from support.models import make_adapter, tiny_llama
from support.shots import WORDS, save_tokenizer

from wlora_merge.cli.main import main

INPUTS = ("BASE", "A", "B", "FOLDER", "shots.jsonl", "shots.csv", "recipe.yaml")
QUICK = ["--max-steps", "2", "--folds", "2", "--settings", "1"]
"""As it stands, but for how long it takes."""


def examples(command: str = "") -> list[str]:
    """The commands in the help of a command, or of the program."""
    text = cleandoc((main.commands[command] if command else main).help or "").replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.lstrip().startswith("wlora-merge ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for `INPUTS`, and what the program's own examples make of them."""
    root = tmp_path_factory.mktemp("help")
    model = tiny_llama()
    model.save_pretrained(root / "BASE")
    save_tokenizer(root / "BASE")
    for i, name in enumerate("AB"):
        make_adapter(model, root / name, i, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
        shutil.copytree(root / name, root / "FOLDER" / name)
    pairs = [(f"{WORDS[4 + i]} {WORDS[5 + i]}", "low" if i < 20 else "high") for i in range(0, 40, 5)]
    lines = [json.dumps({"prompt": text, "completion": f" {label}"}) for text, label in pairs]
    (root / "shots.jsonl").write_text("\n".join(lines) + "\n")
    (root / "shots.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in pairs))
    job = {
        "base": "BASE", "adapters": ["A", "B"], "exports": [{"format": "dense"}],
        "fit": {"data": "shots.jsonl", "task": "causal-lm", "max_steps": 2, "folds": 2, "new_adapter": 0},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(job))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for line in examples():
            ran(line)
    return root


def ran(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "wlora-merge"
    done = CliRunner().invoke(main, words + (QUICK if words[0] == "fit" else []))
    assert done.exit_code == 0, (line, done.output)


def test_the_examples_of_the_program_make_a_model(place: Path) -> None:
    assert [line.split()[1] for line in examples()] == ["fit", "export", "verify"]
    assert (place / "served" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", main.commands)
def test_the_examples_of_a_command_run(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = examples(command)
    assert lines
    made = () if command in ("fit", "mix") else ("mixture", "served") if command != "export" else ("mixture",)
    for name in (*INPUTS, *made):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy2
        copy(place / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert line.split()[1] == command
        ran(line)


def test_no_help_text_has_an_example_that_is_not_run() -> None:
    for command in ("", *main.commands):
        for flag in ("--help", "--help-all"):
            shown = run(*filter(None, [command, flag])).output.partition("Usage:")[2].replace("\\\n", " ")
            found = re.findall(r"^\s+(wlora-merge .*)$", shown, flags=re.M)
            assert {" ".join(line.split()) for line in found} <= set(examples(command))
