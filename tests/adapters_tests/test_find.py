"""Many adapters at once: those of a folder, and those of a list."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wlora_merge.adapters.find import find_adapters
from wlora_merge.errors import AdapterError


def made(root: Path, *folders: str) -> Path:
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "adapter_config.json").write_text("{}")
    return root


def test_every_peft_folder_below_a_folder_in_natural_order(tmp_path: Path) -> None:
    made(tmp_path, "task10", "task2", "task1/inner", "b", ".cache/x", "task1")
    (tmp_path / "no adapter").mkdir()
    found = find_adapters(tmp_path)
    assert [name for name, _ in found] == ["b", "task1", "inner", "task2", "task10"]
    assert dict(found)["inner"] == str(tmp_path / "task1" / "inner")
    assert find_adapters(str(tmp_path / "task2")) == [("task2", str(tmp_path / "task2"))]


def test_a_last_part_that_repeats_is_told_apart_by_the_path_below_the_folder(tmp_path: Path) -> None:
    made(tmp_path, "sst2/checkpoint-9", "sst2/checkpoint-10", "subj/checkpoint-10")
    names = [name for name, _ in find_adapters(tmp_path)]
    assert names == ["checkpoint-9", "sst2.checkpoint-10", "subj.checkpoint-10"]
    made(tmp_path, "a.b/c", "a/b.c", "c", "b.c")
    with pytest.raises(AdapterError, match=r"two adapters are called 'a\.b\.c'"):
        find_adapters(tmp_path)


def test_links_to_adapters_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    made(tmp_path / "real", "a")
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "linked").symlink_to(tmp_path / "real" / "a")
    (zoo / "up").symlink_to(zoo)
    assert find_adapters(zoo) == [("linked", str(zoo / "linked"))]


def test_a_list_has_names_comments_and_paths_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "zoo/a", "zoo/b", "zoo/c=d")
    file = tmp_path / "zoo" / "list.txt"
    file.write_text(
        f"\ufeff# all of them\n\n./b\nfirst = a  # the best\norg/some-lora@abc123\nx={tmp_path}/zoo/a\nn=c=d\nc=d\n".replace(
            "\nc=d\n", "\n"
        )
    )
    monkeypatch.chdir("/")
    folder = tmp_path / "zoo"
    assert find_adapters(file) == [
        ("b", str(folder / "b")), ("first", str(folder / "a")), ("some-lora", "org/some-lora@abc123"), ("x", str(folder / "a")),
        ("n", str(folder / "c=d")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb/c/../nowhere!\n", r"list\.txt, line 3: .*names neither a folder nor a hub id"),
        ("./nowhere\n", r"list\.txt, line 1: .*names neither"),
        ("a\nx=\n", r"list\.txt, line 2: .*names neither"),
        ("a\na b=a\n", r"list\.txt, line 2: adapter name 'a b' may hold letters"),
        ("mix=a\n", r"list\.txt, line 1: adapter name 'mix' is a word of"),
        ("a\nother=b\na\n", r"two adapters are called 'a'"),
        ("# nothing\n\n", r"list\.txt: lists no adapter"),
        ("", r"list\.txt: lists no adapter"),
        ("a\0\n", r"line 1"),
    ],
)
def test_a_broken_list_is_one_sentence_with_the_number_of_its_line(tmp_path: Path, text: str, message: str) -> None:
    made(tmp_path, "a", "b")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(AdapterError, match=message) as error:
        find_adapters(tmp_path / "list.txt")
    assert "\n" not in str(error.value)


def test_what_is_neither_a_folder_of_adapters_nor_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="empty: no PEFT folder lies in it"):
        find_adapters(tmp_path / "empty")
    with pytest.raises(AdapterError, match="nowhere: no such folder or file"):
        find_adapters(tmp_path / "nowhere")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x02\xff")
    with pytest.raises(AdapterError, match="is no text"):
        find_adapters(tmp_path / "pickle.bin")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterError, match="not a regular file"):
        find_adapters(tmp_path / "pipe")
