"""CONTRIBUTING's map of the code is the code's own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wlora_merge"
REACHES_DOWN = {("mixture", "attachment")}


def places() -> dict[str, int]:
    """Module or folder of modules -> its line in the map."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = text[text.index("wlora_merge/\n") : text.index("recipes/\n")].splitlines()[1:]
    return {name: number for number, line in enumerate(lines) for name in re.findall(r"(\w+)(?:\.py|/) ", line + " ")}


def imports(file: Path) -> Iterator[str]:
    """The rooms of the package that a file imports, wherever it does; what is for types alone left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    here = ["wlora_merge", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            prefix = here[: len(here) - node.level + 1] if node.level else []
            parts = [*prefix, *(node.module or "").split(".")] if node.module else prefix
            if parts[:1] == ["wlora_merge"]:
                yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_every_file_imports_only_what_stands_above_it_in_the_map() -> None:
    place = places()
    rooms = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.name == "writers"
    }
    assert rooms - set(place) == {"__init__", "__main__"}
    wrong = {
        (room, found)
        for file in PACKAGE.rglob("*.py")
        if (room := file.relative_to(PACKAGE).parts[0].removesuffix(".py")) in place
        for found in imports(file)
        if found in place and place[found] > place[room]
    }
    assert wrong == REACHES_DOWN
