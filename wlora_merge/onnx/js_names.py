"""The names under which transformers.js looks for graphs: each of its dtypes has a suffix.

Knows names and files. `model.onnx` stays, whatever dtype its weights have: ONNX Runtime's users and Optimum look for that.

Source: `DEFAULT_DTYPE_SUFFIX_MAPPING` in transformers.js.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .graph import MODEL, data_file, graph_file
from .seq2seq import DECODER, ENCODER
from .session import has_half_weights

HALF = "_fp16"
DTYPES = {"": "fp32", HALF: "fp16", "_quantized": "q8", "_int8": "int8", "_q4": "q4", "_q4f16": "q4f16"}
"""Suffix -> what transformers.js calls it; Optimum, too, calls an int8 graph `model_quantized.onnx`."""


def quantized_suffix(kind: str, *, half: bool) -> str:
    """The suffix of an `int8` or `int4` graph; `half`: its other numbers are float16."""
    if kind == "int8":
        return "_quantized"
    return "_q4f16" if half else "_q4"


def name_half(out: Path) -> None:
    """Give the float16 graphs of an export, under their second name, to transformers.js: one file on the disk, where that can be.

    A graph whose weights lie in a data file has one name: the library would look for the data under the other name too.

    Args:
        out: the root of an ONNX export.
    """
    folder = out / "onnx"
    if not has_half_weights(out):
        return
    for name in (MODEL, ENCODER, DECODER):
        graph, other = folder / graph_file(name), folder / graph_file(f"{name}{HALF}")
        if not graph.is_file() or other.exists() or (folder / data_file(name)).exists():
            continue
        try:
            os.link(graph, other)
        except OSError:  # a file system without links
            shutil.copyfile(graph, other)


def dtype_for_js(out: Path) -> str:
    """The dtype by which transformers.js finds the float graphs of an export."""
    return DTYPES[HALF if any((out / "onnx").glob(f"*{HALF}.onnx")) else ""]
