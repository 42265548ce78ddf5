"""Mean pooling as one more layer of an encoder's own architecture: a checkpoint that has it needs no code of ours.

The layer stands behind the last one. Query and key are zero, so its attention is uniform over the mask. Its value is the
identity and its output projection c·I, so that its first layer norm sees c·mean + h. For a large c that is the layer norm of
the mean, for every token. Its feed-forward part is zero. `models.pooling` is the same as a hook.

It knows how two kinds of encoder call the parts of a layer, and one thing of heads: which of them bfloat16 is too coarse for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BaseModelError, UnsupportedError, WloraMergeError
from ..io.safetensors_file import Entry, read_tensor
from ..models.base_model import BaseModel
from .dense import Piece

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """How a kind of encoder calls its stack of layers and the parts of one, and its config the number of layers."""

    stack: str
    count: str
    zero: tuple[str, ...]
    value: str
    projection: str
    norms: tuple[str, str]

    @property
    def modules(self) -> set[str]:
        """Every part of a layer that has tensors."""
        return {*self.zero, self.value, self.projection, *self.norms}


BERT = Parts(
    stack="encoder.layer",
    count="num_hidden_layers",
    zero=("attention.self.query", "attention.self.key", "intermediate.dense", "output.dense"),
    value="attention.self.value",
    projection="attention.output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
DISTILBERT = Parts(
    stack="transformer.layer",
    count="n_layers",
    zero=("attention.q_lin", "attention.k_lin", "ffn.lin1", "ffn.lin2"),
    value="attention.v_lin",
    projection="attention.out_lin",
    norms=("sa_layer_norm", "output_layer_norm"),
)
KINDS = {"bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "electra": BERT, "distilbert": DISTILBERT}
"""Model types whose class reads one token after a stack of post-norm layers -> how they call the parts."""
OLD_NAMES = {"gamma": "weight", "beta": "bias"}
"""How older files call the tensors of a layer norm."""
VECTORS = {"mean": "the mean of its tokens", "last": "the last of its tokens"}
"""What the head sees, in words."""

LARGE = 2.0**24
"""c where the exponent allows it: what is left of h is below float32's last bit."""
LARGEST_F16 = 65504.0
COARSE_SHIFT = 8.0
"""From here on bfloat16 keeps a number to 1/16 at best."""


@dataclass(frozen=True)
class PoolingLayer:
    """The layer: its tensors as they are written, the keys of the config that change, and what the card says of it."""

    pieces: tuple[Piece, ...]
    config: Mapping[str, Any]
    note: str


def pooling_layer(base: BaseModel, pooling: str, dtype: str | None) -> PoolingLayer:
    """The layer that gives `pooling` behind the last layer of a base.

    Args:
        base: the opened base.
        pooling: one of `models.pooling.LAYER_POOLINGS`.
        dtype: safetensors name that the tensors are cast to; None: each has that of the base's last layer.

    Returns:
        Tensors of the names, shapes and dtypes of the base's last layer, one further.

    Raises:
        UnsupportedError: no layer of this architecture gives that.
        BaseModelError: the config counts other layers than the files hold.
    """
    parts = KINDS.get(base.model_type)
    if parts is None or pooling != "mean" or base.config.get("is_decoder"):
        raise UnsupportedError(
            f"{base.folder}: the head sees {VECTORS[pooling]}, and no layer of a checkpoint of model type {base.model_type!r} gives "
            "that: export with --format onnx."
        )
    prefix, number = last_layer(base)
    last = _tensors_of(base, parts, prefix)
    stored = dtype or last[f"{parts.projection}.weight"].dtype
    c = factor_of(stored, *(read_tensor(last[f"{parts.norms[1]}.{kind}"]) for kind in ("weight", "bias")))
    new = prefix.removesuffix(f"{number}.") + f"{number + 1}."
    pieces = tuple(
        Piece(
            new + entry.name.removeprefix(prefix),
            dtype or entry.dtype,
            entry.shape,
            tensor=_numbers(part, entry, parts, c, _epsilon(base)),
        )
        for part, entry in last.items()
    )
    return PoolingLayer(pieces, {parts.count: number + 2}, _note(new.removesuffix("."), parts, c))


def last_layer(base: BaseModel, error: type[WloraMergeError] = BaseModelError) -> tuple[str, int]:
    """What the names of the last layer's tensors begin with (`bert.encoder.layer.5.`), and its number, from 0.

    Raises:
        error: the files hold no layer of a kind that is known here, or the config counts others than they hold.
    """
    parts = KINDS.get(base.model_type)
    if parts is None:
        raise error(f"{base.folder / 'config.json'}: model type {base.model_type!r} is not one of {', '.join(KINDS)}.")
    found = [re.match(rf"(?:\w+\.)?{re.escape(parts.stack)}\.(\d+)\.", name) for name in base.entries]
    prefix, number = max(((m[0], int(m[1])) for m in found if m), key=lambda pair: pair[1], default=("", -1))
    counted = base.config.get(parts.count, number + 1)
    if number < 0 or counted != number + 1:
        raise error(
            f"{base.folder / 'config.json'}: {parts.count} is {counted!r}, and the files hold {number + 1} layers "
            f"({parts.stack}): give the config of these weights."
        )
    return prefix, number


