"""Several processes on one job, as torchrun or `accelerate launch` starts them: who am I, and how do we tell each other.

A rank that fails tells the others why; one that dies takes the job down with it. Without a launcher there is one rank, and
nothing of torch.distributed is touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import WloraMergeError
from .text import first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process among `size` of them; rank 0 leads."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True for the one process that owns the output and speaks to the user."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """What rank 0 gives, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        _spoken(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place; float32, one message, over the CPU."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.detach().float().cpu().reshape(-1) for tensor in tensors])
        _spoken(lambda: dist.all_reduce(flat))
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Run each rank's own part and give all results, in rank order, on every rank.

        Raises:
            WloraMergeError: the part of this rank or of another failed, or another died.
        """
        if self.size == 1:
            return [work()]
        import torch.distributed as dist

        try:
            mine: tuple[str, Any] = ("done", work())
        except WloraMergeError as error:
            mine = ("failed", str(error))
        parts: list[Any] = [None] * self.size
        _spoken(lambda: dist.all_gather_object(parts, mine))
        for rank, (state, value) in enumerate(parts):
            if state == "failed":
                raise WloraMergeError(value if rank == self.rank else f"rank {rank}: {value}")
        return [value for _, value in parts]


def _spoken(call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:  # gloo: the connection to a rank that died is closed
        raise WloraMergeError("another rank of this job died: nothing was written; run again.") from error


def is_leader() -> bool:
    """True for a process that no launcher started, or for its rank 0."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


@contextmanager
def team() -> Iterator[Team]:
    """The processes that a launcher started, joined over gloo (tensors on GPUs over NCCL); alone without one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Team()
        return
    import torch
    import torch.distributed as dist

    joined_here = not dist.is_initialized()
    if joined_here:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        except (ValueError, RuntimeError) as error:
            raise WloraMergeError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the processes cannot be joined ({first_line(error)}): start "
                "with torchrun or accelerate launch, or unset it."
            ) from error
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        if joined_here:
            dist.destroy_process_group()
