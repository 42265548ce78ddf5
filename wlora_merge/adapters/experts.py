"""An adapter's factors for one tensor of the module tree -> factors for the tensors of the files that hold its rows.

A fused expert weight is one parameter [experts, out, in] of the tree. PEFT's `target_parameters` gives it lora_A
[r · experts, in], the experts one after another, and lora_B [out, r · experts], the experts innermost. Its delta weight is one
low-rank product for each expert, so each expert's rows, wherever the files keep them, have factors of their own. An adapter
that was trained on a model with a linear for each expert has them already, of gate_proj and up_proj apart or of both in one.

Source: `peft.tuners.lora.layer.ParamWrapper`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
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
_LINEAR = re.compile(
    r"(?P<experts>.+\.experts)\."
    r"((?P<number>\d+)\.(?P<one>gate_up_proj|gate_proj|up_proj|down_proj)|(?P<of_list>gate_up_proj|down_proj)s\.(?P<in_list>\d+))$"
)
_HALVES = {"gate_proj": 0, "up_proj": 1}
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
    factors, renamed = adapter.modules[name], renamed_parameter(name, tree)
    module = renamed.rpartition(".")[0] if renamed else tree.find_module(name.replace(WRAPPER, ""))
    expert = find_expert(name, tree) if module is None else None
    if module is None and expert is None:
        return []
    if factors.magnitude is not None:
        raise UnsupportedError(
            f"{adapter.where}: target module {name!r} is a DoRA, and the base's files hold its rows in other tensors, which is not "
            "folded yet: leave this adapter out."
        )
    if module is None or expert is not None:
        return _split_linear(adapter, name, expert, tree) if expert else []
    return _split_parameter(adapter, name, renamed or _tensor(adapter, name, module, tree), tree, renamed=bool(renamed))


def _split_parameter(adapter: Adapter, name: str, tensor: str, tree: ModuleTree, *, renamed: bool) -> list[PartFactors]:
    """The factors of every tensor of the files that holds rows of one parameter of the tree: of all experts, or of a module."""
    factors, shape = adapter.modules[name], tree.tensors.get(tensor, ())
    if len(shape) not in (2, 3):
        return []
    experts, rows = shape[0] if len(shape) == 3 else 1, shape[-2]
    r, is_transposed = factors.r // experts, tree.is_transposed(tensor.rpartition(".")[0])
    older = _is_older(adapter, name, tensor, shape, is_transposed=is_transposed)
    transposed, swapped = older and is_transposed, older and not is_transposed
    parameter = f"{name}.weight" if renamed else tensor
    scaling = adapter.scaling_of(parameter if adapter.config.get("target_parameters") else name, r)
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


def _is_older(adapter: Adapter, name: str, tensor: str, shape: tuple[int, ...], *, is_transposed: bool) -> bool:
    """Whether factors are those of a parameter [experts, in, out]: the model says so, or an earlier PEFT took it for that.

    Raises:
        AdapterError: they fit neither.
        UnsupportedError: they fit both, and nothing says which it is.
    """
    factors, (rows, cols) = adapter.modules[name], shape[-2:]
    experts = shape[0] if len(shape) == 3 else 1
    r = factors.r // experts * experts
    got = tuple(factors.stored_A.shape), tuple(factors.stored_B.shape)
    allowed = [False] if len(shape) == 2 else [True] if is_transposed else _orders(adapter)
    expected = {((r, rows), (cols, r)) if older else ((r, cols), (rows, r)): older for older in allowed}
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
    return expected[got]


def renamed_parameter(name: str, tree: ModuleTree) -> str | None:
    """The parameter of all experts that an earlier version of transformers has as the weight of a module of its own, `name`."""
    found, pattern = tree.rename(f"{name}.weight")
    known = pattern is None and len(tree.tensors.get(found, ())) == 3
    return found if known and tree.find_module(name) is None else None


@dataclass(frozen=True)
class Expert:
    """One expert's linear in a tensor [experts, ...] of the tree; `half` is 0 for gate_proj, 1 for up_proj in a gate_up_proj."""

    module: str
    tensor: str
    number: int
    half: int | None


