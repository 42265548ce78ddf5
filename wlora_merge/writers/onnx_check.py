"""An ONNX folder against the dense folder that it was made from.

Knows ONNX Runtime and what must be equal: the file's own soundness, every output at several shapes, and for decoders a
greedy generation. Must not know how the graph was made; the oracle is the PyTorch model with its default attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora_merge.errors import UnsupportedError, VerifyError
from wlora_merge.writers.onnx_graph import DATA_FILE, MODEL_FILE
from wlora_merge.writers.onnx_tasks import load_model, quiet, sample_inputs, task_named

if TYPE_CHECKING:
    import numpy as np
    import torch

# (batch, sequence, past, padding): a single token after nothing, after a past, a batch with padding, other sizes than traced
DECODER_SHAPES = ((1, 1, 0, 0), (1, 1, 6, 0), (3, 9, 0, 2), (2, 4, 5, 3), (1, 17, 0, 0))
ENCODER_SHAPES = ((1, 1, 0, 0), (3, 9, 0, 2), (1, 17, 0, 0))
IMAGE_SHAPES = ((1, 1, 0, 0), (3, 1, 0, 0))
# Allowed difference of an output, in units of the largest absolute value of PyTorch's own output (at least 0.001)
TOLERANCE = {"float32": 1e-4, "float16": 3e-2}
GENERATED = 16


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
    task_named(task)
    check_files(onnx_folder / "onnx")
    session = open_session(onnx_folder / "onnx" / MODEL_FILE)
    import torch

    model = load_model(dense, task, torch.float32)
    rounded = [_dtype(session, name) == "float16" for name in task_named(task).outputs]
    half = load_model(dense, task, torch.float16) if any(rounded) else None
    image = getattr(model, "main_input_name", "") == "pixel_values"
    shapes = IMAGE_SHAPES if image else DECODER_SHAPES if task == "causal-lm" else ENCODER_SHAPES
    with quiet(), torch.no_grad():
        largest = max(_compare(session, model, half, task, *_within(model, shape)) for shape in shapes)
        if task == "causal-lm" and _cache_dtype(session) == "float32":
            _compare_generation(session, model, largest)
    return largest


def run_probe(onnx_folder: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The graph's own outputs on some inputs, in float32; what it takes and is not given is filled in.

    Args:
        onnx_folder: the root of an ONNX export.
        inputs: `input_ids` `[batch, sequence]` or `pixel_values`; masks of ones, positions from 0, token types of 0 and an
            empty past are added where the graph takes them.

    Returns:
        Every output of the graph but the cache, by name.

    Raises:
        VerifyError: the file is broken, or does not run on the inputs.
    """
    import numpy as np
    import torch

    check_files(onnx_folder / "onnx")
    session = open_session(onnx_folder / "onnx" / MODEL_FILE)
    feed = {name: value.numpy() for name, value in inputs.items()}
    takes = {value.name for value in session.get_inputs()}
    if "input_ids" in feed:
        ids = feed["input_ids"]
        filled = {
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
            "token_type_ids": np.zeros_like(ids),
        }
        feed |= {name: value for name, value in filled.items() if name in takes - set(feed)}
    outputs = _run(session, feed)
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


def check_files(folder: Path) -> None:
    """`onnx.checker` on the model, and a data file exactly where the graph names one.

    Raises:
        VerifyError: the model is missing or malformed, or its weights lie elsewhere than it says.
    """
    import onnx

    path = folder / MODEL_FILE
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
        if entry["location"] != DATA_FILE:
            raise VerifyError(f"{path}: {tensor.name} lies in {entry['location']!r}, expected {DATA_FILE!r}")
        data = folder / DATA_FILE
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if not data.is_file() or data.stat().st_size < end:
            raise VerifyError(f"{data}: missing or shorter than the {end} bytes that {tensor.name} needs")
    if DATA_FILE not in named and (folder / DATA_FILE).exists():
        raise VerifyError(f"{folder / DATA_FILE}: no weight of {MODEL_FILE} refers to it; delete it")
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as e:
        raise VerifyError(f"{path}: onnx.checker refuses it ({str(e).splitlines()[0]})") from e


