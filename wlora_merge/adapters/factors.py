"""One adapter's change of one target module: its factors, read from the file where they lie when they are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, TypeAlias

from ..io.safetensors_file import Entry, read_tensor, torch_dtype

if TYPE_CHECKING:
    import torch

Stored: TypeAlias = "torch.Tensor | Entry"
"""A tensor, or where it lies in a file: its shape is known either way, its numbers are read when they are used."""


def numbers(stored: Stored) -> torch.Tensor:
    """A tensor's numbers, read where they lie in a file; in that file's dtype."""
    return read_tensor(stored) if isinstance(stored, Entry) else stored


@dataclass(frozen=True)
class Slice:
    """Which part of stored factors belongs to one expert, and which rows of that expert's delta weight are meant.

    lora_A holds the experts one after another, lora_B has them innermost. `rows` [n] counts rows of the delta weight
    [out, in], or where `transposed` rows of its transpose. Where `swapped`, the file has the transpose of what is meant: lora_A is
    lora_B of the delta weight, and the other way round. Where `spread`, the stored lora_B is those of `out` rows alone, and the
    others are zero.
    """

    expert: int
    experts: int
    rows: torch.Tensor
    transposed: bool = False
    swapped: bool = False
    spread: range | None = None
    out: int = 0


@dataclass
class Factors:
    """One adapter's change of one target module, as its file has it.

    lora_A is [r, in] (a convolution's has its kernel behind), lora_B [out, r]; scaling is alpha / r, or alpha / sqrt(r) for
    rsLoRA. `bias` [out] is a trained lora_B.bias, `magnitude` [out] DoRA's vector. Each is a tensor, or where it lies in the file:
    then each use reads it anew, and many large adapters need no memory.
    """

    stored_A: Stored
    stored_B: Stored
    scaling: float
    embedding: bool
    bias: Stored | None = None
    magnitude: Stored | None = None
    slice: Slice | None = None

    @property
    def lora_A(self) -> torch.Tensor:
        """[r, in], in the file's dtype."""
        if self.slice is None:
            return numbers(self.stored_A)
        if self.slice.swapped:
            return self._expert_B.T
        return self._expert_A[:, self.slice.rows] if self.slice.transposed else self._expert_A

    @property
    def lora_B(self) -> torch.Tensor:
        """[out, r], in the file's dtype."""
        if self.slice is None:
            return numbers(self.stored_B)
        if self.slice.swapped:
            return self._expert_A.T[self.slice.rows]
        return self._expert_B if self.slice.transposed else self._expert_B[self.slice.rows]

    @property
    def _expert_A(self) -> torch.Tensor:
        """One expert's part of `stored_A`, [r, columns]."""
        expert = self.slice.expert if self.slice else 0
        return _held(self.stored_A)[expert * self.r : (expert + 1) * self.r]

    @property
    def _expert_B(self) -> torch.Tensor:
        """One expert's part of `stored_B`, [rows, r]."""
        stored = _held(self.stored_B)
        if self.slice and self.slice.spread:
            spread, whole = self.slice.spread, stored.new_zeros(self.slice.out, self.r)
            whole[spread.start : spread.stop : spread.step] = stored
            return whole
        return stored.reshape(stored.shape[0], self.r, -1)[:, :, self.slice.expert if self.slice else 0]

    @property
    def r(self) -> int:
        """The rank."""
        return self.stored_A.shape[0] // (self.slice.experts if self.slice else 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds both factors, float32 or wider."""
        import torch

        dtypes = [torch_dtype(s.dtype) if isinstance(s, Entry) else s.dtype for s in (self.stored_A, self.stored_B)]
        return torch.promote_types(torch.promote_types(torch.float32, dtypes[0]), dtypes[1])

    @property
    def parameters(self) -> int:
        """How many numbers this change holds."""
        stored = (self.stored_A, self.stored_B, self.bias, self.magnitude)
        return sum(math.prod(tensor.shape) for tensor in stored if tensor is not None)

    @cached_property
    def is_zero(self) -> bool:
        """True where the product is zero: no rank has both its row of lora_A and its column of lora_B."""
        return self._is_zero(used_ranks(self.lora_A, 0), used_ranks(self.lora_B, 1))

    def note_ranks(self, ranks: Mapping[Entry, int]) -> None:
        """Learn from who has read both tensors which ranks they use, so that `is_zero` need not read them again."""
        known = [ranks[s] for s in (self.stored_A, self.stored_B) if isinstance(s, Entry) and s in ranks]
        if len(known) == 2:
            self.is_zero = self._is_zero(*known)

    def _is_zero(self, rows: int, columns: int) -> bool:
        return self.scaling == 0 or not rows & columns


def used_ranks(factor: torch.Tensor, axis: int) -> int:
    """A bit for each rank of a factor that is not all zero; ranks are its rows (axis 0, of lora_A) or columns (axis 1, of lora_B).

    Hundreds of adapters have a hundred thousand factors, and a tensor for each would be a megabyte an adapter.
    """
    used = factor.transpose(0, axis).flatten(1).any(1).tolist()
    return sum(1 << rank for rank, is_used in enumerate(used) if is_used)


def _held(stored: Stored) -> torch.Tensor:
    """A stored tensor that many slices are taken from, read once for a while."""
    return _recent(stored, stored.file.stat().st_mtime_ns) if isinstance(stored, Entry) else stored


@lru_cache(maxsize=16)
def _recent(entry: Entry, _: int) -> torch.Tensor:
    return read_tensor(entry)


@dataclass(frozen=True)
class TokenRows:
    """The rows of an embedding that an adapter trained: token ids [k], and the rows' new values [k, dim]."""

    indices: tuple[int, ...]
    values: Stored
