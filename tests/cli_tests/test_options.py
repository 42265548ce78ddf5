"""Help by topic, for every option of every command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run
from support.paths import ROOT

from wlora_merge.cli.main import main
from wlora_merge.data.tasks import FIT_TASKS
from wlora_merge.option_fields import Topic


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = "import sys; from wlora_merge.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'peft', 'numpy', 'jinja2', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout


@pytest.mark.parametrize("command", ["fit", "mix", "export", "verify", "run", "inspect"])
def test_every_option_of_every_command_has_help(command: str) -> None:
    for parameter in main.commands[command].params:
        assert getattr(parameter, "help", None), parameter.name
        assert isinstance(getattr(parameter, "topic", None), Topic), parameter.name
    assert main.commands[command].help
    assert run(command, "--help").exit_code == 0


LONG = ("fit", "mix", "export")


def flags(text: str) -> set[str]:
    """The options that a help lists."""
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, flags=re.M))


@pytest.mark.parametrize("command", LONG)
def test_help_of_a_long_command_has_ten_options_and_help_all_has_all(command: str) -> None:
    params = main.commands[command].params
    short, whole = run(command, "--help").output, run(command, "--help-all").output
    assert run(command, "-h").output == short
    assert flags(whole) == {p.opts[-1] for p in params if p.opts[0].startswith("-")} | {"--help-all"}
    shown = flags(short) - {"--help", "--help-all"}
    assert len(shown) <= 10
    assert {p.opts[0] for p in params if p.required and p.opts[0].startswith("-")} <= shown < flags(whole)
    hidden = len(flags(whole) - flags(short))
    assert f"\n{hidden} more options: " in short
    assert re.search(rf" {command} --help-all$", short, flags=re.M)
    assert "more options" not in whole
    assert len(short.splitlines()) <= 75


@pytest.mark.parametrize("command", ["verify", "run", "inspect"])
def test_help_of_a_short_command_has_all(command: str) -> None:
    shown = run(command, "--help").output
    assert flags(shown) == {p.opts[0] for p in main.commands[command].params if p.opts[0].startswith("-")} | {"--help"}
    assert run(command, "--help-all").exit_code == 2


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("fit", "--foldz", 3), "fit --help-all"),
        (("fit", "--folds", "x"), "fit --help-all"),
        (("fit",), "fit --help-all"),
        (("export", "mixture", "--format", "dense", "--out", "o", "--opset", 18), "export --help-all"),
        (("verify", "--quik"), "verify (-h|--help)"),
        (("fitt",), "(-h|--help)"),
    ],
)
def test_an_error_names_the_help_that_lists_the_option(words: tuple[object, ...], hint: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert re.search(rf"^Try '.* {hint}' for help\.$", done.stderr, flags=re.M), done.stderr


def test_the_short_help_asks_for_nothing_and_comes_before_any_check() -> None:
    assert run("fit", "--folds", 1, "--help").exit_code == 0
    assert run("export", "--help", "--help-all").output == run("export", "--help").output


def test_help_names_options_that_there_are() -> None:
    others = {"--max-lora-rank"}  # a server's
    for name, command in main.commands.items():
        known = {flag for p in command.params for flag in [*p.opts, *p.secondary_opts]} | others
        texts = [getattr(p, "help", "") or "" for p in command.params] + [command.epilog or ""]
        used = {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)}
        assert used <= known, name


def test_help_describes_arguments_and_columns_under_fitting_headings() -> None:
    def sections(command: str) -> dict[str, str]:
        whole = run(command, "--help-all" if command in LONG else "--help").output
        parts = re.split(r"^(\w[\w ]+):\n", whole, flags=re.M)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    for command, metavar in {
        "export": "MIXTURE_DIR",
        "verify": "EXPORT_DIR",
        "run": "RECIPE",
        "inspect": "PATH...",
    }.items():
        assert re.search(rf"^  {re.escape(metavar)}\S*\s+\w+", sections(command)["Inputs"], flags=re.M)
    assert "--quantize" in sections("export")["Format"]
    assert "--quantize" in sections("fit")["How it is trained"]
    assert "--weights" in sections("mix")["How they are mixed"]
    readme = (ROOT / "README.md").read_text()
    for task in FIT_TASKS:
        text = ", or ".join(map(str, FIT_TASKS[task].forms))
        assert re.search(rf"^ +{task} +{re.escape(text)}$", run("fit", "--help").output, flags=re.M)
        assert f"| `{task}` | {text} |" in readme
    assert "..." not in run("--help").output.partition("Options:")[2]


ADDED = """
    brand_new: int | None = option(
        None, Topic.JUDGED, "A number made up for a test. Default: none.", bounds=COUNT, of=LEARNED)
"""


def test_to_add_an_option_of_fit_is_to_edit_one_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "wlora_merge", tmp_path / "wlora_merge", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "wlora_merge" / "fit_options.py"
    head, mark, rest = file.read_text().partition("    report_to: str = option(")
    file.write_text(head + ADDED.lstrip("\n") + mark + rest)

    def python(*words: str) -> str:
        env = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    judged = python("-m", "wlora_merge", "fit", "--help-all").partition("How it is judged:")[2].partition("\n\n")[0]
    assert re.search(r"--brand-new INTEGER RANGE\s+A number made up for a test. Default: none\.\s+\[x>=1\]", judged)
    fit = json.loads(python("-m", "wlora_merge.cli.recipe_schema"))["properties"]["fit"]["properties"]
    assert fit["brand_new"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]
    row = "| `--brand-new` | a whole number, x ≥ 1 |  | A number made up for a test. Default: none. For learned and auto alone. |"
    assert row in python("-m", "wlora_merge.cli.reference").splitlines()
    (tmp_path / "r.yaml").write_text(
        "base: b\nadapters: [x]\nfit: {data: d, task: causal-lm, brand_new: 2}\nexports: [{format: dense}]"
    )
    code = """
from wlora_merge.cli.recipe import read_recipe
from wlora_merge.errors import WloraMergeError
from wlora_merge.exporters.model_card import _flags
assert read_recipe("r.yaml").fit.options.brand_new == 2
assert _flags({"brand_new": 2}) == ["--brand-new", "2"]
for override in ("fit.brand_new=0", "fit.brand_new=x", "fit.method=uniform"):
    try: read_recipe("r.yaml", [override])
    except WloraMergeError as error: print(error)
"""
    said = python("-c", code).splitlines()
    assert said[0].endswith("fit: brand_new is 0, expected a number above 0.")
    assert said[1].endswith("fit: brand_new is 'x', expected int.")
    assert "so brand_new would have no effect" in said[2]
