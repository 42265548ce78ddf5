"""An ONNX folder against the dense folder that it was made from.

Knows ONNX Runtime and what must be equal: the file's own soundness, every output at several shapes, and for decoders a
greedy generation. Must not know how the graph was made; the oracle is the PyTorch model with its default attention.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora_merge.errors import UnsupportedError, VerifyError
from wlora_merge.names import is_plain_file_name
from wlora_merge.writers import onnx_seq2seq as seq2seq
from wlora_merge.writers.onnx_graph import MODEL, data_file, graph_file
from wlora_merge.writers.onnx_tasks import GENERATING, load_model, quiet, sample_inputs, sentence_tokens, task_named

if TYPE_CHECKING:
    import numpy as np
    import torch

# (batch, sequence, past, padding): a single token after nothing, after a past, a batch with padding, other sizes than traced
DECODER_SHAPES = ((1, 1, 0, 0), (1, 1, 6, 0), (3, 9, 0, 2), (2, 4, 5, 3), (1, 17, 0, 0))
ENCODER_SHAPES = ((1, 1, 0, 0), (3, 9, 0, 2), (1, 17, 0, 0))
IMAGE_SHAPES = ((1, 1, 0, 0), (3, 1, 0, 0))
# Allowed difference of an output, in units of the largest absolute value of PyTorch's own output (at least 0.001)
TOLERANCE = {"float32": 1e-4, "float16": 3e-2}
ONE_A_ROW = ("pooler_output", "sentence_embedding", "text_embeds", "image_embeds")
GENERATED = 16
RUNTIMES_OWN = "No Op registered for SimplifiedLayerNormalization"


def check_onnx(onnx_folder: Path, dense: Path, *, task: str) -> float:
    """Run the graph of `onnx_folder` and the PyTorch model of `dense` on the same inputs and compare all that they give.

    `onnx.checker`, no missing or left-over data file, each output in float32 at several batch sizes, sequence lengths
    and past lengths (masked positions left out), and for a float32 decoder a greedy generation token by token.

    Args:
        onnx_folder: the root of an ONNX export (`onnx/model.onnx` below it).
        dense: the model folder that it was exported from.
        task: the task of both.

    Returns:
        The largest absolute difference of any output from PyTorch's in float32.

    Raises:
        VerifyError: something differs; the message names it.
        UnsupportedError: ONNX Runtime is not installed, or the task has no ONNX export.
    """
    import torch

    task_named(task)
    sessions = open_graphs(onnx_folder)
    model = load_model(dense, task, torch.float32)
    rounded = [_dtype(_main(sessions), name) == "float16" for name in _outputs(_main(sessions))]
    half = load_model(dense, task, torch.float16) if any(rounded) else None
    return compare_with(onnx_folder, model, task=task, half=half)


def compare_with(onnx_folder: Path, model: torch.nn.Module, *, task: str, half: torch.nn.Module | None = None) -> float:
    """As `check_onnx`, with the PyTorch model itself: one in float32, or one with the adapters attached.

    The tokens are those of a few English sentences where the folder has a tokenizer, else random.

    Args:
        half: the same model in float16, where the graph is: what float16 costs PyTorch, the graph may cost too.
    """
    import torch

    sessions = open_graphs(onnx_folder)
    image = getattr(model, "main_input_name", "") == "pixel_values"
    shapes = IMAGE_SHAPES if image else DECODER_SHAPES if task in GENERATING else ENCODER_SHAPES
    tokens = None if image else sentence_tokens(onnx_folder)
    with quiet(), torch.no_grad():
        largest = max(_compare(sessions, model, half, task, tokens, *_within(model, shape)) for shape in shapes)
        if task in GENERATING and _dtype(_main(sessions), "logits") == "float32":
            _compare_generation(sessions, model, task, tokens, largest)
    return largest


def differences(onnx_folder: Path, model: torch.nn.Module, *, task: str, suffix: str) -> dict[str, float]:
    """How far the outputs of the graph `model{suffix}` are from those of `model`, on the inputs of the check.

    Returns:
        `largest_difference`; `relative` to the largest output; `same_choice`, the share of positions (of rows, where there
        is one score vector for each) whose largest score is the same.
    """
    import numpy as np

    exact, other = open_graphs(onnx_folder), open_graphs(onnx_folder, suffix)
    image = getattr(model, "main_input_name", "") == "pixel_values"
    shapes = IMAGE_SHAPES if image else DECODER_SHAPES if task in GENERATING else ENCODER_SHAPES
    tokens = None if image else sentence_tokens(onnx_folder)
    worst = largest = same = total = 0.0
    for shape in shapes:
        batch, sequence, past, _ = _within(model, shape)
        inputs = sample_inputs(model, task, batch, past + sequence, tokens=tokens)
        feed = {name: value.numpy() for name, value in inputs.items()}
        expected, got = _run(exact, feed, past), _run(other, feed, past)
        for name in _outputs(_main(exact)):
            want, have = expected[name].astype(np.float32), got[name].astype(np.float32)
            worst, largest = max(worst, float(np.abs(want - have).max())), max(largest, float(np.abs(want).max()))
            choice = want.argmax(-1) == have.argmax(-1)
            same, total = same + float(choice.sum()), total + choice.size
    return {"largest_difference": worst, "relative": worst / max(largest, 1e-6), "same_choice": same / max(total, 1)}


def open_graphs(onnx_folder: Path, suffix: str = "") -> dict[str, Any]:
    """A session for each graph of an export, after `check_files` on it; `suffix` tells a quantized one.

    Raises:
        VerifyError: a file is broken or missing.
    """
    folder = onnx_folder / "onnx"
    pair = (folder / graph_file(seq2seq.ENCODER)).is_file()
    names = (seq2seq.ENCODER, seq2seq.DECODER) if pair else (MODEL,)
    for name in names:
        check_files(folder, name + suffix)
    return {name: open_session(folder / graph_file(name + suffix)) for name in names}


def _main(sessions: Mapping[str, Any]) -> Any:
    """The session that gives the model's outputs."""
    return sessions.get(seq2seq.DECODER) or sessions[MODEL]


