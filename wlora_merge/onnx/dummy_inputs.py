"""What the model of a task takes and gives, and how it is loaded from a dense folder.

Knows the transformers Auto classes, and which inputs and outputs an ONNX consumer expects under which name. Must not know ONNX:
the tracing and the check both ask here, so that they cannot disagree.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.task import Task
from ..errors import UnsupportedError
from ..models.loading import PROJECTED, class_for, load, quiet
from ..models.pooling import add_pooling_layer
from .pooling import OUTPUTS as POOLED
from .pooling import add_pooling, pools

if TYPE_CHECKING:
    import torch

SENTENCES = (
    "The committee will meet again on Thursday to decide about the new bridge.",
    "I sent the money two days ago, and it has still not arrived; what should I do?",
    "A quiet, funny and surprisingly moving film about three brothers and a boat.",
)
DENSE_INSTEAD = "export with `--format dense` instead."


def outputs_of(model: torch.nn.Module, task: Task) -> tuple[str, ...]:
    """The outputs that the graph of `model` has, in order, the cache left out."""
    if pools(model):
        return (*task.outputs, *POOLED)
    if type(model).__name__.endswith(PROJECTED):
        tower = "image" if getattr(model, "main_input_name", "") == "pixel_values" else "text"
        return (f"{tower}_embeds", *task.outputs)
    return task.outputs


def load_model(
    dense: Path, task: Task, dtype: torch.dtype, attention: str | None = None, pooling: str | None = None
) -> torch.nn.Module:
    """The model in the folder `dense` under its task's transformers class, on the CPU, ready for inference.

    For features of a sentence-transformers folder with the modules that pool (see `pooling`).

    Args:
        dense: an ordinary Hugging Face model folder.
        task: what the model is for.
        dtype: what the weights are cast to.
        attention: transformers' `attn_implementation`; None is the model's default.
        pooling: what its head sees in place of the first token (see `models.pooling`); None: what its class reads.

    Raises:
        BaseModelError: the folder cannot be loaded, or lacks tensors that the task's model needs.
        UnsupportedError: the architecture has no model for the task.
    """
    auto = task.auto_class()
    cls, model_type = class_for(dense, auto)
    if cls is None:
        raise UnsupportedError(
            f"{dense}: a model of type {model_type!r} has no {auto.__name__}, which the ONNX export of the task {task.name!r} needs; "
            f"{DENSE_INSTEAD}"
        )
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    model, _ = load(cls, dense, dtype, unused=lambda _: True, **extra)
    if task.is_body:
        add_pooling(model, dense)
    if pooling is not None:
        add_pooling_layer(model, pooling)
    return model  # type: ignore[no-any-return]


def one_sentence(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of a chain of errors, with its class."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]]).rstrip(".")


def sentence_tokens(folder: Path) -> list[int] | None:
    """Token ids of a few English sentences by the folder's tokenizer; None where it has none that works."""
    import transformers

    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return [
                token for row in tokenizer(list(SENTENCES), add_special_tokens=False).input_ids for token in row
            ] or None
        except Exception:  # whatever a tokenizer's own code raises: then the sample is random
            return None


def sample_inputs(
    model: torch.nn.Module,
    task: Task,
    batch: int,
    sequence: int,
    past: int = 0,
    padding: int = 0,
    tokens: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Seeded inputs for `model`, in the order in which the graph takes them; the cache is not among them.

    Args:
        model: what `load_model` gave.
        task: what the model is for.
        batch: number of rows.
        sequence: number of new tokens in each row.
        past: number of tokens before them, which only `attention_mask` and `position_ids` show.
        tokens: ids to take the rows from, one after the other and from the start again; random ids where there are none.
        padding: how many positions of the first row are masked: its first ones for a decoder, else its last ones.

    Returns:
        Tensors by name: int64 `[batch, sequence]` (`attention_mask`: `[batch, past + sequence]`), or `pixel_values`
        `[batch, channels, height, width]` in the model's dtype.

    Raises:
        UnsupportedError: the model takes neither tokens nor pixels.
    """
    import torch

    main, takes = getattr(model, "main_input_name", "input_ids"), inspect.signature(model.forward).parameters
    _check_inputs(model, task, main, takes)
    generator = torch.Generator().manual_seed(batch * 1000 + sequence)
    if main == "pixel_values":
        pixels = torch.randn(batch, *_image_shape(model.config), generator=generator)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    ids, pad = _ids(config, (batch, sequence), tokens, generator)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    if padding:
        masked = slice(0, padding) if task.is_decoder else slice(past + sequence - padding, None)
        mask[0, masked] = 0
        if not past:
            ids[0, masked] = pad or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task.is_decoder and "position_ids" in takes:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    if not task.generates and "token_type_ids" in takes and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.randint(0, config.type_vocab_size, ids.shape, generator=generator)
    return inputs


def _check_inputs(model: torch.nn.Module, task: Task, main: str, takes: Collection[str]) -> None:
    """Refuse a model that takes neither tokens nor pixels, or both at once."""
    if task.is_body and {"input_ids", "pixel_values"} <= set(takes):
        raise UnsupportedError(
            f"{type(model).__name__} takes text and images at once; export one of its towers, or {DENSE_INSTEAD}"
        )
    if main not in ("pixel_values", "input_ids"):
        raise UnsupportedError(
            f"{type(model).__name__} takes {main!r}, and the ONNX writer feeds only tokens and pixels; {DENSE_INSTEAD}"
        )


def _ids(
    config: Any, shape: tuple[int, int], tokens: Sequence[int] | None, generator: torch.Generator
) -> tuple[torch.Tensor, int | None]:
    """Token ids of a shape, none of them the padding's, and the id of that; None where the model has none."""
    import torch

    pad = config.pad_token_id
    pad = pad if pad is not None and 0 <= pad < config.vocab_size else None  # older Llamas say -1
    ids = torch.randint(0, config.vocab_size, shape, generator=generator)
    if tokens is not None and max(tokens) < config.vocab_size:
        ids = torch.tensor(list(tokens)).repeat(1 + ids.numel() // len(tokens))[: ids.numel()].view(ids.shape).clone()
    if pad is not None:
        ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    return ids, pad


def _image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a vision model takes."""
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width
