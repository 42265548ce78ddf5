"""The options of an export, and which of them go together. This module imports nothing heavy, so a recipe can be checked fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .constants import DTYPES, FORMATS, ONNX_DTYPES, ONNX_PROVIDERS, ONNX_QUANTIZE, ONNX_RUNTIMES, PRUNING, SERVERS
from .data.tasks import TASKS
from .errors import UnsupportedError
from .option_fields import REQUIRED, SHARE, Range, Rule, Topic, checked, flag, option, refuse, spec

_COUNT = Range(1, "1 or more")
_OPSETS = Range(17, "17 or more, for most models 18: torch's exporter writes no older", high=30, too_high="30 or less")


@dataclass(frozen=True)
class ExportOptions:
    """What to write."""

    # fmt: off
    format: str = option(
        REQUIRED, Topic.FORMAT, common=True, choices=FORMATS, help="What to write.",
        detail="dense: safetensors; lora: one PEFT adapter; onnx.")
    rank: int | None = option(
        None, Topic.FORMAT, common=True, of=("lora",), bounds=_COUNT,
        help="lora: the uniform r. Default: the smallest that is exact.",
        detail="Below the sum of the adapters' ranks it is the best approximation of that rank.")
    energy: float | None = option(
        None, Topic.FORMAT, of=("lora",), bounds=SHARE,
        help="lora: smallest r that keeps this share (0 to 1) of the squared norm.", detail="The norm of the delta weights.")
    dtype: str | None = option(
        None, Topic.FORMAT, common=True, choices=tuple(DTYPES),
        help="Of the weights. Default: dense the base's, lora and onnx float32.")
    max_shard_bytes: int | None = option(
        None, Topic.FORMAT, of=("dense",), bounds=_COUNT, flag="--max-shard-size", metavar="SIZE", unit="bytes",
        help="dense: file size, as 5GB. Default: the base's own shards.")
    base_name: str | None = option(
        None, Topic.FORMAT, help="What the card and a lora's config call the base. Default: hub id or folder name.")
    task: str | None = option(
        None, Topic.INPUTS, choices=tuple(TASKS),
        help="What the exported model is for. Default: the mixture's; for onnx else as the inputs say.")
    tokenizer_from: str | None = option(
        None, Topic.INPUTS, metavar="NAME", help="Carry the tokenizer and chat template beside adapter NAME, not the base's.")
    server: str | None = option(
        None, Topic.FORMAT, common=True, choices=SERVERS, flag="--for", help="Refuse what this program would not load.")
    max_rank: int | None = option(
        None, Topic.FORMAT, of=("lora",), bounds=_COUNT, help="lora: refuse a larger r, as a server's --max-lora-rank does.")
    opset: int | None = option(None, Topic.FORMAT, of=("onnx",), bounds=_OPSETS, help="onnx: opset version. Default: 20.")
    onnx_base: str | None = option(
        None, Topic.INPUTS, of=("onnx",), metavar="PATH",
        help="onnx: an ONNX export of the base; rewrite its weights, trace nothing.", detail="A file or a folder.")
    onnx_runtime: str | None = option(
        None, Topic.FORMAT, of=("onnx",), choices=ONNX_RUNTIMES, help="onnx: write an onnxruntime-genai folder instead.")
    ort_fusions: str | None = option(
        None, Topic.FORMAT, of=("onnx",), choices=ONNX_PROVIDERS,
        help="onnx: ONNX Runtime's own operators for cpu, cuda, dml or webgpu.", detail="Without it the graph keeps to ONNX.")
    quantize: str | None = option(
        None, Topic.FORMAT, common=True, of=("onnx",), choices=ONNX_QUANTIZE, help="onnx: a quantized graph beside the float one.",
        detail="With --onnx-runtime genai it is instead of the float one.")
    allow_loss: bool = option(
        False, Topic.FORMAT, help="onnx: have a quantized graph that keeps under 90% of the float one's choices.")
    trace_cache: bool = option(
        True, Topic.FORMAT, help="onnx: trace a base once and keep its graph in the cache folder, without weights.",
        detail="The files are the same either way. `wlora-merge cache` shows what is kept.")
    # fmt: on


_FIELDS = {f.name: f for f in dataclasses.fields(ExportOptions)}


def export_options(given: Mapping[str, Any]) -> ExportOptions:
    """Options by name.

    Raises:
        UnsupportedError: an option that there is not, a value out of range, or options that exclude each other or that would
            have no effect.
    """
    options: ExportOptions = checked(ExportOptions, given, "export", UnsupportedError, flag)
    refuse(_RULES, UnsupportedError, options)
    return options


def refuse_without_rank(method: str, rank: int | None) -> None:
    """Refuse a LoRA of delta weights that no two factors have, where no rank is asked for to come near them with.

    Args:
        method: how the delta weights are combined.
        rank: of the LoRA; None: an exact one.

    Raises:
        UnsupportedError: with the method.
    """
    if method in PRUNING and rank is None:
        raise UnsupportedError(
            f"{method}: its delta weights are no products of two factors, so no LoRA has them: say --rank K for the nearest one of "
            "rank K, whose error is told, or export with --format dense."
        )


def _foreign(options: ExportOptions) -> str:
    """The options that are of another format alone; an empty text where there are none."""
    for kind in FORMATS:
        given = [flag(f) for f in _FIELDS.values() if spec(f).of == (kind,) and getattr(options, f.name) is not None]
        if given and kind != options.format:
            return f"{', '.join(given)}: of --format {kind} alone"
    return ""


def _traced(options: ExportOptions) -> str:
    """The option that a graph must be traced for; an empty text where there is none."""
    given = [n for n in ("onnx_runtime", "ort_fusions", "quantize") if getattr(options, n) is not None]
    return flag(_FIELDS[given[0]]) if given else ""


# fmt: off
_RULES: list[Rule] = [
    (_foreign, "{found}, not of {o.format}."),
    (lambda o: o.rank is not None and o.energy is not None, "--rank and --energy exclude each other: give one."),
    (lambda o: o.format == "onnx" and o.dtype not in (None, *ONNX_DTYPES),
     "--dtype {o.dtype} cannot be exported to ONNX: ONNX Runtime's CPU provider has no {o.dtype} MatMul: use "
     f"{' or '.join(ONNX_DTYPES)}."),
    (lambda o: o.onnx_base is not None and _traced(o), "{found} needs a traced export: leave --onnx-base out."),
    (lambda o: o.onnx_base is not None and (o.dtype is not None or o.opset is not None),
     "--onnx-base keeps the dtype and the opset of that file: leave --dtype and --opset out."),
    (lambda o: o.allow_loss and (o.quantize is None or o.onnx_runtime is not None),
     "--allow-loss is for a quantized graph beside the float one: say --quantize without --onnx-runtime, or leave it out."),
    (lambda o: not o.trace_cache and (o.format != "onnx" or o.onnx_base is not None or o.onnx_runtime is not None),
     "--no-trace-cache is for a graph that is traced, by --format onnx without --onnx-base and --onnx-runtime: leave it out."),
    (lambda o: o.onnx_runtime is not None and (o.opset is not None or o.ort_fusions is not None),
     "onnxruntime-genai's builder chooses opset and operators: leave --opset and --ort-fusions out."),
]
