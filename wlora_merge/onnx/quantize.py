"""A checked ONNX export -> a quantized graph beside it, by ONNX Runtime's own tools, and what that costs.

Knows those tools. The float graph stays. What quantizing costs is measured against it, and a graph that keeps too few of its
choices is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.task import Task
from ..errors import UnsupportedError
from ..models.loading import quiet
from ..progress import Meter
from ..text import first_line
from .dummy_inputs import load_model
from .graph import MODEL, data_file, graph_file
from .js_names import quantized_suffix
from .session import has_half_weights
from .skeleton import INLINE_LIMIT
from .validate import Differences, differences

BLOCK = 32  # weights that share one scale, as in transformers.js's q4
ENOUGH = 0.9
"""The share of the float graph's choices that a quantized graph must keep."""


@dataclass(frozen=True)
class QuantizedReport:
    """A quantized graph: its file in the export, its bytes with its data, which weights share a scale, and how far off it is."""

    file: str
    bytes: int
    scheme: str
    off: Differences


def quantize_onnx(
    out: Path, dense: Path, *, task: Task, kind: str, pooling: str | None = None, allow_loss: bool = False
) -> QuantizedReport:
    """Write a quantized graph beside `onnx/model.onnx`, under the name by which transformers.js finds it, and measure its error.

    int8: `onnxruntime.quantization.quantize_dynamic`, weights in int8, one scale for each output channel, activations
    quantized as they come. The weights take 7 of the 8 bits (`reduce_range`): without VNNI a CPU adds two products in 16 bits,
    which 8 bits overflow, and the graph must be right wherever it is served. Where that keeps too few of the choices, as of most
    language models: `MatMulNBitsQuantizer`, matrix products alone, symmetric blocks of 32 weights. int4: that one alone.

    Args:
        out: the root of an ONNX export.
        dense: the folder that it was exported from, whose model tells the inputs that it takes.
        task: the task of both.
        kind: `int8` or `int4`.
        pooling: as for `write_onnx`.
        allow_loss: take the first way, whatever it keeps.

    Returns:
        The graph's file, its bytes, and how far its outputs are from the float graph's.

    Raises:
        UnsupportedError: the tools cannot, or no way keeps enough.
    """
    Meter("quantizing")
    model = load_model(dense, task, torch.float32, pooling=pooling)
    folder, suffix = out / "onnx", quantized_suffix(kind, half=has_half_weights(out))
    target, kept = folder / graph_file(f"{MODEL}{suffix}"), 0.0
    for scheme, write in WAYS[kind].items():
        _write(folder / graph_file(MODEL), target, kind, write)
        off = differences(out, model, task=task, suffix=suffix)
        kept = 1.0 if off.same_choice is None else off.same_choice
        if kept >= ENOUGH or allow_loss:
            sizes = sum(p.stat().st_size for p in (target, folder / data_file(f"{MODEL}{suffix}")) if p.is_file())
            return QuantizedReport(f"onnx/{target.name}", sizes, scheme, off)
        target.unlink()
    other = "say --quantize int8, " if kind == "int4" else ""
    raise UnsupportedError(
        f"--quantize {kind}: the graph would keep {kept:.1%} of the float graph's choices, expected {ENOUGH:.0%}: "
        f"{other}leave it out, or say --allow-loss to have it all the same."
    )


def _write(source: Path, target: Path, kind: str, write: Callable[[Path, Path], None]) -> None:
    try:
        with quiet():
            write(source, target)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the tools have errors of many kinds
        raise UnsupportedError(
            f"--quantize {kind}: ONNX Runtime's tools cannot quantize this ({first_line(error)}): leave it or --ort-fusions out."
        ) from error


def refuse_quantize(task: Task, kind: str | None, dtype: str) -> None:
    """Refuse what the tools cannot quantize, before anything is written.

    Raises:
        UnsupportedError: an encoder-decoder, whose merged decoder they do not enter; int8 of a float16 graph.
    """
    if kind is not None and task.is_encoder_decoder:
        raise UnsupportedError(
            f"--quantize {kind}: ONNX Runtime's tools do not enter the branches of a merged decoder: export without it."
        )
    if kind == "int8" and dtype == "float16":
        raise UnsupportedError(
            "--quantize int8: ONNX Runtime quantizes float32 activations alone: leave --dtype float16 out."
        )


def _int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = source.with_name(data_file(MODEL)).is_file()
    quantize_dynamic(
        source, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True, use_external_data_format=large,
        extra_options={"DefaultTensorType": 1},
    )  # fmt: skip
    if large:  # the tool's own name for the data is `.onnx.data`
        _save(_loaded(target), target)
        target.with_name(f"{target.name}.data").unlink(missing_ok=True)


def _blocks(source: Path, target: Path, bits: int) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(_loaded(source), bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    _save(quantizer.model.model, target)


BLOCKS = f"blocks of {BLOCK} weights"
WAYS: Mapping[str, Mapping[str, Callable[[Path, Path], None]]] = {
    "int8": {"output channels": _int8, BLOCKS: partial(_blocks, bits=8)},
    "int4": {BLOCKS: partial(_blocks, bits=4)},
}
"""Kind -> which weights share a scale -> how to write such a graph; the first that keeps enough is taken."""


def _loaded(path: Path) -> Any:
    import onnx

    return onnx.load(str(path))


def _save(model: Any, target: Path) -> None:
    import onnx

    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE_LIMIT  # ByteSize fails above 2 GiB
    onnx.save(model, str(target), save_as_external_data=large, location=data_file(target.stem) if large else None)
