"""A checkpoint folder: the index is the authority, and everything that is not safetensors is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_bert, tiny_llama

from wlora_merge.errors import BaseModelError, WloraMergeError
from wlora_merge.models.base_model import open_base
from wlora_merge.models.files import INDEX, SINGLE


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    return tmp_path / "base"


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | changes))


def place(folder: Path, tensor: str, file: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][tensor] = file
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path, kind: type[WloraMergeError] = BaseModelError) -> str:
    with pytest.raises(kind) as error:
        open_base(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_single_file_is_opened_and_read(single: Path) -> None:
    base, expected = open_base(single), load_file(single / SINGLE)
    assert base.model_type == "llama"
    assert list(base.headers) == [SINGLE]
    assert set(base.entries) == set(expected)
    assert all(torch.equal(base.read(name), tensor) for name, tensor in expected.items())
    assert list(base.sha256()) == [SINGLE]


def test_a_sharded_checkpoint_is_opened_in_the_order_of_its_files(sharded: Path) -> None:
    base, whole = open_base(sharded), dict(tiny_llama().state_dict())
    assert len(base.headers) > 2
    assert list(base.headers) == sorted(base.headers)
    assert set(base.entries) == set(whole)
    assert all(torch.equal(base.read(name), tensor) for name, tensor in whole.items())


def test_shards_that_the_index_does_not_name_are_ignored(sharded: Path) -> None:
    before = open_base(sharded)
    save_file({"model.norm.weight": torch.zeros(3), "x": torch.zeros(1)}, sharded / "model-00001-of-00002.safetensors")
    (sharded / "consolidated.safetensors").write_bytes(b"broken")
    after = open_base(sharded)
    assert after.entries == before.entries
    assert after.sha256() == before.sha256()


def test_of_a_single_file_and_shards_that_which_transformers_loads_is_read(sharded: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama(seed=7).save_pretrained(tmp_path / "other")
    save_file(load_file(tmp_path / "other" / SINGLE), sharded / SINGLE, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    base = open_base(sharded)
    assert all(torch.equal(base.read(name), loaded[name]) for name in base.entries)


def test_the_modules_that_modules_json_names_are_carried_but_not_hidden_files(single: Path) -> None:
    rows = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    rows += [{"path": p, "type": "x"} for p in ("1_SpladePooling", "2_LayerNorm")]
    (single / "modules.json").write_text(json.dumps(rows))
    for name in (
        "1_SpladePooling/config.json",
        "2_LayerNorm/config.json",
        "2_LayerNorm/.DS_Store",
        "3_Other/config.json",
    ):
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text("{}")
    carried = {str(name) for name in open_base(single).carried_files()}
    assert {"modules.json", "1_SpladePooling/config.json", "2_LayerNorm/config.json"} <= carried
    assert not carried & {"2_LayerNorm/.DS_Store", "3_Other/config.json"}
    (single / "modules.json").write_text('{"path": 1}')
    assert "modules.json" in {str(name) for name in open_base(single).carried_files()}
    (single / "modules.json").write_text('[{"path": "1_Pooling"}]')
    with pytest.raises(BaseModelError, match="is no list of modules"):
        open_base(single).carried_files()


@pytest.mark.parametrize("name", ["a:b.txt", "caf\udce9.txt"])
def test_a_file_whose_name_no_manifest_takes_is_refused(single: Path, name: str) -> None:
    (single / name).write_text("x")
    with pytest.raises(BaseModelError, match="rename it"):
        open_base(single).carried_files()


def test_a_link_to_nothing_is_refused(single: Path) -> None:
    (single / "tokenizer.json").symlink_to("gone")
    with pytest.raises(BaseModelError, match=r"tokenizer\.json"):
        open_base(single).carried_files()


def test_a_tensor_that_lies_in_two_shards_is_read_where_the_index_says(sharded: Path) -> None:
    name = "model.norm.weight"
    home = open_base(sharded).entries[name].file
    other = next(f for f in sorted(sharded.glob("model-*.safetensors")) if f != home)
    save_file(load_file(other) | {name: torch.full((32,), 7.0)}, other)
    assert open_base(sharded).entries[name].file == home


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x.bin",
        ".x.safetensors",
        3,
        None,
        ["x"],
    ],
)
def test_an_index_that_names_anything_but_a_plain_file_is_refused(sharded: Path, file: Any) -> None:
    place(sharded, "model.norm.weight", file)
    assert "expected a plain .safetensors file name" in refused(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = next(sharded.glob("model-00002-*"))
    shard.unlink()
    assert f"names the shard {shard.name}, which is not there" in refused(sharded)


def test_a_tensor_missing_from_its_shard_is_named(sharded: Path) -> None:
    file = open_base(sharded).entries["model.norm.weight"].file
    place(sharded, "model.of_the_index_alone", file.name)
    message = refused(sharded)
    assert str(file) in message
    assert "lacks tensor 'model.of_the_index_alone'" in message


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: Any) -> None:
    edit_index(sharded, weight_map=weight_map)
    assert "has no weight_map" in refused(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_broken_table_is_named(sharded: Path, name: str, text: str) -> None:
    (sharded / name).write_text(text)
    assert name in refused(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = next(sharded.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused(sharded, WloraMergeError)


def test_a_folder_without_a_config_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    assert "has no config.json" in refused(single)


def test_a_folder_without_weights_is_refused(single: Path) -> None:
    (single / SINGLE).unlink()
    assert "has neither model.safetensors nor" in refused(single)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "consolidated.00.pth"])
def test_a_pickle_is_never_opened(single: Path, name: str) -> None:
    (single / SINGLE).rename(single / name)
    assert f"pickles ({name})" in refused(single)


@pytest.mark.parametrize("config", [True, False])
def test_gguf_is_named(single: Path, config: bool) -> None:
    (single / SINGLE).rename(single / "model-Q4_K_M.gguf")
    if not config:
        (single / "config.json").unlink()
    assert "GGUF" in refused(single)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none", WloraMergeError)


def test_a_tensor_is_found_with_and_without_the_model_prefix(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    base = open_base(tmp_path)
    name = "encoder.layer.0.attention.self.query.weight"
    for spelling in (name, f"bert.{name}"):
        entry = base.find_tensor(spelling)
        assert entry is not None
        assert entry.name == name
    assert base.find_tensor("classifier.weight") is None


# ---------------------------------------------------------------------------------------------------------- tied


def test_a_base_with_an_adapter_of_its_own_is_refused_by_name(single: Path) -> None:
    """Transformers adds it when it loads the folder, and a fold would leave it out."""
    (single / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        BaseModelError, match=r"adapter_config\.json: this base has an adapter of its own beside its weights"
    ):
        open_base(single)


# ------------------------------------------------------------------------------------------------------- carried


def test_what_a_server_reads_is_carried_and_weights_and_cards_are_not(single: Path) -> None:
    kept = [
        "LICENSE", "added_tokens.json", "additional_chat_templates/tools.jinja", "chat_template.jinja", "merges.txt", "modules.json",
        "modeling_own.py", "preprocessor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    ]  # fmt: skip
    left = [
        "README.md", "wlora_merge.json", "training_args.bin", "pytorch_model.bin", "tf_model.h5",
        "model.safetensors.index.json.bak/x", "onnx/model.onnx", ".gitattributes", ".cache/x", "optimizer.pt", "model.gguf",
        "2_Dense/pytorch_model.bin", "checkpoint-5/config.json", "flax_model.msgpack", "pytorch_model.bin.index.json",
    ]  # fmt: skip
    for name in (*kept, *left):
        (single / name).parent.mkdir(parents=True, exist_ok=True)
        (single / name).write_text("[]" if name == "modules.json" else "x")
    found = [p.as_posix() for p in open_base(single).carried_files()]
    assert sorted(found) == sorted([*kept, "config.json", "generation_config.json"])


def test_a_dense_layer_whose_weights_are_a_pickle_is_refused_and_not_left_out(single: Path) -> None:
    for name in ("config.json", "pytorch_model.bin"):
        (single / "2_Dense").mkdir(exist_ok=True)
        (single / "2_Dense" / name).write_text("{}")
    with pytest.raises(
        BaseModelError, match=r"2_Dense/pytorch_model\.bin: is no safetensors.*2_Dense/model\.safetensors"
    ):
        open_base(single).carried_files()
    (single / "2_Dense" / "model.safetensors").write_text("x")
    assert Path("2_Dense/model.safetensors") in open_base(single).carried_files()
    assert Path("2_Dense/pytorch_model.bin") not in open_base(single).carried_files()


def test_the_state_of_a_fit_is_never_carried(tmp_path: Path, llama_zoo: Callable[..., Any]) -> None:
    import shutil

    base, _ = llama_zoo()
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    before = open_base(tmp_path / "base").carried_files()
    for name in ("mixture.fit-state", "mixture.fit-state.partial", "mixture.fit-state-1"):
        (tmp_path / "base" / name).write_bytes(b"state")
    assert open_base(tmp_path / "base").carried_files() == before
    assert Path("tokenizer.json") in before
