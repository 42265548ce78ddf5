"""The dense format: a folder of safetensors, as `save_pretrained` gives it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import DTYPES
from ..distributed import Team
from ..errors import VerifyError, WloraMergeWarning
from ..export_options import ExportOptions
from ..io.tensors import all_finite
from ..mixture.inputs import Inputs
from ..models.base_model import BaseModel, open_base, refuse_quantized
from ..models.tied_embeddings import Untied
from .carried import carried_bytes, write_beside
from .dense import OutputFile, folder_bytes, plan, renamed
from .format import Format, Measures, Plan, Written
from .head import left_out_note, names_with_head, read_stored_head
from .pooling_layer import PoolingLayer, last_layer, pooling_layer, refuse_coarse_shift
from .probe import outputs_of
from .stream import write_files
from .unmerged import load_checked, unused_by
from .verify_files import check_checkpoint
from .verify_outputs import Checked, Tolerance, stored_dtypes, tolerance_of
from .verify_weights import check_added, check_folded, check_untouched

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .manifest import Manifest


class DenseMeasures(Measures):
    """Which tensors are two in the export and one in the base, as adapters change one of the two.

    Attributes:
        untied: tensors that are two here and one in the base.
    """

    untied: list[str] | None = None


@dataclass
class DensePlan(Plan):
    """The files, their dtype as `--dtype` names it (None: the base's own), and their layer that pools, if they have one."""

    inputs: Inputs
    files: list[OutputFile]
    dtype: str | None
    layer: PoolingLayer | None = None
    names: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sum up the bytes, and say what is special."""
        self.nbytes = folder_bytes(self.files) + carried_bytes(self.inputs.base)
        architecture = str((self.inputs.mixture.config.get("architectures") or ["model with this head"])[0])
        notes = (
            untied_note(self.inputs.untied),
            self.layer.note if self.layer else "",
            left_out_note(self.names, architecture),
        )
        self.note = " ".join(filter(None, notes))

    def write_shared(self, out: Path, ranks: Team) -> Mapping[str, str]:
        """Write the weight files; with several ranks each takes every n-th of them."""
        mine = self.files[ranks.rank :: ranks.size]
        parts = ranks.gather(lambda: write_files(mine, out, self.inputs.mixture))
        return {name: digest for part in parts for name, digest in part.items()}

    def write(self, out: Path) -> Written:
        """Write index, config, and every file that the base carries."""
        config = self.layer.config if self.layer else {}
        write_beside(self.inputs, self.files, out, self.dtype, config)
        return Written(DenseMeasures(untied=sorted(self.inputs.untied.pairs) or None))


def plan_dense(
    inputs: Inputs, dtype: str | None, max_shard_bytes: int | None = None, layer: PoolingLayer | None = None
) -> DensePlan:
    """Lay out the files of a dense folder; see `dense.plan`.

    Args:
        inputs: the mixture, its base and its adapters.
        dtype: as `--dtype` names it; None: the base's own.
        max_shard_bytes: of a file; None keeps the base's files.
        layer: the layer that pools; None: the model has the base's layers alone.

    Raises:
        UnsupportedError: the base is quantized.
    """
    refuse_quantized(inputs.base)
    files = plan(
        inputs.base,
        inputs.deltas,
        inputs.mixture.head,
        untied=inputs.untied.tensors,
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_bytes=max_shard_bytes,
        added=layer.pieces if layer else (),
    )
    return DensePlan(inputs, files, dtype, layer)


def plan_pooled(inputs: Inputs, dtype: str | None, max_shard_bytes: int | None = None) -> DensePlan:
    """Lay out the files of a dense folder that computes the mixture by itself: with one more layer, where its head sees the mean.

    Raises:
        UnsupportedError: the base is quantized, no layer of its architecture pools so, or bfloat16 is too coarse for the head.
    """
    refuse_quantized(inputs.base)
    mixture, layer = inputs.mixture, None
    if mixture.pooling is not None:
        layer = pooling_layer(inputs.base, mixture.pooling, None if dtype is None else DTYPES[dtype])
        refuse_coarse_shift(mixture.head, layer.pieces, inputs.base)
    return _with_head(plan_dense(inputs, dtype, max_shard_bytes, layer))


def _with_head(planned: DensePlan) -> DensePlan:
    """The plan with the names that a model with the mixture's head saves; as it is where the mixture has no head."""
    mixture, layer = planned.inputs.mixture, planned.layer
    if not mixture.head or mixture.task is None:
        return planned
    config = {**mixture.config, **planned.inputs.untied.config, **(layer.config if layer else {})}
    called = [piece.name for file in planned.files for piece in file.pieces]
    names = names_with_head(planned.inputs.base, mixture.task, config, called)
    if layer:
        layer = replace(layer, pieces=tuple(replace(piece, name=names[piece.name] or "") for piece in layer.pieces))
    return replace(planned, files=renamed(planned.files, names), layer=layer, names=names)


def untied_note(untied: Untied) -> str:
    """Which tensors are no longer one, in words; empty where there are none."""
    pairs = ", ".join(f"`{name}` and `{other}`" for name, other in sorted(untied.pairs.items()))
    return (
        f"The base model's {pairs} are one tensor in its class; here they are two, as they are no longer equal, and "
        "`tie_word_embeddings` is false."
        if untied
        else ""
    )


class DenseFormat(Format):
    """The base's own files, with the weights folded."""

    name = "dense"
    packages = ("torch",)
    library = "transformers"
    summary = "folded into the base model's weights"
    keeps_tensors = True

    def check_base(self, base: BaseModel) -> None:
        """A fold into quantized weights would not be exact."""
        refuse_quantized(base)

    def plan(self, inputs: Inputs, asked: ExportOptions) -> Plan:
        """The base's files, or others of the size asked for."""
        return plan_pooled(inputs, asked.dtype, asked.max_shard_bytes)

    def measures_of(self, table: Mapping[str, Any]) -> type[Measures]:
        """Of one kind."""
        return DenseMeasures

    def check_structure(self, folder: Path, manifest: Manifest) -> None:
        """Config, index and headers of a checkpoint."""
        check_checkpoint(folder, manifest.files, manifest.dtype)
        if manifest.mixture.pooling is not None:
            last_layer(open_base(folder, VerifyError), VerifyError)

    def check_loads(self, folder: Path, manifest: Manifest) -> list[str]:
        """The model's tensors are the folder's, each."""
        self._load(folder, manifest)
        return ["loads with no missing and no unexpected tensor"]

    def read_head(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """Where the base has the tensors that it replaces, or under its own names."""
        return read_stored_head(folder, manifest.mixture.head, base)

    def check_weights(self, folder: Path, manifest: Manifest, found: Inputs) -> list[str]:
        """What no adapter changes byte for byte, the rest folded again."""
        planned = plan_pooled(found, manifest.dtype)
        untouched = check_untouched(folder, planned.files)
        folded = check_folded(folder, planned.files, found.mixture)
        added = planned.layer.pieces if planned.layer else ()
        check_added(folder, added)
        pools = (
            [f"{len(added)} tensors are those of a layer that averages the tokens, number for number"] if added else []
        )
        return [
            f"{untouched} tensors that no adapter changes are the base's, byte for byte",
            f"{folded} tensors that adapters change or --dtype rounds are the mixture's, folded again, but for a last bit",
            *pools,
        ]

    def outputs(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """As transformers loads it."""
        return outputs_of(self._load(folder, manifest), manifest.probe)

    def tolerance(self, folder: Path, manifest: Manifest, effect: float) -> Tolerance:
        """Rounding to the dtype of its weights."""
        return tolerance_of(stored_dtypes(folder), effect, pooled=manifest.mixture.pooling is not None)

    def check_outputs(
        self, folder: Path, manifest: Manifest, model: nn.Module, base: BaseModel, checked: Checked
    ) -> None:
        """On the probe in float32; of float16 weights it is said where the model overflows in float16."""
        super().check_outputs(folder, manifest, model, base, checked)
        if "F16" not in stored_dtypes(folder):
            return
        try:
            half = outputs_of(self._load(folder, manifest).half(), manifest.probe)
        except VerifyError as error:
            checked.skipped["outputs in float16"] = str(error)
            return
        if bad := [name for name, tensor in half.items() if not all_finite(tensor)]:
            warnings.warn(
                f"{folder}: in float16 PyTorch's own {bad[0]!r} is NaN or infinite, as numbers pass 65504: the weights are right, "
                "but serve them in float32 or bfloat16.",
                WloraMergeWarning,
                stacklevel=2,
            )

    def _load(self, folder: Path, manifest: Manifest) -> nn.Module:
        return load_checked(folder, manifest.mixture.task, unused=unused_by(manifest.mixture))
