"""PATH_OR_ID -> a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from wlora_merge.errors import WloraMergeError
from wlora_merge.io.hub import ADAPTER_PATTERNS, resolve_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder_is_itself(tmp_path: Path) -> None:
    source = resolve_source(tmp_path, ADAPTER_PATTERNS)
    assert (source.folder, source.hub_id, source.revision) == (tmp_path, None, None)
    assert (source.name, source.location) == (tmp_path.name, str(tmp_path))


def test_a_relative_folder_has_an_absolute_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    source = resolve_source("org/name", ADAPTER_PATTERNS)
    assert (source.hub_id, source.location) == (None, str(tmp_path / "org" / "name"))
    assert resolve_source(".", ADAPTER_PATTERNS).name == tmp_path.name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "./nothing",
        "/nothing/here",
        "~nobody-of-that-name/x",
        "name",
        "a/b/..",
        "a/b/../c",
        "a//b",
        "a\0b",
        "x" * 5000,
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(WloraMergeError, match="no such folder"):
        resolve_source(text, ADAPTER_PATTERNS)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(WloraMergeError, match="no such folder"):
        resolve_source(tmp_path / "f", ADAPTER_PATTERNS)


@pytest.mark.parametrize(
    ("text", "revision"), [("org/name", None), ("org/name@v1", "v1"), (f"org/name@{COMMIT}", COMMIT)]
)
def test_a_hub_id_is_fetched_and_remembered_with_its_commit(
    text: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    source = resolve_source(text, ADAPTER_PATTERNS)
    assert (asked["repo"], asked["revision"], asked["allow_patterns"]) == ("org/name", revision, list(ADAPTER_PATTERNS))
    assert (source.name, source.location, source.revision) == ("org/name", "org/name", COMMIT)


def test_a_folder_of_a_repository_is_fetched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        (tmp_path / COMMIT / "runs" / "checkpoint-100").mkdir(parents=True, exist_ok=True)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    source = resolve_source("org/name/runs/checkpoint-100@v1", ["a.json"])
    assert (asked["repo"], asked["revision"], asked["allow_patterns"]) == (
        "org/name", "v1", ["runs/checkpoint-100/a.json"],
    )  # fmt: skip
    assert (source.folder, source.name) == (tmp_path / COMMIT / "runs/checkpoint-100", "org/name/runs/checkpoint-100")
    with pytest.raises(WloraMergeError, match="the repository org/name has no folder 'other'"):
        resolve_source("org/name/other", ["a.json"])


@pytest.mark.parametrize("error", [OSError("404\nmore"), ValueError("bad id"), OSError()])
def test_what_the_hub_does_not_give_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WloraMergeError, match="no such folder here, and the hub did not give it: ") as raised:
        resolve_source("org/name", ADAPTER_PATTERNS)
    assert "\n" not in str(raised.value)


def test_no_pickle_is_ever_asked_for() -> None:
    from wlora_merge.io.hub import BASE_PATTERNS

    ends = (".bin", ".pt", ".pth", ".pkl", "*")
    assert {p for p in (*BASE_PATTERNS, *ADAPTER_PATTERNS) if p.endswith(ends)} == {"LICENSE*", "NOTICE*"}
