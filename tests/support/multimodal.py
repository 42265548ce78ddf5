"""Tiny multimodal models whose text transformers also loads alone, under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}


def qwen3_5(name: str = "Qwen3_5", tied: bool = False, **text: Any) -> Any:
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
        "num_position_embeddings": 16, "spatial_merge_size": 1, "temporal_patch_size": 1,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT | LINEAR_ATTENTION | text | {"tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied,
        image_token_id=50, video_token_id=51, vision_start_token_id=52, vision_end_token_id=53,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def qwen3_5_moe() -> Any:
    return qwen3_5("Qwen3_5Moe", **EXPERTS)


def llama4() -> Any:
    """Its vision and its text call their layers alike, `*.model.layers`."""
    text = {"intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 2}
    sizes = {
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "pixel_shuffle_ratio": 0.5,
    }
    config = transformers.Llama4Config(
        text_config=TEXT | text, vision_config=VISION | sizes | {"num_attention_heads": 2}, image_token_index=50
    )
    return transformers.Llama4ForConditionalGeneration(config)


def mllama() -> Any:
    text = {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {
        "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
    }  # fmt: skip
    config = transformers.MllamaConfig(text_config=TEXT | text, vision_config=VISION | vision, image_token_index=63)
    return transformers.MllamaForConditionalGeneration(config)


MAKERS = {"qwen3_5": qwen3_5, "qwen3_5_moe": qwen3_5_moe, "llama4": llama4, "mllama": mllama}


def save(name: str, folder: Path) -> tuple[Path, Any]:
    """A base of that architecture, its folder and the class that its config names."""
    torch.manual_seed(0)
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder, type(model)
