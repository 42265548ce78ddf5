"""The schemas that ship: a recipe's agrees with the recipe room, and every --json output with its own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator, ValidationError
from support.paths import ROOT, VERSION_1
from support.schemas import invoked, shipped, valid

from wlora_merge.cli.file_schemas import file_schemas
from wlora_merge.cli.main import main
from wlora_merge.cli.recipe import read_recipe
from wlora_merge.cli.recipe_schema import recipe_schema
from wlora_merge.cli.reference import reference
from wlora_merge.errors import RecipeError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.formats import FORMATS
from wlora_merge.mixture.mix import mix

RECIPES = ROOT / "recipes"


def test_the_shipped_recipe_schema_is_the_dataclasses_own() -> None:
    assert shipped("recipe.schema.json") == recipe_schema()


def test_the_shipped_schemas_of_files_are_the_records_own() -> None:
    for name, schema in file_schemas().items():
        assert shipped(name) == schema, "run `make generate`"


def test_the_files_of_a_mixture_and_of_every_export_are_as_their_schemas_say(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", task="causal-lm")
    made = {"mixture.json": [VERSION_1 / "mixture.json", tmp_path / "m" / "mixture.json"], "wlora_merge.json": []}
    for kind in FORMATS:
        export(tmp_path / "m", kind, tmp_path / kind)
        made["wlora_merge.json"].append(tmp_path / kind / "wlora_merge.json")
    for name, files in made.items():
        schema = Draft202012Validator(shipped(f"{Path(name).stem}.schema.json"))
        for file in files:
            table = json.loads(file.read_text())
            schema.validate(table)
            assert not schema.is_valid(
                {key: value for key, value in table.items() if key != "format_version"} | {"groups": 3, "files": 3}
            )


def test_the_reference_page_is_made_from_the_options() -> None:
    page = (ROOT / "docs" / "cli-reference.md").read_text()
    assert page == reference(), "run `make generate`"
    for name, command in main.commands.items():
        section = page.partition(f"## wlora-merge {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            flag = parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.metavar)
            assert section.count(f"\n| `{flag}`") == 1, (name, flag)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_that_ships_is_sound_by_the_room_and_by_the_schema(file: Path) -> None:
    assert read_recipe(file).exports
    Draft202012Validator(shipped("recipe.schema.json")).validate(yaml.safe_load(file.read_text()))


def test_the_commands_of_the_distributed_recipe_parse() -> None:
    lines = [
        line for line in (RECIPES / "distributed.sh").read_text().splitlines() if "wlora" in line and line[0] != "#"
    ]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        command, *rest = words[words.index("wlora_merge") + 1 :] if words[0] == "torchrun" else words[1:]
        main.commands[command].make_context(command, rest)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bse": "x"},
        {"fit": {"data": "x", "task": "causal-ml"}},
        {"fit": {"data": "x", "task": "causal-lm", "max_steps": "many"}},
        {"fit": {"task": "causal-lm"}},
        {"mix": {}},
        {"adapters": 7},
        {"exports": [{"format": "gguf"}]},
        {"exports": [{"rank": 3}]},
        {"exports": [{"format": "lora", "rank": 0}]},
        {"exports": [{"format": "onnx", "opset": 31}]},
        {"fit": {"data": "x", "task": "causal-lm", "interpolation": 1.5}},
        {"fit": {"data": "x", "task": "causal-lm", "temperature": 0}},
        {"fit": {"data": "x", "task": "causal-lm", "delta_scale": "big"}},
        {"fit": {"data": "x", "task": "causal-lm", "seed": -1}},
        {"fit": {"data": "x", "task": "causal-lm", "packing": 1}},
        {"base": 7},
        {"verify": "no"},
    ],
)
def test_what_the_room_refuses_the_schema_refuses(tmp_path: Path, wrong: dict[str, Any]) -> None:
    sound = {
        "base": "b",
        "adapters": ["a", "c"],
        "fit": {"data": "x", "task": "causal-lm"},
        "exports": [{"format": "dense"}],
    }
    schema = Draft202012Validator(shipped("recipe.schema.json"))
    schema.validate(sound)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(sound))
    read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(sound | wrong))
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ValidationError):
        schema.validate(sound | wrong)


@pytest.mark.parametrize(
    ("part", "key", "known", "foreign"),
    [
        ("exports", "quantize", "int4", "4bit"),
        ("exports", "onnx_runtime", "genai", "ort"),
        ("fit", "quantize", "4bit", "int4"),
        ("fit", "modules_to_save", "mix", 1),
        ("fit", "residual", "a", 1),
        ("fit", "task", "seq2seq-lm", "feature-extraction"),
        ("mix", "task", "feature-extraction", "x"),
        ("mix", "normalize", "present", "none"),
        ("mix", "residual", "a", 1),
    ],
)
def test_the_schema_has_each_sections_own_choices(part: str, key: str, known: str, foreign: Any) -> None:
    rows: dict[str, Any] = {"fit": {"data": "x", "task": "causal-lm"}, "mix": {}, "exports": {"format": "onnx"}}
    schema = Draft202012Validator(shipped("recipe.schema.json"))
    for value, sound in ((known, True), (foreign, False)):
        way = part if part != "exports" else "mix"
        job = {"base": "b", "adapters": ["a", "c"], way: rows[way], "exports": [rows["exports"]]}
        row = rows[part] | {key: value}
        assert schema.is_valid(job | {part: [row] if part == "exports" else row}) is sound


def test_what_the_command_line_chooses_from_the_schema_chooses_from() -> None:
    sections = shipped("recipe.schema.json")["properties"]
    names = {"format_": "format"}
    for command, section in (("fit", sections["fit"]), ("export", sections["exports"]["items"])):
        choices = {o.name: o.type.choices for o in main.commands[command].params if isinstance(o.type, click.Choice)}
        assert len(choices) >= 6
        for name, known in choices.items():
            enum = section["properties"][names.get(str(name), str(name))].get("enum", [])
            assert set(enum) - {None} == set(known), (command, name)


def test_every_json_output_is_as_its_schema_says(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    adapters = [word for folder in folders for word in ("--adapter", folder)]
    mixture = invoked("mix", "--base", base, *adapters, "--task", "causal-lm", "--out", tmp_path / "m")
    valid("mix", mixture)
    done = invoked("export", tmp_path / "m", "--format", "lora", "--rank", "3", "--out", tmp_path / "l")
    valid("export", done)
    checked = invoked("verify", tmp_path / "l", "--quick", "--digest", done["digest"])
    valid("verify", checked)
    assert checked["digest"] == done["digest"]
    for paths in ([base, *folders], [tmp_path / "m"], [tmp_path / "l"]):
        valid("inspect", invoked("inspect", *paths))
    job = {
        "base": str(base),
        "adapters": list(map(str, folders)),
        "mix": {"task": "causal-lm"},
        "exports": [{"format": "dense"}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(job))
    valid("check", invoked("run", tmp_path / "r.yaml", "--check"))
    valid("run", invoked("run", tmp_path / "r.yaml", "--out", tmp_path / "tree"))


def test_a_digest_that_is_not_the_pinned_one_fails(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    adapters = [word for folder in folders for word in ("--adapter", folder)]
    invoked("mix", "--base", base, *adapters, "--out", tmp_path / "m")
    done = CliRunner().invoke(main, ["export", str(tmp_path / "m"), "--format", "dense", "--out", str(tmp_path / "d")])
    line = done.stdout.splitlines()[-1]
    assert line.startswith("sha256:")
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "d"), "--quick", "--digest", line]).exit_code == 0
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "d"), "--quick", "--digest", "sha256:" + "0" * 64])
    assert done.exit_code == 1
    assert "expected sha256:000" in done.stderr
