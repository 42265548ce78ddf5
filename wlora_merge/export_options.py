"""The options of an export, and which of them go together. This room imports nothing heavy, so a recipe can be checked fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .constants import DTYPES, FORMATS, ONNX_DTYPES, ONNX_PROVIDERS, ONNX_QUANTIZE, ONNX_RUNTIMES, SERVERS
from .errors import UnsupportedError
from .fit_options import plain_value
from .text import nearest


@dataclass(frozen=True)
class ExportOptions:
    """What to write.

    All formats:
        format: `dense` (safetensors), `lora` (one PEFT adapter) or `onnx`.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the base's (lora and onnx: float32).
        base_name: what the card and an adapter's config call the base; None means its hub id or folder name.

    dense only:
        max_shard_bytes: write files of at most this many bytes; None keeps the base's own.

    lora only:
        rank: the uniform r; below the sum of the adapters' ranks the best approximation of that rank.
        energy: the smallest uniform r that keeps this share (0 to 1) of the delta weights' squared norm.
        server: `vllm` refuses what that server would not load, and says what to change.
        max_rank: refuse a larger r (what the server was started with).

    onnx only:
        opset: of the graph; None: the writer's own choice.
        onnx_base: an ONNX export of the base, a file or a folder, whose weights are rewritten; nothing is traced.
        onnx_runtime: `genai` writes an onnxruntime-genai folder.
        ort_fusions: the provider whose own operators of ONNX Runtime are used; None keeps to ONNX.
        quantize: `int8` or `int4`, a quantized graph beside the float one (with genai: instead of it).
    """

    format: str
    rank: int | None = None
    energy: float | None = None
    dtype: str | None = None
    max_shard_bytes: int | None = None
    base_name: str | None = None
    server: str | None = None
    max_rank: int | None = None
    opset: int | None = None
    onnx_base: str | None = None
    onnx_runtime: str | None = None
    ort_fusions: str | None = None
    quantize: str | None = None


OLDEST_OPSET = 17
_FLAGS = {"server": "--for", "max_shard_bytes": "--max-shard-size"}
_BELONG = {
    "dense": ("max_shard_bytes",),
    "lora": ("rank", "energy", "server", "max_rank"),
    "onnx": ("opset", "onnx_base", "onnx_runtime", "ort_fusions", "quantize"),
}
CHOICES = {
    "dtype": DTYPES,
    "server": SERVERS,
    "onnx_runtime": ONNX_RUNTIMES,
    "ort_fusions": ONNX_PROVIDERS,
    "quantize": ONNX_QUANTIZE,
}


def flag(name: str) -> str:
    """The command line's name of an option."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def export_options(given: Mapping[str, Any]) -> ExportOptions:
    """Options by name.

    Raises:
        UnsupportedError: an option that there is not, a value out of range, or options that exclude each other or that would
            have no effect.
    """
    known = [f.name for f in dataclasses.fields(ExportOptions)]
    for name in given:
        if name not in known:
            raise UnsupportedError(f"export has no option {name!r}{nearest(name, known)}.")
    plain = {
        n: plain_value(ExportOptions, n, value, UnsupportedError) for n, value in given.items() if value is not None
    }
    options = ExportOptions(**plain)
    if options.format not in FORMATS:
        raise UnsupportedError(f"format is {options.format!r}, expected one of {', '.join(FORMATS)}.")
    for kind, names in _BELONG.items():
        foreign = [flag(name) for name in names if kind != options.format and getattr(options, name) is not None]
        if foreign:
            raise UnsupportedError(f"{', '.join(foreign)}: of --format {kind} alone, not of {options.format}.")
    for name, choices in CHOICES.items():
        value = getattr(options, name)
        if value is not None and value not in choices:
            raise UnsupportedError(f"{flag(name)} is {value!r}, expected one of {', '.join(choices)}.")
    for name in ("rank", "max_rank", "max_shard_bytes", "opset"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UnsupportedError(f"{flag(name)} is {value}, expected 1 or more.")
    if options.opset is not None and options.opset < OLDEST_OPSET:
        raise UnsupportedError(
            f"--opset is {options.opset}, expected {OLDEST_OPSET} or more, for most models 18: torch's exporter writes no older."
        )
    if options.energy is not None and not 0 < options.energy <= 1:
        raise UnsupportedError(f"--energy is {options.energy}, expected a share above 0 and at most 1.")
    _check_together(options)
    return options


def _check_together(options: ExportOptions) -> None:
    if options.rank is not None and options.energy is not None:
        raise UnsupportedError("--rank and --energy exclude each other: give one.")
    if options.format == "onnx" and options.dtype not in (None, *ONNX_DTYPES):
        raise UnsupportedError(
            f"--dtype {options.dtype} cannot be exported to ONNX: ONNX Runtime's CPU provider has no {options.dtype} MatMul: use "
            f"{' or '.join(ONNX_DTYPES)}."
        )
    if options.onnx_base is not None:
        for name in ("onnx_runtime", "ort_fusions", "quantize"):
            if getattr(options, name) is not None:
                raise UnsupportedError(f"{flag(name)} needs a traced export: leave --onnx-base out.")
        if options.dtype is not None or options.opset is not None:
            raise UnsupportedError(
                "--onnx-base keeps the dtype and the opset of that file: leave --dtype and --opset out."
            )
    if options.onnx_runtime is not None and (options.opset is not None or options.ort_fusions is not None):
        raise UnsupportedError(
            "onnxruntime-genai's builder chooses opset and operators: leave --opset and --ort-fusions out."
        )
