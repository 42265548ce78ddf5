"""An ONNX folder against the dense folder that it was made from.

Knows what must be equal: every output at several shapes, and for decoders each token of a greedy generation. Must not know how the
graph was made, nor how it is run (`session`); the oracle is the PyTorch model with its default attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..data.tasks import get_task
from ..errors import UnsupportedError, VerifyError
from ..io.tensors import refuse_not_finite
from ..models.loading import library_errors, quiet
from .dummy_inputs import load_model, sample_inputs, sentence_tokens
from .rope import lengths_that_matter
from .session import has_half_weights, main_session, next_scores, open_graphs, output_names, run_graphs

if TYPE_CHECKING:
    import torch

# (batch, sequence, past, padding): a single token after nothing, after a past, a batch with padding, other sizes than traced
DECODER_SHAPES = ((1, 1, 0, 0), (1, 1, 6, 0), (3, 9, 0, 2), (2, 4, 5, 3), (1, 17, 0, 0))
ENCODER_SHAPES = ((1, 1, 0, 0), (3, 9, 0, 2), (1, 17, 0, 0))
IMAGE_SHAPES = ((1, 1, 0, 0), (3, 1, 0, 0))
# Allowed difference of an output, in units of the largest absolute value of PyTorch's own output (at least 0.001)
TOLERANCE = {"float32": 1e-4, "float16": 3e-2}
ONE_A_ROW = ("pooler_output", "sentence_embedding", "text_embeds", "image_embeds")
GENERATED = 16
LONGEST = 1024  # tokens whose attention scores a check can hold
MIXTURE_ADVICE = "look at the adapters' numbers, the mixture weights and the delta_scale"
HALF_ADVICE = (
    "float16 ends at 65504, and a runtime that computes in float16 would give the same, though ONNX Runtime's CPU provider, which "
    "computes in float32, does not show it: export with --dtype float32"
)


def check_onnx(onnx_folder: Path, dense: Path, *, task: str, pooling: str | None = None) -> float:
    """Run the graph of `onnx_folder` and the PyTorch model of `dense` on the same inputs and compare all that they give.

    It runs `onnx.checker`, and looks for missing and left-over data files. It compares each output in float32 at several batch
    sizes, sequence lengths and past lengths, masked positions left out. A float32 decoder also generates greedily, token by token,
    and each token must be PyTorch's choice after those before it.

    Args:
        onnx_folder: the root of an ONNX export (`onnx/model.onnx` below it).
        dense: the model folder that it was exported from.
        task: the name of their task.
        pooling: what the head sees in place of the first token; None: what its class reads.

    Returns:
        The largest absolute difference of any output from PyTorch's in float32.

    Raises:
        VerifyError: something differs; the message names it.
        NotFiniteError: PyTorch's outputs are not finite, in float32 or, where the graph is in float16, in float16.
        UnsupportedError: ONNX Runtime is not installed, or the task has no ONNX export.
    """
    import torch

    kind = get_task(task)
    model, half = (partial(load_model, dense, kind, dtype, pooling=pooling) for dtype in (torch.float32, torch.float16))
    return compare_with(onnx_folder, model(), task=kind, halved=half)


def compare_with(
    onnx_folder: Path, model: torch.nn.Module, *, task: Task, halved: Callable[[], torch.nn.Module]
) -> float:
    """As `check_onnx`, with the PyTorch model itself: one in float32, or one with the adapters attached.

    The tokens are those of a few English sentences where the folder has a tokenizer, else random.

    Args:
        onnx_folder: the root of an ONNX export.
        model: the PyTorch model.
        task: what the model is for.
        halved: gives the same model in float16, asked where the graph is: what float16 costs PyTorch, the graph may cost too.
            ONNX Runtime's CPU provider computes float16 in float32, so this model alone shows what overflows in float16.
    """
    import torch

    sessions = open_graphs(onnx_folder)
    half = halved() if has_half_weights(onnx_folder) else None
    shapes, tokens = _shapes(model, task), _tokens(model, onnx_folder)
    with quiet(), torch.no_grad():
        differences = [_compare(sessions, model, half, task, tokens, shape) for shape in (*shapes, *_longer(model))]
        largest = max(differences)
        if task.generates and half is None:
            _compare_generation(sessions, model, task, tokens, largest)
    return largest


@dataclass(frozen=True)
class Differences:
    """How far outputs are from others.

    Attributes:
        largest_difference: of an output, absolute.
        relative: the same, relative to the largest output.
        same_choice: the share (0 to 1) of positions whose largest score is the same; of rows, where each has one score vector. None
            where the outputs are no scores.
        cosine: the smallest cosine of two vectors, where the outputs are embeddings; else None.
    """

    largest_difference: float
    relative: float
    same_choice: float | None
    cosine: float | None = None


def differences(onnx_folder: Path, model: torch.nn.Module, *, task: Task, suffix: str) -> Differences:
    """How far the outputs of the graph `model{suffix}` are from those of the float graph, on the inputs of the check.

    Raises:
        NotFiniteError: outputs of one of the two are NaN or infinite.
    """
    import numpy as np
    import torch

    exact, other = open_graphs(onnx_folder), open_graphs(onnx_folder, suffix)
    tokens = _tokens(model, onnx_folder)
    worst = largest = same = total = 0.0
    cosine = 1.0
    for batch, sequence, past, _ in _shapes(model, task):
        inputs = sample_inputs(model, task, batch, past + sequence, tokens=tokens)
        feed = {name: value.numpy() for name, value in inputs.items()}
        expected, got = run_graphs(exact, feed, past), run_graphs(other, feed, past)
        for name in output_names(main_session(exact)):
            want, have = expected[name].astype(np.float32), got[name].astype(np.float32)
            for graph, values in (("model.onnx", want), (f"model{suffix}.onnx", have)):
                where = f"{onnx_folder / 'onnx' / graph}: output {name!r}"
                refuse_not_finite(torch.from_numpy(values), where, "export without --quantize")
            worst, largest = max(worst, float(np.abs(want - have).max())), max(largest, float(np.abs(want).max()))
            choice = want.argmax(-1) == have.argmax(-1)
            same, total = same + float(choice.sum()), total + choice.size
            lengths = np.linalg.norm(want, axis=-1) * np.linalg.norm(have, axis=-1)
            cosine = min(cosine, float(((want * have).sum(-1) / np.maximum(lengths, 1e-12)).min()))
    choices = (None, cosine) if task.is_body else (same / max(total, 1), None)
    return Differences(worst, worst / max(largest, 1e-6), *choices)


def _compare(
    sessions: Mapping[str, Any],
    model: torch.nn.Module,
    half: torch.nn.Module | None,
    task: Task,
    tokens: Sequence[int] | None,
    shape: tuple[int, int, int, int],
) -> float:
    """The largest difference of an output for one shape; the past is first computed by the graph itself.

    Args:
        sessions: ONNX Runtime sessions by the graph's name.
        model: the PyTorch model.
        half: the same model in float16; None where the graph has none.
        task: what the model is for.
        tokens: ids for the inputs; None for random ones.
        shape: batch, sequence, past and padding.

    What float16 costs depends on the model: `half`, PyTorch's own, widens what is allowed to twice its difference.
    """
    import numpy as np
    import torch

    session, (batch, sequence, past, padding) = main_session(sessions), shape
    inputs = sample_inputs(model, task, batch, past + sequence, padding=padding, tokens=tokens)
    if task.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    expected = model(**inputs)
    same = _run_half(half, inputs) if half is not None else expected
    given = run_graphs(sessions, {name: value.numpy() for name, value in inputs.items()}, past)
    worst = 0.0
    for name in output_names(session):
        if name not in expected:
            raise VerifyError(f"the ONNX graph gives {name!r}, PyTorch {', '.join(expected)}.")
        want, rounded, got = expected[name].numpy(), same[name].float().numpy(), given[name].astype(np.float32)
        want, rounded = (want[:, past:], rounded[:, past:]) if past else (want, rounded)
        if got.shape != want.shape:
            raise VerifyError(
                f"{name} is {list(got.shape)} in ONNX Runtime, expected {list(want.shape)} as in PyTorch."
            )
        if padding and not task.is_encoder_decoder and name not in ONE_A_ROW and want.shape[1:2] == (sequence,):
            kept = inputs["attention_mask"][:, past:].numpy().astype(bool)
            got, want, rounded = got[kept], want[kept], rounded[kept]
        refuse_not_finite(torch.from_numpy(want), f"PyTorch's own output {name!r} in float32", MIXTURE_ADVICE)
        refuse_not_finite(torch.from_numpy(rounded), f"PyTorch's own output {name!r} in float16", HALF_ADVICE)
        difference = float(np.abs(got - want).max())
        limit = TOLERANCE["float32" if half is None else "float16"] * max(1e-3, float(np.abs(want).max()))
        limit = max(limit, 2 * float(np.abs(rounded - want).max()))
        if not difference <= limit:  # a NaN is a difference too
            raise VerifyError(
                f"{name} differs by {difference:.3g} from PyTorch (batch {batch}, sequence {sequence}, past {past};"
                f" allowed {limit:.3g}); the ONNX graph does not compute the model: export to `--format dense`."
            )
        worst = max(worst, difference)
    return worst


def _run_half(half: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """PyTorch's own outputs in float16.

    Raises:
        UnsupportedError: an operation of the model has no float16 here.
    """
    halved = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
    with library_errors(
        "PyTorch cannot run the model in float16 here, so a float16 graph cannot be checked", UnsupportedError
    ):
        return half(**halved)


def _shapes(model: torch.nn.Module, task: Task) -> list[tuple[int, int, int, int]]:
    """Batch, sequence, past and padding of what is compared."""
    shapes = DECODER_SHAPES if task.generates else ENCODER_SHAPES
    return [_within(model, shape) for shape in (IMAGE_SHAPES if _sees(model) else shapes)]


def _longer(model: torch.nn.Module) -> list[tuple[int, int, int, int]]:
    """Shapes behind the lengths at which the model's rotary frequencies change."""
    return [(1, length + 3, 0, 0) for length in sorted(lengths_that_matter(model)) if length <= LONGEST]


