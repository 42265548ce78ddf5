"""The streamed dense export against an in-memory float64 reference, and its bytes against the base's."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import assert_verified, make_adapter, tiny_bert, tiny_llama

from wlora_merge.errors import WloraMergeError, WloraMergeWarning
from wlora_merge.exporters import dense_format, stream
from wlora_merge.exporters.export import export
from wlora_merge.io.safetensors_file import read_header
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.models.config_spellings import older_spellings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("zoo")
    model = tiny_llama(hidden_size=24, intermediate_size=37, num_attention_heads=3, num_key_value_heads=1)
    model.to(torch.bfloat16).save_pretrained(root / "base", max_shard_size="4kB")
    model.float()
    folders = [
        make_adapter(model, root / "a", 1, r=3, target_modules=["q_proj", "down_proj"]),
        make_adapter(model, root / "b", 2, r=2, target_modules=["down_proj", "up_proj"]),
    ]
    return root / "base", folders


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def reference(zoo: tuple[Path, list[Path]], weights: list[float] | None = None) -> dict[str, torch.Tensor]:
    """The float64 sum, with our gains but formed as whole matrices."""
    base, folders = zoo
    inputs = find_inputs(mix(base, folders, weights=weights))
    sums = {name: tensor.double() for name, tensor in tensors_of(base).items()}
    for delta in inputs.deltas:
        gains = inputs.mixture.gains_of(delta)
        sums[f"{delta.module}.weight"] += (delta.lora_B.double() * gains) @ delta.lora_A.double()
    return sums


def test_the_base_of_these_tests_has_shards_with_one_tensor_and_with_no_target(zoo: tuple[Path, list[Path]]) -> None:
    contents = [list(read_header(f).entries) for f in sorted(zoo[0].glob("*.safetensors"))]
    assert any(len(names) == 1 for names in contents)
    assert any(not any(t in n for n in names for t in ("q_proj", "down_proj", "up_proj")) for names in contents)


def test_a_sharded_base_keeps_its_shards_its_index_and_its_untouched_bytes(
    zoo: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, folders = zoo
    export(mix(base, folders), "dense", tmp_path / "out")
    out = tmp_path / "out"
    assert {f.name for f in base.glob("model*")} == {f.name for f in out.glob("model*")}
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (base / index).read_bytes()
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    config = json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config | older_spellings(config)
    changed = ("q_proj", "down_proj", "up_proj")
    expected = reference(zoo)
    for file in base.glob("*.safetensors"):
        before, after = read_header(file), read_header(out / file.name)
        assert before.raw == after.raw
        ours, theirs = (out / file.name).read_bytes(), file.read_bytes()
        for name, entry in before.entries.items():
            same = ours[entry.start : entry.end] == theirs[entry.start : entry.end]
            assert same is not any(part in name for part in changed), name
        with safe_open(out / file.name, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - a safe_open is no mapping
                assert torch.equal(opened.get_tensor(name), expected[name].bfloat16()), name


@pytest.mark.parametrize("block", [1, 37, 1000])
def test_a_tensor_larger_than_the_block_is_folded_the_same(
    zoo: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    base, folders = zoo
    export(mix(base, folders), "dense", tmp_path / "whole")
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    export(mix(base, folders), "dense", tmp_path / "blocks")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "blocks" / file.name).read_bytes() == file.read_bytes()


def test_every_spelling_of_the_dtype_follows_dtype(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="30kB")
    file, index = tmp_path / "base" / "config.json", tmp_path / "base" / "model.safetensors.index.json"
    part = {"text_config": {"torch_dtype": "bfloat16", "x": 1}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch_dtype": "bfloat16", "dtype": "bfloat16"} | part))
    table = json.loads(index.read_text())
    count = sum(p.numel() for p in model.parameters())
    assert table["metadata"]["total_parameters"] == count
    table["metadata"]["total_parameters"] = 1
    index.write_text(json.dumps(table))
    folder = make_adapter(model.float(), tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    export(mix(tmp_path / "base", [folder]), "dense", tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config["torch_dtype"], config["dtype"], config["text_config"]] == [
        "float32", "float32", {"torch_dtype": "float32", "x": 1},
    ]  # fmt: skip
    metadata = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata == {"total_parameters": count, "total_size": 4 * count}


@pytest.mark.parametrize("which", ["base", "a"])
def test_an_input_that_is_replaced_while_it_is_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    mixture, name = mix(tmp_path / "base", [folder]), "model" if which == "base" else "adapter_model"
    file = tmp_path / which / f"{name}.safetensors"
    real = dense_format.plan

    def swapped(*args: Any, **options: Any) -> Any:
        planned = real(*args, **options)
        save_file({k: 50 * v for k, v in load_file(file).items()}, tmp_path / "new", {"format": "pt"})
        os.replace(tmp_path / "new", file)
        return planned

    monkeypatch.setattr(dense_format, "plan", swapped)
    with pytest.raises(WloraMergeError, match=f"{file}: changed meanwhile"):
        export(mixture, "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_index_forgot_is_exported_as_transformers_loads_it(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="30kB")
    folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    index, name = tmp_path / "base" / "model.safetensors.index.json", "model.layers.1.mlp.down_proj.weight"
    table = json.loads(index.read_text())
    table["weight_map"].pop(name)
    index.write_text(json.dumps(table))
    export(mix(tmp_path / "base", [folder], task="causal-lm"), "dense", tmp_path / "out")
    assert name in json.loads((tmp_path / "out" / index.name).read_text())["weight_map"]
    assert_verified(tmp_path / "out", base=tmp_path / "base", adapters=[f"a={folder}"])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtype_casts_every_floating_tensor_after_the_sum(
    zoo: tuple[Path, list[Path]], tmp_path: Path, dtype: str
) -> None:
    base, folders = zoo
    export(mix(base, folders), "dense", tmp_path / "out", dtype=dtype)
    got, expected = tensors_of(tmp_path / "out"), reference(zoo)
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name].to(DTYPES[dtype])), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype


def test_max_shard_size_lays_the_tensors_out_anew(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    export(mix(base, folders), "dense", tmp_path / "one", max_shard_bytes=10**9)
    assert [f.name for f in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    export(mix(base, folders), "dense", tmp_path / "many", max_shard_bytes=8000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert set(one) == set(many) == set(index["weight_map"])
    assert all(torch.equal(one[n], many[n]) for n in one)
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / "many" / file).entries
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    sizes = [[entry.nbytes for entry in read_header(file).entries.values()] for file in files]
    assert len(sizes) > 3
    assert all(sum(each) <= 8000 or len(each) == 1 for each in sizes), sizes
    assert all(sum(each) + then[0] > 8000 for each, then in itertools.pairwise(sizes)), sizes
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_padding_and_metadata_of_a_header_are_kept(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    single = tmp_path / "single"
    single.mkdir()
    (single / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(tensors_of(base), single / "model.safetensors", {"format": "pt", "note": "x" * 13})
    data = (single / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    padded = (size + 64).to_bytes(8, "little") + data[8 : 8 + size] + b" " * 64 + data[8 + size :]
    (single / "model.safetensors").write_bytes(padded)
    export(mix(single, folders), "dense", tmp_path / "out")
    out = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert out[: 8 + size + 64] == padded[: 8 + size + 64]


def test_the_manifest_has_the_digest_of_every_file(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    export(mix(base, folders), "dense", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "wlora_merge.json").read_text())
    files = {f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert set(manifest["files"]) == files - {"wlora_merge.json"}
    for name, row in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == row["sha256"]


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie_and_however_many_threads(
    zoo: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    base, folders = zoo
    export(mix(base, folders), "dense", tmp_path / "here")
    there = tmp_path / "elsewhere" / "deep"
    shutil.copytree(base.parent, there)
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    moved = mix(there / "base", [there / f.name for f in folders])
    export(moved, "dense", tmp_path / "there")
    for file in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (6.5e4, "float16")])
def test_a_nan_in_the_base_or_an_overflow_names_the_tensor_and_leaves_nothing(
    zoo: tuple[Path, list[Path]], tmp_path: Path, value: float, dtype: str
) -> None:
    base, folders = zoo
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors: dict[str, Any] = tensors_of(base)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = value * (1.1 if dtype == "float16" else 1)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    said = name.replace(".", r"\.") + (".*this base is broken" if dtype == "bfloat16" else ".*overflows.*wider --dtype")
    with pytest.raises(WloraMergeError, match=said):
        export(mix(broken, folders), "dense", tmp_path / "out", dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_of_a_tensor_that_no_adapter_changes_a_nan_is_refused_by_name_and_an_infinity_copied(
    zoo: tuple[Path, list[Path]], tmp_path: Path, value: float, dtype: str | None
) -> None:
    """Gemma 4 keeps limits of minus and plus infinity in buffers of a sound checkpoint."""
    base, folders = zoo
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors: dict[str, Any] = tensors_of(base)
    name = "model.layers.1.post_attention_layernorm.weight"
    tensors[name][-1] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    if value != value:
        with pytest.raises(WloraMergeError, match=name.replace(".", r"\.") + ".*holds a NaN"):
            export(mix(broken, folders), "dense", tmp_path / "out", dtype=dtype)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]
        return
    if dtype is None:
        with pytest.warns(WloraMergeWarning, match=f"1 tensors of the base hold an infinity, first {name!r}"):
            export(mix(broken, folders), "dense", tmp_path / "out")
    else:
        export(mix(broken, folders), "dense", tmp_path / "out", dtype=dtype)
    assert torch.equal(tensors_of(tmp_path / "out")[name], tensors[name].to(tensors_of(tmp_path / "out")[name].dtype))


def test_a_lora_that_overflows_in_half_precision_names_its_tensor_and_leaves_nothing(
    zoo: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, folders = zoo
    mixture = mix(base, folders, delta_scale=1e8)
    with pytest.raises(WloraMergeError, match=r"lora_B\.weight' of the LoRA overflows in torch\.float16"):
        export(mixture, "lora", tmp_path / "out", dtype="float16")
    assert not any(tmp_path.iterdir())


def test_a_head_that_overflows_in_half_precision_names_its_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(tiny_bert().config).eval()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["query"])
    mixture = mix(tmp_path / "base", [folder], task="text-classification")
    mixture.head = {"classifier.weight": torch.full((2, 32), 1e6), "classifier.bias": torch.zeros(2)}
    mixture.head_tensors = {name: name for name in mixture.head}
    with pytest.raises(WloraMergeError, match=r"classifier\.weight.*overflows.*--dtype"):
        export(mixture, "dense", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_a_sum_that_overflows_in_float32_is_not_told_to_widen_its_dtype(
    zoo: tuple[Path, list[Path]], tmp_path: Path, kind: str
) -> None:
    base, folders = zoo
    mixture = mix(base, folders, delta_scale=1e45)
    with pytest.raises(WloraMergeError, match=r"overflows.*delta_scale") as error:
        export(mixture, kind, tmp_path / "out", dtype="float32")
    assert "--dtype" not in str(error.value)


def test_a_base_truncated_while_it_is_read_is_one_clear_error(
    zoo: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    base, folders = zoo
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    mixture = mix(copy, folders)
    real = stream.write_files

    def truncate_first(*args: Any, **options: Any) -> dict[str, str]:
        victim = sorted(copy.glob("*.safetensors"))[0]
        victim.write_bytes(victim.read_bytes()[:-100])
        return real(*args, **options)

    monkeypatch.setattr(dense_format, "write_files", truncate_first)
    with pytest.raises(WloraMergeError, match="changed"):
        export(mixture, "dense", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_an_export_with_a_new_head_does_not_import_peft(tmp_path: Path) -> None:
    """Transformers it must ask how the class with the head calls its tensors."""
    from transformers import BertForSequenceClassification

    tiny_bert(max_position_embeddings=24).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["query"], modules_to_save=["classifier"])
    attach(model, [folder], head=["classifier"])
    mixture = Mixture.from_model(model, tmp_path / "base")
    assert mixture.head_tensors == {"classifier.weight": None, "classifier.bias": None}
    mixture.config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    mixture.save(tmp_path / "m")
    code = (
        "import sys; from wlora_merge import export;"
        f"export({str(tmp_path / 'm')!r}, 'dense', {str(tmp_path / 'out')!r});"
        "print(sorted({'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["classifier.weight"], model.classifier.weight)


def test_a_plain_export_imports_neither_transformers_nor_peft(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """What the model is for is not asked of transformers where nobody needs to know."""
    base, folders = zoo
    mix(base, folders, tmp_path / "m")
    code = (
        "import sys; from wlora_merge import export;"
        f"export({str(tmp_path / 'm')!r}, 'dense', {str(tmp_path / 'out')!r});"
        "print(sorted({'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_head_that_the_files_call_otherwise_takes_its_place(tmp_path: Path) -> None:
    """A checkpoint with the prefix of another class: `model.classifier.weight` is replaced, not joined by a second one."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert().config).eval()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({f"model.{k}": v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["query"])
    attach(model, [folder], head=["classifier"])
    mixture = Mixture.from_model(model, tmp_path / "base")
    assert mixture.head_tensors["classifier.weight"] == "model.classifier.weight"
    export(mixture, "dense", tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {k.removeprefix("model.") for k in load_file(file)}


def test_files_that_are_not_hashed_are_the_same_files(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    inputs = find_inputs(mix(base, folders))
    files = dense_format.plan_dense(inputs, None).files
    for name in ("hashed", "plain"):
        (tmp_path / name).mkdir()
    hashed = stream.write_files(files, tmp_path / "hashed", inputs.mixture)
    assert stream.write_files(files, tmp_path / "plain", inputs.mixture, hashed=False) == {}
    written = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "plain").iterdir()}
    assert written == hashed
