"""How the adapters' delta weights become one: their weighted sum, or first pruned, elected by sign, and then summed.

A delta weight is here what it is in a merge: one dense matrix for each adapter and tensor, scaling · lora_B @ lora_A in float64, in
the base tensor's order. Magnitudes are compared over the whole of it; all else is done a block of rows at a time, so that memory
stays flat. Blocks lie on a grid of their own: the numbers are the same whoever asks for which rows.

Sources: TIES, Yadav et al. 2023, https://arxiv.org/abs/2306.01708; DARE, Yu et al. 2023, https://arxiv.org/abs/2311.03099; the
formulas are those of `peft.utils.merge_utils`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapters.deltas import TensorDelta
from ..constants import LINEAR
from ..errors import UnsupportedError
from ..io.tensors import BLOCK_ELEMENTS
from .fold import fold_factors

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..adapters.adapter import Adapter
    from ..adapters.deltas import ModuleDelta

ELECTING, DROPPING = ("ties", "dare_ties"), ("dare_linear", "dare_ties")
"""The methods that elect a sign for each number, and those that prune at random."""
_TIES = "[Yadav et al. 2023](https://arxiv.org/abs/2306.01708)"
_DARE = "[Yu et al. 2023](https://arxiv.org/abs/2311.03099)"
SOURCES = {"ties": _TIES, "dare_linear": _DARE, "dare_ties": f"{_DARE}, {_TIES}", "magnitude_prune": "as in PEFT"}


@dataclass(frozen=True)
class Combination:
    """A method, and its numbers.

    Attributes:
        method: as on the command line; `linear` is the weighted sum, which has none of the others.
        density: the share of each adapter's delta weight that is kept: the largest magnitudes, or at random, divided by it.
        majority_sign: whether a sign is elected by the `total` of the pruned numbers, or by the `frequency` of their signs.
        seed: of what is pruned at random.
    """

    method: str = LINEAR
    density: float = 1.0
    majority_sign: str = "total"
    seed: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether it is the weighted sum, which stays a product of two factors."""
        return self.method == LINEAR

    @property
    def elects(self) -> bool:
        """Whether only numbers of the elected sign are summed, and divided by how many they are."""
        return self.method in ELECTING

    @property
    def drops(self) -> bool:
        """Whether it prunes at random."""
        return self.method in DROPPING

    def table(self) -> dict[str, Any]:
        """Its method, with those of the numbers that it knows."""
        known: dict[str, Any] = {"method": self.method}
        if not self.is_linear:
            known["density"] = self.density
        if self.elects:
            known["majority_sign"] = self.majority_sign
        if self.drops:
            known["seed"] = self.seed
        return known

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {value:g}" if name == "density" else f"{name} {value}" for name, value in self.table().items()
        )

    def refuse_changes(self, adapters: Iterable[Adapter], tensors: Iterable[TensorDelta]) -> None:
        """Refuse what is no delta weight of two factors, where there is more to do than to sum.

        Raises:
            UnsupportedError: with the adapter, or the tensor.
        """
        if self.is_linear:
            return
        advice = f"which {self.method} does not combine, nor does PEFT"
        for adapter in adapters:
            if found := _beside(adapter):
                raise UnsupportedError(
                    f"{adapter.where}: it {found}, {advice}: leave this adapter out, or take another --method."
                )
        for delta in tensors:
            raise UnsupportedError(
                f"tensor {delta.tensor!r}: adapters change it as a whole, {advice}: say --modules-to-save drop, or take another "
                "--method."
            )

    def join(self, deltas: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Pruned delta weights [n, rows, cols] and their weights [n] -> what is added to the base [rows, cols], all float64.

        Source: `peft.utils.merge_utils.calculate_majority_sign_mask`, `disjoint_merge`.
        """
        import torch

        weighted = deltas * weights[:, None, None]
        if not self.elects:
            return weighted.sum(0)
        signs = deltas.sign()
        votes = (signs if self.majority_sign == "frequency" else deltas).sum(0)
        agree = signs == torch.where(votes >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _beside(adapter: Adapter) -> str:
    """What an adapter changes beside the product of two factors, in words; empty where it changes nothing else."""
    factors = adapter.modules.values()
    if any(f.magnitude is not None for f in factors):
        return "is a DoRA, which scales the base's rows"
    if adapter.biases or any(f.bias is not None for f in factors):
        return "trains biases"
    return "trains rows of an embedding (trainable_token_indices)" if adapter.token_rows else ""


class CombinedFold:
    """W + the combined delta weight of one module, by rows; it is asked as `fold.LinearFold` is.

    Args:
        how: the combination.
        delta: the module's changes.
        weights: [N], delta_scale · mixture weight.
        names: the N adapters' names.
    """

    def __init__(self, how: Combination, delta: ModuleDelta, weights: torch.Tensor, names: Sequence[str]) -> None:
        left, right = fold_factors(delta, delta.scaling)
        present = sorted({*delta.adapter_index.tolist()})
        self._how, self._weights = how, weights.double()[present]
        self._shape = rows, cols = left.shape[0], right.shape[1]
        self._step = max(1, BLOCK_ELEMENTS // max(1, cols))
        self._inner = max(1, self._step // len(present))
        self._products = [
            (left[:, own].contiguous(), right[own]) for own in (delta.adapter_index == n for n in present)
        ]
        self._prune: list[_Largest | _Dropped | None] = [None] * len(present)
        if how.density < 1:
            self._prune = [
                _Dropped(_key(how.seed, names[n], delta.label), how.density)
                if how.drops
                else _largest(self, number, int(how.density * rows * cols))
                for number, n in enumerate(present)
            ]

    def rows(self, block: torch.Tensor, rows: slice | list[int], total: torch.Tensor) -> torch.Tensor:
        """W + the delta weight for some rows; arguments as for `LinearFold.rows`."""
        total.copy_(block)
        spans = [(rows.start, rows.stop)] if isinstance(rows, slice) else list(_runs(rows))
        at = 0
        for first, end in spans:
            self._add(total[at : at + end - first], first)
            at += end - first
        return total

    def dense(self) -> torch.Tensor:
        """The delta weight [rows, cols] float64 in the base tensor's order."""
        import torch

        whole = torch.zeros(*self._shape, dtype=torch.float64)
        self._add(whole, 0)
        return whole

    def _add(self, total: torch.Tensor, first: int) -> None:
        """Add the delta weight's rows from `first` on to `total` [count, cols]."""
        row, end = first, first + len(total)
        while row < end:
            start, stop = self._cell(row)
            upto = min(stop, end)
            total[row - first : upto - first] += self._combined(start, stop)[row - start : upto - start]
            row = upto

    def _combined(self, start: int, stop: int) -> torch.Tensor:
        import torch

        pruned = []
        for number, prune in enumerate(self._prune):
            product = self.product(number, start, stop)
            pruned.append(product if prune is None else prune(product, start * self._shape[1]))
        return self._how.join(torch.stack(pruned), self._weights)

    def _cell(self, row: int) -> tuple[int, int]:
        """First row and end of the cell of the grid that a row lies in."""
        block = row // self._step * self._step
        start = block + (row - block) // self._inner * self._inner
        return start, min(start + self._inner, block + self._step, self._shape[0])

    def cells(self) -> Iterator[tuple[int, int]]:
        """The cells of the grid, in order."""
        row = 0
        while row < self._shape[0]:
            start, row = self._cell(row)
            yield start, row

    def magnitudes(self, number: int) -> np.ndarray[Any, Any]:
        """The absolute values [rows · cols] of one adapter's delta weight."""
        import numpy as np

        whole = np.empty(self._shape)
        for start, stop in self.cells():
            whole[start:stop] = self.product(number, start, stop).abs().numpy()
        return whole.reshape(-1)

    def product(self, number: int, start: int, stop: int) -> torch.Tensor:
        """Rows of one adapter's delta weight, before pruning."""
        left, right = self._products[number]
        return left[start:stop] @ right


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending rows as (first, end) of those that follow each other."""
    first = at = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at] != rows[at - 1] + 1:
            yield rows[first], rows[at - 1] + 1
            first = at


# ------------------------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class _Largest:
    """Keeps numbers above a magnitude, and those of that magnitude whose place in the matrix is at most `last`."""

    threshold: float
    last: int

    def __call__(self, values: torch.Tensor, first: int) -> torch.Tensor:
        """The numbers [rows, cols] of which the first has the place `first`, pruned."""
        import torch

        magnitudes = values.abs()
        kept = magnitudes > self.threshold
        if first <= self.last:
            places = torch.arange(first, first + values.numel()).view_as(values)
            kept |= (magnitudes == self.threshold) & (places <= self.last)
        return values.mul_(kept)


@dataclass(frozen=True)
class _Dropped:
    """Keeps each number with the probability `density`, and divides it by that; which ones, its place in the matrix decides alone."""

    key: int
    density: float

    def __call__(self, values: torch.Tensor, first: int) -> torch.Tensor:
        """As of `_Largest`: the n-th draw of a counter-based generator (Philox, four draws to a count) is that of place n."""
        import numpy as np
        import torch

        skipped = first % 4
        draws = np.random.Philox(key=self.key, counter=first // 4).random_raw(values.numel() + skipped)[skipped:]
        kept = (draws >> np.uint64(11)) < np.uint64(self.density * 2**53)
        return values.mul_(torch.from_numpy(kept).view_as(values)).div_(self.density)


def _key(seed: int, adapter: str, label: str) -> int:
    """128 bits for one adapter's delta weight of one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{adapter}\0{label}".encode()).digest()[:16], "big")


def _largest(fold: CombinedFold, number: int, k: int) -> _Largest:
    """What keeps the k largest magnitudes of an adapter's delta weight; of equal ones the first in the matrix."""
    if k == 0:
        return _Largest(math.inf, -1)
    magnitudes = fold.magnitudes(number)
    magnitudes.partition(len(magnitudes) - k)
    largest, rest = magnitudes[-k:], magnitudes[:-k]
    threshold = float(largest[0])
    equal = int((largest == threshold).sum())
    if not threshold or not (rest == threshold).any():
        return _Largest(threshold, len(magnitudes))
    for start, stop in fold.cells():
        product = fold.product(number, start, stop)
        places = (product.abs().flatten() == threshold).nonzero().flatten()
        if len(places) >= equal:
            return _Largest(threshold, start * product.shape[1] + int(places[equal - 1]))
        equal -= len(places)
    raise ValueError(f"{equal} numbers of magnitude {threshold} are not found again")