def _tokens(model: torch.nn.Module, onnx_folder: Path) -> list[int] | None:
    return None if _sees(model) else sentence_tokens(onnx_folder)


def _sees(model: torch.nn.Module) -> bool:
    return getattr(model, "main_input_name", "") == "pixel_values"


def _within(model: torch.nn.Module, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """`shape` cut to the positions that the model has."""
    batch, sequence, past, padding = shape
    limit = getattr(model.config, "max_position_embeddings", None) or sequence + past
    return batch, min(sequence, max(1, limit - past - 2)), past, padding


def _compare_generation(
    sessions: Mapping[str, Any], model: torch.nn.Module, task: Task, tokens: Sequence[int] | None, noise: float
) -> None:
    """A greedy generation by the graph, one token at a time; PyTorch then reads all of it, and must choose each token too.

    Where both choose the same token after the same tokens, from the first to the last, both generate the same.

    Raises:
        VerifyError: a token is not PyTorch's, and its logit is further from PyTorch's best than the noise between the two.
    """
    inputs = sample_inputs(model, task, 1, 4, tokens=tokens)
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    row = [start] if task.is_encoder_decoder else inputs["input_ids"][0].tolist()
    given = len(row)
    steps = next_scores(sessions, {name: value.numpy() for name, value in inputs.items()}, start)
    scores = [next(steps)]
    for _ in range(GENERATED - 1):
        row.append(int(scores[-1].argmax()))
        scores.append(steps.send(row[-1]))
    read = _read_by_torch(model, task, inputs, row, given)
    for position, (wanted, got) in enumerate(zip(read[given - 1 :], scores, strict=True), given):
        token, expected = int(got.argmax()), int(wanted.argmax())
        if not float(wanted[expected] - wanted[token]) <= 4 * noise:  # else a tie: either token is the greedy one
            raise VerifyError(
                f"greedy generation differs at token {position}: ONNX Runtime gives {token}, PyTorch {expected};"
                " the ONNX graph does not compute the model: export to `--format dense`."
            )


def _read_by_torch(
    model: torch.nn.Module, task: Task, inputs: dict[str, torch.Tensor], row: Sequence[int], given: int
) -> torch.Tensor:
    """PyTorch's logits `[sequence, vocabulary]` of a sequence: what it generates, given the tokens before each.

    It is read in one run. From a length at which the rotary frequencies change, each token is a run of its own, as in a
    generation: a key in the cache keeps the frequencies of its own run. The run before is shorter than that length: only then does
    dynamic NTK forget an earlier, longer sequence.

    Args:
        model: the PyTorch model.
        task: what the model is for.
        inputs: the prompt; of an encoder-decoder what its encoder reads.
        row: the sequence.
        given: how many of its tokens are not generated.
    """
    import torch

    first = max(given, min(lengths_that_matter(model), default=len(row) + 1) - 1)
    whole = inputs if task.is_encoder_decoder else sample_inputs(model, task, 1, len(row))
    scores, cache, at = [], None, 0
    for end in [*range(first, len(row)), len(row)]:
        new = torch.tensor([row[at:end]])
        if task.is_encoder_decoder:
            part = {**whole, "decoder_input_ids": new}
        else:
            part = {name: value[:, at:end] for name, value in whole.items()}
            part |= {"input_ids": new, "attention_mask": whole["attention_mask"][:, :end]}
        read = model(**part, past_key_values=cache, use_cache=True)
        cache, at = read.past_key_values, end
        scores.append(read.logits[0])
    return torch.cat(scores)