def _tensors_of(base: BaseModel, parts: Parts, prefix: str) -> dict[str, Entry]:
    """The tensors of a layer: module and `weight` or `bias` -> entry.

    Raises:
        UnsupportedError: it has other parts than a plain layer of its kind, or lacks one.
    """
    found = {}
    for entry in base.entries.values():
        if entry.name.startswith(prefix):
            module, _, kind = entry.name.removeprefix(prefix).rpartition(".")
            found[f"{module}.{OLD_NAMES.get(kind, kind)}"] = entry
    plain = {f"{module}.{kind}" for module in parts.modules for kind in ("weight", "bias")}
    if strange := sorted(plain ^ set(found)):
        what = "has" if strange[0] in found else "lacks"
        raise UnsupportedError(
            f"{base.folder}: its last layer {what} {prefix + strange[0]!r}, unlike a plain {base.model_type}'s, so no layer that "
            "averages the tokens can follow: export with --format onnx."
        )
    return found


def factor_of(dtype: str, norm_weight: torch.Tensor, norm_bias: torch.Tensor) -> float:
    """c: the largest power of two with which c·mean + h stays finite.

    A number of h is at most √hidden·|weight| + |bias| of the last layer norm, and so is one of the mean.

    Args:
        dtype: safetensors name of what the layer is stored in.
        norm_weight: [hidden] of the base's last layer norm.
        norm_bias: [hidden] of the same.
    """
    if dtype != "F16":
        return LARGE
    weight, bias = norm_weight.double(), norm_bias.double()
    most = float((weight.abs() * len(weight) ** 0.5 + bias.abs()).max())
    return min(2.0 ** math.floor(math.log2(max(LARGEST_F16 / max(most, 1e-3) - 1, 1))), 2.0**15)


def _numbers(part: str, entry: Entry, parts: Parts, c: float, epsilon: float) -> torch.Tensor:
    """What a tensor of the layer holds, float32 of the entry's shape; what is zero takes no memory."""
    import torch

    module, _, kind = part.rpartition(".")
    diagonal = {parts.value: 1.0, parts.projection: c}
    ones = {parts.norms[0]: 1.0, parts.norms[1]: math.sqrt(1 + epsilon)}  # the second sees a vector of variance 1
    if kind == "weight" and module in diagonal:
        return torch.eye(entry.shape[0]) * diagonal[module]
    return torch.tensor(ones.get(module, 0.0) if kind == "weight" else 0.0).expand(entry.shape)


def _epsilon(base: BaseModel) -> float:
    value = base.config.get("layer_norm_eps")
    return value if isinstance(value, float) and 0 <= value < 1 else 1e-12


def _note(layer: str, parts: Parts, c: float) -> str:
    too_large = (
        " Its numbers are too large for float16. vLLM loads a float32 model as float16, so say `--dtype float32` there; an export "
        "with `--dtype float16` is loaded in any dtype."
    )
    return (
        f"This model has one more layer than its base. `{layer}` averages the tokens: its attention is uniform over the mask, and "
        f"its layer norm sees {c:.0f} times their mean. It is an ordinary layer, which `{parts.count}` counts, so nothing but the "
        "architecture's own class is needed to load it." + (too_large if c > LARGEST_F16 else "")
    )


def refuse_coarse_shift(head: Mapping[str, torch.Tensor], pieces: Iterable[Piece], base: BaseModel) -> None:
    """Refuse to store a head in bfloat16 that shifts its vector into the linear range of a GELU or ReLU.

    Args:
        head: the trained head by parameter name.
        pieces: of the layer before it.
        base: the base, for the message.

    Raises:
        UnsupportedError: with the dtypes that hold it.
    """
    if not any(piece.dtype == "BF16" for piece in pieces):
        return
    for name, bias in head.items():
        weight = head.get(f"{name.removesuffix('.bias')}.weight")
        square = weight is not None and name.endswith(".bias") and tuple(weight.shape) == (len(bias), len(bias))
        if square and float(bias.abs().max()) >= COARSE_SHIFT:
            raise UnsupportedError(
                f"{base.folder}: {name!r} of the head shifts by {float(bias.abs().max()):g}, where bfloat16 is too coarse: export "
                "with --dtype float32 or float16, or with --format onnx."
            )
