"""A dense folder -> an onnxruntime-genai folder, through that library's own builder and in its own layout.

Knows how to call the builder and how to ask the result for tokens. Must not know what the builder writes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.causal_lm import CAUSAL_LM
from ..data.task import Task
from ..errors import UnsupportedError, VerifyError
from ..io.tensors import refuse_not_finite
from ..models.loading import quiet
from ..progress import Meter
from ..text import first_line
from .dummy_inputs import DENSE_INSTEAD, load_model, sentence_tokens
from .validate import MIXTURE_ADVICE

if TYPE_CHECKING:
    import torch

CONFIG = "genai_config.json"
GENERATED = 16
TIE = 1e-3  # two scores of PyTorch's that are nearer than this, in units of the largest, are a tie


def write_genai(dense: Path, out: Path, *, task: Task, dtype: str = "float32", quantize: str | None = None) -> float:
    """Build an onnxruntime-genai folder of the model in `dense`, and check the tokens that it generates.

    Args:
        dense: an ordinary Hugging Face model folder, with a tokenizer.
        out: an empty folder.
        task: of a decoder.
        dtype: of the weights: `float32`; with `quantize`, of what is not quantized.
        quantize: `int4` for the builder's own 4-bit weights.

    Returns:
        The share (0 to 1) of greedy tokens that are `generate()`'s.

    Raises:
        UnsupportedError: the builder is not installed, or cannot build this model.
        VerifyError: without quantization, a token differs.
    """
    import torch

    _check_asked(task, dtype, quantize)
    precision = quantize or "fp32"
    with tempfile.TemporaryDirectory() as cache:
        Meter("building the onnxruntime-genai model")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(dense), "-o", str(out)]
        done = subprocess.run([*command, "-p", precision, "-e", "cpu", "-c", cache], capture_output=True, text=True)
    if done.returncode or not (out / CONFIG).is_file():
        reason = ([line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"])[-1].strip()
        raise UnsupportedError(f"{dense}: onnxruntime-genai's builder cannot build it ({reason}); {DENSE_INSTEAD}")
    share = compare_genai(out, load_model(dense, task, torch.float32))
    if share < 1 and quantize is None:
        raise VerifyError(
            f"{out}: only {share:.0%} of the tokens that onnxruntime-genai generates are PyTorch's: export without --onnx-runtime."
        )
    return share


def _check_asked(task: Task, dtype: str, quantize: str | None) -> None:
    """Refuse what the builder does not build, or what could not be checked."""
    if not task.is_decoder:
        raise UnsupportedError(
            f"onnxruntime-genai generates text: the task is {task.name!r}, expected {CAUSAL_LM.name!r}."
        )
    if quantize not in (None, "int4"):
        raise UnsupportedError(f"onnxruntime-genai's builder quantizes to int4 alone, got {quantize}.")
    if dtype == "float16" and quantize is None:
        raise UnsupportedError(
            "ONNX Runtime's CPU provider does not run the float16 folder that onnxruntime-genai's builder makes, so it could not be "
            "checked: use float32 or --quantize int4."
        )
    _require_genai()


def _require_genai() -> None:
    if find_spec("onnxruntime_genai") is None:
        raise UnsupportedError("onnxruntime-genai is not installed: pip install onnxruntime-genai.")


def compare_genai(folder: Path, model: Any) -> float:
    """The share of greedy tokens, each after PyTorch's own tokens before it, on which the two agree; a tie is agreement.

    Args:
        folder: an onnxruntime-genai folder.
        model: the PyTorch model in float32, or one with the adapters attached.

    Raises:
        UnsupportedError: the library is not installed.
        VerifyError: the library cannot load or run the folder.
        NotFiniteError: PyTorch's own scores are not finite.
    """
    import torch

    _require_genai()
    limit = model.config.get_text_config().vocab_size
    tokens = [token for token in sentence_tokens(folder) or range(3, 40) if token < limit][:12] or [1, 2, 3]
    with quiet(), torch.no_grad():
        row = list(tokens)
        for _ in range(GENERATED):
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        scores: torch.Tensor = model(input_ids=torch.tensor([row])).logits[0]
    refuse_not_finite(scores, "PyTorch's own output 'logits' in float32", MIXTURE_ADVICE)
    given = _greedy(folder, row, len(tokens))
    same = 0
    for at, token in enumerate(given, len(tokens)):
        gap = float(scores[at - 1].max() - scores[at - 1][token])
        same += gap <= TIE * float(scores[at - 1].abs().max())
    return same / len(given)


def _greedy(folder: Path, row: list[int], prompt: int) -> list[int]:
    """The token that the library would give after each prefix of `row` from `prompt` tokens on, with its own cache."""
    import numpy as np

    og: Any = __import__("onnxruntime_genai")
    try:
        generator = _generator(og, folder, len(row) + 1)
        given = []
        for at in range(prompt, len(row)):
            generator.append_tokens(np.array(row[:prompt] if at == prompt else [row[at - 1]], dtype=np.int32))
            scores = np.asarray(generator.get_logits())
            given.append(int(scores.reshape(-1, scores.shape[-1])[-1].argmax()))
        return given
    except Exception as e:  # its errors share no class of their own
        raise VerifyError(f"{folder}: onnxruntime-genai cannot run it ({first_line(e)}).") from e


def _generator(og: Any, folder: Path, length: int) -> Any:
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    return og.Generator(model, parameters)
