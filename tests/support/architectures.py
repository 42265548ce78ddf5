"""Architectures of transformers at a tiny size, with adapters on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from support.models import make_adapter

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


SHORT = {"max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


GATED = {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8} | SHORT


VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8}


WEIGHTS = (0.625, 0.5, -0.25)  # float32 holds them exactly


@dataclass(frozen=True)
class Case:
    """A tiny model: how to make it, two of its linear layers, and what it takes as input."""

    auto: str
    config: str
    settings: dict[str, Any]
    targets: tuple[str, str]
    inputs: tuple[str, ...] = ("input_ids",)
    dtype: torch.dtype = torch.float32

    def make(self) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**copy.deepcopy(self.settings))
        model = getattr(transformers, self.auto).from_config(config)
        return model.to(self.dtype).eval()

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        return getattr(transformers, self.auto).from_pretrained(folder, dtype=dtype).eval()


def clip_config() -> dict[str, Any]:
    text = TEXT | {"intermediate_size": 24} | SHORT
    return {"text_config": text, "vision_config": VISION | {"patch_size": 4}, "projection_dim": 8}


def llava_config() -> dict[str, Any]:
    return {
        "text_config": transformers.LlamaConfig(**TEXT, **GATED, tie_word_embeddings=False),
        "vision_config": transformers.CLIPVisionConfig(**VISION, patch_size=4),
        "image_token_index": 39,
        "vision_feature_layer": -1,
    }


def gemma3_config() -> dict[str, Any]:
    text = TEXT | GATED | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "text_config": transformers.Gemma3TextConfig(**text),
        "vision_config": transformers.SiglipVisionConfig(**VISION, patch_size=4),
        "mm_tokens_per_image": 4, "image_token_id": 39, "image_token_index": 39,
    }  # fmt: skip


def qwen_vl_config() -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = TEXT | GATED | {"rope_scaling": rope, "rope_parameters": rope}
    vision = {
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": 16,
        "patch_size": 4,
    }
    return {"text_config": text, "vision_config": vision, "image_token_id": 39, "tie_word_embeddings": False}


LM, BF16, FP16 = "AutoModelForCausalLM", torch.bfloat16, torch.float16


ENCODER = TEXT | SHORT | {"intermediate_size": 24}


EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}


SEQ2SEQ = ("input_ids", "decoder_input_ids")


BOTH_SIDES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "decoder_start_token_id": 2,
}  # fmt: skip


GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 40,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


CASES = {
    "llama": Case(LM, "LlamaConfig", TEXT | GATED, ("q_proj", "down_proj"), dtype=BF16),
    "qwen2": Case(LM, "Qwen2Config", TEXT | GATED, ("k_proj", "up_proj"), dtype=FP16),
    "qwen3_moe": Case(LM, "Qwen3MoeConfig", TEXT | GATED | EXPERTS, ("q_proj", "o_proj")),
    "mixtral": Case(LM, "MixtralConfig", TEXT | GATED | {"num_local_experts": 4}, ("v_proj", "o_proj"), dtype=BF16),
    "gemma": Case(LM, "GemmaConfig", TEXT | GATED, ("q_proj", "gate_proj")),
    "phi": Case(LM, "PhiConfig", ENCODER, ("q_proj", "fc1")),
    "opt": Case(LM, "OPTConfig", TEXT | SHORT | {"ffn_dim": 24, "word_embed_proj_dim": 16}, ("q_proj", "fc2"), dtype=FP16),
    "gpt2": Case(LM, "GPT2Config", GPT, ("c_attn", "c_proj")),
    "gpt_neox": Case(LM, "GPTNeoXConfig", ENCODER, ("query_key_value", "dense_4h_to_h")),
    "bloom": Case(LM, "BloomConfig", TEXT | {"n_layer": 2, "n_head": 2}, ("query_key_value", "dense"), dtype=BF16),
    "falcon": Case(LM, "FalconConfig", TEXT | SHORT, ("query_key_value", "dense_h_to_4h")),
    "t5": Case("AutoModelForSeq2SeqLM", "T5Config",
               {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40,
                "decoder_start_token_id": 0}, ("q", "wo"), SEQ2SEQ),
    "bart": Case("AutoModelForSeq2SeqLM", "BartConfig", BOTH_SIDES | SHORT, ("q_proj", "fc1"), SEQ2SEQ, FP16),
    "bert": Case("AutoModelForSequenceClassification", "BertConfig", ENCODER, ("query", "dense")),
    "roberta": Case("AutoModelForTokenClassification", "RobertaConfig", ENCODER, ("query", "value"), dtype=BF16),
    "deberta_v2": Case("AutoModelForSequenceClassification", "DebertaV2Config", ENCODER, ("query_proj", "dense")),
    "vit": Case("AutoModelForImageClassification", "ViTConfig", VISION | {"patch_size": 4}, ("q_proj", "fc1"),
                ("pixel_values",)),
    "clip": Case("AutoModel", "CLIPConfig", clip_config(), ("q_proj", "fc2"), ("input_ids", "pixel_values")),
    "whisper": Case("AutoModelForSpeechSeq2Seq", "WhisperConfig",
                    BOTH_SIDES | SHORT | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 12},
                    ("q_proj", "fc1"), ("input_features", "decoder_input_ids")),
    "llava": Case("AutoModelForImageTextToText", "LlavaConfig", llava_config(), ("q_proj", "up_proj"),
                  ("image_ids", "pixel_values"), BF16),
    "gemma3": Case("AutoModelForImageTextToText", "Gemma3Config", gemma3_config(), ("q_proj", "up_proj"),
                   ("image_ids", "pixel_values")),
    "qwen2_5_vl": Case("AutoModelForImageTextToText", "Qwen2_5_VLConfig", qwen_vl_config(), ("q_proj", "up_proj")),
}  # fmt: skip


def adapter_settings(case: Case) -> list[dict[str, Any]]:
    """Three adapters that differ in everything that PEFT lets differ."""
    first, second = case.targets
    return [
        {"r": 4, "lora_alpha": 6, "target_modules": [first, second], "rank_pattern": {first: 2}, "alpha_pattern": {second: 3},
         "layers_to_transform": [1]},
        {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "exclude_modules": [second], "use_rslora": True},
        {"r": 2, "lora_alpha": 7, "target_modules": rf".*\.({first}|{second})"},
    ]  # fmt: skip


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = {
        "input_ids": torch.randint(3, 38, (2, 6)),
        "image_ids": torch.tensor([[39, 39, 39, 39, 5, 7]] * 2),  # four patches of an image
        "decoder_input_ids": torch.randint(3, 38, (2, 5)),
        "pixel_values": torch.randn(2, 3, 8, 8),
        "input_features": torch.randn(2, 8, 16),
    }
    return {name.replace("image_ids", "input_ids"): made[name] for name in case.inputs}


def first_output(model: Any, case: Case) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs_of(case))[0]
    return found


def merged(case: Case, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge of one adapter, in float64."""
    from peft import PeftModel

    peft = PeftModel.from_pretrained(case.load(base, torch.float64), adapter, autocast_adapter_dtype=False).double()
    state: dict[str, torch.Tensor] = peft.merge_and_unload().state_dict()
    return state


def expected_state(case: Case, base: Path, adapters: list[Path]) -> dict[str, torch.Tensor]:
    """W + Σ w_n (merged_n - W), float64, under the names of the module tree."""
    start = case.load(base, torch.float64).state_dict()
    total = {name: tensor.clone() for name, tensor in start.items()}
    for weight, adapter in zip(WEIGHTS, adapters, strict=False):
        for name, tensor in merged(case, base, adapter).items():
            total[name] += weight * (tensor - start[name])
    return total


def make_adapters(case: Case, model: Any, root: Path) -> list[Path]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    settings = zip(adapter_settings(case), dtypes, strict=True)
    return [make_adapter(model, root / f"a{i}", i, dtype=d, scale=0.3, **s) for i, (s, d) in enumerate(settings)]
