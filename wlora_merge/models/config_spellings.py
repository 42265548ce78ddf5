"""Keys of a config that transformers 4 and 5 spell otherwise: where a base has the new spelling alone, an export has both.

Transformers 4, and programs that read its keys, take rope_theta for 10000 where it stands in `rope_parameters` alone, without a
word. Transformers 5 reads both spellings, and where both stand takes the numbers that it would have had.

Source: `transformers.modeling_rope_utils.RotaryEmbeddingConfigMixin` of 5, `transformers.models.*.configuration_*` of 4.57.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED = ("rope_theta", "partial_rotary_factor")
"""What stood in the config itself."""
BY_LAYER_TYPE = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}
"""Model type -> where transformers 4 has the rope_theta of full and of sliding attention."""


def older_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config, and of its parts, that transformers 4 reads and that are not there; empty where none are missing."""
    changes = {key: part | more for key, part in config.items() if isinstance(part, dict) and (more := _of_rope(part))}
    return changes | _of_rope(config)


def _of_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    names = BY_LAYER_TYPE.get(str(config.get("model_type")))
    if isinstance(full, Mapping) and isinstance(sliding, Mapping) and names is not None:
        thetas = (full.get("rope_theta"), sliding.get("rope_theta"))
        moved = {name: theta for name, theta in zip(names, thetas, strict=True) if theta is not None}
        rope = full
    else:
        moved = {name: rope[name] for name in MOVED if name in rope}
    if moved and rope.get("rope_type", "default") != "default":
        moved["rope_scaling"] = {key: value for key, value in rope.items() if key not in MOVED}
    return {key: value for key, value in moved.items() if key not in config}
