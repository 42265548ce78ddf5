"""The keys of an adapter's file: which module or tensor each one changes, and which part of the change it is.

Three spellings meet here. An adapter file says `base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight`;
the model that it was trained on calls that module `bert.encoder.layer.0.attention.self.query`; the base's file may call its
weight `encoder.layer.0.attention.self.query.weight`, without the model prefix. This file maps strings to strings. It knows
no files, no tensors and no library.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import AdapterError, UnsupportedError
from ..text import short

PEFT_PREFIX = "base_model.model."

_LORA_KEY = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.(?P<parameter>weight|bias))?$"
)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
PATTERN_SECONDS = 5.0
_WRAPPED = re.compile(r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_TOKEN_COPY = ".token_adapter.base_layer."
_SAVED_COPY = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_FOREIGN = {
    "kohya": re.compile(r"lora_(unet|te\d?|transformer|prior)_|.*\.lora_(down|up|mid)\.weight$|.*\.alpha$"),
    "Diffusers": re.compile(
        r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks|prior|controlnet)\.|.*\blora\.(down|up)\.weight$"
        r"|.*_lora\d?\.(down|up)\.weight$"
    ),
    "mlx-lm": re.compile(r".*\.lora_[ab]$"),
    "torchtune": re.compile(r".*\.lora_[ab]\.weight$"),
    "NeMo": re.compile(r".*\.adapters?\..*linear_(in|out)\.weight$|.*\.adapter_layer\."),
    "LyCORIS": re.compile(r".*\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2)$"),
    "Tinker": re.compile(
        r".*\.linear_attn\.in_proj_[qkv]\.lora_"
    ),  # query, key and value are one in_proj_qkv elsewhere
}
_NOT_WHOLE = re.compile(r"(^|\.)(lora_|token_adapter\.)|\.(?!weight$|bias$)[^.]*$|^[^.]*$")
RESERVED = ("drop", "mix")  # words of --modules-to-save
V = TypeVar("V")


@dataclass(frozen=True)
class AdapterKey:
    """What one key of an adapter file holds.

    Attributes:
        name: the target module; of `tensor` a whole tensor of the model, as a saved head.
        part: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`, `lora_magnitude_vector` or `tensor`. Or it
            is `original`, the base's own copy of a saved module, which has no effect. Or it is `token_rows`, the new values of some
            rows of an embedding.
    """

    name: str
    part: str


def parse_adapter_key(key: str, *, wrapped: bool = False) -> AdapterKey:
    """Split a key of `adapter_model.safetensors` into what it changes and which part of the change it is.

    Accepts keys with the adapter's name inside (`lora_A.default.weight`), as older PEFT wrote them, and what
    torch.compile and FSDP leave in names. With `wrapped` a target module keeps its `.base_layer`: PEFT wraps a module once for each
    of its parameters that it trains.

    Raises:
        UnsupportedError: for keys in other conventions (Diffusers, kohya, mlx-lm), named, and for any other that is not understood.

    Source: `peft.utils.save_and_load.get_peft_model_state_dict`.
    """
    for convention, pattern in _FOREIGN.items():
        if pattern.match(key):
            raise UnsupportedError(
                f"tensor {key!r} is in the {convention} convention: convert the file to PEFT's first."
            )
    name = _WRAPPED.sub("", key).removeprefix(PEFT_PREFIX)
    match = _LORA_KEY.match(name)
    if match is None:
        whole = _SAVED_COPY.sub("", name).replace(_TOKEN_COPY, ".").replace(".base_layer.", ".")
        if whole.endswith(_TOKEN_ROWS):
            return AdapterKey(whole.removesuffix(_TOKEN_ROWS), "token_rows")
        if ".original_module." in whole:
            return AdapterKey(whole.replace(".original_module.", "."), "original")
        if _NOT_WHOLE.search(whole):
            raise UnsupportedError(f"tensor {key!r} is no part of a LoRA that is folded: leave this adapter out.")
        return AdapterKey(whole, "tensor")
    part = match["part"] + (".bias" if match["parameter"] == "bias" else "")
    module = match["module"]
    return AdapterKey(module if wrapped else module.replace(".base_layer", ""), part)


def pattern_value(patterns: Mapping[str, V], module: str, default: V, deadline: float | None = None) -> V:
    """The value of the first pattern that matches the end of `module`, else `default`.

    Args:
        patterns: pattern -> value, as in a LoraConfig.
        module: dotted name of the module.
        default: the value where no pattern matches.
        deadline: of `time.monotonic()`, in seconds, for a whole file's matches; None gives this one `PATTERN_SECONDS`.

    Raises:
        AdapterError: what is no regular expression, or one that takes too long: such a pattern is an attack.

    Source: `peft.utils.other.get_pattern_key`, used for `rank_pattern` and `alpha_pattern`.
    """
    if not patterns:
        return default
    import regex  # the standard library's `re` cannot be stopped

    end = time.monotonic() + PATTERN_SECONDS if deadline is None else deadline
    for pattern, value in patterns.items():
        try:
            found = regex.match(rf"(.*\.)?({pattern})$", module, timeout=max(end - time.monotonic(), 1e-6))
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise AdapterError(f"pattern {short(pattern)} is not a regular expression ({error}).") from error
        except TimeoutError as error:
            raise AdapterError(
                f"pattern {short(pattern)}: matching takes more than {PATTERN_SECONDS:g} seconds: write the names out."
            ) from error
        if found:
            return value
    return default


def check_adapter_name(name: str) -> str:
    """The name itself if it is one that files and command lines can carry, else AdapterError."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r} may hold letters, digits, '.', '_' and '-' alone: set it with NAME=PATH."
        )
    if name in RESERVED:
        raise AdapterError(f"adapter name {name!r} is a word of --modules-to-save: set another with NAME=PATH.")
    return name
