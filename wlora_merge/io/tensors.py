"""Small questions about tensors, and the memory that blocks of them pass through.

It knows numbers and shapes. It knows neither files nor models.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import NotFiniteError
from .safetensors_file import safetensors_dtype

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 << 20  # an untouched range moves in pieces of this size, through buffers of this size
BLOCK_ELEMENTS = 1 << 20  # a fold's row block: 8 MiB of float64, 2 MiB of bf16


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape and the same numbers, whatever their dtypes."""
    return one.shape == other.shape and bool((one.double() == other.double()).all())


def all_finite(tensor: torch.Tensor) -> bool:
    """True where a floating tensor holds no NaN and no infinity; 20 times faster than `isfinite().all()`."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN if one element is
    return bool(low.isfinite() & high.isfinite())


def refuse_not_finite(tensor: torch.Tensor, where: str, advice: str) -> None:
    """Refuse outputs that hold a NaN or an infinity: a difference from them says nothing, and a tolerance made of them allows all.

    Args:
        tensor: outputs of any shape and floating dtype.
        where: the model and the output, as the message names it.
        advice: what to do.

    Raises:
        NotFiniteError: with how many of its numbers are not finite.
    """
    if not all_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise NotFiniteError(
            f"{where}: {bad} of {tensor.numel()} numbers are NaN or infinite, expected none: {advice}."
        )


def overflow_advice(dtype: torch.dtype) -> str:
    """What to do about a sum that overflows in `dtype`."""
    if safetensors_dtype(dtype) == "F16":
        return "export with a wider --dtype (bfloat16, float32)"
    return "look at the adapters' numbers, the mixture weights and the delta_scale"


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Small tensors, or many blocks side by side: threads inside an operation would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def matrix_shape(base: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a base tensor viewed as a matrix: its first dimension, and all others together."""
    return base[0], math.prod(base[1:])


class Workspace:
    """Memory that is used again and again: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._spare: deque[bytearray] = deque()
        self._local = threading.local()

    def take(self, length: int) -> memoryview:
        """`length` bytes with anything in them."""
        try:
            buffer = self._spare.pop() if length <= BLOCK_BYTES else bytearray(length)
        except IndexError:
            buffer = bytearray(BLOCK_BYTES)
        return memoryview(buffer)[:length]

    def give_back(self, block: memoryview) -> None:
        """Take back what `take` gave, once it is written."""
        if isinstance(block.obj, bytearray) and len(block.obj) == BLOCK_BYTES:
            self._spare.append(block.obj)

    def own(self, name: str, length: int) -> memoryview:
        """This thread's buffer of that name, with anything in it."""
        buffer: bytearray | None = getattr(self._local, name, None)
        if buffer is None or len(buffer) < length:
            buffer = bytearray(length)
            setattr(self._local, name, buffer)
        return memoryview(buffer)[:length]

    def sum(self, elements: int) -> torch.Tensor:
        """This thread's float64 buffer."""
        import torch

        buffer: torch.Tensor | None = getattr(self._local, "sum", None)
        if buffer is None or buffer.numel() < elements:
            buffer = self._local.sum = torch.empty(max(elements, BLOCK_ELEMENTS), dtype=torch.float64)
        return buffer[:elements]
