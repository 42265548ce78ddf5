"""Layer kinds <-> matrices: the one place that knows how the factors of each lie in files.

Every LoRA is a product lora_B @ lora_A of shape [out, in]. How that product lies in the base's tensor differs by layer:

    kind        base tensor            lora_A in the file     lora_B in the file     stored delta
    LINEAR      [out, in]              [r, in]                [out, r]               B A
    CONV1D      [in, out]  (GPT-2)     [r, in]                [out, r]               (B A)^T
    EMBEDDING   [vocab, dim]           [r, vocab]             [dim, r]               (B A)^T
    CONV        [out, in, *kernel]     [r, in, *kernel]       [out, r, 1...]         B A, reshaped

`stored_factors` gives `left [rows, R]` and `right [R, cols]`. left @ right is the delta in the base tensor's own order, viewed
as a matrix of shape[0] rows. So a fold runs over row blocks of the file and never transposes the base.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError
from ..io.tensors import matrix_shape

if TYPE_CHECKING:
    import torch

CONV1D_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
COMPOSITES = ("encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder")
"""Model types made of two models, either of which may be a GPT-2."""
BLOCK_ELEMENTS = 1 << 20
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


class Layout(enum.Enum):
    """How the product lora_B @ lora_A lies in the base tensor."""

    LINEAR = "Linear"
    CONV1D = "Conv1D"
    EMBEDDING = "Embedding"
    CONV = "Conv"

    @property
    def transposed(self) -> bool:
        """True where the base tensor holds the transpose of [out, in]."""
        return self in (Layout.CONV1D, Layout.EMBEDDING)


def layout_of(
    module: str,
    base: tuple[int, ...],
    lora_A: tuple[int, ...],
    lora_B: tuple[int, ...],
    *,
    embedding: bool,
    model_type: str,
    fan_in_fan_out: bool = False,
) -> Layout:
    """The layer kind of a target module, from shapes; names and the config tell a GPT-2 style Conv1D from a Linear.

    Args:
        module: dotted name, for messages.
        base: shape of the base tensor.
        lora_A: shapes in the adapter's file.
        lora_B: shapes in the adapter's file.
        embedding: the file calls them lora_embedding_A and lora_embedding_B.
        model_type: the base config's `model_type`.
        fan_in_fan_out: the adapter's config says that its layers were Conv1D (PEFT sets it so itself).

    Raises:
        AdapterError: the shapes do not fit the base tensor.
        UnsupportedError: a square matrix that may lie either way.
    """
    out_in = (lora_B[0], *lora_A[1:])
    fits_transposed = len(base) == 2 and (base[1], base[0]) == out_in
    if embedding:
        if fits_transposed:
            return Layout.EMBEDDING
    elif len(base) > 2:
        if base == out_in:
            return Layout.CONV
    elif len(base) == 2:
        conv1d = fits_transposed and _is_conv1d(module, base, model_type, fan_in_fan_out)
        if conv1d or base == out_in:
            return Layout.CONV1D if conv1d else Layout.LINEAR
    raise AdapterError(
        f"target module {module!r}: lora_A {list(lora_A)} and lora_B {list(lora_B)} do not fit the base weight {list(base)}: "
        "this adapter was trained on another base model."
    )


def _is_conv1d(module: str, base: tuple[int, ...], model_type: str, fan_in_fan_out: bool) -> bool:
    """Whether a target module whose weight may lie transposed is a GPT-2 style Conv1D.

    Raises:
        UnsupportedError: a square matrix, in a model of which it is not known.
    """
    certain = model_type in CONV1D_MODEL_TYPES  # else PEFT looks at the layer, whatever the config says
    known = certain or model_type in COMPOSITES  # PEFT's fan_in_fan_out is that of the last module alone
    conv1d = module.rpartition(".")[2] in CONV1D_NAMES if known else fan_in_fan_out
    if conv1d and base[0] == base[1] and not certain:
        raise UnsupportedError(
            f"target module {module!r}: its weight {list(base)} is square, and in a {model_type or 'custom'} model it may be a "
            "Linear or a Conv1D: leave this adapter out."
        )
    return conv1d


def factors_from_file(layout: Layout, factor: torch.Tensor) -> torch.Tensor:
    """A factor of the file as a matrix, `lora_A [r, in]` or `lora_B [out, r]`; a convolution's kernel joins `in`."""
    return factor.flatten(1) if layout is Layout.CONV else factor


def factors_to_file(
    layout: Layout, lora_A: torch.Tensor, lora_B: torch.Tensor, base: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Key suffix -> tensor, as PEFT's file has them, for matrices `lora_A [r, in]` and `lora_B [out, r]`."""
    if layout is Layout.EMBEDDING:
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}
    if layout is Layout.CONV:
        lora_A = lora_A.reshape(lora_A.shape[0], *base[1:])
        lora_B = lora_B.reshape(*lora_B.shape, *[1] * (len(base) - 2))
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def stored_factors(layout: Layout, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`left [rows, R]`, `right [R, cols]` with left @ right = the delta in the base tensor's order."""
    return (lora_A.T, lora_B.T) if layout.transposed else (lora_B, lora_A)


def output_rows(layout: Layout, base: tuple[int, ...]) -> int:
    """`out`: how many output rows the product has, wherever they lie in the base tensor."""
    return base[1] if layout.transposed else base[0]


def row_norms(layout: Layout, base: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """||W + lora_B @ lora_A|| of each output row, [out] float64: what DoRA divides by. The sum is formed in blocks of rows.

    Args:
        layout: the kind of layer.
        base: W in its own order, any floating dtype.
        lora_A: [r, in]; lora_B: [out, r], the scaling included.
        lora_B: [out, r].

    Source: `peft.tuners.lora.dora.DoraLinearLayer.get_weight_norm`.
    """
    import torch

    left, right = stored_factors(layout, lora_A.double(), lora_B.double())
    rows, cols = matrix_shape(tuple(base.shape))
    weight, step = base.reshape(rows, cols), max(1, BLOCK_ELEMENTS // max(1, cols))
    squares = []
    for row in range(0, rows, step):
        total = weight[row : row + step].cpu().double() + left[row : row + step] @ right
        squares.append(total.square().sum(0 if layout.transposed else 1))
    return (torch.stack(squares).sum(0) if layout.transposed else torch.cat(squares)).sqrt()


def row_factor(layout: Layout, factor: torch.Tensor) -> torch.Tensor:
    """A factor [out] of the output rows in the shape that multiplies the base tensor's matrix: [1, cols] or [rows, 1]."""
    return factor[None, :] if layout.transposed else factor[:, None]
