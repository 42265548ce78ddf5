"""A transformers model -> a raw ONNX graph, through transformers' own exporter.

Knows how to call `transformers.exporters.OnnxExporter` so that one graph serves every batch size, sequence length and
past length, and so that it is fast: explicit dynamic axes, no stack traces, no decomposition that changes nothing.
Must not know files, nor the conventions for names inside the graph (onnx_graph.py).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..errors import UnsupportedError
from ..models.loading import quiet
from .dummy_inputs import DENSE_INSTEAD, one_sentence, outputs_of, sample_inputs
from .rope import stateless_rope
from .seq2seq import trace_seq2seq

if TYPE_CHECKING:
    import onnx_ir
    import torch

# Sizes of the traced example: all different and none 0 or 1, which torch.export would take for constants.
BATCH, SEQUENCE, PAST = 2, 5, 7


def trace(model: torch.nn.Module, task: Task, opset: int) -> dict[str, onnx_ir.Model]:
    """The graphs of `model` by name, unoptimized, their inputs and outputs under their conventional names.

    One, `model`, for all but an encoder-decoder (see `seq2seq`).

    Args:
        model: what `load_model` gave, with eager attention (half the nodes of a decomposed scaled-dot-product).
        task: what the model is for.
        opset: the ONNX opset to write.

    Raises:
        UnsupportedError: the model cannot be exported; the reason is the exporter's own.

    Source: `transformers.exporters.OnnxExporter`; torch.export's `Dim.DYNAMIC`.
    """
    import torch

    def export(module: torch.nn.Module, inputs: dict[str, Any], axes: dict[str, Any]) -> onnx_ir.Model:
        exporters: Any = importlib.import_module("transformers.exporters")  # its lazy module names no types
        config = exporters.OnnxConfig(dynamic_shapes=axes, opset_version=opset, optimize=False)
        with _without_stack_traces(), _without_idle_decompositions(), stateless_rope(model):
            program: onnx_ir.Model
            program, _ = exporters.OnnxExporter().export_program(module, inputs, config)
        return program

    if task.is_encoder_decoder:
        with refusing(model), quiet(), torch.no_grad():
            return trace_seq2seq(model, task, export)
    if not task.is_decoder:
        model.config.use_cache = False  # type: ignore[union-attr]
    inputs: dict[str, Any] = dict(sample_inputs(model, task, BATCH, SEQUENCE, past=PAST if task.is_decoder else 0))
    with refusing(model), quiet(), torch.no_grad():
        if task.is_decoder:
            inputs["past_key_values"] = {
                str(i): {name: torch.zeros(BATCH, heads, PAST, width) for name, width in widths.items()}
                for i, (heads, widths) in enumerate(cache_shapes(model, task))
            }
        return {"model": export(_flat(model, outputs_of(model, task)), inputs, _dynamic(inputs))}


@contextlib.contextmanager
def refusing(model: torch.nn.Module) -> Iterator[None]:
    """Turn whatever the exporter raises about `model` into one sentence.

    The exporters raise dozens of classes, from torch's, sympy's and their own: each means that this architecture cannot
    be traced. The original error stays chained.
    """
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as e:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be exported to ONNX ({one_sentence(e)}); {DENSE_INSTEAD}"
        ) from e


def cache_shapes(model: torch.nn.Module, task: Task) -> list[tuple[int, dict[str, int]]]:
    """For each layer of a decoder's cache, its heads and the width of its keys and values, read off one real step.

    Raises:
        UnsupportedError: the model keeps something else than keys and values of every past token.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    outputs = model(**sample_inputs(model, task, 1, 2), use_cache=True)
    cache = getattr(outputs, "past_key_values", None)
    layers = cache.layers if isinstance(cache, DynamicCache) else []
    if not layers or not all(isinstance(layer, DynamicLayer) and layer.is_initialized for layer in layers):
        raise UnsupportedError(
            f"{type(model).__name__} keeps a state that is not the keys and values of each layer"
            f" ({type(cache).__name__}), which the ONNX decoder graph has no inputs for; {DENSE_INSTEAD}"
        )
    return [
        (layer.keys.shape[1], {"key": layer.keys.shape[-1], "value": layer.values.shape[-1]})  # type: ignore[union-attr]
        for layer in layers
    ]


def _dynamic(inputs: dict[str, Any]) -> dict[str, Any]:
    """Which axes vary: of tokens all, of pixels the batch, of a cache `[batch, heads, past, width]` batch and past.

    `Dim.DYNAMIC`, not `Dim.AUTO`: an axis that the model would fix at the traced size is then an error.
    """
    from torch.export import Dim

    def axes(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: axes(name, child) for key, child in value.items()}
        vary = {"pixel_values": (0,), "past_key_values": (0, 2)}.get(name, (0, 1))
        return dict.fromkeys(vary, Dim.DYNAMIC)

    return {name: axes(name, value) for name, value in inputs.items()}


