"""An export's weights against the mixture: what no adapter changes byte for byte, the rest folded again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import WEIGHTS_FILE, load_adapters
from ..adapters.deltas import ModuleDelta
from ..adapters.stacking import stack
from ..adapters.targets import modules_of, tensors_of
from ..errors import VerifyError, WloraMergeError, WloraMergeWarning
from ..io.safetensors_file import Entry, read_header, read_tensor, torch_dtype
from ..mixture.combination import CombinedFold
from ..mixture.fold import fold_factors
from ..models.base_model import BaseModel, open_base
from ..progress import Meter

if TYPE_CHECKING:
    from ..mixture.inputs import Inputs
    from ..mixture.mixture import Mixture
    from .dense import OutputFile, Piece

LORA_ROUNDING = {"F32": 1e-3, "BF16": 3e-2, "F16": 3e-2}
"""What rounding its factors may cost a module of a LoRA, relative to its delta weight; small numbers of F16 have few bits."""
SUBNORMAL = 2.0**-24
"""Twice what rounding may change the smallest numbers of float16 by, however small they are."""


def check_untouched(folder: Path, planned: Sequence[OutputFile]) -> int:
    """Compare a dense export with what its writer would write: names, dtypes, shapes, and what no adapter changes byte for byte.

    Args:
        folder: the export.
        planned: from `dense.plan`.

    Returns:
        The number of tensors compared by their bytes.

    Raises:
        VerifyError: a tensor that is missing, of another shape or dtype, or changed though no adapter changes it.
    """
    found = dict(open_base(folder).entries)
    count = 0
    for piece in (p for file in planned for p in file.pieces):
        got = found.pop(piece.name, None)
        if got is None or (got.dtype, got.shape) != (piece.dtype, piece.shape):
            what = f"is {got.dtype} {list(got.shape)}" if got else "is missing"
            raise VerifyError(
                f"{folder}: tensor {piece.name!r} {what}, expected {piece.dtype} {list(piece.shape)}: export again."
            )
        if piece.untouched and piece.source is not None:
            count += 1
            if not _same_bytes(got, piece.source):
                raise VerifyError(
                    f"{got.file}: tensor {piece.name!r} is not the base's, though no adapter changes it: export again."
                )
    if found:
        raise VerifyError(f"{folder}: tensor {min(found)!r} is neither the base's nor of the head: export again.")
    return count


def check_folded(folder: Path, planned: Sequence[OutputFile], mixture: Mixture) -> int:
    """Fold what adapters change again, tensor by tensor, and compare a dense export with it: rounding to 16 bits hides in a model's
    outputs what an adapter does, but not in its weights.

    Args:
        folder: the export.
        planned: from `dense.plan`.
        mixture: the mixture.

    Returns:
        The number of tensors compared.

    Raises:
        VerifyError: a number that is off by more than the last bit, in which another machine's float64 sums may differ.
    """
    from ..io.tensors import Workspace
    from .stream import differing

    found, space = open_base(folder).entries, Workspace()
    pieces = [p for file in planned for p in file.pieces]
    pieces = [p for p in pieces if p.source is not None and p.tensor is None and not p.untouched]
    meter = Meter("folding again", sum(p.nbytes for p in pieces), len(pieces), "tensors")
    for piece in pieces:
        off = differing(piece, mixture, space, found[piece.name])
        if off:
            raise VerifyError(
                f"{found[piece.name].file}: tensor {piece.name!r} is not the mixture's in {off} of its {math.prod(piece.shape)} "
                "numbers: export again."
            )
        meter.add(piece.nbytes, 1)
    return len(pieces)


def check_added(folder: Path, pieces: Sequence[Piece]) -> None:
    """Compare tensors that neither the base nor the head has with what they must hold.

    Raises:
        VerifyError: another number.
    """
    import torch

    found = open_base(folder).entries
    for piece in pieces:
        got = found[piece.name]
        if piece.tensor is not None and not torch.equal(read_tensor(got), piece.tensor.to(torch_dtype(piece.dtype))):
            raise VerifyError(
                f"{got.file}: tensor {piece.name!r} is not that of the layer that pools the tokens: export again."
            )


def check_lora(folder: Path, told: Mapping[str, float], found: Inputs) -> float:
    """Compare the factors of a LoRA export with the mixture's own, module by module: ||Δ - lora_B @ lora_A|| / ||Δ||.

    Args:
        folder: the export folder.
        told: module -> what its report says that it lost, relative to its delta weight.
        found: the mixture, its base and its adapters.

    Returns:
        The same over all modules together: what its rank and its dtype lost.

    Raises:
        VerifyError: a module that lost more than its report and its dtype say.
    """
    file, wanted = folder / WEIGHTS_FILE, {d.label: d for d in found.deltas if isinstance(d, ModuleDelta)}
    energy = {module: _energy(found.mixture, delta) for module, delta in wanted.items()}
    if not any(energy.values()):
        return 0.0
    written = _written_lora(folder, found.base)
    written = {m: delta for m, delta in written.items() if m in wanted or not all(f.is_zero for f in delta.factors)}
    if set(written) != set(wanted):
        raise VerifyError(f"{file}: it changes module {min(set(written) ^ set(wanted))!r}, or lacks it: export again.")
    dtypes = [entry.dtype for entry in read_header(file).entries.values() if "lora_" in entry.name]
    rounding = max(LORA_ROUNDING.get(dtype, LORA_ROUNDING["F32"]) for dtype in dtypes)
    apart = {}
    for module, delta in wanted.items():
        other, lost = written[module], told.get(module, 0.0)
        apart[module] = _energy(found.mixture, delta, other)
        more = apart[module] - lost**2 * energy[module]  # what truncation drops is orthogonal to what it keeps
        if not more <= (rounding * energy[module] ** 0.5 + _tiny(other)) ** 2:
            raise VerifyError(
                f"{file}: module {module!r} is off from its delta weight by {(apart[module] / (energy[module] or 1)) ** 0.5:.2e} "
                f"of it, expected {lost:.2e}: export again."
            )
    return float((sum(apart.values()) / sum(energy.values())) ** 0.5)


def _written_lora(folder: Path, base: BaseModel) -> dict[str, ModuleDelta]:
    """The modules that a LoRA export changes, and how."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WloraMergeWarning)  # of experts that do not change
            deltas = stack(
                load_adapters([("export", folder)]), modules_of(base), tensors_of(base), model_type=base.model_type
            )
    except WloraMergeError as error:
        raise VerifyError(f"{error} Export again.") from error
    return {delta.label: delta for delta in deltas if isinstance(delta, ModuleDelta)}


