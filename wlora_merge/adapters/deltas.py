"""ModuleDelta and TensorDelta: the changes of all adapters to one module, or to one tensor, of the base.

This is the one structure between reading and writing. This room knows shapes and factors, no names of an adapter and no
weights of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import AdapterError
from .factors import Factors, numbers
from .layouts import Layout, factors_from_file, output_rows, row_norms

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModuleDelta:
    """All adapters' low-rank changes of one module, stacked.

    lora_A [R, in] and lora_B [out, R] hold the rows and columns of all adapters that target the module, R = Σ r_n. `owners` has
    for each of `factors` the number of the adapter that it came from; scaling [R] and adapter_index [R] say the same for each row.
    `module` is the base tensor's name without `.weight`, and `shape` the base tensor's shape. With `start` only the rows from there
    on change, and `shape` is theirs: rows of a matrix with its last dimension as columns. `name` is what an adapter calls the
    module; empty where it knows it as a part of another. `read` gives the base weight.

    DoRA's merged weight is c_n·(W + s_n B_n A_n) with c_n = magnitude_n / ||W + s_n B_n A_n|| of each output row. It is
    W + (c_n - 1)·W + s_n (c_n·B_n) A_n: lora_B holds c_n·B_n, and `row_scale` [N, out] holds c_n - 1.

    `biases` holds, by adapter, the delta [out] float64 of a trained bias. A module of which only the bias changes (a norm,
    say) has no factors, R = 0, and the bias's shape. `others` are adapters that change a tensor of the module as a whole.
    """

    module: str
    layout: Layout
    shape: tuple[int, ...]
    factors: tuple[Factors, ...]
    owners: tuple[int, ...]
    n_adapters: int
    read: Callable[[], torch.Tensor] | None = field(default=None, compare=False)
    name: str = ""
    start: int | None = None
    biases: dict[int, torch.Tensor] = field(default_factory=dict)
    others: frozenset[int] = frozenset()

    @property
    def label(self) -> str:
        """What tells it from others: its module and, of some rows of a tensor, where they start."""
        return self.module if self.start is None else f"{self.module}[{self.start}:]"

    @property
    def bias(self) -> torch.Tensor | None:
        """Deltas of the bias [N, out] float64, zero for an adapter that leaves it alone; None where all do."""
        import torch

        if not self.biases:
            return None
        zero = torch.zeros_like(next(iter(self.biases.values())))
        return torch.stack([self.biases.get(n, zero) for n in range(self.n_adapters)])

    @property
    def changes(self) -> list[str]:
        """Names of the base's tensors that change."""
        return [*([f"{self.module}.weight"] if self.factors else []), *([self.bias_name] if self.biases else [])]

    @property
    def bias_name(self) -> str:
        """The name of the module's bias in the base's files."""
        return f"{self.module}.bias"

    @property
    def present(self) -> torch.Tensor:
        """[N] bool: which adapters change this module."""
        import torch

        mask = torch.zeros(self.n_adapters, dtype=torch.bool)
        mask[[*self.owners, *self.biases, *self.others]] = True
        return mask

    @property
    def R(self) -> int:
        """Rank of the stack: the sum of the adapters' ranks."""
        return sum(f.r for f in self.factors)

    @cached_property
    def scaling(self) -> torch.Tensor:
        """[R] float64: each row's scaling."""
        return self._by_row([f.scaling for f in self.factors], "float64")

    @cached_property
    def adapter_index(self) -> torch.Tensor:
        """[R] int64: the adapter that each row came from."""
        return self._by_row(self.owners, "int64")

    def _by_row(self, values: Sequence[float], dtype: str) -> torch.Tensor:
        """One value for each of `factors` as one for each of its rows."""
        import torch

        ranks = torch.tensor([f.r for f in self.factors], dtype=torch.int64)
        return torch.tensor(values, dtype=getattr(torch, dtype)).repeat_interleave(ranks)

    @cached_property
    def dtype(self) -> torch.dtype:
        """float32, or wider where an adapter is, or where DoRA's factor is in lora_B."""
        import torch

        if self.has_row_scale:
            return torch.float64
        return max((f.dtype for f in self.factors), key=lambda dtype: dtype.itemsize)

    @property
    def lora_A(self) -> torch.Tensor:
        """[R, in], joined from the adapters when it is asked for: a stack holds no tensors of its own."""
        import torch

        return torch.cat([factors_from_file(self.layout, f.lora_A).to(self.dtype) for f in self.factors])

    @property
    def lora_B(self) -> torch.Tensor:
        """[out, R], joined when it is asked for; DoRA's factor of each output row is in it."""
        import torch

        parts = [factors_from_file(self.layout, f.lora_B).to(self.dtype) for f in self.factors]
        if self.row_scale is not None:
            parts = [(1 + self.row_scale[n])[:, None] * part for n, part in zip(self.owners, parts, strict=True)]
        return torch.cat(parts, dim=1)

    @property
    def has_row_scale(self) -> bool:
        """True where an adapter is a DoRA."""
        return any(f.magnitude is not None for f in self.factors)

    @cached_property
    def row_scale(self) -> torch.Tensor | None:
        """c_n - 1 [N, out] float64, zero for an adapter that is no DoRA here; None where none is. It reads the base weight.

        Raises:
            AdapterError: a row that DoRA divides by is zero.
        """
        import torch

        if not self.has_row_scale:
            return None
        if self.read is None:
            raise AdapterError(f"module {self.module!r}: an adapter is a DoRA, and the base weight cannot be read.")
        base = self.read()
        scale = torch.zeros(self.n_adapters, output_rows(self.layout, self.shape), dtype=torch.float64)
        for n, f in zip(self.owners, self.factors, strict=True):
            if f.magnitude is not None:
                lora_A, lora_B = (factors_from_file(self.layout, t).double() for t in (f.lora_A, f.lora_B))
                norms = row_norms(self.layout, base, lora_A, f.scaling * lora_B)
                scale[n] = numbers(f.magnitude).double().flatten() / norms - 1
        if not bool(scale.isfinite().all()):
            raise AdapterError(f"module {self.module!r}: DoRA divides by the norm of a row that is zero: leave it out.")
        return scale

    def only(self, used: torch.Tensor) -> ModuleDelta:
        """The same without the factors of adapters that are not `used` [N] bool: their files are not read."""
        kept = [(f, n) for f, n in zip(self.factors, self.owners, strict=True) if used[n]]
        if len(kept) == len(self.factors):
            return self
        return replace(self, factors=tuple(f for f, _ in kept), owners=tuple(n for _, n in kept))


@dataclass(frozen=True)
class TensorDelta:
    """A whole tensor of the base that adapters carry their own copy of; `saved[n]` is adapter n's.

    `others` are adapters that change another tensor of its module, or this one by a LoRA.
    """

    tensor: str
    shape: tuple[int, ...]
    saved: dict[int, torch.Tensor]
    n_adapters: int
    others: frozenset[int] = frozenset()

    @property
    def present(self) -> torch.Tensor:
        """[N] bool: which adapters change this tensor."""
        import torch

        return torch.tensor([n in self.saved or n in self.others for n in range(self.n_adapters)])

    @property
    def module(self) -> str:
        """The name by which it belongs to a group."""
        return self.tensor.removesuffix(".weight").removesuffix(".bias")
