"""A dense folder -> an ONNX folder: `onnx/model.onnx` (+ `model.onnx_data`) beside config, tokenizer and processor.

Knows the layout that ONNX Runtime, Optimum and transformers.js look for, and the order of the work: load the model; take its
graph without weights from the cache, or trace it; fill the weights in; check. Must not know mixtures or LoRA: the model that it is
given is an ordinary one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..data.tasks import get_task
from ..errors import NotFiniteError, OutputError, UnsupportedError, VerifyError
from ..export_options import export_options
from ..models.files import carried_files
from ..models.loading import quiet
from ..progress import LOG, Meter
from ..text import first_line
from .dummy_inputs import load_model
from .graph import data_file, graph_file, tidy
from .js_names import name_half
from .seq2seq import BRANCHES as DECODER_BRANCHES
from .seq2seq import DECODER, merge
from .session import run_probe
from .skeleton import INLINE_LIMIT, fill, skeleton_of
from .trace import trace
from .trace_cache import Skeletons, TraceKey, keep_graphs, read_graphs, trace_key
from .validate import check_onnx, compare_with
from .weights import structure_of, take_weights, weights_of

if TYPE_CHECKING:
    import torch

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
    cached_as: str | None = None,
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
        cached_as: what `wlora-merge cache` calls the base, whose graph is taken from the user's cache and kept there; None: it is
            traced, whatever is there, and not kept.

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
    job = _Job(dense, out, get_task(task), dtype, opset or DEFAULT_OPSET, ort_fusions, pooling)
    model = job.load(torch.float32)
    key = None if cached_as is None else job.key(model, cached_as)
    copy_side_files(dense, out, dtype)
    kept = None if key is None else read_graphs(key)
    graphs = job.traced(key) if kept is None else kept
    try:
        difference = job.write(graphs, model)
    except VerifyError as error:
        if kept is None or isinstance(error, NotFiniteError):  # the latter is PyTorch's own
            raise
        shutil.rmtree(folder)  # whatever is wrong with what was kept, it is not used again
        graphs = job.traced(key)
        difference = job.write(graphs, model)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return OnnxReport(*_interface(graphs), opset=job.opset, largest_difference=difference, sizes=sizes)


@dataclass(frozen=True)
class _Job:
    """What is exported, where to, and how: the model in a folder, and all that its graph depends on beside it."""

    dense: Path
    out: Path
    task: Task
    dtype: str
    opset: int
    ort_fusions: str | None
    pooling: str | None

    def load(self, dtype: torch.dtype, attention: str | None = None) -> torch.nn.Module:
        """The model, in another dtype than the graph's where it is for comparing."""
        return load_model(self.dense, self.task, dtype, attention, self.pooling)

    def key(self, model: torch.nn.Module, base: str) -> TraceKey:
        """Under which the graphs of the model are kept."""
        return trace_key(
            self.dense, structure_of(model), task=self.task.name, dtype=self.dtype, opset=self.opset, pooling=self.pooling,
            base=base,
        )  # fmt: skip

    def traced(self, key: TraceKey | None) -> Skeletons:
        """The graphs by name, traced now, and kept under the key unless they are of these weights alone.

        Raises:
            UnsupportedError: the exporter cannot, or not in this opset.
        """
        import torch

        Meter("tracing")
        model = self.load(getattr(torch, self.dtype), attention="eager")
        graphs = trace(model, self.task, self.opset)
        strange = [name for graph in graphs.values() for name in take_weights(graph.graph, model)]
        Meter("tidying the graph")
        with quiet():
            for graph in graphs.values():
                tidy(graph)
        if DECODER_BRANCHES[0] in graphs:
            graphs[DECODER] = merge(*(graphs.pop(name) for name in DECODER_BRANCHES))
        got = next(iter(graphs.values())).opset_imports.get("", 0)
        if got != self.opset:
            raise UnsupportedError(f"opset {self.opset} cannot be written, the exporter gave {got}; leave --opset out.")
        skeletons = {name: skeleton_of(graph) for name, graph in graphs.items()}
        if strange:
            LOG.info(f"The graph is traced for each mixture: its {strange[0]!r} may come from the model's weights.")
        elif key is not None:
            keep_graphs(key, skeletons)
        return skeletons

    def write(self, graphs: Skeletons, model: torch.nn.Module) -> float:
        """Fill the graphs with the model's weights, and compare them with it; the largest difference of an output.

        Raises:
            VerifyError: they do not compute the same.
            UnsupportedError: they do not since the fusions.
        """
        import torch

        Meter("writing")
        folder = self.out / "onnx"
        folder.mkdir()
        for name, skeleton in graphs.items():
            fill(skeleton, weights_of(model), folder, name, INLINE_LIMIT)
            if self.ort_fusions is not None:
                _fuse_file(folder, name, self.ort_fusions)
        name_half(self.out)
        Meter("checking against PyTorch")
        try:
            return compare_with(self.out, model, task=self.task, halved=partial(self.load, torch.float16))
        except NotFiniteError:  # of PyTorch's own
            raise
        except VerifyError as e:
            if self.ort_fusions is None:
                raise
            raise UnsupportedError(
                f"the fusions for {self.ort_fusions} break this model's graph ({first_line(e)}): leave --ort-fusions out."
            ) from e


def _interface(graphs: Skeletons) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs and of the outputs, each once, in order."""
    import onnx

    models = [onnx.ModelProto.FromString(skeleton.graph).graph for skeleton in graphs.values()]
    inputs = dict.fromkeys(value.name for graph in models for value in graph.input)
    return tuple(inputs), tuple(dict.fromkeys(value.name for graph in models for value in graph.output))


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


def _fuse_file(folder: Path, name: str, provider: str) -> None:
    """Put ONNX Runtime's own operators into a written graph; they may take weights together, so each export does it anew."""
    import onnx_ir as ir

    fused = folder / ".fused"
    fused.mkdir()
    outside = data_file(name) if (folder / data_file(name)).exists() else None
    with quiet():
        graph = ir.load(folder / graph_file(name))
        _fuse(graph, provider)
        ir.save(graph, fused / graph_file(name), external_data=outside)
    for file in fused.iterdir():
        os.replace(file, folder / file.name)
    fused.rmdir()


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
