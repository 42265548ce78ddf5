"""A LoRA export loads in PEFT: every key has its place, and computes what PEFT computes with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import make_adapter, tiny_llama, trained_adapter
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from wlora_merge.errors import AdapterError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.lora import check_loads
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.models.base_model import open_base

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
}


def qwen() -> Any:
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2}, vision_config={**VISION, "fullatt_block_indexes": [1]},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def ctrl() -> Any:
    return CTRLLMHeadModel(CTRLConfig(n_embd=16, dff=24, n_layer=1, n_head=2, vocab_size=96))


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **TEXT))  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "targets"), [(qwen, ["q_proj", "mlp.0", "mlp.2"]), (ctrl, ["Wq", "ffn.0", "ffn.2"])])
def test_targets_that_are_called_like_containers_are_named_whole(make: Any, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=targets)
    export(mix(tmp_path / "base", [folder], weights=[1.0]), "lora", tmp_path / "out")
    wanted, got = (
        PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), f).merge_and_unload().state_dict()
        for f in (folder, tmp_path / "out")
    )
    assert all(torch.allclose(got[name], tensor, atol=1e-6) for name, tensor in wanted.items())
    assert not all(torch.equal(got[name], tensor) for name, tensor in base.state_dict().items())
    verify(tmp_path / "out", base=tmp_path / "base", adapters=[f"a={folder}"])


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_a_lora_of_some_weights_of_experts_computes_in_peft_what_the_adapter_does(
    parameters: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = mixtral()
    base.save_pretrained(tmp_path / "base")
    named = [f"mlp.experts.{name}" for name in parameters]
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"], target_parameters=named)
    export(mix(tmp_path / "base", [folder], weights=[1.0], task="causal-lm"), "lora", tmp_path / "out")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        wanted, got = (
            PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(tmp_path / "base"), f).eval()(ids).logits
            for f in (folder, tmp_path / "out")
        )
        plain = MixtralForCausalLM.from_pretrained(tmp_path / "base").eval()(ids).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    verify(tmp_path / "out", base=tmp_path / "base", adapters=[f"a={folder}"])


@pytest.mark.parametrize("fault", ["more", "less", "container"])
def test_a_lora_that_peft_would_not_load_is_refused_by_the_key(fault: str, tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj", "v_proj"])
    check_loads(folder, open_base(tmp_path / "base"), "causal-lm", {})
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    key = min(tensors)
    if fault == "container":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["mlp"]}))
    else:
        tensor = tensors.pop(key)
        more = {key.replace("layers.0", "layers.7"): tensor.clone(), key: tensor} if fault == "more" else {}
        save_file(tensors | more, file)
    said = {"more": r"no place for '.*layers\.7", "less": r"no tensor for '.*layers\.0", "container": "not supported"}
    with pytest.raises(UnsupportedError, match=said[fault]):
        check_loads(folder, open_base(tmp_path / "base"), "causal-lm", {})


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_ensure_weight_tying_is_folded_as_its_tensors_say(config: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    folder = trained_adapter(base, tmp_path / "a", ensure_weight_tying=True, **config)
    export(mix(tmp_path / "base", [folder], weights=[1.0]), "dense", tmp_path / "out")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), folder).eval()(ids).logits
        got = type(base).from_pretrained(tmp_path / "out").eval()(ids).logits
    assert torch.allclose(got, wanted, atol=1e-5)


def test_one_name_that_the_base_lacks_is_not_another_base(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({k.replace("layers.0.self_attn.q_proj", "layers.0.self_attn.q_prj"): v for k, v in whole.items()}, file)
    with pytest.raises(
        AdapterError,
        match=r"q_prj' is not in .*, which has 1 of its 2.*did you mean 'model\.layers\.0\.self_attn\.q_proj'",
    ) as said:
        mix(tmp_path / "base", [folder])
    assert "another base" not in str(said.value)
    save_file({k.replace("q_proj", "query"): v for k, v in whole.items()}, file)
    with pytest.raises(
        AdapterError,
        match=r"base model: this adapter was trained on another base; did you mean 'model\.layers\.0\.self_attn\.q_proj'\?",
    ):
        mix(tmp_path / "base", [folder])
    with pytest.raises(AdapterError, match=r"another base; did you mean 'model\.layers\.0\.self_attn\.q_proj'\?"):
        attach(type(base).from_pretrained(tmp_path / "base"), [folder])
    save_file({k.replace("layers", "blocks.7"): v for k, v in whole.items()}, file)
    with pytest.raises(AdapterError, match=r"was trained on another base\.$"):
        mix(tmp_path / "base", [folder])
