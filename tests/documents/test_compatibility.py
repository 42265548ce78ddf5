"""docs/compatibility.md names tests as evidence; each must exist, and each promise and each feature must name one."""

from __future__ import annotations

import re

import pytest
from support.pages import PAGES
from support.paths import ROOT

TESTS = ROOT / "tests"
PAGE = PAGES["docs/compatibility.md"].read_text("utf-8")


def section(title: str) -> list[list[str]]:
    """The cells of each row of the table under a heading."""
    text = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for page in PAGES.values() for name in re.findall(r"`(test_\w+)(?:\.py)?`", page.read_text("utf-8"))}
    found = {
        name for file in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 20
    assert named <= found | {file.stem for file in TESTS.rglob("test_*.py")}, named - found


@pytest.mark.parametrize("title", ["What is exact", "What is folded"])
def test_every_promise_and_every_feature_names_its_test(title: str) -> None:
    rows = section(title)
    assert len(rows) > 6
    assert all("`test_" in row[-1] for row in rows)
