"""The graphs of an ONNX folder: sound files, opened in ONNX Runtime, and run as their consumers run them.

Knows `onnx.checker`, ONNX Runtime's sessions, the cache that goes from one run into the next, and how the two graphs of an
encoder-decoder are fed. Must not know PyTorch's models, nor what the outputs should be.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError, VerifyError
from ..io.untrusted import is_plain_file_name
from ..text import first_line
from .graph import MODEL, data_file, graph_file
from .protobuf import read_onnx, without_weights
from .seq2seq import DECODER, ENCODER, SWITCH

if TYPE_CHECKING:
    import numpy as np
    import torch

RUNTIMES_OWN = "SimplifiedLayerNormalization"  # ONNX Runtime's operator, which it keeps in ONNX's own domain
RUNTIMES_DOMAIN = "com.microsoft"


def open_graphs(onnx_folder: Path, suffix: str = "") -> dict[str, Any]:
    """A session for each graph of an export, after `check_files` on it; `suffix` tells a quantized one.

    Raises:
        VerifyError: a file is broken or missing.
    """
    folder = onnx_folder / "onnx"
    pair = (folder / graph_file(ENCODER)).is_file()
    names = (ENCODER, DECODER) if pair else (MODEL,)
    for name in names:
        check_files(folder, name + suffix)
    return {name: open_session(folder / graph_file(name + suffix)) for name in names}


def has_half_weights(onnx_folder: Path) -> bool:
    """Whether an export computes in float16: a matrix of its graphs is. Its inputs and outputs may be float32 all the same."""
    graphs = sorted((onnx_folder / "onnx").glob("*model*.onnx"))
    names = {graph_file(name) for name in (MODEL, ENCODER, DECODER)}
    found = (entry for graph in graphs if graph.name in names for entry in read_onnx(graph).tensors)
    return any(entry.dtype == "F16" and len(entry.shape) > 1 for entry in found)


def main_session(sessions: Mapping[str, Any]) -> Any:
    """The session that gives the model's outputs."""
    return sessions.get(DECODER) or sessions[MODEL]


def output_names(session: Any) -> list[str]:
    """What the graph gives beside the cache."""
    return [value.name for value in session.get_outputs() if not value.name.startswith("present.")]


