"""Configs with the keys that transformers 4 reads: transformers 5 reads the same numbers from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.models import make_adapter, tiny_llama

from wlora_merge import export, mix
from wlora_merge.models.config_spellings import older_spellings

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 1e5}
SLIDING = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": DEFAULT}


@pytest.mark.parametrize(
    ("name", "given", "added"),
    [
        ("Llama", {"rope_parameters": DEFAULT}, {"rope_theta": 1e5}),
        (
            "Llama",
            {"rope_parameters": LLAMA3},
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            "Phi",
            {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
            {"rope_theta": 1e5, "partial_rotary_factor": 0.5},
        ),
        (
            "Gemma3Text",
            {"rope_parameters": SLIDING},
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e5,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "ModernBert",
            {"rope_parameters": dict.fromkeys(SLIDING, DEFAULT)},
            {"global_rope_theta": 1e5, "local_rope_theta": 1e5},
        ),
        ("Bert", {}, {}),
    ],
)
def test_what_transformers_4_reads_is_added_and_transformers_5_reads_the_same(
    name: str, given: dict[str, Any], added: dict[str, Any], tmp_path: Path
) -> None:
    own = json.loads(getattr(transformers, f"{name}Config")(**given).to_json_string(use_diff=False))
    assert older_spellings(own) == added
    (tmp_path / "config.json").write_text(json.dumps(own | added))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert getattr(again, "rope_parameters", None) == own.get("rope_parameters")
    assert older_spellings(own | added) == {}


def test_a_part_of_a_config_has_them_and_what_is_there_stays() -> None:
    text = {"model_type": "llama", "rope_parameters": DEFAULT}
    assert older_spellings({"model_type": "llava", "text_config": text}) == {"text_config": text | {"rope_theta": 1e5}}
    assert older_spellings({"rope_parameters": DEFAULT, "rope_theta": 7.0}) == {}
    assert older_spellings({"rope_parameters": None, "rope_theta": 7.0}) == {}


def test_a_dense_export_has_both_spellings(tmp_path: Path) -> None:
    model = tiny_llama(rope_parameters=DEFAULT)
    model.save_pretrained(tmp_path / "base")
    assert "rope_theta" not in json.loads((tmp_path / "base" / "config.json").read_text())
    adapter = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    export(mix(tmp_path / "base", [adapter], task="causal-lm"), "dense", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (1e5, 1e5)
