"""README.md, docs and their kin: links and anchors lead somewhere, and what is made from the code is what the code says."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.pages import PAGES
from support.paths import ROOT

from wlora_merge.exporters.serving import SERVERS

OTHER_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/bench_fit/README.md", "recipes/zoo/README.md")
LINKED = [*PAGES.values(), *(ROOT / name for name in OTHER_PAGES)]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def script(name: str) -> ModuleType:
    """A script in docs, as a module."""
    found = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@cache
def anchors(page: Path) -> set[str]:
    """What a code host calls the headings of a page: small letters, without marks, with hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    text = FENCED.sub("", page.read_text("utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]


def broken(page: Path) -> list[str]:
    """Links of a page to no file, to no heading of one, or out of the repository."""
    lost = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.exists() and target.is_relative_to(ROOT)
        if not inside or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    assert not broken(page)


def test_a_link_to_no_file_or_no_heading_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A *title*, twice\n[a](#a-title-twice) [b](#no-title) [c](no.md) [d](https://example.org/no)\n")
    assert broken(page) == [
        "#a-title-twice",
        "#no-title",
        "no.md",
    ]  # a page outside the repository has no links of ours


def test_every_page_is_linked_from_the_readme() -> None:
    assert {name for name in PAGES if name != "README.md"} <= set(links(ROOT / "README.md"))


@pytest.mark.parametrize("name", PAGES)
def test_generated_parts_are_what_the_code_says(name: str) -> None:
    page = PAGES[name].read_text("utf-8")
    assert page == script("fill").filled(page), "run `make generate`"
    assert page.count("<!-- generated: ") == page.count("<!-- end of ")


def test_every_key_of_the_files_is_described() -> None:
    rows = re.findall(r"^\| .*`.*$", PAGES["docs/file-formats.md"].read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 60
    assert not [row for row in rows if re.search(r"\|\s*\|$", row)]


def test_the_drawing_is_what_its_script_draws() -> None:
    assert (ROOT / "docs" / "way.svg").read_text("utf-8") == script("draw_way").way(), "run `make generate`"


def test_every_program_has_a_section_with_its_code() -> None:
    page = PAGES["docs/export.md"].read_text("utf-8")
    assert "\n### What was asked\n" in page
    for server in SERVERS.values():
        section = page.partition(f"### {server.title}\n")[2].partition("\n### ")[0]
        assert "```" in section, server.title
        assert server.version in section
        assert server.date in section


def toml(name: str) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    found: dict[str, Any] = tomllib.loads((ROOT / name).read_text("utf-8"))
    return found


def test_every_extra_that_the_readme_names_can_be_installed() -> None:
    table = PAGES["README.md"].read_text("utf-8").partition("| extra |")[2].partition("\n\n")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    extras = set(toml("pyproject.toml")["project"]["optional-dependencies"])
    assert named == extras - {"dev", "quickstart"}  # for a clone


def test_the_changelogs_newest_version_is_the_packages() -> None:
    found = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert found[0] == toml("pyproject.toml")["project"]["version"]


def test_each_line_of_the_changelog_is_short_and_has_its_page() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    lines = [" ".join(line.split()) for line in re.findall(r"^- (.*(?:\n {2}.*)*)", text, re.MULTILINE)]
    assert len(lines) > 50
    for line in lines:
        (page,) = re.findall(r"\]\((docs/[\w.-]+\.md)[)#]", line)
        assert len(line.rpartition(" [")[0].split()) <= 15, line
        assert (ROOT / page).exists(), line