def run_probe(onnx_folder: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The graph's own outputs on some inputs, in float32; what it takes and is not given is filled in.

    Args:
        onnx_folder: the root of an ONNX export.
        inputs: `input_ids` `[batch, sequence]` (and `decoder_input_ids`) or `pixel_values`; masks of ones, positions from
            0, token types of 0 and an empty past are added where the graph takes them.

    Returns:
        Every output of the graph but the cache, by name.

    Raises:
        VerifyError: the file is broken, or does not run on the inputs.
    """
    import numpy as np
    import torch

    sessions = open_graphs(onnx_folder)
    session = main_session(sessions)
    feed = {name: value.numpy() for name, value in inputs.items()}
    takes = {value.name for value in session.get_inputs()}
    if "input_ids" in feed:
        ids = feed["input_ids"]
        filled = {
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
            "token_type_ids": np.zeros_like(ids),
        }
        takes |= {"attention_mask"} if ENCODER in sessions else set()
        feed |= {name: value for name, value in filled.items() if name in takes - set(feed)}
    outputs = run_graphs(sessions, feed)
    return {
        name: torch.from_numpy(value.astype(np.float32))
        for name, value in outputs.items()
        if not name.startswith("present.")
    }


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        UnsupportedError: ONNX Runtime is not installed.
        VerifyError: ONNX Runtime cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise UnsupportedError("ONNX Runtime is not installed: pip install 'wlora-merge[onnx]'.") from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its notices about unused initializers are for its authors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the machine runs other things too
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its classes are generated at import and share no base but this
        raise VerifyError(f"{path}: ONNX Runtime cannot load it ({first_line(e)}).") from e


def check_files(folder: Path, name: str = MODEL) -> None:
    """`onnx.checker` on the graph `name`, and a data file exactly where the graph names one.

    Raises:
        VerifyError: the model is missing or malformed, or its weights lie elsewhere than it says.
    """
    import onnx

    path, data = folder / graph_file(name), folder / data_file(name)
    if not path.is_file():
        raise VerifyError(f"{path}: missing; export the mixture again.")
    try:
        model = onnx.ModelProto.FromString(without_weights(path))
    except Exception as e:  # protobuf's DecodeError moves between its versions
        raise VerifyError(f"{path}: not an ONNX file ({e}); export the mixture again.") from e
    named = set()
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if not entry:
            continue
        named.add(entry["location"])
        if not is_plain_file_name(entry["location"]):
            raise VerifyError(f"{path}: {tensor.name} lies in {entry['location']!r}, expected a file beside it.")
        where = folder / entry["location"]
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if not where.is_file() or where.stat().st_size < end:
            raise VerifyError(f"{where}: missing or shorter than the {end} bytes that {tensor.name} needs.")
    if data.name not in named and data.exists():
        raise VerifyError(f"{data}: no weight of {path.name} refers to it; delete it.")
    _move_outside(model.graph)
    if _rename_runtimes_own(model.graph):  # the checker knows no such operator, and passes over other domains
        model.opset_import.append(onnx.helper.make_opsetid(RUNTIMES_DOMAIN, 1))
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as e:
        raise VerifyError(f"{path}: onnx.checker refuses it ({first_line(e)}).") from e


def _rename_runtimes_own(graph: Any) -> bool:
    """Put ONNX Runtime's own operator, and those of its branches, under ONNX Runtime's domain; False where there is none."""
    found = False
    for node in graph.node:
        if node.op_type == RUNTIMES_OWN and not node.domain:
            node.domain, found = RUNTIMES_DOMAIN, True
        for attribute in node.attribute:
            found |= _rename_runtimes_own(attribute.g)
    return found


def _move_outside(graph: Any) -> None:
    """Make inputs of the weights that lie in a data file, which was looked at already, so that the graph can be judged alone."""
    import onnx

    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    for tensor in outside:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        graph.initializer.remove(tensor)


# ---------------------------------------------------------------------------------------------------------- running


def run_graphs(sessions: Mapping[str, Any], inputs: dict[str, np.ndarray], past: int = 0) -> dict[str, np.ndarray]:
    """The outputs for the tokens after the first `past`, which the graph is given first where there are any.

    Args:
        sessions: what `open_graphs` gave.
        inputs: of an encoder-decoder `input_ids` and `attention_mask` [batch, source], `decoder_input_ids` [batch, sequence]
            (`past` counts those); else all that the graph takes but the cache.
        past: how many of the tokens come from the cache.
    """
    if DECODER in sessions:
        feed = _encoded(sessions, inputs)
        ids, grown = inputs["decoder_input_ids"], None
        if past:
            grown = _grown(_decode(sessions, feed, ids[:, :past], None))
        return _decode(sessions, feed, ids[:, past:], grown)
    session = sessions[MODEL]
    cache = _empty_cache(session, len(next(iter(inputs.values()))))
    if past:
        cache = _grown(_step(session, {name: value[:, :past] for name, value in inputs.items()}, cache))
        inputs = {name: value if name == "attention_mask" else value[:, past:] for name, value in inputs.items()}
    return _step(session, inputs, cache)


def next_scores(
    sessions: Mapping[str, Any], inputs: dict[str, np.ndarray], start: int
) -> Generator[np.ndarray, int, None]:
    """The scores of the next token, first after the prompt, then after each token that is sent.

    Args:
        sessions: ONNX Runtime sessions by the graph's name.
        inputs: the prompt, of one row; of an encoder-decoder what its encoder reads.
        start: an encoder-decoder's first token.
    """
    import numpy as np

    cache: dict[str, np.ndarray] | None = None
    if DECODER in sessions:
        feed, token = _encoded(sessions, inputs), start
        while True:
            outputs = _decode(sessions, feed, np.array([[token]]), cache)
            token = yield outputs["logits"][0, -1]
            cache = _grown(outputs)
    session, feed, cache = sessions[MODEL], inputs, _empty_cache(sessions[MODEL], 1)
    position = feed["input_ids"].shape[1]
    while True:
        outputs = _step(session, feed, cache)
        token = yield outputs["logits"][0, -1]
        cache = _grown(outputs)
        feed = {"input_ids": np.array([[token]]), "attention_mask": np.ones((1, position + 1), dtype=np.int64)}
        if "position_ids" in inputs:
            feed["position_ids"] = np.array([[position]])
        position += 1


def _step(session: Any, inputs: dict[str, np.ndarray], cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run of the graph; an input that it does not take, or takes and is not given, is an error."""
    takes = {value.name for value in session.get_inputs()}
    if takes != {*inputs, *cache}:
        raise VerifyError(f"the ONNX graph takes {sorted(takes)}, expected {sorted({*inputs, *cache})}.")
    names = [value.name for value in session.get_outputs()]
    typed = {
        name: value.astype(dtype_of(session, name)) if value.dtype.kind == "f" else value
        for name, value in inputs.items()
    }
    try:
        return dict(zip(names, session.run(names, {**typed, **cache}), strict=True))
    except Exception as e:  # see open_session
        shapes = {name: value.shape for name, value in typed.items()}
        raise VerifyError(f"ONNX Runtime cannot run the graph on {shapes} ({first_line(e)}).") from e


def _empty_cache(session: Any, batch: int) -> dict[str, np.ndarray]:
    """The `past_key_values` inputs for a past of no token."""
    import numpy as np

    return {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=dtype_of(session, value.name))
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }


def dtype_of(session: Any, name: str) -> str:
    """The numpy name of an input's or output's floating dtype."""
    types = {value.name: value.type for value in [*session.get_inputs(), *session.get_outputs()]}
    return {"tensor(float16)": "float16"}.get(types[name], "float32")


def _encoded(sessions: Mapping[str, Any], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the decoder gets of the encoder."""
    hidden = _step(sessions[ENCODER], {name: inputs[name] for name in ("input_ids", "attention_mask")}, {})
    return {"encoder_attention_mask": inputs["attention_mask"], "encoder_hidden_states": hidden["last_hidden_state"]}


def _decode(
    sessions: Mapping[str, Any], feed: dict[str, np.ndarray], ids: np.ndarray, cache: dict[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """One run of an encoder-decoder's decoder, with the cache of the run before or None for the first."""
    import numpy as np

    session = sessions[DECODER]
    switched = {**feed, "input_ids": ids, SWITCH: np.array([cache is not None])}
    return _step(session, switched, _empty_cache(session, len(ids)) if cache is None else cache)


def _grown(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The cache that a run gave, under the names of the next run's inputs."""
    return {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }
