"""A format is one object: all facts about it, what it measures, and what people are told of that."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
from support.paths import ROOT, VERSION_1

from wlora_merge import constants
from wlora_merge.export_options import ExportOptions
from wlora_merge.exporters.format import Measures
from wlora_merge.exporters.formats import FORMATS


def test_the_formats_are_those_of_the_command_line() -> None:
    assert tuple(FORMATS) == constants.FORMATS
    assert [name for name, kind in FORMATS.items() if kind.is_adapter] == ["lora"]


def test_nothing_in_the_room_compares_a_formats_name_outside_its_own_file() -> None:
    for file in sorted((ROOT / "wlora_merge" / "exporters").glob("*.py")):
        if file.stem.removesuffix("_format") in FORMATS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            names = {part.value for part in operands if isinstance(part, ast.Constant)} & set(FORMATS)
            assert not names, f"{file.name}:{node.lineno} asks whether a format is {names}"  # type: ignore[attr-defined]


def measured(kind: str, table: dict[str, Any]) -> Measures:
    return FORMATS[kind].measures_of(table).model_validate(table)


QUANTIZED = {"file": "onnx/model_q4.onnx", "bytes": 9, "largest_difference": 0.5, "relative": 0.25, "same_choice": 0.75}
TRACED = {"inputs": ["x"], "outputs": ["y"], "opset": 20, "largest_difference": 2e-6}


@pytest.mark.parametrize(
    ("kind", "table", "card", "line"),
    [
        ("dense", {}, "", ""),
        ("dense", {"untied": ["lm_head.weight"]}, "", ""),
        (
            "lora",
            {"r": 8, "relative_error": 0.5, "energy_kept": 0.75, "modules": {"q": {"relative_error": 0.5}}},
            "One LoRA of r = lora_alpha = 8: relative error 5.00e-01 against the mixture, 75.0000% of its squared norm kept.",
            "r = 8, relative error 5.00e-01, energy kept 75.0000%.",
        ),
        (
            "onnx", TRACED, "ONNX Runtime's outputs are within 2.00e-06 of PyTorch's.",
            "Largest difference from PyTorch 2.00e-06.",
        ),
        (
            "onnx",
            TRACED | {"quantized": QUANTIZED},
            "ONNX Runtime's outputs are within 2.00e-06 of PyTorch's. `onnx/model_q4.onnx` has quantized weights: its outputs are "
            "off by 2.50e-01 of the largest, same choice 75.0%; transformers.js loads it with `dtype: 'q4'`.",
            "Largest difference from PyTorch 2.00e-06. onnx/model_q4.onnx: off by 2.50e-01 of the largest, same choice 75.0%.",
        ),
        (
            "onnx", {"onnx_base": {"model.onnx": "0"}, "rewritten": 7, "dtypes": ["float32"]}, "",
            "7 weights of there/model.onnx rewritten.",
        ),
        ("onnx", {"same_tokens": 0.5}, "", "50.0% of the greedy tokens are PyTorch's."),
    ],
)  # fmt: skip
def test_what_was_measured_says_itself_what_the_card_and_the_command_line_tell(
    kind: str, table: dict[str, Any], card: str, line: str
) -> None:
    found = measured(kind, table)
    assert found.table() == table
    assert found.card() == card
    assert found.line(ExportOptions(format=kind, onnx_base="there/model.onnx")) == line


@pytest.mark.parametrize("kind", list(FORMATS))
def test_what_the_version_before_measured_is_of_the_same_kind(kind: str) -> None:
    table = json.loads((VERSION_1 / f"{kind}.json").read_text())["report"]
    found = measured(kind, table)
    assert found.table() == table
    assert found.rank == table.get("r")
