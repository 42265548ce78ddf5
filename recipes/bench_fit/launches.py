"""How many kernels a training step would launch on a GPU, counted on a CPU by torch's profiler.

A step is that of `speed.py`: one forward and backward pass. Counted are the operations of ATen that call no other. Views and
allocations launch nothing; a product or a reduction counts once, whatever it calls on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from speed import make_adapters, make_step
from torch.profiler import ProfilerActivity, profile

ONCE = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "sum", "mean", "index_put_", "_index_put_impl_",
}  # fmt: skip
NOTHING = {
    "view", "view_as", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "t", "T", "mT",
    "numpy_T", "matrix_H", "transpose", "permute", "expand", "expand_as", "as_strided", "alias", "detach",
    "detach_", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "squeeze",
    "unsqueeze", "diagonal", "movedim", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "resize_", "set_", "to", "contiguous", "lift_fresh", "result_type", "item",
    "_local_scalar_dense", "is_nonzero", "resolve_conj", "resolve_neg", "conj",
}  # fmt: skip


def launches(step: Callable[[], None]) -> int:
    """Kernels of a step that was taken once before."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return sum(1 for event in found.events() if event.cpu_parent is None for _ in _kernels(event))


def _kernels(event: Any) -> Iterator[str]:
    """Names of the operations under an event that launch something."""
    name = event.name.removeprefix("aten::")
    if event.name.startswith("aten::") and name in ONCE:
        yield name
        return
    inside = [kernel for child in event.cpu_children for kernel in _kernels(child)]
    if not inside and event.name.startswith("aten::") and name not in NOTHING:
        inside = [name]
    yield from inside


def launch_rows(base: Path, work: Path, counts: tuple[int, ...] = (4, 16)) -> list[tuple[str, ...]]:
    """Rows of the table: adapters, dtype, launches of the base's step, of the attached model's, their quotient."""
    rows = []
    for count in counts:
        adapters = make_adapters(base, work / "adapters", count)
        for dtype in (torch.float32, torch.bfloat16):
            floor, stacked = (
                launches(make_step(what, base, adapters, 1, dtype, "cpu")) for what in ("floor", "stacked")
            )
            kind = str(dtype).removeprefix("torch.")
            rows.append((str(count), kind, f"{floor:,}", f"{stacked:,}", f"{stacked / floor:.2f}"))
    return rows