def _outputs(session: Any) -> list[str]:
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
    session = _main(sessions)
    feed = {name: value.numpy() for name, value in inputs.items()}
    takes = {value.name for value in session.get_inputs()}
    if "input_ids" in feed:
        ids = feed["input_ids"]
        filled = {
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
            "token_type_ids": np.zeros_like(ids),
        }
        takes |= {"attention_mask"} if seq2seq.ENCODER in sessions else set()
        feed |= {name: value for name, value in filled.items() if name in takes - set(feed)}
    outputs = _run(sessions, feed)
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
        raise UnsupportedError("ONNX Runtime is not installed: pip install 'wlora-merge[onnx]'") from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its notices about unused initializers are for its authors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the machine runs other things too
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its classes are generated at import and share no base but this
        raise VerifyError(f"{path}: ONNX Runtime cannot load it ({str(e).splitlines()[0]})") from e


def check_files(folder: Path, name: str = MODEL) -> None:
    """`onnx.checker` on the graph `name`, and a data file exactly where the graph names one.

    Raises:
        VerifyError: the model is missing or malformed, or its weights lie elsewhere than it says.
    """
    import onnx

    path, data = folder / graph_file(name), folder / data_file(name)
    if not path.is_file():
        raise VerifyError(f"{path}: missing; export the mixture again")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as e:  # protobuf's DecodeError moves between its versions
        raise VerifyError(f"{path}: not an ONNX file ({e}); export the mixture again") from e
    named = set()
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if not entry:
            continue
        named.add(entry["location"])
        if not is_plain_file_name(entry["location"]):
            raise VerifyError(f"{path}: {tensor.name} lies in {entry['location']!r}, expected a file beside it")
        where = folder / entry["location"]
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if not where.is_file() or where.stat().st_size < end:
            raise VerifyError(f"{where}: missing or shorter than the {end} bytes that {tensor.name} needs")
    if data.name not in named and data.exists():
        raise VerifyError(f"{data}: no weight of {path.name} refers to it; delete it")
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as e:
        if RUNTIMES_OWN in str(e):
            return  # ONNX Runtime's operator in ONNX's own domain, which only its session can judge
        raise VerifyError(f"{path}: onnx.checker refuses it ({str(e).splitlines()[0]})") from e