def _compare(
    session: Any,
    model: torch.nn.Module,
    half: torch.nn.Module | None,
    task: str,
    batch: int,
    sequence: int,
    past: int,
    padding: int,
) -> float:
    """The largest difference of an output for one shape; the past is first computed by the graph itself.

    What float16 costs depends on the model: `half`, PyTorch's own, widens what is allowed to twice its difference.
    """
    import numpy as np

    inputs = sample_inputs(model, task, batch, past + sequence, padding=padding)
    expected = model(**inputs)
    same = half(**_halved(inputs)) if half is not None else expected
    given = _run(session, {name: value.numpy() for name, value in inputs.items()}, past)
    worst = 0.0
    for name in task_named(task).outputs:
        want, got = getattr(expected, name).numpy(), given[name].astype(np.float32)
        noise = getattr(same, name).float().numpy() - want
        want, noise = (want[:, past:], noise[:, past:]) if past else (want, noise)
        if got.shape != want.shape:
            raise VerifyError(f"{name} is {list(got.shape)} in ONNX Runtime, expected {list(want.shape)} as in PyTorch")
        if padding and want.shape[1:2] == (sequence,):
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


def _run(session: Any, inputs: dict[str, np.ndarray], past: int = 0) -> dict[str, np.ndarray]:
    """The graph's outputs for the tokens after the first `past`, which it is given first where there are any."""
    cache = _empty_cache(session, len(next(iter(inputs.values()))))
    if past:
        cache = _grown(_step(session, {name: value[:, :past] for name, value in inputs.items()}, cache))
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


def _grown(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The cache that a run gave, under the names of the next run's inputs."""
    return {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }


def _dtype(session: Any, name: str) -> str:
    """The numpy name of an input's or output's floating dtype."""
    types = {value.name: value.type for value in [*session.get_inputs(), *session.get_outputs()]}
    return {"tensor(float16)": "float16"}.get(types[name], "float32")


def _cache_dtype(session: Any) -> str:
    return _dtype(session, "present.0.key")


def _within(model: torch.nn.Module, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """`shape` cut to the positions that the model has."""
    batch, sequence, past, padding = shape
    limit = getattr(model.config, "max_position_embeddings", None) or sequence + past
    return batch, min(sequence, max(1, limit - past - 2)), past, padding


def _compare_generation(session: Any, model: torch.nn.Module, noise: float) -> None:
    """A greedy generation by the graph, one token at a time, against `generate()`.

    Raises:
        VerifyError: a token differs, where PyTorch's best two logits are further apart than the noise between the two.
    """
    prompt = sample_inputs(model, "causal-lm", 1, 4)
    expected = _generate(model, prompt)
    sequence = prompt["input_ids"].numpy()
    cache = _empty_cache(session, 1)
    takes_positions = "position_ids" in prompt
    feed = {name: value.numpy() for name, value in prompt.items()}
    for position in range(sequence.shape[1], len(expected)):
        outputs = _step(session, feed, cache)
        token = int(outputs["logits"][0, -1].argmax())
        if token != expected[position]:
            scores = outputs["logits"][0, -1]
            if abs(float(scores[token] - scores[expected[position]])) <= 4 * noise:
                return  # a tie: either token is the greedy one, and from here on the two differ rightly
            raise VerifyError(
                f"greedy generation differs at token {position}: ONNX Runtime gives {token}, PyTorch {expected[position]};"
                " the ONNX graph does not compute the model: export to `--format dense`"
            )
        cache, feed = _grown(outputs), _next_feed(token, position, takes_positions)


def _next_feed(token: int, position: int, takes_positions: bool) -> dict[str, np.ndarray]:
    """The inputs of one decoding step."""
    import numpy as np

    feed = {"input_ids": np.array([[token]]), "attention_mask": np.ones((1, position + 1), dtype=np.int64)}
    return {**feed, "position_ids": np.array([[position]])} if takes_positions else feed


def _generate(model: Any, prompt: dict[str, torch.Tensor]) -> list[int]:
    """Prompt and `GENERATED` greedy tokens, whatever the model's own generation defaults are."""
    import transformers

    plain: Callable[[], Any] = transformers.GenerationConfig
    model.generation_config = plain()
    asked: Callable[..., Any] = model.generate
    tokens = asked(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        do_sample=False,
        max_new_tokens=GENERATED,
    )
    return [int(token) for token in tokens[0]]
