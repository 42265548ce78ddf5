"""A room's `__init__` names its files and imports nothing; no room imports an underscore name of another."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "wlora_merge"
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


def test_the_rooms_are_those_of_the_contract() -> None:
    contract = (ROOT / "pyproject.toml").read_text()
    assert {name for name in ROOMS if f"wlora_merge.{name}" in contract} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_opens_with_a_line_for_each_file_and_imports_nothing(room: str) -> None:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    assert len(tree.body) == 1
    doc = ast.get_docstring(tree) or ""
    assert "must not know" in " ".join(doc.split()) or "knows" in doc
    files = {p.stem for p in (PACKAGE / room).glob("*.py")} - {"__init__"}
    named = {name for line in doc.splitlines() for name in re.findall(r"\w+", line)}
    assert files <= named, f"{sorted(files - named)} have no line"


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """(room, name) of what a file imports from other rooms."""
    here = file.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*here[: len(here) - node.level], *(node.module or "").split(".")]
            yield from ((parts[0], alias.name) for alias in node.names)


def test_no_room_imports_an_underscore_name_of_another() -> None:
    private = {
        (str(file.relative_to(PACKAGE)), name)
        for file in PACKAGE.rglob("*.py")
        for room, name in imported(file)
        if name.startswith("_") and room != file.relative_to(PACKAGE).parts[0] and not name.startswith("__")
    }
    assert private == set()


def test_every_file_of_the_package_that_is_no_python_is_in_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    carried = {
        path for package, globs in data.items() for g in globs for path in (ROOT / package.replace(".", "/")).glob(g)
    }
    others = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others == carried
