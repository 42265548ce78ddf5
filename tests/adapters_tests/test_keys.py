"""PEFT key <-> module name <-> tensor name."""

from __future__ import annotations

import pytest

from wlora_merge.adapters.keys import check_adapter_name, parse_adapter_key, pattern_value
from wlora_merge.errors import AdapterError, UnsupportedError

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "name", "part"),
    [
        (f"base_model.model.{Q}.lora_A.weight", Q, "lora_A"),
        (f"base_model.model.{Q}.lora_B.weight", Q, "lora_B"),
        (f"{Q}.lora_B.weight", Q, "lora_B"),
        (f"base_model.model.{Q}.lora_A.default.weight", Q, "lora_A"),
        (f"base_model.model.{Q}.lora_A.my-task.weight", Q, "lora_A"),
        (f"base_model.model.{Q}.lora_B.bias", Q, "lora_B.bias"),
        (f"base_model.model.{Q}.lora_magnitude_vector", Q, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", Q, "lora_magnitude_vector"),
        (f"_orig_mod.base_model.model.{Q}.lora_A.weight", Q, "lora_A"),
        (f"base_model.model._orig_mod.{Q}.lora_B.weight", Q, "lora_B"),
        (f"base_model.model._fsdp_wrapped_module.{Q}._checkpoint_wrapped_module.lora_B.weight", Q, "lora_B"),
        ("base_model.model.embed.lora_embedding_A", "embed", "lora_embedding_A"),
        ("base_model.model.embed.lora_embedding_B.default", "embed", "lora_embedding_B"),
        ("base_model.model.embed.base_layer.weight", "embed.weight", "tensor"),
        ("base_model.model.classifier.weight", "classifier.weight", "tensor"),
        ("base_model.model.classifier.modules_to_save.weight", "classifier.weight", "tensor"),
        ("base_model.model.classifier.modules_to_save.default.weight", "classifier.weight", "tensor"),
        ("base_model.model.classifier.modules_to_save.out_proj.bias", "classifier.out_proj.bias", "tensor"),
        ("base_model.model.classifier.modules_to_save.default.dense.bias", "classifier.dense.bias", "tensor"),
    ],
)
def test_a_peft_key_names_its_module_and_its_part(key: str, name: str, part: str) -> None:
    parsed = parse_adapter_key(key)
    assert (parsed.name, parsed.part) == (name, part)


@pytest.mark.parametrize(
    ("key", "convention"),
    [
        ("lora_unet_down_blocks_0_attn.lora_down.weight", "kohya"),
        ("lora_te1_text_model_encoder_q_proj.alpha", "kohya"),
        ("model.layers.0.q_proj.lora_up.weight", "kohya"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "Diffusers"),
        ("text_encoder_2.encoder.layers.0.q_proj.lora_A.weight", "Diffusers"),
        ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", "Diffusers"),
        ("down_blocks.0.attn1.processor.to_q_lora.down.weight", "Diffusers"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "Diffusers"),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"),
        ("layers.0.attn.q_proj.lora_b.weight", "torchtune"),
        ("model.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight", "NeMo"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight", "NeMo"),
        ("base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a", "LyCORIS"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lokr_w2", "LyCORIS"),
        ("base_model.model.model.layers.0.linear_attn.in_proj_q.lora_A.weight", "Tinker"),
    ],
)
def test_files_of_other_conventions_are_refused_by_name(key: str, convention: str) -> None:
    with pytest.raises(UnsupportedError, match=convention):
        parse_adapter_key(key)


def test_gpt2_keys_without_a_prefix_are_not_taken_for_diffusers() -> None:
    assert parse_adapter_key("transformer.h.0.attn.c_attn.lora_A.weight").name == "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.q.lora_A.weight.quant_state",
        "base_model.model.q.lora_C.weight",
        "base_model.model.q.hada_w1_a",
        "base_model.model.q.ia3_l",
        "prompt_embeddings",
        "weight",
    ],
)
def test_a_key_that_is_not_understood_is_refused_and_never_taken_for_a_whole_tensor(key: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        parse_adapter_key(key)
    assert key in str(error.value)


@pytest.mark.parametrize(
    "patterns", [{"q_proj": 2}, {r"layers\.0\.self_attn\.q_proj": 2}, {".*q_proj": 2}, {"^model.*": 2}]
)
def test_a_pattern_matches_the_end_of_a_module_name_as_in_peft(patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    assert pattern_value(patterns, Q, 8) == patterns.get(get_pattern_key(list(patterns), Q), 8) == 2


@pytest.mark.parametrize("patterns", [{"proj": 2}, {"layers.0": 2}, {"": 2}, {}])
def test_a_pattern_that_matches_less_than_the_last_part_is_not_used_as_in_peft(patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    assert pattern_value(patterns, Q, 8) == patterns.get(get_pattern_key(list(patterns), Q), 8) == 8


def test_the_first_pattern_wins_and_a_broken_one_is_named() -> None:
    assert pattern_value({"q_proj": 1, "self_attn.q_proj": 2}, Q, 8) == 1
    with pytest.raises(AdapterError, match=r"pattern '\['"):
        pattern_value({"[": 1}, Q, 8)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "a\n", "drop", "mix"])
def test_an_adapter_name_that_a_command_line_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(AdapterError):
        check_adapter_name(name)


def test_a_sound_adapter_name_is_kept() -> None:
    assert check_adapter_name("SST-2_v1.0") == "SST-2_v1.0"
