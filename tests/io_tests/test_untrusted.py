"""Files of an input folder: links, pipes, and tables that are not what they should be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wlora_merge.adapters.adapter import load_adapter
from wlora_merge.adapters.keys import pattern_value
from wlora_merge.cli.recipe import read_recipe
from wlora_merge.errors import AdapterError, RecipeError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.model_card import _LICENSE, _front, _named
from wlora_merge.io.untrusted import MAX_TABLE_BYTES, find_file, is_plain_file_name, parse_yaml, read_bytes, read_json
from wlora_merge.mixture.mix import mix
from wlora_merge.models.base_model import open_base
from wlora_merge.models.names import natural_key
from wlora_merge.text import redacted


def test_a_file_is_found_and_a_missing_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to("a.json")
    assert find_file(tmp_path, "a.json", WloraMergeError) == tmp_path / "a.json"
    assert find_file(tmp_path, "b.json", WloraMergeError) == tmp_path / "b.json"
    assert find_file(tmp_path, "c.json", WloraMergeError) is None


def test_a_link_that_leaves_the_folder_or_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../secret")
    (folder / "gone.json").symlink_to("nothing")
    with pytest.raises(AdapterError, match="outside its folder"):
        find_file(folder, "config.json", AdapterError)
    with pytest.raises(AdapterError, match="not there"):
        find_file(folder, "gone.json", AdapterError)
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(AdapterError, match="outside its folder"):
        find_file(tmp_path / "link", "config.json", AdapterError)


def test_a_snapshot_of_the_hub_cache_may_link_to_its_own_blobs_and_to_no_others(tmp_path: Path) -> None:
    for repository in ("models--org--one", "models--org--two"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs" / "abc").write_text("{}")
    snapshot = tmp_path / "models--org--one" / "snapshots" / "c0ffee"
    (snapshot / "1_Pooling").mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/abc")
    (snapshot / "foreign.json").symlink_to("../../../models--org--two/blobs/abc")
    assert find_file(snapshot, "config.json", WloraMergeError)
    assert find_file(snapshot, Path("1_Pooling/config.json"), WloraMergeError)
    with pytest.raises(WloraMergeError, match="outside its folder"):
        find_file(snapshot, "foreign.json", WloraMergeError)


def test_a_folder_a_pipe_and_a_device_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(WloraMergeError, match="expected a file"):
            find_file(tmp_path, name, WloraMergeError)
    with pytest.raises(WloraMergeError, match="not a regular file"):
        read_bytes(tmp_path / "pipe", WloraMergeError)
    with pytest.raises(WloraMergeError, match="not a regular file"):
        read_bytes(Path("/dev/zero"), WloraMergeError)


def test_a_table_of_any_size_or_with_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    with open(file, "wb") as stream:
        stream.truncate(MAX_TABLE_BYTES + 1)
    with pytest.raises(WloraMergeError, match="longer than"):
        read_json(file, WloraMergeError)
    for text in ('{"a": "\\ud800"}', "[" * 100_000, '{"a": ' + "1" * 10_000 + "}"):
        file.write_text(text)
        with pytest.raises(WloraMergeError, match="not valid JSON"):
            read_json(file, WloraMergeError)
    file.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(file, WloraMergeError) == {"a": "😀"}


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [id]",
        "!!bool maybe",
        '!!int ""',
        "!!timestamp x",
        "2026-13-45",
        "a: b: c",
        "[" * 5000,
    ],
)
def test_yaml_that_is_none_is_a_value_error_and_runs_nothing(text: str) -> None:
    with pytest.raises(ValueError):
        parse_yaml(text)


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def test_a_recipe_of_ten_lines_that_means_ten_billion_values_is_refused_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(ALIASES + "base: x\nadapters: *j\nmix: {}\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 430
    (tmp_path / "README.md").write_text(f"---\n{ALIASES}license: *j\n---\n")
    assert _named(_front(tmp_path), "license", _LICENSE) == []


@pytest.mark.parametrize("text", ["weights: [[1]]", "weights: [true]", f"delta_scale: {10**400}", "weights: &a [*a]"])
def test_numbers_of_a_recipe_are_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(f"base: b\nadapters: [x]\nmix:\n  {text}\n")
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "r.yaml")


def test_a_pattern_that_would_match_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wlora_merge.adapters.keys.PATTERN_SECONDS", 0.2)
    with pytest.raises(AdapterError, match="takes more than"):
        pattern_value({"(a|aa)+=": 3}, "a" * 60, 8)


def test_numbers_in_names_that_int_cannot_read_sort_as_words() -> None:
    assert natural_key("layers.²") == ((-1, "layers"), (-1, "²"))
    assert natural_key("9" * 5000)[0][0] == -1


def test_credentials_are_taken_out_of_messages() -> None:
    token = "hf_" + "a1B2" * 8
    assert redacted(f"https://me:{token}@hub/x {token} hf_hub") == "https://***@hub/x hf_*** hf_hub"


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_base_with_a_link_out_of_its_folder_is_not_exported(
    llama_zoo: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    source, adapters = llama_zoo()
    base = tmp_path / "base"
    base.mkdir()
    for file in source.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (tmp_path / "outside").write_bytes((base / name).read_bytes() if (base / name).exists() else b"secret")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to("../outside")
    with pytest.raises(WloraMergeError, match="outside its folder"):
        export(mix(base, adapters), "dense", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "outside"]


def test_a_config_of_wrong_types_is_refused(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    source, _ = llama_zoo()
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in (
        {"architectures": [3]},
        {"architectures": "x"},
        {"vocab_size": []},
        {"text_config": {"vocab_size": {}}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(WloraMergeError, match=r"config\.json"):
            open_base(tmp_path)


def test_a_pickle_given_by_its_name_is_refused_with_what_converts_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(WloraMergeError, match=r"is a pickle.*save_pretrained"):
        load_adapter(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "c:x", "a\0b", None, 3])
def test_what_is_no_plain_file_name(name: object) -> None:
    assert not is_plain_file_name(name)