def _energy(mixture: Mixture, delta: ModuleDelta, other: ModuleDelta | None = None) -> float:
    """||Δ - what the other does||² of a module; of a weighted sum no [out, in] matrix is formed."""
    import torch

    from .lora import energy_of

    fold = mixture.fold_of(delta)
    if isinstance(fold, CombinedFold):
        dense = fold.dense()
        if other is not None:
            left, right = fold_factors(other, other.scaling)
            dense -= left @ right
        return float(dense.square().sum())
    lora_A, lora_B = delta.lora_A.double(), delta.lora_B.double() * mixture.gains_of(delta)
    if other is not None:
        lora_A = torch.cat([lora_A, other.lora_A.double()])
        lora_B = torch.cat([lora_B, -other.lora_B.double() * other.scaling.double()], dim=1)
    return max(0.0, energy_of(lora_A, lora_B))


def _tiny(delta: ModuleDelta) -> float:
    """What rounding the smallest numbers of a module's factors may change it by."""
    numbers = delta.lora_A.numel() + delta.lora_B.numel()
    return float(SUBNORMAL * numbers**0.5 * max(delta.lora_A.norm(), delta.lora_B.norm()))


def _same_bytes(one: Entry, other: Entry) -> bool:
    if (one.dtype, one.nbytes) != (other.dtype, other.nbytes):
        return False
    with open(one.file, "rb") as a, open(other.file, "rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.nbytes
        while left:
            step = min(left, 1 << 22)
            if a.read(step) != b.read(step):
                return False
            left -= step
    return True
