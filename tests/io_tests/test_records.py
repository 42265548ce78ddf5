"""A table from elsewhere becomes a typed record, or one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from wlora_merge.errors import MixtureError
from wlora_merge.io.records import AS_WRITTEN, UNCHANGED, Record, checked_by, one_of, read_record


def refuse_even(value: int) -> None:
    if value % 2 == 0:
        raise ValueError("is even, expected an odd number")


class Part(Record):
    name: str
    size: float = 1.0
    odd: Annotated[int, checked_by(refuse_even)] = 1


class Whole(Record):
    kind: Annotated[str, one_of(("a", "b"))]
    parts: list[Part] = Field(default_factory=list)
    by_name: dict[str, Part] = Field(default_factory=dict)
    kept: Annotated[dict[str, int], AS_WRITTEN, UNCHANGED] = Field(default_factory=dict)
    flag: bool = False


FILE = Path("/there/x.json")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "lacks kind"),
        ({"kind": "c"}, "kind is 'c', expected one of a, b"),
        ({"kind": 3}, "kind is 3, expected text"),
        ({"kind": None}, "kind is null, expected text"),
        ({"kind": "a", "parts": {}}, "parts is a table, expected a list"),
        ({"kind": "a", "parts": [{"name": "x"}, {}]}, "lacks parts[1].name"),
        ({"kind": "a", "parts": [[]]}, "parts[0] is a list, expected a table"),
        ({"kind": "a", "by_name": {"x.y": {"name": 1}}}, "by_name['x.y'].name is 1, expected text"),
        ({"kind": "a", "parts": [{"name": "x", "size": True}]}, "parts[0].size is True, expected a number"),
        ({"kind": "a", "parts": [{"name": "x", "size": "1"}]}, "parts[0].size is '1', expected a number"),
        (
            {"kind": "a", "parts": [{"name": "x", "size": float("nan")}]},
            "parts[0].size is nan, expected a finite number",
        ),
        ({"kind": "a", "parts": [{"name": "x", "odd": 2}]}, "parts[0].odd is even, expected an odd number"),
        ({"kind": "a", "parts": [{"name": "x", "odd": 1.0}]}, "parts[0].odd is 1.0, expected a whole number"),
        ({"kind": "a", "flag": 1}, "flag is 1, expected true or false"),
        ({"kind": "a", "kept": {"x": "y"}}, "kept.x is 'y', expected a whole number"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_key_got_expected_and_advice(table: Any, said: str) -> None:
    with pytest.raises(MixtureError) as error:
        read_record(Whole, table, FILE, MixtureError, "make it again")
    assert str(error.value) == f"{FILE}: {said}: make it again."


@pytest.mark.parametrize("value", ["x" * 10_000, 10**4000, [["y" * 1000] * 1000] * 1000])
def test_a_message_stays_short_whatever_the_file_holds(value: Any) -> None:
    for table in ({"kind": value}, {"kind": "a", "flag": value}, {"kind": "a", "by_name": {str(value)[:9000]: value}}):
        with pytest.raises(MixtureError) as error:
            read_record(Whole, table, FILE, MixtureError, "make it again")
        assert len(str(error.value)) < 300


def test_a_key_that_is_not_known_is_passed_over_but_where_the_table_is_kept_as_it_was_written() -> None:
    table = {"kind": "a", "later": 1, "kept": {"b": 2, "a": 1}}
    record = read_record(Whole, table, FILE, MixtureError, "make it again")
    assert "later" not in record.model_dump()
    assert json.dumps(record.kept) == '{"b": 2, "a": 1}'
    assert record.model_dump()["kept"] == table["kept"]


def test_a_record_does_not_change() -> None:
    record = read_record(Whole, {"kind": "a"}, FILE, MixtureError, "make it again")
    with pytest.raises(ValueError, match="frozen"):
        record.kind = "b"


def test_pydantic_is_imported_where_a_record_is_read_and_not_before() -> None:
    code = "import sys, wlora_merge, wlora_merge.cli.main, wlora_merge.cli.inspect_tables, wlora_merge.mixture.mix\n"
    code += "print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
