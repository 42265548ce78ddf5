"""An export's outputs against those of the unmerged mixture: how far they may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import DTYPES
from ..errors import VerifyError
from ..io.safetensors_file import TORCH_NAMES, read_header
from .probe import difference_of

if TYPE_CHECKING:
    import torch

TOLERANCE = {"F32": 1e-4, "F16": 5e-2, "BF16": 1e-1, "F64": 1e-4}
"""Largest difference of an output allowed, relative to the largest output: rounding of the weights, amplified by the layers."""
TRUNCATION = 4.0
"""Share of the adapters' effect on the outputs that a truncated LoRA may lose, per share of the delta weights' norm that it lost:
to first order 1 on average; up to 2.6 was seen on tiny models, where little averages out."""


@dataclass
class Checked:
    """What was checked and what was found; `skipped` names each check that could not be made, with the reason.

    `largest_difference` of the outputs and the `tolerance` that it was held to are relative to the largest output.
    """

    files: int = 0
    done: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    largest_difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Tolerance:
    """How much outputs may differ, relative to the largest, and `why`; `exact` where nothing but float32's own rounding may."""

    value: float
    why: str
    exact: bool


def tolerance_of(folder: Path, manifest: Mapping[str, Any], effect: float) -> Tolerance:
    """How much an export's outputs may differ from its mixture's.

    Args:
        effect: how much the adapters change the outputs, relative to the largest. In float32 and of a LoRA, where rounding is small,
            half of it is too much: an export that lost an adapter must not pass because its adapters do little on the probe. A LoRA
            of a low rank may lose of the effect `TRUNCATION` times the share that its report says it lost of the delta weights.
    """
    dtype = max(_dtypes(folder, manifest), key=lambda name: TOLERANCE[name])
    exact = TOLERANCE[dtype] == TOLERANCE["F32"]
    small = exact or manifest["format"] == "lora"  # whose rounding is as small as the effect is
    allowed = min(TOLERANCE[dtype], max(effect / 2, 1e-6)) if small else TOLERANCE[dtype]
    report = manifest.get("report") or {}
    lost = min(float(report.get("relative_error", 0.0)), 1.0)
    if lost > 1e-6:
        why = f"rank {report.get('r')} keeps {1 - lost**2:.2%} of the energy"
        return Tolerance(TOLERANCE[dtype] + TRUNCATION * lost * effect, why, False)
    return Tolerance(allowed, TORCH_NAMES[dtype] if exact else f"rounding to {TORCH_NAMES[dtype]}", exact)


def _dtypes(folder: Path, manifest: Mapping[str, Any]) -> set[str]:
    """The floating dtypes of an export's weights, as safetensors names them."""
    if manifest["format"] == "onnx":
        asked = (manifest.get("options") or {}).get("dtype") or "float32"
        found = {DTYPES.get(str(name)) for name in (manifest.get("report") or {}).get("dtypes") or [asked]}
    else:
        files = folder.glob("*.safetensors")
        found = {entry.dtype for file in files for entry in read_header(file).entries.values()}
    return {name for name in found if name in TOLERANCE} or {"F32"}


def compare(
    got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float, where: str
) -> float:
    """The largest difference relative to the largest output.

    Raises:
        VerifyError: it is above the tolerance, or the outputs differ in kind.
    """
    if set(got) != set(expected) or not got:
        raise VerifyError(f"{where}: its outputs are {sorted(got)}, the mixture's {sorted(expected)}.")
    worst = 0.0
    for name, tensor in expected.items():
        difference = difference_of(got[name], tensor)
        if not difference <= tolerance:
            raise VerifyError(
                f"{where}: its {name} differ from the unmerged mixture's by {difference:.2e} of the largest, allowed "
                f"{tolerance:.0e}: this export does not compute its mixture; export again."
            )
        worst = max(worst, difference)
    return worst
