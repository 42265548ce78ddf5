"""What an export format is: planned, written, described and verified behind one interface.

A format is one object with all facts about it; no other file asks for its name. `formats` has the list of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..distributed import Team
from ..errors import UnsupportedError
from ..export_options import ExportOptions
from ..io.records import Record
from ..mixture.inputs import Inputs
from ..models.base_model import BaseModel
from .verify_outputs import Checked, Tolerance, expected_outputs, record_difference

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .manifest import Manifest


class Measures(Record):
    """What was measured while an export was written, and what people are told of it."""

    @property
    def rank(self) -> int | None:
        """Of a LoRA, its uniform r."""
        return None

    def card(self) -> str:
        """What the model card says; empty where there is nothing to say."""
        return ""

    def line(self, asked: ExportOptions) -> str:
        """What stands behind `Wrote ...` on the command line; empty where there is nothing to say."""
        return ""

    def table(self) -> dict[str, Any]:
        """What the manifest and `--json` have."""
        return self.model_dump(exclude_none=True)


@dataclass(frozen=True)
class Written:
    """What was measured of an export that is written, and the sha256 of its files that are known by then, by name."""

    measures: Measures
    digests: Mapping[str, str] = field(default_factory=dict)


class Plan(ABC):
    """What will be written, from headers alone: its bytes on disk, and a paragraph of the card on what is special about it."""

    nbytes: int
    note: str = ""
    names: Mapping[str, str | None] = MappingProxyType({})
    """Tensor as the base calls it -> as the files do, where they call it otherwise; None for one that they lack."""

    def write_shared(self, out: Path, ranks: Team) -> Mapping[str, str]:
        """Write what every rank has a share of; file name -> sha256 of it."""
        return {}

    @abstractmethod
    def write(self, out: Path) -> Written:
        """Write the rest, on one rank."""


class Format(ABC):
    """A format: facts, and how to plan, describe and verify an export of it.

    Attributes:
        name: as on the command line.
        packages: those whose versions decide the bytes.
        library: what the hub calls the library that loads it.
        is_adapter: whether it needs its base to be loaded; else it is a whole model.
        keeps_tensors: whether its files have the base's tensors.
        needs_task: whether its model is made for one task.
        gives_all_outputs: whether it gives each output that the model gives.
        summary: what became of the adapters, for the card.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    library: ClassVar[str]
    summary: ClassVar[str]
    is_adapter: ClassVar[bool] = False
    keeps_tensors: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False
    gives_all_outputs: ClassVar[bool] = True

    def check_base(self, base: BaseModel) -> None:
        """Refuse a base of which no such export can be written, before anything else of a mixture is read.

        Raises:
            UnsupportedError: with what to give instead.
        """
        return

    def prepared(self, inputs: Inputs, asked: ExportOptions) -> Inputs:
        """The inputs with what this format needs and the mixture leaves open.

        Raises:
            WloraMergeError: it is not told anywhere.
        """
        return inputs

    @abstractmethod
    def plan(self, inputs: Inputs, asked: ExportOptions) -> Plan:
        """Lay out what to write.

        Raises:
            WloraMergeError: these inputs, or these options with them, do not allow it.
        """

    # ------------------------------------------------------------------------------------------------ described

    @abstractmethod
    def measures_of(self, table: Mapping[str, Any]) -> type[Measures]:
        """The kind of record that a manifest's `report` is."""

    # ------------------------------------------------------------------------------------------------- verified

    @abstractmethod
    def check_structure(self, folder: Path, manifest: Manifest) -> None:
        """Compare what its config and index say with what its headers say; nothing is loaded.

        Raises:
            WloraMergeError: they disagree.
        """

    def check_loads(self, folder: Path, manifest: Manifest) -> list[str]:
        """Load it without its inputs, where that says something; what was found, in words."""
        return []

    @abstractmethod
    def read_head(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """The trained head out of its own files, under its parameter names.

        Raises:
            VerifyError: it is not there.
            UnsupportedError: it cannot be read back.
        """

    def check_weights(self, folder: Path, manifest: Manifest, found: Inputs) -> list[str]:
        """Compare its weights with the mixture's own; what was found, in words.

        Raises:
            VerifyError: they are others.
        """
        return []

    def unmerged(self, model: nn.Module, folder: Path, manifest: Manifest) -> nn.Module:
        """The unmerged mixture with what an export computes beside its model."""
        return model

    @abstractmethod
    def outputs(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """Its own outputs on the probe, by the libraries of its kind."""

    @abstractmethod
    def tolerance(self, folder: Path, manifest: Manifest, effect: float) -> Tolerance:
        """How much its outputs may differ from its mixture's; `effect` is what the adapters change, relative to the largest."""

    def check_outputs(
        self, folder: Path, manifest: Manifest, model: nn.Module, base: BaseModel, checked: Checked
    ) -> None:
        """Compare its outputs with those of the unmerged mixture `model`, which loses its adapters; the result is in `checked`.

        Raises:
            VerifyError: they differ by more than rounding.
        """
        expected, effect = expected_outputs(model, manifest.probe)
        got = self.outputs(folder, manifest, base)
        wanted = expected if self.gives_all_outputs else {name: expected[name] for name in expected if name in got}
        record_difference(str(folder), got, wanted, self.tolerance(folder, manifest, effect), checked)


M = TypeVar("M", bound=Measures)


def measured(kind: type[M], manifest: Manifest) -> M:
    """A manifest's measures, as the record that its format has for them."""
    if not isinstance(manifest.report, kind):
        raise TypeError(f"the report of a {manifest.format} export is a {type(manifest.report).__name__}")
    return manifest.report


def refuse_added(inputs: Inputs, why: str, instead: str) -> None:
    """Refuse a mixture with a vocabulary of another size, for whose rows the export has no place."""
    if inputs.base.vocabulary is not None:
        raise UnsupportedError(
            f"--resize-vocab {inputs.mixture.resize_vocab}: the model has another vocabulary than its base, which {why}: export with "
            f"--format {instead}."
        )
