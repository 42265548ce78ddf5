"""The texts in recipes/ci: their commands are ours, and what they read from --json is there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from support.paths import ROOT

from wlora_merge.cli.main import main
from wlora_merge.cli.options import Argument, Command, Option
from wlora_merge.option_fields import Topic

TOPICS = ("Make a mixture", "Write a model", "Look and check")
CI = ROOT / "recipes" / "ci"


def commands(text: str) -> list[list[str]]:
    return [shlex.split(m[1]) for m in re.finditer(r"(?:^|run: )wlora-merge (?!\[)([^|>\n#]+)", text, re.MULTILINE)]


def test_the_commands_of_the_workflow_run_and_the_digest_pins(
    llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = llama_zoo()
    job = {
        "base": str(base),
        "adapters": list(map(str, folders)),
        "mix": {"task": "causal-lm"},
        "exports": [{"format": "dense"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.chdir(tmp_path)
    text = (CI / "workflow.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["jobs"].keys() == {"check", "build"}
    assert workflow["defaults"]["run"]["shell"] == "bash"  # GitHub's own default has no pipefail
    check, work, verify = commands(text)
    assert CliRunner().invoke(main, check).exit_code == 0
    done = CliRunner().invoke(main, work)
    assert done.exit_code == 0
    assert not done.stderr
    query = re.search(r"jq -r '\.([\w.]+)'", text)
    assert query
    found = json.loads(done.stdout)
    for key in query[1].split("."):
        found = found[key]
    words = [found if "steps.pin" in word else word for word in verify]
    assert CliRunner().invoke(main, words).exit_code == 0


def test_the_commands_of_the_container_parse() -> None:
    text = (CI / "Dockerfile").read_text()
    (line,) = re.findall(r"docker run .* wlora-merge (run .*)", text)
    words = shlex.split(line)
    assert main.commands[words[0]].make_context(words[0], words[1:]).params["recipe"] == "recipe.yaml"
    assert json.loads(text.split("ENTRYPOINT ")[1].splitlines()[0]) == ["wlora-merge"]


# -------------------------------------------------------------------------------------------------- at the terminal


def test_every_command_and_option_stands_under_one_topic() -> None:
    for command in main.commands.values():
        assert isinstance(command, Command)
        assert command.topic in TOPICS
        found = command.by_topic(click.Context(command, help_option_names=[]))
        assert [p for chosen in found.values() for p in chosen] == sorted(
            command.params,
            key=lambda p: list(Topic).index(p.topic),  # type: ignore[attr-defined]
        )
        assert all(isinstance(p, Argument | Option) and p.help for p in command.params)


def test_help_has_topics_and_a_worked_example_for_every_command() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    assert all(f"{topic}:" in text for topic in TOPICS)
    assert "_WLORA_MERGE_COMPLETE" in text
    for name in main.commands:
        text = CliRunner().invoke(main, [name, "--help"]).output
        assert f"wlora-merge {name}" in text.split("Usage:")[1].split("\n", 1)[1]
        assert "Output:" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_what_the_help_says(shell: str) -> None:
    done = CliRunner().invoke(main, [], prog_name="wlora-merge", env={"_WLORA_MERGE_COMPLETE": f"{shell}_source"})
    assert "_WLORA_MERGE_COMPLETE" in done.output
    env = {"_WLORA_MERGE_COMPLETE": "bash_complete", "COMP_WORDS": "wlora-merge ex", "COMP_CWORD": "1"}
    assert "export" in CliRunner().invoke(main, [], prog_name="wlora-merge", env=env).output


def test_quiet_leaves_stderr_empty_and_nothing_is_coloured_where_there_is_no_terminal(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    base, folders = llama_zoo()
    job = {
        "base": str(base),
        "adapters": list(map(str, folders)),
        "mix": {"task": "causal-lm"},
        "exports": [{"format": "dense"}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(job | {"verify": False, "report": False}))
    loud = CliRunner().invoke(main, ["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "loud")])
    quiet = CliRunner().invoke(main, ["--quiet", "run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "quiet")])
    assert "export dense" in loud.stderr
    assert not quiet.stderr
    assert "\x1b" not in loud.output
    assert quiet.stdout


def test_tables_fit_80_columns(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    done = CliRunner().invoke(main, ["inspect", str(base), *map(str, folders)], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    tables = [line for line in done.stdout.splitlines() if line[:1] in "┏┃┡│└├"]
    assert tables
    assert all(len(line) <= 80 for line in tables)
