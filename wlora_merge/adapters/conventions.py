"""What other trainers write differently into a PEFT folder, and what it is in PEFT's spelling.

Tinker keeps the factors of all experts in tensors of three dimensions, under Mixtral's names w1, w2 and w3, one of the two factors
shared by all experts. It and unsloth call some modules as their own model classes do. This file knows names and shapes, and no base.

Source: tinker-cookbook's `weights` (its merge of adapters), unsloth-zoo's classes of gpt-oss for bitsandbytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import AdapterError, UnsupportedError
from ..io.safetensors_file import Entry

_ALL_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.(?P<matrix>w[123])$")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OTHER_NAMES = (
    (re.compile(r"^(model\.)?unembed_tokens$"), "lm_head"),  # Tinker's
    (re.compile(r"(\.\d+)\.attn\."), r"\1.self_attn."),  # Tinker's, of gpt-oss
    (re.compile(r"\.router\.linear$"), ".router"),  # unsloth's, of gpt-oss
)


def other_names(module: str) -> Iterator[str]:
    """What PEFT may call the module that another trainer calls `module`."""
    for pattern, name in _OTHER_NAMES:
        found = pattern.sub(name, module)
        if found != module:
            yield found


def by_expert(parts: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Target modules with their parts; factors of all experts in one tensor become those of each expert's own linear.

    lora_A is [experts or 1, r, in], lora_B [experts or 1, out, r]; each expert's are cut out of the file's bytes, not read.

    Args:
        parts: target module -> part -> where its tensor lies.

    Raises:
        AdapterError: lora_A and lora_B are of different numbers of experts, or two modules become one.
        UnsupportedError: factors without a number, as for a projection that the model has not.
    """
    found: dict[str, dict[str, Any]] = {}
    for module, held in parts.items():
        for name, own in _split(module, held).items():
            if name in found:
                raise AdapterError(
                    f"target module {module!r} holds the factors of {name!r}, which the file has already."
                )
            found[name] = own
    return found


def _split(module: str, held: dict[str, Any]) -> dict[str, dict[str, Any]]:
    match, factors = _ALL_EXPERTS.match(module), [held.get(part) for part in ("lora_A", "lora_B")]
    if match is None or set(held) != {"lora_A", "lora_B"} or any(len(f.shape) != 3 for f in factors if f is not None):
        return {module: held}
    lora_A, lora_B = held["lora_A"], held["lora_B"]
    if 0 in (*lora_A.shape, *lora_B.shape):
        raise UnsupportedError(
            f"target module {module!r} is in Tinker's convention, and its factors are empty: convert the adapter to PEFT's with "
            "tinker_cookbook.weights.build_lora_adapter."
        )
    experts = max(lora_A.shape[0], lora_B.shape[0])
    if experts == 1 or not {lora_A.shape[0], lora_B.shape[0]} <= {1, experts}:
        raise AdapterError(
            f"target module {module!r}: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} are of different numbers of "
            "experts, expected one number, or 1 in one of the two."
        )
    name = _PROJECTIONS[match["matrix"]]
    return {
        f"{match['experts']}.{expert}.{name}": {"lora_A": _cut(lora_A, expert), "lora_B": _cut(lora_B, expert)}
        for expert in range(experts)
    }


def _cut(entry: Entry, expert: int) -> Entry:
    """One expert's matrix of a tensor [experts or 1, rows, cols]."""
    size = entry.nbytes // entry.shape[0]
    start = entry.start + size * min(expert, entry.shape[0] - 1)
    return replace(entry, shape=entry.shape[1:], start=start, end=start + size)
