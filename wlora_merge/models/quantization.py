"""Which format a base's weights are quantized in, told by its config, or by its tensors where that says nothing.

A quantized weight cannot be folded into. A LoRA over it can still be exported: that needs names and shapes alone, and the
shapes, which packing hides, come from the module tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..io.safetensors_file import FLOATING, Entry

WEIGHT_SUFFIXES = ("weight", "qweight", "weight_packed", "weight_blocks")
"""How the formats call a packed weight: bitsandbytes and FP8, GPTQ and AWQ, compressed-tensors, MXFP4."""
CONFIG_KEYS = ("quantization_config", "compression_config")


def quantized_format(config: Mapping[str, Any], entries: Iterable[Entry]) -> str | None:
    """The format's name and bits (`gptq 4-bit`); None for weights in plain floating point."""
    for table in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in CONFIG_KEYS:
            if table.get(key):
                return _name(table[key])
    for entry in entries:
        if len(entry.shape) > 1 and entry.dtype not in FLOATING and _is_weight(entry.name):
            return f"tensor {entry.name!r} has dtype {entry.dtype}"
    return None


def _name(method: Any) -> str:
    if not isinstance(method, Mapping):
        return str(method)
    bits = method.get("bits") or (4 if method.get("load_in_4bit") else 8 if method.get("load_in_8bit") else None)
    name = str(method.get("quant_method") or "unknown")
    return f"{name} {bits}-bit" if isinstance(bits, int) else name


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in WEIGHT_SUFFIXES or name.endswith("_blocks")
