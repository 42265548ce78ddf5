"""A dense folder -> an ONNX folder: `onnx/model.onnx` (+ `model.onnx_data`) beside config, tokenizer and processor.

Knows the layout that ONNX Runtime, Optimum and transformers.js look for, and the order of the work: load, trace, tidy,
save, check. Must not know mixtures or LoRA: the model that it is given is an ordinary one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.tasks import get_task
from ..errors import NotFiniteError, OutputError, UnsupportedError, VerifyError
from ..export_options import export_options
from ..models.files import carried_files
from ..models.loading import quiet
from ..progress import Meter
from ..text import first_line
from .dummy_inputs import load_model
from .graph import INLINE_LIMIT, save, tidy
from .js_names import name_half
from .seq2seq import BRANCHES as DECODER_BRANCHES
from .seq2seq import DECODER, merge
from .session import run_probe
from .trace import trace
from .validate import check_onnx

__all__ = ["DEFAULT_OPSET", "OnnxReport", "check_onnx", "run_probe", "write_onnx"]

# What torch's exporter translates to most directly, and ONNX Runtime, also in the browser, has run since 1.17
DEFAULT_OPSET = 20


@dataclass(frozen=True)
class OnnxReport:
    """What an ONNX export is: its interface, and how far it is from PyTorch.

    Attributes:
        input_names: the graph's input names, in order.
        output_names: the graph's output names, in order.
        opset: the ONNX opset of the graph.
        largest_difference: the largest absolute difference of an output from PyTorch's in float32.
        sizes: bytes of each file in `onnx/`, by name.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    opset: int
    largest_difference: float
    sizes: dict[str, int]


def write_onnx(
    dense: Path,
    out: Path,
    *,
    task: str,
    dtype: str = "float32",
    opset: int | None = None,
    ort_fusions: str | None = None,
    pooling: str | None = None,
) -> OnnxReport:
    """Export the model in the folder `dense` to `out/onnx/model.onnx`, and check it against PyTorch.

    A decoder becomes one graph for prefill and decode: `input_ids`, `attention_mask`, `position_ids` and
    `past_key_values.{i}.key|value` in (a past of length 0 is a prefill), `logits` and `present.{i}.key|value` out. An
    encoder-decoder becomes `encoder_model.onnx` and `decoder_model_merged.onnx`. In float16 each has a second name (see `js_names`).

    Args:
        dense: an ordinary Hugging Face model folder.
        out: an empty folder.
        task: the name of its task.
        dtype: of the weights: `float32` or `float16`.
        opset: of the graph; `DEFAULT_OPSET` when None.
        ort_fusions: `cpu`, `cuda`, `webgpu` or `dml`: use ONNX Runtime's own operators for that provider; None keeps to ONNX.
        pooling: what the head sees in place of the first token, as `models.pooling` names it; None: what the class reads.

    Returns:
        The graph's interface, sizes, and its largest difference from PyTorch.

    Raises:
        UnsupportedError: the architecture, the task, the dtype or the opset cannot be exported, or the extra is missing.
        BaseModelError: `dense` cannot be loaded for the task.
        OutputError: `out` already holds an `onnx` folder.
        VerifyError: the graph does not compute what PyTorch does.
        NotFiniteError: PyTorch's own outputs are not finite, in float32 or in `dtype`.
    """
    export_options({"format": "onnx", "dtype": dtype, "opset": opset, "ort_fusions": ort_fusions})
    require_extra()
    refuse_provider(ort_fusions)
    folder = out / "onnx"
    if folder.exists():
        raise OutputError(f"{folder}: exists already; give an empty output folder.")
    import torch

    Meter("loading the model")
    kind = get_task(task)
    model = load_model(dense, kind, getattr(torch, dtype), attention="eager", pooling=pooling)
    Meter("tracing")
    graphs = trace(model, kind, opset or DEFAULT_OPSET)
    del model
    Meter("tidying the graph")
    with quiet():
        for graph in graphs.values():
            tidy(graph)
            if ort_fusions is not None:
                _fuse(graph, ort_fusions)
    if DECODER_BRANCHES[0] in graphs:
        graphs[DECODER] = merge(*(graphs.pop(name) for name in DECODER_BRANCHES))
    got = next(iter(graphs.values())).opset_imports.get("", 0)
    if got != (opset or DEFAULT_OPSET):
        raise UnsupportedError(f"opset {opset} cannot be written, the exporter gave {got}; leave --opset out.")
    Meter("writing")
    folder.mkdir()
    for name, graph in graphs.items():
        save(graph, folder, name, INLINE_LIMIT)
    name_half(out)
    copy_side_files(dense, out, dtype)
    names = (
        tuple(dict.fromkeys(str(value.name) for graph in graphs.values() for value in graph.graph.inputs)),
        tuple(dict.fromkeys(str(value.name) for graph in graphs.values() for value in graph.graph.outputs)),
    )
    del graphs, graph
    Meter("checking against PyTorch")
    try:
        difference = check_onnx(out, dense, task=task, pooling=pooling)
    except NotFiniteError:  # of PyTorch's own
        raise
    except VerifyError as e:
        if ort_fusions is None:
            raise
        raise UnsupportedError(
            f"the fusions for {ort_fusions} break this model's graph ({first_line(e)}): leave --ort-fusions out."
        ) from e
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return OnnxReport(*names, opset=got, largest_difference=difference, sizes=sizes)


def copy_side_files(dense: Path, out: Path, dtype: str) -> None:
    """Copy everything of a model folder that is not weights, hidden, or ours; `config.json` gets the graph's dtype."""
    for name in carried_files(dense):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(dense / name, out / name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _fuse(graph: Any, provider: str) -> None:
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(graph, provider)


def refuse_provider(provider: str | None) -> None:
    """Refuse fusions that ONNX Runtime cannot run here: the graph could not be checked.

    Raises:
        UnsupportedError: with what it can.
    """
    import onnxruntime

    here = [name.removesuffix("ExecutionProvider").lower() for name in onnxruntime.get_available_providers()]
    if provider is not None and provider not in here:
        raise UnsupportedError(
            f"--ort-fusions {provider}: ONNX Runtime has no such provider here ({', '.join(here)}), so the graph could not be "
            "checked: export on a machine that has it."
        )


def require_extra() -> None:
    """Refuse where the `onnx` extra is not installed.

    Raises:
        UnsupportedError: with how to install it.
    """
    from importlib.util import find_spec

    for package in ("onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UnsupportedError(f"the ONNX export needs {package}: pip install 'wlora-merge[onnx]'.")
