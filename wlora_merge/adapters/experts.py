"""An adapter's factors for one tensor of the module tree -> factors for the tensors of the files that hold its rows.

A fused expert weight is one parameter [experts, out, in] of the tree; PEFT's `target_parameters` gives it lora_A
[r · experts, in], the experts one after another, and lora_B [out, r · experts], the experts innermost. Its delta weight is one
low-rank product for each expert, so each expert's rows, wherever the files keep them, have factors of their own.

Source: `peft.tuners.lora.layer.ParamWrapper`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError
from ..io.safetensors_file import Entry, read_tensor
from ..models.module_tree import ModuleTree, Part
from ..text import short
from .adapter import Adapter
from .factors import Factors, Slice
from .layouts import Layout

if TYPE_CHECKING:
    import torch

WRAPPER = ".base_layer"
SWAPPED = (0, 19)
"""The version of PEFT from which on expert weights are [experts, out, in], unless the model says that they are transposed."""


@dataclass(frozen=True)
class PartFactors:
    """Factors of `count` rows of a tensor of the files, from row `start` on; `whole`: all rows of a module, in order."""

    entry: Entry
    start: int
    count: int
    layout: Layout
    factors: Factors
    whole: bool = False

    def read(self) -> torch.Tensor:
        """The rows themselves [count, cols], in the file's dtype."""
        return read_tensor(self.entry).reshape(-1, self.entry.shape[-1])[self.start : self.start + self.count]


def split_factors(adapter: Adapter, name: str, tree: ModuleTree) -> list[PartFactors]:
    """The factors of every tensor of the files that holds rows of one target module; empty where the tree has none.

    Args:
        adapter: the adapter.
        name: the target module as the adapter names it, with a `.base_layer` for each wrapper around PEFT's.
        tree: the module tree of the base.

    Raises:
        AdapterError: the shapes do not fit, or the config's target_parameters do not explain the wrappers.
        UnsupportedError: transformers makes the tensor by more than moving rows; a DoRA; a square expert weight of which the
            config does not say which PEFT wrote the factors.
    """
    factors, module = adapter.modules[name], tree.find_module(name.replace(WRAPPER, ""))
    if module is None:
        return []
    if factors.magnitude is not None:
        raise UnsupportedError(
            f"{adapter.where}: target module {name!r} is a DoRA, and the base's files hold its rows in other tensors, which is not "
            "folded yet: leave this adapter out."
        )
    tensor = _tensor(adapter, name, module, tree)
    shape = tree.tensors.get(tensor, ())
    if len(shape) not in (2, 3):
        return []
    experts, (rows, cols) = shape[0] if len(shape) == 3 else 1, shape[-2:]
    r = factors.r // experts
    got = tuple(factors.stored_A.shape), tuple(factors.stored_B.shape)
    allowed = [False] if len(shape) == 2 else [True] if tree.is_transposed(module) else _orders(adapter)
    expected = {
        ((r * experts, rows), (cols, r * experts)) if order else ((r * experts, cols), (rows, r * experts)): order
        for order in allowed
    }
    if got not in expected:
        wanted = " or ".join(f"{list(lora_A)} and {list(lora_B)}" for lora_A, lora_B in expected)
        raise AdapterError(
            f"{adapter.where}: target module {name!r}: lora_A {list(got[0])} and lora_B {list(got[1])} do not fit {tensor!r} "
            f"{list(shape)} of the base model, expected {wanted}{_written_by(adapter)}: give the base that it was trained on."
        )
    if len(allowed) > len(expected):
        raise UnsupportedError(
            f"{adapter.where}: target module {name!r}: {tensor!r} {list(shape)} is square, PEFT 0.18 and before store its factors "
            "transposed to later ones, and adapter_config.json does not say which wrote them: set its peft_version."
        )
    transposed = expected[got] and tree.is_transposed(module)
    swapped = expected[got] and not transposed
    scaling = adapter.scaling_of(tensor if adapter.config.get("target_parameters") else name, r)
    layout = Layout.CONV1D if transposed else Layout.LINEAR
    return [
        PartFactors(
            part.entry, part.start, len(part.rows), layout,
            replace(factors, scaling=scaling, slice=Slice(expert, experts, part.rows % rows, transposed, swapped)),
            whole=len(shape) == 2 and part.rows.tolist() == list(range(rows)),
        )
        for whole in tree.parts(tensor)
        for expert, part in _by_expert(whole, rows)
    ]  # fmt: skip


def _orders(adapter: Adapter) -> list[bool]:
    """Whether the PEFT that wrote an adapter takes expert weights [experts, out, in] for [experts, in, out], as it did until 0.18;
    both where its version is not known, and of a development version between them.

    Source: `peft.tuners.lora.layer.ParamWrapper.update_layer`.
    """
    match = re.match(r"(\d+)\.(\d+)(\.\d+)*($|@|\+|rc|\.post)", str(adapter.config.get("peft_version") or ""))
    if match is None:
        return [False, True]
    return [(int(match[1]), int(match[2])) < SWAPPED]


def _written_by(adapter: Adapter) -> str:
    version = adapter.config.get("peft_version")
    return f" of PEFT {short(version)}" if version else ""


def _tensor(adapter: Adapter, name: str, module: str, tree: ModuleTree) -> str:
    wrapped = tree.wrapped_parameters(module, adapter.config.get("target_parameters") or [])
    outer = name.replace(WRAPPER, "")
    wrappers = sum(other.replace(WRAPPER, "") == outer for other in adapter.modules)
    if not wrapped and wrappers == 1:
        return f"{module}.weight"
    if len(wrapped) != wrappers:
        raise AdapterError(
            f"{adapter.where}: target module {outer!r} has {wrappers} pairs of factors, and the config's target_parameters name "
            f"{len(wrapped)} of its parameters."
        )
    return f"{module}.{wrapped[-1 - name.count(WRAPPER)]}"


def _by_expert(part: Part, rows: int) -> Iterator[tuple[int, Part]]:
    """Cut a part where it passes from one expert to the next."""
    expert = part.rows // rows
    ends = ((expert[1:] != expert[:-1]).nonzero().flatten() + 1).tolist()
    for a, b in zip([0, *ends], [*ends, len(expert)], strict=True):
        yield int(expert[a]), Part(part.entry, part.start + a, part.rows[a:b], part.width)