def _compare(
    sessions: Mapping[str, Any],
    model: torch.nn.Module,
    half: torch.nn.Module | None,
    task: str,
    tokens: Sequence[int] | None,
    batch: int,
    sequence: int,
    past: int,
    padding: int,
) -> float:
    """The largest difference of an output for one shape; the past is first computed by the graph itself.

    What float16 costs depends on the model: `half`, PyTorch's own, widens what is allowed to twice its difference.
    """
    import numpy as np

    session = _main(sessions)
    inputs = sample_inputs(model, task, batch, past + sequence, padding=padding, tokens=tokens)
    if task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    expected = model(**inputs)
    same = half(**_halved(inputs)) if half is not None else expected
    given = _run(sessions, {name: value.numpy() for name, value in inputs.items()}, past)
    worst = 0.0
    for name in _outputs(session):
        if name not in expected:
            raise VerifyError(f"the ONNX graph gives {name!r}, PyTorch {', '.join(expected)}")
        want, got = expected[name].numpy(), given[name].astype(np.float32)
        noise = same[name].float().numpy() - want
        want, noise = (want[:, past:], noise[:, past:]) if past else (want, noise)
        if got.shape != want.shape:
            raise VerifyError(f"{name} is {list(got.shape)} in ONNX Runtime, expected {list(want.shape)} as in PyTorch")
        if padding and task != "seq2seq-lm" and name not in ONE_A_ROW and want.shape[1:2] == (sequence,):
            kept = inputs["attention_mask"][:, past:].numpy().astype(bool)
            got, want, noise = got[kept], want[kept], noise[kept]
        difference = float(np.abs(got - want).max())
        limit = TOLERANCE[_dtype(session, name)] * max(1e-3, float(np.abs(want).max()))
        limit = max(limit, 2 * float(np.abs(noise).max()))
        if not difference <= limit:  # a NaN is a difference too
            raise VerifyError(
                f"{name} differs by {difference:.3g} from PyTorch (batch {batch}, sequence {sequence}, past {past};"
                f" allowed {limit:.3g}); the ONNX graph does not compute the model: export to `--format dense`"
            )
        worst = max(worst, difference)
    return worst


def _halved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}


def _run(sessions: Mapping[str, Any], inputs: dict[str, np.ndarray], past: int = 0) -> dict[str, np.ndarray]:
    """The outputs for the tokens after the first `past`, which the graph is given first where there are any."""
    if seq2seq.DECODER in sessions:
        return seq2seq.run(sessions, inputs, _step, past)
    session = sessions[MODEL]
    cache = _empty_cache(session, len(next(iter(inputs.values()))))
    if past:
        cache = seq2seq.grown(_step(session, {name: value[:, :past] for name, value in inputs.items()}, cache))
        inputs = {name: value if name == "attention_mask" else value[:, past:] for name, value in inputs.items()}
    return _step(session, inputs, cache)


