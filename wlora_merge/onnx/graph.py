"""A raw ONNX graph -> a conventional, small, reproducible one.

Knows onnx_ir: which passes pay, how axes are named, what must not reach a file (paths, traces). The graph's weights have no
numbers here, so nothing that is done depends on them. Must not know torch or transformers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .weights import Weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir

MODEL = "model"
_AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "pixel_values": ("batch_size",),
    "encoder_attention_mask": ("batch_size", "encoder_sequence_length"),
    "past_key_values.0.decoder.key": ("batch_size", "num_heads", "past_sequence_length"),
    "past_key_values.0.key": ("batch_size", "num_heads", "past_sequence_length"),
}


def tidy(model: onnx_ir.Model) -> None:
    """Fold constants, drop what is unused or said twice, name the axes, and strip every note about the tracing.

    The passes are those of `onnxscript.optimizer.optimize_ir` without its two rounds of some hundred rewrite rules. These
    take 30 s on a 30-layer decoder; only the rules that drop slices and casts doing nothing have work there.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import _collapse_slices, _no_op

    common: Any = ir.passes.common  # some of its constructors have no types
    outputs = [value.name for value in model.graph.outputs]
    ir.passes.Sequential(common.InlinePass(), common.RemoveUnusedNodesPass())(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        rewriter.RewritePass((*_no_op.rules, *_collapse_slices.rules)),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    )(model)
    _turn_weights(model.graph)
    ir.passes.Sequential(
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        if value.name != name:  # two outputs that are one tensor have been given the first one's name
            value.name = name
    name_axes(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    # the build (+cpu, +cu130) is not what the graph depends on
    model.producer_version = (model.producer_version or "").split("+")[0]


def _turn_weights(graph: onnx_ir.Graph) -> None:
    """Let a weight stand transposed in the graph, where one transpose is all that reads it: a tied embedding stays as it is."""
    import onnx_ir as ir

    for value in list(graph.initializers.values()):
        weight, uses = Weight.of(value), list(value.uses())
        node = uses[0].node if len(uses) == 1 else None
        if weight is None or node is None or node.op_type != "Transpose" or node.graph is not graph:
            continue
        turned, shape = node.outputs[0], value.shape
        if shape is None or turned.is_graph_output():
            continue
        axes = tuple(node.attributes.get_ints("perm", range(len(shape))[::-1]))
        new = ir.Value(name=turned.name, type=value.type, shape=ir.Shape([shape[axis] for axis in axes]))
        Weight(weight.name, axes).mark(new)
        turned.replace_all_uses_with(new)
        graph.remove(node, safe=True)
        del graph.initializers[str(value.name)]
        graph.initializers.add(new)


def name_axes(model: onnx_ir.Model) -> None:
    """Give the dynamic axes their conventional names, in every shape of the graph.

    `batch_size`, `sequence_length`, `past_sequence_length`, and `total_sequence_length` for the sum of the last two.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        known = _AXES.get(value.name or "", ())
        for i, symbol in _symbols(value):
            if i < len(known):
                names.setdefault(symbol, known[i])
    for value in _values(model):
        if value.shape is not None and not value.shape.frozen:
            for i, symbol in _symbols(value):
                value.shape[i] = _renamed(symbol, names)


def _symbols(value: onnx_ir.Value) -> list[tuple[int, str]]:
    """The axes of a value that are not numbers, with their names."""
    import onnx_ir as ir

    dims = enumerate(value.shape or ())
    return [(i, dim.value) for i, dim in dims if isinstance(dim, ir.SymbolicDim) and dim.value]


def _renamed(expression: str, names: dict[str, str]) -> str:
    """A symbol, or an expression of several, under the new names."""
    return names.get(expression) or re.sub(r"\w+", lambda word: names.get(word[0], word[0]), expression)


def _values(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def graph_file(name: str) -> str:
    """The file of the graph `name`."""
    return f"{name}.onnx"


def data_file(name: str) -> str:
    """The file of its weights, where they are too large for the graph's own."""
    return f"{name}.onnx_data"