def _flat(model: torch.nn.Module, outputs: tuple[str, ...]) -> torch.nn.Module:
    """`model` with a nested dict for a cache, and only the named outputs and the grown cache in a dict."""
    import torch
    from transformers.cache_utils import DynamicCache

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.config = model.config

        def forward(self, **inputs: Any) -> dict[str, Any]:
            """The model's outputs by name, with its cache as tensors."""
            _tie_axes(inputs)
            past = inputs.pop("past_key_values", None)
            if past is not None:
                # without a config: a sliding layer keeps its whole past, and the mask applies the window
                cache = DynamicCache([(layer["key"], layer["value"]) for layer in past.values()])
                inputs.update(past_key_values=cache, use_cache=True)
            given = self.model(**inputs)
            named = {name: given[name] for name in outputs}
            if past is not None:
                for i, layer in enumerate(given["past_key_values"].layers):
                    named |= {f"present.{i}.key": layer.keys, f"present.{i}.value": layer.values}
            return named

    return Flat()


def _tie_axes(inputs: dict[str, Any]) -> None:
    """Tell the tracer which axes are the same one, so that it carries two or three symbols and not one for each."""
    import torch

    if "input_ids" not in inputs:
        return
    same: Any = torch._check
    batch, sequence = inputs["input_ids"].shape
    past = inputs["past_key_values"]["0"]["key"].shape[2] if "past_key_values" in inputs else 0
    for name, value in inputs.items():
        if name not in ("input_ids", "past_key_values"):
            same(value.shape[0] == batch)
            same(value.shape[1] == (past + sequence if name == "attention_mask" else sequence))
    for layer in inputs.get("past_key_values", {}).values():
        for value in layer.values():
            same(value.shape[0] == batch)
            same(value.shape[2] == past)


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Skip the Python stack of each traced node: an eighth of the time, and it would name local files."""
    import torch.fx

    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def _without_idle_decompositions() -> Iterator[None]:
    """Let torch.onnx skip its decomposition pass where that pass would change nothing.

    It traces the whole graph twice more, half of a decoder's export time, although torch's ONNX library translates nearly
    every operator of a transformer as it is. Where every operator is either translated or one of the few spelled anew
    below, and none writes in place, the pass has nothing to do; else it runs.

    Source: `torch.onnx._internal.exporter._fx_passes.decompose_with_registry` (private: where it is gone, so is this).
    """
    try:
        passes: Any = importlib.import_module("torch.onnx._internal.exporter._fx_passes")
        decompositions: Any = importlib.import_module("torch.onnx._internal.exporter._decomp")
        original: Callable[..., Any] = passes.decompose_with_registry
        translated_by = decompositions.get_onnx_implemented_overloads
    except (ImportError, AttributeError):
        yield
        return

    def decompose(program: Any, registry: Any) -> Any:
        if not _respell(program.graph_module, set(translated_by(registry))):
            return original(program, registry)
        return program

    passes.decompose_with_registry = decompose
    try:
        yield
    finally:
        passes.decompose_with_registry = original


def _respell(graph_module: torch.fx.GraphModule, translated: set[Any]) -> bool:
    """Spell the few untranslated operators by translated ones, in place; False, and nothing done, where others are."""
    import torch

    aten = torch.ops.aten
    casts = {aten.to.dtype, aten.to.dtype_layout, aten.to.device}
    renamed = {
        aten.__and__.Tensor: aten.bitwise_and.Tensor,
        aten.__or__.Tensor: aten.bitwise_or.Tensor,
        aten.min.other: aten.minimum.default,  # in the positions of a T5's decoder
    }
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    for target in {node.target for node in nodes}:
        if isinstance(target, torch._ops.HigherOrderOperator):
            return False
        if isinstance(target, torch._ops.OpOverload) and (
            target._schema.is_mutable or (target not in translated and target not in casts and target not in renamed)
        ):
            return False
    for node in nodes:
        if node.target is aten.detach.default:  # transformers' own fixes insert these bare
            node.meta.setdefault("val", node.args[0].meta["val"])
        if node.target in casts:
            # the traced result's own dtype: `to` may name it, or only a device
            node.target, node.args = aten._to_copy.default, node.args[:1]
            node.kwargs = {"dtype": node.meta["val"].dtype}
        node.target = renamed.get(node.target, node.target)
    graph_module.recompile()
    return True