def _step(session: Any, inputs: dict[str, np.ndarray], cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run of the graph; an input that it does not take, or takes and is not given, is an error."""
    takes = {value.name for value in session.get_inputs()}
    if takes != {*inputs, *cache}:
        raise VerifyError(f"the ONNX graph takes {sorted(takes)}, expected {sorted({*inputs, *cache})}")
    names = [value.name for value in session.get_outputs()]
    typed = {
        name: value.astype(_dtype(session, name)) if value.dtype.kind == "f" else value
        for name, value in inputs.items()
    }
    try:
        return dict(zip(names, session.run(names, {**typed, **cache}), strict=True))
    except Exception as e:  # see open_session
        shapes = {name: value.shape for name, value in typed.items()}
        raise VerifyError(f"ONNX Runtime cannot run the graph on {shapes} ({str(e).splitlines()[0]})") from e


def _empty_cache(session: Any, batch: int) -> dict[str, np.ndarray]:
    """The `past_key_values` inputs for a past of no token."""
    import numpy as np

    return {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=_dtype(session, value.name))
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }


def _dtype(session: Any, name: str) -> str:
    """The numpy name of an input's or output's floating dtype."""
    types = {value.name: value.type for value in [*session.get_inputs(), *session.get_outputs()]}
    return {"tensor(float16)": "float16"}.get(types[name], "float32")


def _within(model: torch.nn.Module, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """`shape` cut to the positions that the model has."""
    batch, sequence, past, padding = shape
    limit = getattr(model.config, "max_position_embeddings", None) or sequence + past
    return batch, min(sequence, max(1, limit - past - 2)), past, padding


def _compare_generation(
    sessions: Mapping[str, Any], model: torch.nn.Module, task: str, tokens: Sequence[int] | None, noise: float
) -> None:
    """A greedy generation by the graph, one token at a time, against `generate()`.

    Raises:
        VerifyError: a token differs, where PyTorch's best two logits are further apart than the noise between the two.
    """
    prompt = sample_inputs(model, task, 1, 4, tokens=tokens)
    expected = _generate(model, prompt)
    feed = {name: value.numpy() for name, value in prompt.items()}
    steps = (
        _decoded(sessions[MODEL], feed) if MODEL in sessions else seq2seq.decoded(sessions, feed, expected[0], _step)
    )
    given = 1 if task == "seq2seq-lm" else prompt["input_ids"].shape[1]
    token = -1
    for position in range(given, len(expected)):
        scores = next(steps) if position == given else steps.send(token)
        token = int(scores.argmax())
        if token == expected[position]:
            continue
        if abs(float(scores[token] - scores[expected[position]])) <= 4 * noise:
            return  # a tie: either token is the greedy one, and from here on the two differ rightly
        raise VerifyError(
            f"greedy generation differs at token {position}: ONNX Runtime gives {token}, PyTorch {expected[position]};"
            " the ONNX graph does not compute the model: export to `--format dense`"
        )


def _decoded(session: Any, feed: dict[str, np.ndarray]) -> Generator[np.ndarray, int, None]:
    """The scores of the next token, for the prompt and then for each token that is sent."""
    import numpy as np

    cache, takes_positions = _empty_cache(session, 1), "position_ids" in feed
    position = feed["input_ids"].shape[1]
    while True:
        outputs = _step(session, feed, cache)
        token = yield outputs["logits"][0, -1]
        cache = seq2seq.grown(outputs)
        feed = {"input_ids": np.array([[token]]), "attention_mask": np.ones((1, position + 1), dtype=np.int64)}
        if takes_positions:
            feed["position_ids"] = np.array([[position]])
        position += 1


def _generate(model: Any, prompt: dict[str, torch.Tensor]) -> list[int]:
    """Prompt (of an encoder-decoder: its start token) and `GENERATED` greedy tokens, whatever the model's defaults are."""
    import transformers

    plain: Callable[..., Any] = transformers.GenerationConfig
    kept = model.generation_config
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = plain(decoder_start_token_id=0 if start is None else start)
    asked: Callable[..., Any] = model.generate
    try:
        tokens = asked(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            do_sample=False,
            max_new_tokens=GENERATED,
        )
    finally:
        model.generation_config = kept
    return [int(token) for token in tokens[0]]
