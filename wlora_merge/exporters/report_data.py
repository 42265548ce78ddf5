"""What a report measures: how alike the adapters are, the spectrum of the mixture, what an export changed.

All from the low-rank factors and from rows of the files: no [out, in] matrix is formed. This room draws nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..errors import BaseModelError
from ..io.safetensors_file import Entry, byte_length, opened, read_header, read_rows, torch_dtype
from ..io.tensors import matrix_shape, one_torch_thread
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel

if TYPE_CHECKING:
    import torch

BLOCKS, ROWS = 8, 8
"""Of each changed tensor, this many blocks of this many rows are looked at, evenly spread."""


def adapter_similarity(deltas: Sequence[ModuleDelta | TensorDelta]) -> torch.Tensor:
    """Cosine of the angle between the adapters' delta weights, all modules joined to one vector: [N, N] float64.

    <ΔW_i, ΔW_j> = s_i s_j Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ) needs [R, R] products alone. What adapters change beside the two factors
    (DoRA's row scales, biases, whole tensors) is left out; an adapter without factors has NaN.
    """
    import torch

    stacks = [delta for delta in deltas if isinstance(delta, ModuleDelta) and delta.R]
    n = max((delta.n_adapters for delta in deltas), default=0)
    inner = torch.zeros(n, n, dtype=torch.float64)
    with one_torch_thread():
        for delta in stacks:
            A, B = delta.lora_A.double(), delta.lora_B.double() * delta.scaling
            owner = torch.nn.functional.one_hot(delta.adapter_index, n).double()  # [R, N]
            inner += owner.T @ ((B.T @ B) * (A @ A.T)) @ owner
    norms = inner.diagonal().sqrt()
    return (inner / norms[:, None] / norms).clamp(-1, 1)


def spectra(deltas: Sequence[ModuleDelta | TensorDelta], mixture: Mixture) -> dict[str, torch.Tensor]:
    """Singular values of each module's delta weight in the mixture, descending, float64."""
    with one_torch_thread():
        return {d.label: mixture.svd_of(d)[1] for d in deltas if isinstance(d, ModuleDelta) and d.R}


def error_by_rank(values: Mapping[str, torch.Tensor]) -> list[float]:
    """Relative Frobenius error, over all modules together, of the best LoRA of uniform rank 0, 1, 2, ..."""
    import torch

    longest = max((len(v) for v in values.values()), default=0)
    squares = torch.zeros(longest + 1, dtype=torch.float64)
    for v in values.values():
        squares[: len(v)] += v.square()
    lost = squares.flip(0).cumsum(0).flip(0)  # lost[k]: what rank k leaves out
    return (lost / lost[0]).sqrt().tolist() if float(lost[0]) else [0.0] * len(lost)


@dataclass(frozen=True)
class Change:
    """One tensor of a dense export: ||W' - W|| / ||W||, and ||W' - exact|| / ||exact - W||, None where it is not measured."""

    tensor: str
    relative_change: float
    lost: float | None


def changes(
    base: BaseModel,
    deltas: Sequence[ModuleDelta | TensorDelta],
    mixture: Mixture,
    folder: Path,
    names: Mapping[str, str | None] = MappingProxyType({}),
) -> list[Change]:
    """What a dense export changed and what rounding to its dtype lost, from evenly spread rows of each changed tensor.

    Args:
        base: the opened base model.
        deltas: what the adapters change.
        mixture: the mixture.
        folder: the dense export. The exact sum is taken anew, in float64.
        names: tensor as the base calls it -> as the export does, where it calls it otherwise.
    """
    written: dict[str, Entry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        written |= read_header(file).entries
    written |= {name: written[called] for name, called in names.items() if called in written}
    with one_torch_thread():
        found = [_change(base, d, mixture, written) for d in deltas if isinstance(d, TensorDelta) or d.R]
    # A tensor that holds many experts changes in many parts.
    return list({change.tensor: change for change in found}.values())


def _change(
    base: BaseModel, delta: ModuleDelta | TensorDelta, mixture: Mixture, written: Mapping[str, Entry]
) -> Change:
    named = delta.tensor if isinstance(delta, TensorDelta) else f"{delta.module}.weight"
    name = named if named in written else delta.module
    entry = base.entries.get(name) or base.find_tied(name)
    if entry is None or name not in written:
        raise BaseModelError(
            f"{base.folder}: tensor {name!r}, which the adapters change, is not in the base and the export."
        )
    rows = _block_rows(matrix_shape(entry.shape)[0])
    before, after = _sampled(entry, rows), _sampled(written[name], rows)
    return Change(name, _ratio(after - before, before), _lost(before, after, rows, delta, mixture))


def _lost(
    before: torch.Tensor,
    after: torch.Tensor,
    rows: list[int],
    delta: ModuleDelta | TensorDelta,
    mixture: Mixture,
) -> float | None:
    """||W' - exact|| / ||exact - W|| of these rows; None where the tensor changes by more than one product of factors."""
    import torch

    if isinstance(delta, TensorDelta) or delta.start is not None or delta.others:
        return None
    exact = mixture.fold_of(delta).rows(before, rows, torch.empty_like(before))
    return _ratio(after - exact, exact - before)


def _ratio(one: torch.Tensor, other: torch.Tensor) -> float:
    """||one|| / ||other||, and 0 where the other is zero."""
    return float(one.norm() / other.norm()) if bool(other.any()) else 0.0


def _block_rows(count: int) -> list[int]:
    """The rows that are looked at, ascending."""
    if count <= BLOCKS * ROWS:
        return list(range(count))
    starts = [round(i * (count - ROWS) / (BLOCKS - 1)) for i in range(BLOCKS)]
    return sorted({start + i for start in starts for i in range(ROWS)})


def _sampled(entry: Entry, rows: list[int]) -> torch.Tensor:
    """Those rows of a tensor [rows, cols], float64."""
    import torch

    _, cols = matrix_shape(entry.shape)
    width = byte_length(entry.dtype, (cols,))
    data = bytearray(width * len(rows))
    fd = opened(entry)
    try:
        for i, row in enumerate(rows):
            read_rows(fd, entry, memoryview(data)[i * width : (i + 1) * width], row * width)
    finally:
        os.close(fd)
    return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).view(len(rows), cols).double()
