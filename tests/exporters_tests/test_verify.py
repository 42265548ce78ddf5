"""verify finds what an export should not be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import inputs_of, make_adapter, tiny_bert, tiny_llama
from support.onnx_models import T5

from wlora_merge.errors import VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.io import digests
from wlora_merge.io.digests import sha256_file
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture


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
    with pytest.raises(VerifyError, match="is not the mixture's in 1792 of its 1792 numbers"):
        verify(folder, **inputs)


def test_of_a_16_bit_export_a_small_adapter_that_is_missing_is_found_out(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    folders = [
        make_adapter(model.float(), tmp_path / f"a{i}", i, scale=0.02, target_modules=["q_proj"]) for i in range(2)
    ]
    inputs = {"base": tmp_path / "base", "adapters": [f"{f.name}={f}" for f in folders]}
    for kind in ("dense", "lora"):
        export(mix(tmp_path / "base", folders, task="causal-lm"), kind, tmp_path / kind, dtype="bfloat16")
        assert any("for a last bit" in done for done in verify(tmp_path / kind, **inputs).done) is (kind == "dense")
    forge(tmp_path / "dense", lambda t: t.update(load_file(tmp_path / "base" / "model.safetensors")))
    with pytest.raises(VerifyError, match="is not the mixture's"):
        verify(tmp_path / "dense", **inputs)
    name = "adapter_model.safetensors"
    forge(tmp_path / "lora", lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items()}), name)
    with pytest.raises(VerifyError, match="every delta weight is zero"):
        verify(tmp_path / "lora", **inputs)


def test_a_nan_is_never_the_mixtures(dense: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = dense
    name = "model.layers.0.self_attn.q_proj.weight"
    forge(folder, lambda t: t[name].view(-1)[5].fill_(float("nan")))
    with pytest.raises(VerifyError, match=rf"{name}' is not the mixture's in 1 of its"):
        verify(folder, **inputs)


def test_numbers_that_are_off_by_a_few_last_bits_are_found_out(dense: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = dense
    name = "model.layers.0.self_attn.q_proj.weight"

    def nudge(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[tensors[name].abs().argmax()] *= 1 + 8 * 2**-23

    forge(folder, nudge)
    with pytest.raises(VerifyError, match=rf"{name}' is not the mixture's in 1 of its"):
        verify(folder, **inputs)


def test_a_quick_look_reads_every_file_again_even_if_its_digest_is_remembered(
    dense: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [file for file in dense[0].rglob("*") if file.is_file()]
    for file in files:
        os.utime(file, (1_600_000_000, 1_600_000_000))  # old enough to be remembered
    verify(dense[0], quick=True)
    read: list[str] = []
    hashed = digests._hash
    monkeypatch.setattr(digests, "_hash", lambda path, *rest: (read.append(Path(path).name), hashed(path, *rest))[1])
    verify(dense[0], quick=True)
    assert set(read) == {file.name for file in files} - {"wlora_merge.json"}


def test_an_export_that_went_through_a_repository_is_still_whole(dense: tuple[Path, dict[str, Any]]) -> None:
    (dense[0] / ".gitattributes").write_text("*.safetensors filter=lfs")
    (dense[0] / ".cache" / "huggingface").mkdir(parents=True)
    (dense[0] / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert verify(dense[0], quick=True).files
    (dense[0] / "other.txt").write_text("x")
    with pytest.raises(VerifyError, match="is not in the manifest"):
        verify(dense[0], quick=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_features_of_a_whole_checkpoint_are_verified_and_a_lora_over_them_has_an_effect(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model: Any = {
        "llama": tiny_llama,
        "bert": lambda: transformers.BertForMaskedLM(tiny_bert().config),
        "t5": lambda: transformers.T5ForConditionalGeneration(T5),
    }[name]()
    model.eval().save_pretrained(tmp_path / "base")
    targets = {"llama": ["q_proj"], "bert": ["query"], "t5": ["q"]}[name]
    folders = [make_adapter(model, tmp_path / f"a{i}", i, scale=2.0, r=2, target_modules=targets) for i in range(2)]
    inputs = {"base": tmp_path / "base", "adapters": [f"{f.name}={f}" for f in folders]}
    outputs = {}
    for kind in ("dense", "lora"):
        export(mix(tmp_path / "base", folders, task="feature-extraction"), kind, tmp_path / kind)
        checked = verify(tmp_path / kind, **inputs)
        assert checked.largest_difference is not None
        assert checked.largest_difference < 1e-4
        assert not checked.skipped
    probe = {"input_ids": torch.tensor([[5, 6, 7]])} | (
        {"decoder_input_ids": torch.tensor([[1, 2]])} if name == "t5" else {}
    )
    for kind in ("base", "dense"):
        outputs[kind] = transformers.AutoModel.from_pretrained(tmp_path / kind).eval()(**probe).last_hidden_state
    bare = transformers.AutoModel.from_pretrained(tmp_path / "base")
    outputs["lora"] = PeftModel.from_pretrained(bare, tmp_path / "lora").eval()(**probe).last_hidden_state
    assert torch.allclose(outputs["lora"], outputs["dense"], atol=1e-5)
    assert not torch.allclose(outputs["base"], outputs["dense"], atol=1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tags", "answers", "distil"])
def test_an_onnx_export_with_a_head_of_its_own_is_verified(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "distil":
        config = transformers.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        body, cls, head = (
            transformers.DistilBertModel(config),
            transformers.DistilBertForSequenceClassification,
            ["classifier"],
        )
        head, target = ["classifier", "pre_classifier"], "q_lin"
    else:
        body, target = tiny_bert(), "query"
        cls = transformers.BertForTokenClassification if kind == "tags" else transformers.BertForQuestionAnswering
        head = ["classifier"] if kind == "tags" else ["qa_outputs"]
    body.save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base").eval()
    folders = [make_adapter(body, tmp_path / f"a{i}", i, r=2, scale=0.5, target_modules=[target]) for i in range(2)]
    attach(model, folders, head=head)
    mixture = Mixture.from_model(model)
    mixture.save(tmp_path / "m")
    export(tmp_path / "m", "onnx", tmp_path / "onnx")
    checked = verify(tmp_path / "onnx", base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders])
    assert not checked.skipped
    assert checked.largest_difference is not None


def test_a_dropped_module_is_found_out(dense: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = dense
    name = "model.layers.0.self_attn.v_proj.weight"
    forge(folder, lambda t: t.update({name: load_file(inputs["base"] / "model.safetensors")[name]}))
    with pytest.raises(VerifyError, match=rf"{name}' is not the mixture's"):
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
    assert "not found here: the base model, " in checked.skipped["outputs"]
    assert all(f"adapter {name!r}" in checked.skipped["outputs"] for name in ("a0", "a1", "a2"))


def test_inputs_are_found_by_content_when_this_machine_remembers_them(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
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
    with pytest.raises(VerifyError, match=r"every delta weight is zero.*Export again"):
        verify(folder, **inputs)


def test_a_nan_in_the_factors_of_a_lora_is_found_out(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    folder, inputs = lora(tmp_path, llama_zoo(), 8)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    forge(folder, lambda t: t[name].view(-1)[0].fill_(float("nan")), "adapter_model.safetensors")
    with pytest.raises(VerifyError, match=f"{name}' holds a NaN or an infinity.*Export again"):
        verify(folder, **inputs)


@pytest.mark.parametrize(("rank", "dtype"), [(4, None), (None, None), (4, "bfloat16"), (None, "float16")])
def test_of_a_lora_a_module_that_is_not_the_mixtures_is_found_whatever_its_rank(
    llama_zoo: Callable[..., Any], tmp_path: Path, rank: int | None, dtype: str | None
) -> None:
    base, folders = llama_zoo()
    export(mix(base, folders, task="causal-lm"), "lora", tmp_path / "out", rank=rank, dtype=dtype)
    inputs = {"base": base, "adapters": [f"{f.name}={f}" for f in folders]}
    said = next(line for line in verify(tmp_path / "out", **inputs).done if line.startswith("its factors"))
    report = json.loads((tmp_path / "out/wlora_merge.json").read_text())["report"]
    assert float(said.split()[7]) == pytest.approx(report["relative_error"], abs=1e-2 if dtype else 1e-6, rel=1e-2)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    forge(tmp_path / "out", lambda t: t.update({name: t[name] * 1.2}), "adapter_model.safetensors")
    with pytest.raises(VerifyError, match=r"layers.1.self_attn.q_proj' is off from its delta weight"):
        verify(tmp_path / "out", **inputs)


def test_a_lora_of_tiny_factors_in_float16_is_the_mixtures(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folders = [
        make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=[name])
        for i, name in enumerate(("q_proj", "v_proj"))
    ]
    mixture = mix(tmp_path / "base", folders, weights=[1.0, 1e-6], task="causal-lm")
    export(mixture, "lora", tmp_path / "out", dtype="float16")
    assert any(
        line.startswith("its factors")
        for line in verify(tmp_path / "out", base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders]).done
    )


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
