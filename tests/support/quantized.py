"""A base written as quantizers write it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from wlora_merge.models.files import SINGLE

Tensors = dict[str, torch.Tensor]


def bitsandbytes_4bit(name: str, weight: torch.Tensor) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.weight.absmax": torch.ones(4),
    }


def bitsandbytes_8bit(name: str, weight: torch.Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.int8), f"{name}.SCB": torch.ones(len(weight))}


def gptq(name: str, weight: torch.Tensor) -> Tensors:
    rows, cols = weight.shape
    return {f"{name}.qweight": torch.zeros(cols // 8, rows, dtype=torch.int32), f"{name}.scales": torch.ones(1, rows)}


def awq(name: str, weight: torch.Tensor) -> Tensors:
    rows, cols = weight.shape
    return {f"{name}.qweight": torch.zeros(cols, rows // 8, dtype=torch.int32), f"{name}.scales": torch.ones(1, rows)}


def fp8(name: str, weight: torch.Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": torch.ones(1, 1)}


def compressed_tensors(name: str, weight: torch.Tensor) -> Tensors:
    rows, cols = weight.shape
    packed = torch.zeros(rows, cols // 8, dtype=torch.int32)
    return {f"{name}.weight_packed": packed, f"{name}.weight_shape": torch.tensor([rows, cols])}


FORMATS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any], str]] = {
    "bitsandbytes 4-bit": (bitsandbytes_4bit, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "weight"),
    "bitsandbytes 8-bit": (bitsandbytes_8bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "weight"),
    "gptq 4-bit": (gptq, {"quant_method": "gptq", "bits": 4}, "qweight"),
    "awq 4-bit": (awq, {"quant_method": "awq", "bits": 4}, "qweight"),
    "fp8": (fp8, {"quant_method": "fp8"}, "weight"),
    "compressed-tensors": (compressed_tensors, {"quant_method": "compressed-tensors"}, "weight_packed"),
}


def quantize(base: Path, folder: Path, kind: str, *, told: bool = True) -> Path:
    pack, settings, _ = FORMATS[kind]
    shutil.copytree(base, folder)
    tensors: Tensors = {}
    for name, tensor in load_file(base / SINGLE).items():
        tensors |= pack(name.removesuffix(".weight"), tensor) if "proj" in name else {name: tensor}
    save_file(tensors, folder / SINGLE)
    config = json.loads((base / "config.json").read_text()) | ({"quantization_config": settings} if told else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
