"""Fused experts at a tiny size, with adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.architectures import GATED, LM, TEXT, Case
from support.models import make_adapter

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


CASES = {
    "mixtral": Case(LM, "MixtralConfig", TEXT | GATED | LOCAL, ("q_proj", "v_proj"), dtype=torch.bfloat16),
    "qwen2_moe": Case(LM, "Qwen2MoeConfig", TEXT | GATED | MOE | {"shared_expert_intermediate_size": 20}, ("q_proj", "o_proj")),
    "deepseek_v3": Case(LM, "DeepseekV3Config", TEXT | GATED | MOE | DEEPSEEK | {"num_key_value_heads": 2}, ("q_a_proj", "o_proj")),
    "granitemoe": Case(LM, "GraniteMoeConfig", TEXT | GATED | LOCAL, ("q_proj", "o_proj")),  # experts in one tensor on disk
    "gpt_oss": Case(LM, "GptOssConfig", TEXT | GATED | LOCAL, ("q_proj", "o_proj")),  # and transposed
    "llama4": Case(LM, "Llama4TextConfig", TEXT | GATED | LOCAL | {"intermediate_size_mlp": 20}, ("q_proj", "o_proj")),
}  # fmt: skip


def make(case: Case, root: Path, *settings: dict[str, Any]) -> tuple[Path, list[Path]]:
    model = case.make()
    model.save_pretrained(root / "base")
    model.float()
    return root / "base", [
        make_adapter(model, root / f"a{i}", i, scale=0.3, dtype=(torch.float32, torch.bfloat16)[i % 2], **s)
        for i, s in enumerate(settings)
    ]
