"""verify finds an export whose config and tensors disagree, or whose untouched tensors are not the base's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.exports import agree, change_json, change_tensors
from support.exports import made as made
from support.models import make_adapter, tiny_llama

from wlora_merge.errors import UnsupportedError, VerifyError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.unmerged import load_checked
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix


def test_sound_exports_say_what_was_checked(made: Any) -> None:
    folder, inputs = made()
    checked = verify(folder, **inputs)
    assert checked.done[0] == "digests"
    assert "11 tensors that no adapter changes are the base's, byte for byte" in checked.done


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_a_pickle_in_an_export_is_never_loaded(made: Any, kind: str) -> None:
    folder, inputs = made(kind)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    agree(folder, "pytorch_model.bin")
    with pytest.raises(VerifyError, match="is a pickle"):
        verify(folder, **inputs)


def test_tensors_of_another_dtype_than_the_config_says_are_found(made: Any) -> None:
    folder, _ = made(dtype="bfloat16")
    assert verify(folder, quick=True).files
    change_json(folder, "config.json", dtype="float32")
    with pytest.raises(VerifyError, match="its dtype is 'float32', and the tensors' is bfloat16"):
        verify(folder, quick=True)
    change_json(folder, "config.json", dtype="bfloat16")
    change_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    with pytest.raises(VerifyError, match=r"model\.norm\.weight' is F32, expected BF16"):
        verify(folder, quick=True)


def test_an_output_embedding_that_is_not_the_input_embedding_though_they_are_tied_is_found(made: Any) -> None:
    folder, _ = made(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(VerifyError, match=r"config\.json ties them"):
        verify(folder, quick=True)


def test_an_index_that_places_a_tensor_elsewhere_is_found(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base", max_shard_size="12kB")
    folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    export(mix(tmp_path / "base", [folder], task="causal-lm"), "dense", tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    change_json(tmp_path / "out", "model.safetensors.index.json", **index)
    with pytest.raises(VerifyError, match=r"model\.norm\.weight' is not where"):
        verify(tmp_path / "out", quick=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 3, "lora_alpha": 3}, "expected rank 3"),
        ({"lora_alpha": 4}, "lora_alpha 4"),
        ({"target_modules": ["k_proj"]}, "lack"),
    ],
)
def test_a_lora_whose_config_is_not_that_of_its_tensors_is_found(made: Any, changes: dict[str, Any], said: str) -> None:
    folder, _ = made("lora")
    change_json(folder, "adapter_config.json", **changes)
    with pytest.raises(VerifyError, match=said):
        verify(folder, quick=True)


@pytest.mark.parametrize("changes", [{"vocab_size": 10**9}, {"num_hidden_layers": 10**8}, {"intermediate_size": 10**7}])
def test_a_config_of_a_kilobyte_that_means_a_petabyte_is_refused(made: Any, changes: dict[str, Any]) -> None:
    folder, inputs = made()
    change_json(folder, "config.json", **changes)
    with pytest.raises(VerifyError, match="not the config of these weights"):
        verify(folder, **inputs)


def test_no_code_that_comes_with_a_model_is_run(made: Any, tmp_path: Path) -> None:
    folder, _ = made()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    change_json(folder, "config.json", auto_map=auto, model_type="evil")
    with pytest.raises(UnsupportedError, match=r"code of its own .*never run here"):
        load_checked(folder, "causal-lm")
    with pytest.raises(WloraMergeError):
        export(mix(folder, [f"a={tmp_path / 'a'}"], task="causal-lm"), "onnx", tmp_path / "onnx")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "onnx").exists()


def test_a_manifest_tells_the_inputs_that_were_read_and_not_those_that_were_meant(made: Any, tmp_path: Path) -> None:
    _, inputs = made()
    mix(inputs["base"], inputs["adapters"], tmp_path / "m")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    with pytest.raises(WloraMergeError, match=r"adapter_config\.json: the adapter 'a' is not the one"):
        export(tmp_path / "m", "lora", tmp_path / "x")
    export(tmp_path / "m", "lora", tmp_path / "x", any_digest=True)
    told = json.loads((tmp_path / "x" / "wlora_merge.json").read_text())
    assert told["mixture"]["adapters"][0]["sha256"][config.name] == hashlib.sha256(config.read_bytes()).hexdigest()
    assert told["options"]["any_digest"] is True
