"""An encoder-decoder -> two graphs: `encoder_model.onnx` and `decoder_model_merged.onnx`.

The decoder is traced twice, with and without a past. The two become the branches of one `If` over shared weights, as
Optimum lays them out and transformers.js runs them. Knows that layout alone; tracing and tidying are the other rooms'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..errors import UnsupportedError
from .dummy_inputs import DENSE_INSTEAD, sample_inputs
from .weights import Weight

if TYPE_CHECKING:
    import onnx_ir
    import torch

ENCODER, DECODER = "encoder_model", "decoder_model_merged"
BRANCHES = ("prefill", "decode")
PARTS = ("decoder", "encoder")  # a layer's own cache, and that of its cross-attention
SWITCH = "use_cache_branch"
# Sizes of the traced example, all different (see onnx_trace)
BATCH, SOURCE, SEQUENCE, PAST = 2, 5, 3, 7

Export = Callable[["torch.nn.Module", dict[str, Any], dict[str, Any]], "onnx_ir.Model"]


def trace_seq2seq(model: torch.nn.Module, task: Task, export: Export) -> dict[str, onnx_ir.Model]:
    """The graphs of an encoder-decoder by file name, not yet tidied; the decoder's two branches stand apart.

    Args:
        model: what `load_model` gave.
        task: the model's, which reads one text and writes another.
        export: traces a module on inputs with given dynamic axes.

    Raises:
        UnsupportedError: the model keeps something else than keys and values.
    """
    import torch
    from torch.export import Dim

    tokens = sample_inputs(model, task, BATCH, SOURCE)
    rows = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in ("input_ids", "attention_mask")}
    encoder = export(_Encoder.of(model), tokens, rows)
    with torch.no_grad():
        hidden = _Encoder.of(model)(**tokens)["last_hidden_state"]
    start = {
        "encoder_attention_mask": tokens["attention_mask"],
        "input_ids": sample_inputs(model, task, BATCH, SEQUENCE)["input_ids"],
        "encoder_hidden_states": hidden,
    }
    axes: dict[str, Any] = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in start}
    prefill = export(_Decoder.of(model), start, axes)
    lengths = {"decoder": PAST, "encoder": SOURCE}
    shapes = cross_cache_shapes(model, start)
    past = {
        str(i): {
            part: {kind: torch.zeros(BATCH, heads, lengths[part], width) for kind, width in widths.items()}
            for part, (heads, widths) in layer.items()
        }
        for i, layer in enumerate(shapes)
    }
    dtype = hidden.dtype
    past = {i: {p: {k: t.to(dtype) for k, t in c.items()} for p, c in layer.items()} for i, layer in past.items()}
    grown = {
        i: {p: {k: {0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for k in c} for p, c in layer.items()} for i, layer in past.items()
    }
    decode = export(_Decoder.of(model), {**start, "past_key_values": past}, {**axes, "past_key_values": grown})
    return {ENCODER: encoder, "prefill": prefill, "decode": decode}


def cross_cache_shapes(
    model: torch.nn.Module, start: dict[str, torch.Tensor]
) -> list[dict[str, tuple[int, dict[str, int]]]]:
    """For each layer, of its own cache and of its cross-attention's: heads, and the width of keys and values.

    Raises:
        UnsupportedError: the model keeps something else.
    """
    import torch
    from transformers.cache_utils import EncoderDecoderCache

    with torch.no_grad():
        cache = _run_decoder(model, dict(start)).past_key_values
    if not isinstance(cache, EncoderDecoderCache):
        raise UnsupportedError(
            f"{type(model).__name__} keeps a {type(cache).__name__} and not the keys and values of each layer, which the ONNX "
            f"decoder graph has no inputs for; {DENSE_INSTEAD}"
        )
    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    return [
        {
            part: (layer.keys.shape[1], {"key": layer.keys.shape[-1], "value": layer.values.shape[-1]})  # type: ignore[union-attr]
            for part, layer in zip(PARTS, pair, strict=True)
        }
        for pair in pairs
    ]


def _run_decoder(model: Any, inputs: dict[str, Any], cache: Any = None) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return model(
        attention_mask=inputs["encoder_attention_mask"],
        encoder_outputs=BaseModelOutput(last_hidden_state=inputs["encoder_hidden_states"]),
        decoder_input_ids=inputs["input_ids"],
        past_key_values=cache,
        use_cache=True,
    )


class _Encoder:
    @staticmethod
    def of(model: Any) -> torch.nn.Module:
        """The encoder alone, its one output named."""
        import torch

        class Encoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.config = model.config

            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
                same: Any = torch._check
                same(input_ids.shape[0] == attention_mask.shape[0])
                same(input_ids.shape[1] == attention_mask.shape[1])
                given = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
                return {"last_hidden_state": given.last_hidden_state}

        return Encoder()


class _Decoder:
    @staticmethod
    def of(model: Any) -> torch.nn.Module:
        """The decoder and its head, with a nested dict for the cache."""
        import torch

        class Decoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.config = model.config

            def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
                """One step of the decoder, with its caches as tensors."""
                from transformers.cache_utils import DynamicCache, EncoderDecoderCache

                _tie(inputs)
                past = inputs.get("past_key_values")
                cache = None
                if past is not None:
                    own, cross = (
                        DynamicCache([(layer[part]["key"], layer[part]["value"]) for layer in past.values()])
                        for part in PARTS
                    )
                    cache = EncoderDecoderCache(own, cross)
                given = _run_decoder(self.model, inputs, cache)
                named = {"logits": given.logits}
                kept = given.past_key_values
                for i, pair in enumerate(
                    zip(kept.self_attention_cache.layers, kept.cross_attention_cache.layers, strict=True)
                ):
                    for part, layer in zip(PARTS, pair, strict=True):
                        if past is None or part == "decoder":
                            named |= {f"present.{i}.{part}.key": layer.keys, f"present.{i}.{part}.value": layer.values}
                return named

        return Decoder()


def _tie(inputs: dict[str, Any]) -> None:
    """Tell the tracer which axes are the same one."""
    import torch

    same: Any = torch._check
    batch, source = inputs["encoder_attention_mask"].shape
    same(inputs["encoder_hidden_states"].shape[0] == batch)
    same(inputs["encoder_hidden_states"].shape[1] == source)
    same(inputs["input_ids"].shape[0] == batch)
    layers = list(inputs.get("past_key_values", {}).values())
    for layer in layers:
        for part in PARTS:
            length = source if part == "encoder" else layers[0]["decoder"]["key"].shape[2]
            for value in layer[part].values():
                same(value.shape[0] == batch)
                same(value.shape[2] == length)


def merge(prefill: onnx_ir.Model, decode: onnx_ir.Model) -> onnx_ir.Model:
    """One graph that runs `decode` where its input `use_cache_branch` is true, else `prefill`; each weight is there once.

    Source: the layout of Optimum's `decoder_model_merged.onnx`, which transformers.js feeds.
    """
    import onnx_ir as ir

    inputs = {
        value.name: ir.Value(name=value.name, shape=value.shape, type=value.type) for value in decode.graph.inputs
    }
    switch = ir.Value(name=SWITCH, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    weights: dict[tuple[Any, ...], ir.Value] = {}
    given = [(value.name, value.shape, value.type) for value in prefill.graph.outputs]
    names = [str(name) for name, _, _ in given]
    branches = {
        "else_branch": _branch(prefill, "prefill", names, inputs, weights),
        "then_branch": _branch(decode, "decode", names, inputs, weights),
    }
    outputs = [ir.Value(name=name, type=kind, shape=_loose(shape)) for name, shape, kind in given]
    attributes = [ir.AttrGraph(name, graph) for name, graph in sorted(branches.items(), reverse=True)]
    node = ir.Node("", "If", [switch], attributes, outputs=outputs, name="decoder")
    graph = ir.Graph(
        [*inputs.values(), switch],
        outputs,
        nodes=[node],
        initializers=list(weights.values()),
        opset_imports=decode.graph.opset_imports,
        name="merged",
    )
    return ir.Model(
        graph,
        ir_version=decode.ir_version,
        producer_name=decode.producer_name,
        producer_version=decode.producer_version,
    )


def _loose(shape: Any) -> Any:
    """The shape without the names of lengths, which differ between the branches."""
    import onnx_ir as ir

    dims = [d if isinstance(d, int) else "batch_size" if i == 0 else f"{i}" for i, d in enumerate(shape)]
    return ir.Shape([d if isinstance(d, int) or d == "batch_size" else None for d in dims])


def _branch(
    model: onnx_ir.Model,
    name: str,
    outputs: list[str],
    inputs: dict[str | None, onnx_ir.Value],
    weights: dict[tuple[Any, ...], onnx_ir.Value],
) -> onnx_ir.Graph:
    """The model's nodes as a graph without inputs, over the merged graph's inputs and weights."""
    import onnx_ir as ir

    graph = model.graph
    for value in graph.inputs:
        value.replace_all_uses_with(inputs[value.name], replace_graph_outputs=True)
    for value in list(graph.initializers.values()):
        tensor, weight = value.const_value, Weight.of(value)
        if tensor is None and weight is None:
            continue
        content = weight if tensor is None else hashlib.sha256(tensor.tobytes()).digest()
        key = (value.dtype, tuple(value.shape or ()), content)
        if key not in weights:
            taken = {kept.name for kept in weights.values()}
            own = f"{name}.{value.name}" if value.name in taken else value.name
            weights[key] = ir.Value(name=own, shape=value.shape, type=value.type, const_value=tensor)
            if weight is not None:
                weight.mark(weights[key])
        value.replace_all_uses_with(weights[key], replace_graph_outputs=True)
    found = {value.name: value for value in graph.outputs}
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for missing in [output for output in outputs if output not in found]:
        past = inputs[missing.replace("present.", "past_key_values.", 1)]
        passed = ir.Node("", "Identity", [past], name=missing)
        found[missing] = passed.outputs[0]
        found[missing].type, found[missing].shape = past.type, past.shape
        nodes.append(passed)
    for node in nodes:
        node.name = f"{name}.{node.name}"
        for value in node.outputs:
            value.name = f"{name}.{value.name}"
    for output in outputs:
        found[output].name = f"{name}.{output}"
    return ir.Graph([], [found[output] for output in outputs], nodes=nodes, name=name)