def find_expert(name: str, tree: ModuleTree) -> Expert | None:
    """The expert whose own linear an adapter calls `name`, as `experts.3.up_proj` or unsloth's `experts.gate_up_projs.3`; None
    where the tree has no such experts in one tensor."""
    match = _LINEAR.match(name)
    module = tree.find_module(match["experts"]) if match else None
    if match is None or module is None:
        return None
    linear, number = match["one"] or match["of_list"], int(match["number"] or match["in_list"])
    tensor = f"{module}.{'down_proj' if linear == 'down_proj' else 'gate_up_proj'}"
    shape = tree.tensors.get(tensor, ())
    return Expert(module, tensor, number, _HALVES.get(linear)) if len(shape) == 3 and number < shape[0] else None


def _split_linear(adapter: Adapter, name: str, expert: Expert, tree: ModuleTree) -> list[PartFactors]:
    """The factors of every tensor of the files that holds rows of one expert's linear.

    Raises:
        AdapterError: the shapes do not fit.
        UnsupportedError: the model does not say which way its experts lie, or in which order gate_proj and up_proj.
    """
    factors, owner = adapter.modules[name], tree.modules[expert.module]
    shape = tree.tensors[expert.tensor]
    (r, cols), out = factors.stored_A.shape, factors.stored_B.shape[0] * (1 if expert.half is None else 2)
    told = getattr(owner, "is_transposed", None)
    fits = [t for t in ([False, True] if told is None else [told]) if shape[1:] == ((cols, out) if t else (out, cols))]
    if not fits:
        raise AdapterError(
            f"{adapter.where}: target module {name!r}: lora_A {list(factors.stored_A.shape)} and lora_B "
            f"{list(factors.stored_B.shape)} do not fit an expert of {expert.tensor!r} {list(shape)} of the base model: give the "
            "base that it was trained on."
        )
    joined = getattr(owner, "is_concatenated", None)
    if len(fits) > 1 or (expert.half is not None and joined is None):
        raise UnsupportedError(
            f"{adapter.where}: target module {name!r} is an expert's own linear, and {type(owner).__name__} of transformers, which "
            f"has {expert.tensor!r} {list(shape)} for all experts, does not say how that lies in it: leave this adapter out."
        )
    spread = None
    if expert.half is not None:
        spread = range(expert.half * out // 2, (expert.half + 1) * out // 2) if joined else range(expert.half, out, 2)
    scaled = replace(factors, scaling=adapter.scaling_of(name, r))
    layout = Layout.CONV1D if fits[0] else Layout.LINEAR
    return [
        PartFactors(
            part.entry, part.start, len(part.rows), layout,
            replace(scaled, slice=Slice(0, 1, part.rows % shape[1], fits[0], spread=spread, out=out)),
        )
        for part in _parts_by_expert(tree, expert.tensor).get(expert.number, ())
        if fits[0] or spread is None or _meets(part, spread, shape[1])
    ]  # fmt: skip


@lru_cache(maxsize=4)  # a file names the experts of one tensor one after another
def _parts_by_expert(tree: ModuleTree, tensor: str) -> dict[int, list[Part]]:
    found: dict[int, list[Part]] = {}
    for whole in tree.parts(tensor):
        for number, part in _by_expert(whole, tree.tensors[tensor][-2]):
            found.setdefault(number, []).append(part)
    return found


def _meets(part: Part, spread: range, rows: int) -> bool:
    """Whether a part has any of the rows that a linear's factors are spread to."""
    return any(row in spread for row in (part.rows % rows).tolist())


def _orders(adapter: Adapter) -> list[bool]:
    """Whether the PEFT that wrote an adapter takes expert weights [experts, out, in] for [experts, in, out], as it did until 0.18.

    It may be both: where its version is not known, and of a development version between them.

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
