"""Tensor maths of the fold: adding a delta weight to a base weight, and one low-rank product for a whole mixture.

No paths, no files. Sums are taken in float64 and converted once, by torch: on a CPU that costs half a second more on a 1.1 B
model than float32 does, whose sums end in another number in some of 10^4 elements. (Torch converts float64 to 16 bits through
float32, which is off by one unit where the float32 number lies exactly between two: 9 of 10^6 elements.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..adapters.layouts import row_factor, stored_factors
from ..io.tensors import matrix_shape

if TYPE_CHECKING:
    import torch

    from ..adapters.deltas import ModuleDelta, TensorDelta


def fold_factors(delta: ModuleDelta, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`left [rows, R]`, `right [R, cols]` float64 in the base tensor's order, with the gains in `left`; R may be 0."""
    import torch

    if not delta.factors:
        rows, cols = matrix_shape(delta.shape)
        return torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, cols, dtype=torch.float64)
    lora_B = delta.lora_B.double() * gains.double()
    left, right = stored_factors(delta.layout, delta.lora_A.double(), lora_B)
    return left.contiguous(), right.contiguous()


def fold_factor(delta: ModuleDelta, gains: torch.Tensor) -> torch.Tensor | None:
    """1 + Σ gains_n·row_scale_n, by which DoRA adapters multiply W: [rows, 1] or [1, cols] float64; None where none is.

    Args:
        delta: the module's changes; what DoRA adds is its row_scale [N, out].
        gains: [N], delta_scale · mixture weight: a row scale has no scaling of its own.
    """
    if delta.row_scale is None:
        return None
    return row_factor(delta.layout, 1 + gains.double() @ delta.row_scale)


class RowFold(Protocol):
    """What folds a module by rows, however its adapters are combined."""

    def rows(self, block: torch.Tensor, rows: slice | list[int], total: torch.Tensor) -> torch.Tensor:
        """The folded weight of some rows.

        Args:
            block: those rows [count, cols] of the base weight, any floating dtype.
            rows: which they are.
            total: [count, cols] float64, overwritten and returned.
        """


@dataclass(frozen=True)
class LinearFold:
    """factor · W + left @ right: the weighted sum; the terms are those of `fold_rows`."""

    left: torch.Tensor
    right: torch.Tensor
    factor: torch.Tensor | None = None

    def rows(self, block: torch.Tensor, rows: slice | list[int], total: torch.Tensor) -> torch.Tensor:
        """As of a `RowFold`."""
        factor = self.factor[rows] if self.factor is not None and self.factor.shape[0] > 1 else self.factor
        return fold_rows(block, self.left[rows], self.right, total, factor)

    def dense(self) -> torch.Tensor:
        """The delta weight [rows, cols] float64 in the base tensor's order, without what the factor changes."""
        return self.left @ self.right


def fold_rows(
    block: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    work: torch.Tensor,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """factor · W + left @ right for a block of rows, in float64, in the buffer `work`.

    Args:
        block: [rows, cols] base weight, any floating dtype.
        left: [rows, R] float64, the gains included; right: [R, cols] float64.
        right: [R, in] float64.
        work: [rows, cols] float64, overwritten and returned.
        factor: [rows, 1] or [1, cols] float64, or None for 1.
    """
    work.copy_(block)
    if factor is not None:
        work.mul_(factor)
    return work.addmm_(left, right)


def fold_saved(
    block: torch.Tensor, delta: TensorDelta, gains: torch.Tensor, total: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """Add Σ gains_n (T_n - W) to `total`, for whole tensors T_n that adapters carry.

    Args:
        block: [rows, cols] of the base's tensor from row `first` on, any floating dtype.
        delta: the tensor's changes.
        gains: [N], as for `fold_factor`.
        total: [rows, cols] float64, changed and returned.
        first: number of the block's first row.
    """
    rows, cols = block.shape
    for n, saved in delta.saved.items():
        change = saved.reshape(-1, cols)[first : first + rows].double() - block.double()
        total.add_(change, alpha=float(gains[n]))
    return total


def bias_factors(delta: ModuleDelta, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`left [out, N]`, `right [N, 1]` float64 with left @ right = Σ gains_n·Δb_n; gains [N] as for `fold_factor`."""
    if delta.bias is None:
        raise ValueError(f"{delta.module} has no trained bias")
    return delta.bias.T.contiguous(), gains.double()[:, None]


def lora_product(delta: ModuleDelta, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A [R, in], lora_B · gains [out, R]), float32: exactly the mixture's delta weight as one LoRA of scaling 1."""
    return delta.lora_A.float(), (delta.lora_B.double() * gains.double()).float()


def low_rank_svd(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition U diag(S) V^T of lora_B @ lora_A without forming the product.

    QR of both factors, then the SVD of the R×R core; both Q are orthonormal, so this is the product's own SVD.

    Returns:
        U [out, k], S [k] descending, V^T [k, in], all float64, k = min(R, out, in).
    """
    import torch

    q_B, r_B = torch.linalg.qr(lora_B.double())
    q_A, r_A = torch.linalg.qr(lora_A.double().T)
    u, s, vt = torch.linalg.svd(r_B @ r_A.T, full_matrices=False)
    return q_B @ u, s, vt @ q_A.T


def truncate(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-k approximation (Eckart-Young) as (lora_A [k, in], lora_B [out, k]), sqrt(S) on both sides, float32."""
    root = s[:rank].sqrt()
    return (root[:, None] * vt[:rank]).float(), (u[:, :rank] * root).float()


def pad_rank(lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Append zero rows and columns up to `rank`; the product stays the same."""
    import torch

    missing = rank - lora_A.shape[0]
    if missing <= 0:
        return lora_A, lora_B
    return (
        torch.cat([lora_A, lora_A.new_zeros(missing, lora_A.shape[1])]),
        torch.cat([lora_B, lora_B.new_zeros(lora_B.shape[0], missing)], dim=1),
    )
