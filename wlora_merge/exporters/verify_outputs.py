"""An export's outputs against those of the unmerged mixture: how far they may differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError, VerifyError
from ..io.safetensors_file import TORCH_NAMES, read_header
from ..io.tensors import refuse_not_finite
from .probe import difference_of, outputs_of

if TYPE_CHECKING:
    import torch
    from torch import nn

TOLERANCE = {"F32": 1e-4, "F16": 5e-2, "BF16": 1e-1, "F64": 1e-4}
"""Largest difference of an output allowed, relative to the largest output: rounding of the weights, amplified by the layers."""
POOLED_ROUNDING = 1e-5
"""The same of float32 sums in another order, where a head shifts its vector by a number larger than any in it."""
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


def tolerance_of(dtypes: Collection[str], effect: float, *, pooled: bool = False) -> Tolerance:
    """How much an export's outputs may differ from its mixture's.

    Args:
        dtypes: of its weights, as safetensors names them; float32 where none of them is known.
        effect: how much the adapters change the outputs, relative to the largest. In float32, where rounding is small, half of it is
            too much: an export that lost an adapter must not pass because its adapters do little on the probe.
        pooled: its head sees pooled tokens, which an export computes in another way than the mixture does.
    """
    dtype = _roundest(dtypes)
    if TOLERANCE[dtype] == TOLERANCE["F32"]:
        least = POOLED_ROUNDING if pooled else 1e-6
        return Tolerance(_small(dtype, effect, least), TORCH_NAMES[dtype], True)
    return Tolerance(TOLERANCE[dtype], f"rounding to {TORCH_NAMES[dtype]}", False)


def tolerance_of_lora(dtypes: Collection[str], effect: float, lost: float, r: int) -> Tolerance:
    """The same of a LoRA, whose rounding is as small as the effect is, whatever its dtype.

    Args:
        dtypes: safetensors dtypes of the written tensors.
        effect: how far the adapters move the outputs, relative to the largest.
        lost: the share of the delta weights' norm that its rank `r` lost, as its report says; of the effect, the outputs may lose
            `TRUNCATION` times as much.
        r: the rank.
    """
    dtype, lost = _roundest(dtypes), min(lost, 1.0)
    if lost > 1e-6:
        why = f"rank {r} keeps {1 - lost**2:.2%} of the energy"
        return Tolerance(TOLERANCE[dtype] + TRUNCATION * lost * effect, why, False)
    exact = tolerance_of([dtype], effect)
    return Tolerance(_small(dtype, effect), exact.why, exact.exact)


def _roundest(dtypes: Collection[str]) -> str:
    return max([name for name in dtypes if name in TOLERANCE] or ["F32"], key=lambda name: TOLERANCE[name])


def _small(dtype: str, effect: float, least: float = 1e-6) -> float:
    return min(TOLERANCE[dtype], max(effect / 2, least))


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes of the safetensors in a folder."""
    return {entry.dtype for file in folder.glob("*.safetensors") for entry in read_header(file).entries.values()}


def expected_outputs(model: nn.Module, probe: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], float]:
    """Outputs of the unmerged mixture, which loses its adapters, and how much they change them, relative to the largest.

    Raises:
        UnsupportedError: the unmerged mixture does not run on the probe.
        NotFiniteError: outputs with or without the adapters are NaN or infinite.
    """
    from ..mixture.attachment import attachment_of

    expected = outputs_of(model, probe, UnsupportedError)
    attachment_of(model).delta_scale = 0.0  # gives the base model
    without = outputs_of(model, probe, UnsupportedError)
    for who, outputs in (("the unmerged mixture", expected), ("the base model", without)):
        for name, tensor in outputs.items():
            refuse_not_finite(
                tensor, f"output {name!r} of {who} on the probe", "look at its weights and the delta_scale"
            )
    return expected, max(difference_of(without[name], tensor) for name, tensor in expected.items())


def record_difference(
    where: str,
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tolerance: Tolerance,
    checked: Checked,
) -> None:
    """Compare outputs, and say in `checked` how near they are.

    Raises:
        VerifyError: they are not near enough.
    """
    checked.tolerance = tolerance.value
    checked.largest_difference = compare(got, expected, tolerance.value, where)
    checked.done.append(
        f"outputs {'equal' if tolerance.exact else 'agree with'} the unmerged mixture's: off by {checked.largest_difference:.1e} "
        f"of the largest, at most {tolerance.value:.1e} expected ({tolerance.why})"
    )


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
