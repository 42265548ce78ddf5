"""A base that is itself quantized: dense refuses and names the format, a LoRA is exported all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_adapter, tiny_llama
from support.quantized import FORMATS, Tensors, quantize

from wlora_merge.errors import UnsupportedError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.io.safetensors_file import read_header
from wlora_merge.mixture.mix import mix
from wlora_merge.models.base_model import open_base, refuse_quantized
from wlora_merge.models.files import SINGLE


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root, model = tmp_path_factory.mktemp("plain"), tiny_llama()
    model.save_pretrained(root / "base")
    targets = ["q_proj", "down_proj"]
    return root / "base", [make_adapter(model, root / f"a{i}", i, r=i + 2, target_modules=targets) for i in range(2)]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_over_a_quantized_base_is_the_lora_over_the_original_one(
    kind: str, plain: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = plain
    folder = quantize(base, tmp_path / "quantized", kind)
    mixture = mix(folder, adapters)
    with pytest.raises(UnsupportedError, match=rf"quantized \({kind}\).*original 16-bit base.*--format lora"):
        export(mixture, "dense", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    export(mixture, "lora", tmp_path / "lora")
    export(mix(base, adapters), "lora", tmp_path / "expected")
    got, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "expected"))
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    modules = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    wrapped = {name for name, m in model.named_modules() if hasattr(m, "lora_A") and not name.endswith("lora_A")}
    assert len(wrapped) == 4, modules


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_that_the_config_does_not_tell_is_told_by_its_tensors(
    kind: str, plain: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    folder = quantize(plain[0], tmp_path / "quantized", kind, told=False)
    with pytest.raises(UnsupportedError, match=rf"layers\.\d\..*\.{FORMATS[kind][2]}' has dtype"):
        refuse_quantized(open_base(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_what_bitsandbytes_writes_is_refused_by_name_and_takes_a_lora(
    bits: int, plain: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base, adapters = plain
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    kinds = {e.dtype for e in read_header(tmp_path / "quantized" / SINGLE).entries.values()}
    assert kinds & {"U8", "I8"}
    with pytest.raises(UnsupportedError, match=rf"quantized \(bitsandbytes {bits}-bit\)"):
        export(mix(tmp_path / "quantized", adapters), "dense", tmp_path / "dense")
    export(mix(tmp_path / "quantized", adapters), "lora", tmp_path / "lora")
    export(mix(base, adapters), "lora", tmp_path / "expected")
    got, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "expected"))
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"bits": 4}}, "unknown 4-bit"),
        ({"quantization_config": "fp8"}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_a_format_is_found_wherever_the_config_tells_it(single: Path, config: dict[str, Any], name: str) -> None:
    base = open_base(single)
    refuse_quantized(base)
    base = open_base(single)
    base.config.update(config)
    with pytest.raises(UnsupportedError, match=rf"quantized \({name}\).*--format lora"):
        refuse_quantized(base)


def test_a_causal_mask_of_bytes_is_no_quantized_weight(single: Path) -> None:
    save_file(load_file(single / SINGLE) | {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, single / SINGLE)
    refuse_quantized(open_base(single))


def test_an_adapter_of_another_width_is_refused_on_a_quantized_base_too(
    plain: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    from wlora_merge.errors import AdapterError

    other = make_adapter(tiny_llama(hidden_size=64), tmp_path / "other", 0, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="do not fit the base weight"):
        mix(quantize(plain[0], tmp_path / "quantized", "gptq 4-bit"), [other])


@pytest.mark.parametrize("told", [True, False])
def test_experts_in_mxfp4_are_refused_by_name_and_take_a_lora_beside_them(told: bool, tmp_path: Path) -> None:
    """Laid out by hand as gpt-oss has them: 4-bit values in blocks [experts, rows, cols / 32, 16], and their scales."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 96, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **more)).eval()
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    experts = make_adapter(
        model, tmp_path / "e", 1, r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    shutil.copytree(tmp_path / "base", tmp_path / "mxfp4")
    tensors: Tensors = {}
    for name, tensor in load_file(tmp_path / "base" / SINGLE).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        count, cols, rows = tensor.shape
        tensors[f"{name}_blocks"] = torch.zeros(count, rows, cols // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(count, rows, cols // 32, dtype=torch.uint8)
    save_file(tensors, tmp_path / "mxfp4" / SINGLE)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    settings = {"quantization_config": {"quant_method": "mxfp4"}} if told else {}
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(config | settings))
    mixture = mix(tmp_path / "mxfp4", [adapter])
    named = r"mxfp4" if told else r"_blocks' has dtype U8"
    with pytest.raises(UnsupportedError, match=rf"quantized \(.*{named}.*original 16-bit base"):
        export(mixture, "dense", tmp_path / "dense")
    export(mixture, "lora", tmp_path / "lora")
    export(mix(tmp_path / "base", [adapter]), "lora", tmp_path / "expected")
    got, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "expected"))
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    with pytest.raises(WloraMergeError):
        export(mix(tmp_path / "mxfp4", [experts]), "lora", tmp_path / "no")
