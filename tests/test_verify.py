"""verify finds what an export should not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import inputs_of, make_adapter, tiny_bert
from safetensors.torch import load_file, save_file

from wlora_merge.digests import sha256_file
from wlora_merge.errors import VerifyError
from wlora_merge.export import export
from wlora_merge.mix import mix
from wlora_merge.verify import verify


@pytest.fixture
def dense(llama_zoo: Callable[..., Any], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    base, folders = llama_zoo()
    export(mix(base, folders, task="causal-lm"), "dense", tmp_path / "out")
    return tmp_path / "out", {"base": base, "adapters": [f"{f.name}={f}" for f in folders]}


def forge(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "model.safetensors") -> None:
    """Change tensors and make the manifest agree: what a broken writer would leave."""
    file = folder / name
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    manifest = json.loads((folder / "wlora_merge.json").read_text())
    manifest["files"][file.name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    (folder / "wlora_merge.json").write_text(json.dumps(manifest))


def test_a_sound_export_passes_every_check(dense: tuple[Path, dict[str, Any]]) -> None:
    checked = verify(dense[0], **dense[1])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-6
    assert not checked.skipped
    assert checked.tolerance is not None
    assert checked.largest_difference < checked.tolerance <= 1e-4
    assert checked.done[-1].startswith("outputs equal the unmerged mixture's: off by ")
    assert checked.done[-1].endswith(" expected (float32)")


def test_an_export_that_is_just_the_base_is_found_out(dense: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = dense
    forge(folder, lambda t: t.update(load_file(inputs["base"] / "model.safetensors")))
    with pytest.raises(VerifyError, match="differ from the unmerged mixture"):
        verify(folder, **inputs)


def test_a_dropped_module_is_found_out(dense: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = dense
    name = "model.layers.0.self_attn.v_proj.weight"
    forge(folder, lambda t: t.update({name: load_file(inputs["base"] / "model.safetensors")[name]}))
    with pytest.raises(VerifyError, match="differ from the unmerged mixture"):
        verify(folder, **inputs)


def test_a_missing_and_an_unexpected_tensor_are_found_out(dense: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = dense
    forge(folder, lambda t: t.update({"model.layers.9.extra.weight": t.pop("model.norm.weight")}))
    with pytest.raises(VerifyError, match=r"missing keys|unexpected keys"):
        verify(folder, **inputs)


def test_inputs_that_cannot_be_found_are_a_named_skip(
    dense: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WLORA_MERGE_CACHE", str(tmp_path / "another machine"))
    checked = verify(dense[0])
    assert checked.largest_difference is None
    assert "adapter" in checked.skipped["outputs"] or "base" in checked.skipped["outputs"]


def test_inputs_are_found_by_content_when_this_machine_remembers_them(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    import os
    import shutil

    base, folders = llama_zoo()
    for source in (base, *folders):
        copy = tmp_path / "zoo" / source.name
        shutil.copytree(source, copy)
        for file in copy.iterdir():
            os.utime(file, (1_600_000_000, 1_600_000_000))  # old enough to be remembered
    mixture = mix(tmp_path / "zoo" / base.name, [tmp_path / "zoo" / f.name for f in folders], task="causal-lm")
    export(mixture, "lora", tmp_path / "out")
    checked = verify(tmp_path / "out")
    assert checked.largest_difference is not None
    assert not checked.skipped


def lora(root: Path, zoo: tuple[Path, list[Path]], rank: int) -> tuple[Path, dict[str, Any]]:
    base, folders = zoo
    export(mix(base, folders, task="causal-lm"), "lora", root / "out", rank=rank)
    return root / "out", {"base": base, "adapters": [f"{f.name}={f}" for f in folders]}


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_lora_of_a_low_rank_agrees_within_what_its_recorded_error_allows(
    llama_zoo: Callable[..., Any], tmp_path: Path, rank: int
) -> None:
    folder, inputs = lora(tmp_path, llama_zoo(), rank)
    checked = verify(folder, **inputs)
    kept = json.loads((folder / "wlora_merge.json").read_text())["report"]["energy_kept"]
    assert checked.largest_difference is not None
    assert checked.tolerance is not None
    assert 1e-4 < checked.largest_difference <= checked.tolerance < 10
    assert checked.done[-1].startswith("outputs agree with the unmerged mixture's: off by ")
    assert checked.done[-1].endswith(f"(rank {rank} keeps {kept:.2%} of the energy)")


def test_a_lora_of_a_low_rank_that_differs_more_than_its_recorded_error_allows_fails(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    folder, inputs = lora(tmp_path, llama_zoo(), 8)
    forge(folder, lambda t: t.update({k: v * 0 for k, v in t.items() if "lora_B" in k}), "adapter_model.safetensors")
    with pytest.raises(VerifyError, match="differ from the unmerged mixture"):
        verify(folder, **inputs)


def test_rounding_to_16_bits_is_named(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    export(mix(base, folders, task="causal-lm"), "dense", tmp_path / "out", dtype="bfloat16")
    checked = verify(tmp_path / "out", base=base, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.done[-1].startswith("outputs agree with the unmerged mixture's: off by ")
    assert checked.done[-1].endswith("at most 1.0e-01 expected (rounding to bfloat16)")


def test_a_lora_for_features_of_adapters_that_were_trained_under_a_head_loads_on_the_bare_model(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    bare = tiny_bert()
    bare.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification(bare.config)
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"]) for i in range(2)]
    mix(tmp_path / "base", folders, tmp_path / "mixture", task="feature-extraction", modules_to_save="drop")
    export(tmp_path / "mixture", "lora", tmp_path / "out")
    checked = verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-5
