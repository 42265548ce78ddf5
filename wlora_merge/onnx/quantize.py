"""A checked ONNX export -> a quantized graph beside it, by ONNX Runtime's own tools, and what that costs.

Knows those tools. The float graph stays; the error is the
difference from it, measured and reported, not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..errors import UnsupportedError
from ..models.loading import quiet
from ..text import first_line
from .graph import INLINE_LIMIT, MODEL, data_file, graph_file
from .js_names import quantized_suffix
from .session import has_half_weights
from .validate import Differences, differences

if TYPE_CHECKING:
    import torch

BLOCK = 32  # weights that share one scale in int4, as in transformers.js's q4


@dataclass(frozen=True)
class QuantizedReport:
    """A quantized graph: its file in the export, the bytes of it and its data, and how far it is from the float graph."""

    file: str
    bytes: int
    off: Differences


def quantize_onnx(out: Path, model: torch.nn.Module, *, task: Task, kind: str) -> QuantizedReport:
    """Write a quantized graph beside `onnx/model.onnx`, under the name by which transformers.js finds it, and measure its error.

    int8: `onnxruntime.quantization.quantize_dynamic`, weights in int8, one scale for each output channel, activations
    quantized as they come. The weights take 7 of the 8 bits (`reduce_range`): without VNNI a CPU adds two products in 16 bits,
    which 8 bits overflow, and the graph must be right wherever it is served. int4: `MatMulNBitsQuantizer`, matrix products
    alone, symmetric blocks of 32 weights.

    Args:
        out: the root of an ONNX export.
        model: the PyTorch model, which tells the inputs that it takes.
        task: the task of both.
        kind: `int8` or `int4`.

    Returns:
        The graph's file, its bytes, and how far its outputs are from the float graph's.

    Raises:
        UnsupportedError: the tools cannot.
    """
    folder, suffix = out / "onnx", quantized_suffix(kind, half=has_half_weights(out))
    target = folder / graph_file(f"{MODEL}{suffix}")
    try:
        with quiet():
            (_int8 if kind == "int8" else _int4)(folder / graph_file(MODEL), target)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the tools have errors of many kinds
        raise UnsupportedError(
            f"--quantize {kind}: ONNX Runtime's tools cannot quantize this ({first_line(error)}): leave it or --ort-fusions out."
        ) from error
    off = differences(out, model, task=task, suffix=suffix)
    sizes = sum(p.stat().st_size for p in (target, folder / data_file(f"{MODEL}{suffix}")) if p.is_file())
    return QuantizedReport(f"onnx/{target.name}", sizes, off)


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


def _int4(source: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(_loaded(source), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    _save(quantizer.model.model, target)


def _loaded(path: Path) -> Any:
    import onnx

    return onnx.load(str(path))


def _save(model: Any, target: Path) -> None:
    import onnx

    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE_LIMIT  # ByteSize fails above 2 GiB
    onnx.save(model, str(target), save_as_external_data=large, location=data_file(target.stem) if large else None)
