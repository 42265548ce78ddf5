"""Tiny models from configs, PEFT adapters on them, and PEFT's own sums as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wlora_merge.mixture.mixture import Mixture

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | overrides))).to(dtype).eval()


def tiny_bert(**overrides: Any) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 32,
    }
    return BertModel(BertConfig(**(config | overrides))).eval()


def make_adapter(
    model: Any, folder: Path, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.1, **config: Any
) -> Path:
    """A random PEFT adapter on a copy of `model`, its factors of standard deviation `scale`, saved as PEFT saves it."""
    import copy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, **config))
    for name, parameter in peft.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data = parameter.data * (1 + torch.randn_like(parameter) * scale)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * scale
    if dtype is not torch.float32:
        peft = peft.to(dtype)
    peft.peft_config["default"].base_model_name_or_path = "tiny"
    peft.save_pretrained(folder)
    return folder


def peft_changes(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """State dict name -> what PEFT's own merge of one adapter adds to it, in float64; names without a change are left out."""
    import copy

    from peft import PeftModel

    base = copy.deepcopy(model).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, folder).double().merge_and_unload().state_dict()
    return {name: merged[name] - before[name] for name in before if not torch.equal(merged[name], before[name])}


def peft_sum(model: Any, folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """The model's tensors in float64, plus the weighted sum of what PEFT's merge of each adapter alone adds."""
    sums = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for folder, weight in zip(folders, weights, strict=True):
        for name, change in peft_changes(model, folder).items():
            sums[name] = sums[name] + weight * change
    return sums


def assert_equal_but_for_rounding(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each float32 tensor is the float64 one rounded once (an ulp is allowed: PEFT's float64 sums have their own order)."""
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=2**-23, atol=1e-12), name


MIXED: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 5, "target_modules": EVERY_LINEAR, "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {"k_proj": 3},
    },
)


def inputs_of(mixture: Path) -> dict[str, Any]:
    """For `verify`, where a mixture's inputs lie; digests of files this young are not remembered."""
    made = Mixture.load(mixture)
    return {"base": made.base.source, "adapters": [f"{a.name}={a.source}" for a in made.adapters]}


def assert_verified(folder: Path, **inputs: Any) -> None:
    """No check of an export fails or is skipped, and it computes what the unmerged mixture does but for rounding."""
    from wlora_merge.exporters.verify import verify

    checked = verify(folder, **inputs)
    assert not checked.skipped
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-4


def trained_adapter(model: Any, folder: Path, **config: Any) -> Path:
    """A PEFT adapter whose every trained number is random; what it trains beside factors moves away from the base's."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(change if "lora_" in name else parameter.data + change)  # in place, as some share it
    peft.save_pretrained(folder)
    return folder
