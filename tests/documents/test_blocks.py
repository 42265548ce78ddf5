"""Every command and code block of README.md and docs, run as it stands; what needs a network has a tiny stand-in here.

A command or a block that is not run stands in NOT_RUN, with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.pages import PAGES, STAND_INS, blocks, commands, make_place, shots
from support.paths import ROOT

from wlora_merge.cli.main import main

ASKED = "make test-servers asks this program, with the code of a card; the page has the same code"
NOT_RUN = {
    "make quickstart": "makes a virtual environment; the parts that it runs are tested in test_quickstart.py",
    "make test": "is what runs this test",
    "pip install": "needs a network",
    "vllm serve": ASKED,
    "curl ": ASKED,
    "docker run": "needs a container",
    "python convert_": ASKED,
    "llama-server": ASKED,
    "ct2-transformers-converter": ASKED,
    "lm_eval": ASKED,
    "wlora-merge verify served --digest": "asks a shell and jq; test_ci.py pins a digest",
}
"""How a command begins -> why it is not run here."""
NOT_RUN_PYTHON = {
    "import SentenceTransformer": ASKED,
    "import ctranslate2": ASKED,
    "from optimum": ASKED,
    "import onnxruntime_genai": ASKED,
    "encoder_model.onnx": "the graph on the page is no encoder-decoder; make test-servers asks one",
}
"""What is in a block -> why it is not run here."""
OTHERS = ("make", "torchrun", "accelerate", "--use_fsdp", "pip", "cp", "vllm", "docker")
"""How spans begin that show another program's options."""
PLACEHOLDERS = {"BASE": "./base", "A": "./a", "B": "./b", "FOLDER": "./zoo"}
SHORTER = ["--max-steps", "2", "--folds", "2"]
"""A fit on a page is run as it stands, but for how long it takes."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def place(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with the inputs, as the working directory."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_run(line: str) -> bool:
    return not any(line.startswith(known) for known in NOT_RUN)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other libraries, in code that is a reader's
@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_block_runs_or_stands_in_a_list_with_a_reason(place: Path, name: str) -> None:
    page = PAGES[name]
    python = [text for text in blocks(page, "python") if not any(known in text for known in NOT_RUN_PYTHON)]
    lines = [line for line in commands(page) if is_run(line)]
    if not re.search(r'--out mixture\b|out="mixture"', "\n".join(lines + python)):
        run("wlora-merge mix --base ./base --adapter a=./a --adapter b=./b --task causal-lm --out mixture")
    for line in lines:
        run(line)
    ids = torch.arange(2, 8)
    names: dict[str, Any] = {
        "base": place / "base", "adapter_a": str(place / "a"), "adapter_b": str(place / "b"), "data": "shots.jsonl",
        "rows": [{"input_ids": ids, "labels": ids}] * 8,
    }  # fmt: skip
    for block in python:
        exec(with_stand_ins(block), names)
    for folder in [made.parent for made in place.glob("*/wlora_merge.json")]:
        run(f"wlora-merge verify {folder.name}")


def with_stand_ins(text: str) -> str:
    for hub_id, folder in STAND_INS.items():
        text = text.replace(hub_id, f"./{folder}")
    return text


def run(line: str) -> None:
    for placeholder, given in PLACEHOLDERS.items():
        line = re.sub(rf"(?<!\S){re.escape(placeholder)}(?!\S)", given, line)
    program, command, *words = shlex.split(with_stand_ins(line), comments=True)
    assert program == "wlora-merge", f"{line}: neither run nor in NOT_RUN"
    if command == "fit":
        words += SHORTER
    if command in ("fit", "mix", "export", "run") and "--check" not in words:
        words.append("--force")  # a page may make one folder twice
    done = CliRunner().invoke(main, [command, *words])
    assert done.exit_code == 0, (line, done.output)


def test_what_is_not_run_stands_on_a_page() -> None:
    lines = [line for page in PAGES.values() for line in commands(page)]
    assert all(any(line.startswith(known) for line in lines) for known in NOT_RUN)
    code = [text for page in PAGES.values() for text in blocks(page, "python")]
    assert all(any(known in text for text in code) for known in NOT_RUN_PYTHON)


def test_the_commands_of_the_readme_are_all_that_there_are() -> None:
    shown = {shlex.split(line)[1] for line in commands(PAGES["README.md"]) if line.startswith("wlora-merge")}
    assert shown == set(main.commands)


def test_the_examples_of_getting_started_are_those_of_the_readme() -> None:
    lines = blocks(PAGES["docs/getting-started.md"], "json")[0].splitlines()
    assert [json.loads(line) for line in lines] == shots()


@pytest.mark.parametrize("name", PAGES)
def test_every_inline_command_names_options_that_exist(name: str) -> None:
    known = {
        word
        for command in [main, *main.commands.values()]
        for p in command.params
        for word in [*p.opts, *p.secondary_opts, "--help", "--help-all"]
    }
    text = re.sub(r"^```.*?^```$", "", PAGES[name].read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`]+)`", text) if not span.startswith(OTHERS)]
    used = {word for span in spans for word in re.findall(r"(?<![\w-])--[a-z][\w-]+", span)}
    assert used <= known


def test_every_file_that_the_tree_names_exists() -> None:
    (tree,) = re.findall(r"^```\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    rooms, rest = tree.split("recipes/\n")
    for name in re.findall(r"\b([\w]+\.py)\b", rooms):
        assert list((ROOT / "wlora_merge").rglob(name)), name
    for name in re.findall(r"^  ([\w.-]+\.(?:py|sh)|[\w.-]+\.yaml)", rest, re.MULTILINE):
        assert (ROOT / "recipes" / name).exists(), name
    shown = set(re.findall(r"[\w.-]+\.yaml", rest))
    assert shown == {p.name for p in (ROOT / "recipes").glob("*.yaml")}


def test_help_of_the_package_teaches_the_api() -> None:
    import pydoc

    import wlora_merge

    text = pydoc.plain(pydoc.render_doc(wlora_merge))
    for name in ("attach", "fit", "mix", "export", "verify", "Mixture"):
        assert name in text
        assert getattr(wlora_merge, name).__doc__
    assert "Fold a mixture and write it" in text
    assert "Args:" in text
