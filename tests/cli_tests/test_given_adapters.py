"""--adapters on the command line and in recipes."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import refused, run
from support.models import make_adapter, tiny_llama

from wlora_merge.mixture.mixture import Mixture


@pytest.fixture
def many(llama_zoo: Callable[..., Any], tmp_path: Path) -> Path:
    """A folder with a base, adapters that fit in `zoo`, and one that does not."""
    base, folders = llama_zoo()
    shutil.copytree(base, tmp_path / "base")
    for folder in folders:
        shutil.copytree(folder, tmp_path / "zoo" / folder.name)
    make_adapter(tiny_llama(hidden_size=64), tmp_path / "zoo" / "wide", 1, r=2, target_modules=["q_proj"])
    return tmp_path


def test_a_folder_is_mixed_and_the_card_has_the_command_that_makes_the_same(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("mix", "--base", many / "base", "--adapters", many / "zoo", "--task", "causal-lm", "--out", many / "m")
    assert done.exit_code == 0, done.output
    assert "Warning: adapter 'wide' is left out: adapter 'wide'" in done.stderr
    assert Mixture.load(many / "m").adapter_names == ["a0", "a1", "a2"]
    assert run("export", many / "m", "--format", "dense", "--out", many / "d").exit_code == 0
    card = (many / "d" / "README.md").read_text()
    (line,) = (row for row in card.splitlines() if row.startswith("wlora-merge mix "))
    monkeypatch.chdir(many / "zoo")
    words = shlex.split(line)[1:]
    words[words.index("--base") + 1] = str(many / "base")
    words[words.index("--out") + 1] = str(many / "again")
    assert run(*words).exit_code == 0
    for file in ("mixture.json", "mixture.safetensors"):
        assert (many / "m" / file).read_bytes() == (many / "again" / file).read_bytes()


def test_a_list_stands_behind_the_adapters_that_are_named(many: Path) -> None:
    (many / "list.txt").write_text("second=zoo/a1\nzoo/a2\n")
    words = ["--adapter", f"first={many}/zoo/a0", "--adapters", many / "list.txt", "--weights", "0.5,0.25,0.25"]
    assert run("mix", "--base", many / "base", *words, "--out", many / "m").exit_code == 0
    assert Mixture.load(many / "m").adapter_names == ["first", "second", "a2"]
    done = run("mix", "--base", many / "base", *words[:-1], "1,2", "--out", many / "n")
    assert done.exit_code == 2
    assert "has 2 numbers, expected one for each of 3 adapters" in done.stderr
    (many / "list.txt").write_text("first=zoo/a1\n")
    done = run("mix", "--base", many / "base", *words[:-2], "--out", many / "n")
    refused(done, many / "n", "two adapters are called 'first'")


@pytest.mark.parametrize("more", [["--strict"], ["--weights", "1,1,1,1"]])
def test_strict_and_weights_refuse_what_does_not_fit(many: Path, more: list[str]) -> None:
    done = run("mix", "--base", many / "base", "--adapters", many / "zoo", *more, "--out", many / "m")
    refused(done, many / "m", "adapter 'wide'", "do not fit the base weight")


def test_bad_input_is_one_sentence(many: Path) -> None:
    (many / "empty").mkdir()
    done = run("mix", "--base", many / "base", "--adapters", many / "empty", "--out", many / "m")
    refused(done, many / "m", "no PEFT folder lies in it")
    done = run("mix", "--base", many / "base", "--adapters", many / "zoo" / "wide", "--out", many / "m")
    refused(done, many / "m", "none of the 1 adapters can be mixed on this base (wide: ")
    (many / "list.txt").write_text("zoo/a0\nzoo/a9/..//!\n")
    done = run("mix", "--base", many / "base", "--adapters", many / "list.txt", "--out", many / "m")
    refused(done, many / "m", "list.txt, line 2: ")
    fit = ["fit", "--base", many / "base", "--data", "x.csv", "--task", "causal-lm", "--out", many / "m"]
    for words, message in (
        (["mix", "--base", "b", "--out", "o"], "Missing option '--adapter'"),
        (["mix", "--base", "b", "--adapter", "a", "--strict", "--out", "o"], "--strict is of --adapters"),
        (["inspect"], "Missing argument"),
        (fit, "Missing option '--adapter'"),
    ):
        done = run(*words)
        assert (done.exit_code, message in done.stderr) == (2, True), done.output


def test_a_fit_takes_the_adapters_of_a_folder_that_fit(many: Path) -> None:
    from support.shots import save_tokenizer

    save_tokenizer(many / "base")
    rows = "".join(json.dumps({"prompt": f"w{i} w2", "completion": " w4"}) + "\n" for i in range(4))
    (many / "shots.jsonl").write_text(rows)
    words = [
        "fit",
        "--base",
        many / "base",
        "--adapters",
        many / "zoo",
        "--data",
        many / "shots.jsonl",
        "--task",
        "causal-lm",
    ]
    done = run(*words, "--max-steps", "1", "--new-adapter", "0", "--folds", "0", "--no-report", "--out", many / "m")
    assert done.exit_code == 0, done.output
    assert "adapter 'wide' is left out" in done.stderr
    assert Mixture.load(many / "m").adapter_names == ["a0", "a1", "a2"]
    refused(run(*words, "--strict", "--out", many / "n"), many / "n", "adapter 'wide'")


def test_inspect_says_of_a_whole_folder_which_adapters_mix(many: Path) -> None:
    tables = json.loads(run("inspect", many / "base", "--adapters", many / "zoo", "--json").stdout)
    assert {row["adapter"]: row["mixes"] for row in tables["Adapters"]} == {
        "a0": "yes", "a1": "yes", "a2": "yes", "wide": "no",
    }  # fmt: skip
    assert [row["adapter"] for row in tables["Adapters that cannot be mixed"]] == ["wide"]
    alone = json.loads(run("inspect", "--adapters", many / "zoo", "--json").stdout)
    assert [row["adapter"] for row in alone["Adapters"]] == ["a0", "a1", "a2", "wide"]


def test_a_recipe_takes_a_folder_or_a_list(many: Path) -> None:
    recipe = many / "job.yaml"
    recipe.write_text("base: base\nadapters: zoo\nmix: {task: causal-lm}\nreport: false\nexports: [{format: dense}]\n")
    done = run("run", recipe, "--out", many / "tree")
    assert done.exit_code == 0, done.output
    assert "adapter 'wide' is left out" in done.stderr
    assert Mixture.load(many / "tree" / "mixture").adapter_names == ["a0", "a1", "a2"]
    refused(
        run("--quiet", "run", recipe, "--set", "strict=true", "--out", many / "other"), many / "other", "adapter 'wide'"
    )
    (many / "list.txt").write_text("second=zoo/a1\nzoo/a0\n")
    done = run("run", recipe, "--check", "--set", "adapters=list.txt", "--json")
    assert [row["what"] for row in json.loads(done.stdout)["inputs"]][1:3] == ["adapter second", "adapter a0"]
    done = run("run", recipe, "--check", "--set", "adapters={a: zoo/a0}", "--set", "strict=true")
    assert done.exit_code == 2
    assert "strict is of adapters in a folder or a list" in done.stderr
