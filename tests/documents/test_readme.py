"""The README names tests as evidence; each must exist, and each feature's row must name one."""

from __future__ import annotations

import re

from support.paths import ROOT

TESTS = ROOT / "tests"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> list[list[str]]:
    """The cells of each row of the table under a heading."""
    text = README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_test_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", README))
    found = {
        name for file in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 20
    assert named <= found | {file.stem for file in TESTS.rglob("test_*.py")}, named - found


def test_every_promise_and_every_feature_names_its_test() -> None:
    for title in ("What is exact", "What is folded"):
        rows = section(title)
        assert len(rows) > 6
        assert all("`test_" in row[-1] for row in rows), title
