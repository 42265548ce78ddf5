"""The schemas that ship."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from click.testing import CliRunner
from jsonschema import Draft202012Validator

from wlora_merge.cli.main import main


def shipped(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("wlora_merge.cli").joinpath("schemas", name).read_text())
    Draft202012Validator.check_schema(found)
    return found


def valid(command: str, table: dict[str, Any]) -> None:
    whole = shipped("results.schema.json")
    Draft202012Validator({"$defs": whole["$defs"], "$ref": f"#/$defs/{command}"}).validate(table)


def invoked(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*(str(w) for w in words), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found
