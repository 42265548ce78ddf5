"""The lora format: one PEFT adapter, which PEFT and vLLM load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.deltas import ModuleDelta
from ..errors import UnsupportedError, VerifyError
from ..export_options import ExportOptions
from ..io.records import Record
from ..io.tensors import matrix_shape
from ..mixture.inputs import Inputs
from ..models.base_model import BaseModel
from ..models.loading import bounded, library_errors, quiet
from .carried import carried_bytes, copy_carried
from .format import Format, Measures, Plan, Written, measured, refuse_added
from .head import read_stored_head
from .lora import check_loads, modules_of_lora, tree_of_lora, write_lora
from .pooling_layer import VECTORS
from .probe import outputs_of
from .serving import check_rank
from .unmerged import head_options, load_checked, unused_by
from .verify_files import check_adapter
from .verify_outputs import Tolerance, stored_dtypes, tolerance_of_lora
from .verify_weights import check_lora

if TYPE_CHECKING:
    import torch

    from .manifest import Manifest


class ModuleMeasures(Record):
    """What truncation lost of one module's delta weight: Frobenius norm of what is lost over that of the whole.

    Attributes:
        relative_error: 0 where nothing is lost.
    """

    relative_error: float


class LoraMeasures(Measures):
    """The uniform rank, and what it lost: over all modules together, and of each.

    Attributes:
        r: the uniform rank.
        relative_error: Frobenius norm of what is lost over that of the whole, 0 to 1.
        energy_kept: share of the squared norm that is kept, 0 to 1.
        modules: module -> what it lost.
    """

    r: int
    relative_error: float
    energy_kept: float
    modules: dict[str, ModuleMeasures]

    @property
    def rank(self) -> int:
        """The uniform r."""
        return self.r

    def card(self) -> str:
        """The rank, and what it keeps."""
        return (
            f"One LoRA of r = lora_alpha = {self.r}: relative error {self.relative_error:.2e} against the mixture, "
            f"{self.energy_kept:.4%} of its squared norm kept."
        )

    def line(self, asked: ExportOptions) -> str:
        """The rank, and what it keeps."""
        return f"r = {self.r}, relative error {self.relative_error:.2e}, energy kept {self.energy_kept:.4%}."


@dataclass
class LoraPlan(Plan):
    """What is needed to write one LoRA."""

    inputs: Inputs
    asked: ExportOptions

    def __post_init__(self) -> None:
        """Sum up the bytes."""
        self.nbytes = lora_bytes(self.inputs, self.asked.rank) + carried_bytes(self.inputs.base)

    def write(self, out: Path) -> Written:
        """Write the adapter, and what the base carries but for its config, which breaks the loading of adapters."""
        inputs, asked = self.inputs, self.asked
        report = write_lora(
            inputs.mixture,
            inputs.base,
            inputs.deltas,
            out,
            base_name=asked.base_name or inputs.base.source.name,
            rank=asked.rank,
            energy=asked.energy,
            dtype=asked.dtype or "float32",
        )
        check_loads(out, inputs.base, inputs.mixture.task, head_options(inputs.mixture.config))
        copy_carried(inputs.base, out, config=False)
        check_rank(report.r, server=asked.server, max_rank=asked.max_rank, exact=asked.rank is None)
        whole = report.overall
        modules = {name: ModuleMeasures(relative_error=m.relative_error) for name, m in report.modules.items()}
        return Written(
            LoraMeasures(
                r=report.r,
                relative_error=whole.relative_error,
                energy_kept=whole.kept / whole.energy if whole.energy else 1.0,
                modules=modules,
            )
        )


def lora_bytes(inputs: Inputs, rank: int | None) -> int:
    """Bytes of one float32 LoRA of rank `rank`, or of the largest R of any module."""
    stacks = [delta for delta in inputs.deltas if isinstance(delta, ModuleDelta)]
    r = rank or max((delta.R for delta in stacks), default=0)
    return sum(4 * r * sum(matrix_shape(delta.shape)) for delta in stacks)


class LoraFormat(Format):
    """One adapter over the same base."""

    name = "lora"
    packages = ("torch", "safetensors")
    library = "peft"
    summary = "as one LoRA adapter"
    is_adapter = True

    def plan(self, inputs: Inputs, asked: ExportOptions) -> Plan:
        """Its rank is known when it is written."""
        refuse_added(inputs, "no LoRA over that base can express", "dense")
        if inputs.mixture.pooling is not None:
            raise UnsupportedError(
                f"{inputs.base.folder}: the mixture's head sees {VECTORS[inputs.mixture.pooling]}, which no LoRA adds to a base: "
                "export with --format dense or --format onnx, or fit with --pooling model."
            )
        return LoraPlan(inputs, asked)

    def measures_of(self, table: Mapping[str, Any]) -> type[Measures]:
        """Of one kind."""
        return LoraMeasures

    def check_structure(self, folder: Path, manifest: Manifest) -> None:
        """Config and headers of an adapter of one rank."""
        check_adapter(folder)

    def read_head(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """Among its `modules_to_save`."""
        return read_stored_head(folder, manifest.mixture.head, base)

    def check_weights(self, folder: Path, manifest: Manifest, found: Inputs) -> list[str]:
        """Its factors against the mixture's own."""
        modules = measured(LoraMeasures, manifest).modules
        lost = check_lora(folder, {name: module.relative_error for name, module in modules.items()}, found)
        return [f"its factors are the mixture's, but for {lost:.2e} of the delta weights' norm, as its report says"]

    def outputs(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """As PEFT loads it over its base."""
        from peft import PeftModel

        mixture = manifest.mixture
        tree = tree_of_lora(base, mixture.task, modules_of_lora(folder)) if mixture.task is None else None
        model = load_checked(
            base.folder,
            mixture.task,
            cls=type(tree.model) if tree is not None else None,
            head=mixture.head,
            unused=unused_by(mixture),
            **head_options(mixture.config),
        )
        with quiet(), library_errors(f"{folder}: PEFT cannot load it", VerifyError), bounded(folder, VerifyError):
            loaded = PeftModel.from_pretrained(model, folder).eval()
        return outputs_of(loaded, manifest.probe)

    def tolerance(self, folder: Path, manifest: Manifest, effect: float) -> Tolerance:
        """Rounding of its factors, and what its rank lost."""
        report = measured(LoraMeasures, manifest)
        return tolerance_of_lora(stored_dtypes(folder), effect, report.relative_error, report.r)
