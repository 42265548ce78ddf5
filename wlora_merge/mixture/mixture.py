"""Mixture: how much of each adapter, group by group, and what its files hold.

A Mixture is the small part that a fit learns, one weight per group and adapter, with enough provenance to find its inputs
again.

Source of the method: Asadi et al. 2024, https://arxiv.org/abs/2402.15414.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..adapters.deltas import ModuleDelta, TensorDelta
from ..constants import MIXTURE_FILE, MIXTURE_TENSORS, NEW_FOLDER
from ..data.tasks import get_task
from ..errors import MixtureError
from ..io.digests import remember
from ..io.hub import at_revision, public_name
from ..io.safetensors_file import write_tensors
from ..io.staging import staged
from ..models.base_model import BaseModel
from ..models.names import OUTPUT_EMBEDDINGS
from .combination import Combination, CombinedFold
from .fold import LinearFold, fold_factor, fold_factors, low_rank_svd
from .groups import group_count, rows_of
from .weights import at_module, gains

if TYPE_CHECKING:
    import torch

    from .record import AdapterRecord, BaseRecord, FitMetrics, MadeFrom, MixtureRecord

TRAINING_LOOP = "training loop"
"""`data["method"]` of a mixture that was read off a model which somebody's own loop has trained."""

NOT_ATTACHED = "the model has no adapters attached: call wlora_merge.attach(model, adapters) first."


@dataclass(frozen=True)
class InputRef:
    """An input as a mixture remembers it: a folder or hub id, a hub commit, and the sha256 of each weight file."""

    source: str
    revision: str | None
    sha256: dict[str, str]
    name: str = ""

    @property
    def spec(self) -> str:
        """How a command names it to others: a hub id with its commit; of a local folder its own name."""
        return at_revision(public_name(self.source), self.revision)


@dataclass
class Mixture:
    """Which adapters, in which groups, with which weights.

    `mixture_weights` [G, N] float32 are what an export reads. `wlora_weights` [G, N] are the logits (free weights with
    `normalize: none`), kept to continue a fit. Row g belongs to the g-th group of `groups`. `head_tensors` says which tensor of
    the base's files each tensor of the head replaces; None where it is new. `pooling` says what the head sees in place of the
    first token (`models.pooling.add_pooling_layer`); None: what its class reads. `new_files` are the files of an adapter that
    the fit trained and that no folder holds yet; its source is `NEW_FOLDER` alone.
    """

    base: InputRef
    adapters: list[InputRef]
    granularity: str
    normalize: str
    delta_scale: float
    groups: dict[str, list[str]]
    mixture_weights: torch.Tensor
    wlora_weights: torch.Tensor
    task: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metrics: FitMetrics = field(default_factory=dict)  # type: ignore[assignment]
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    head_tensors: dict[str, str | None] = field(default_factory=dict)
    combination: Combination = field(default_factory=Combination)
    modules_to_save: str | None = None
    resize_vocab: str | None = None
    pooling: str | None = None
    data: MadeFrom = field(default_factory=dict)  # type: ignore[assignment]
    prefixes: tuple[str, str] = ("", "")
    new_files: dict[str, bytes] = field(default_factory=dict)

    def live_name(self, delta: ModuleDelta, body_prefix: str = "") -> str:
        """A module's name in the model that loads the base: with the prefix that it adds or drops, or as the adapters have it.

        Args:
            delta: the module's changes.
            body_prefix: what the base's files put before the names of its body (`model.`), which a bare model does not have.
        """
        if delta.module in OUTPUT_EMBEDDINGS:
            return delta.name or delta.module  # it stands beside the model that has the prefix
        in_file, in_model = self.prefixes
        if self.task and get_task(self.task).is_body and not in_file:
            return delta.module.removeprefix(body_prefix)  # whatever head the adapters were trained under
        if in_file or in_model:
            return in_model + delta.module.removeprefix(in_file)
        return delta.name or delta.module

    @property
    def adapter_names(self) -> list[str]:
        """The adapters' names, in the order of the weights' columns."""
        return [a.name for a in self.adapters]

    @property
    def group_count(self) -> str:
        """How many groups there are, in words: `1 group`, `24 groups`."""
        return group_count(self.groups)

    @property
    def judged_on(self) -> str:
        """What the scores of its fit were measured on, as a title."""
        return judged_on(self.metrics)

    def weights_of(self, delta: ModuleDelta | TensorDelta) -> torch.Tensor:
        """Mixture weights [N] float64 of one module, renormalized over those present where the mixture says so.

        Raises:
            MixtureError: the module belongs to no group.
        """
        row = self._rows.get(delta.module)
        if row is None:
            raise MixtureError(
                f"module {delta.module!r} belongs to no group of the mixture: it was made from other adapters."
            )
        return at_module(self.mixture_weights[row].double(), delta.present, self.normalize)

    def gains_of(self, delta: ModuleDelta) -> torch.Tensor:
        """gains [R] float64 of one module: delta_scale · mixture weight · scaling."""
        return gains(self.weights_of(delta), delta.scaling, delta.adapter_index, self.delta_scale)

    def whole_gains_of(self, delta: ModuleDelta | TensorDelta) -> torch.Tensor:
        """gains [N] float64 of what has no scaling of its own: delta_scale · mixture weight."""
        return self.delta_scale * self.weights_of(delta)

    def fold_of(self, delta: ModuleDelta) -> LinearFold | CombinedFold:
        """What folds the weight of one module; an adapter of weight zero is not read, but where it has a vote."""
        weights = self.whole_gains_of(delta)
        if not self.combination.elects:
            delta = delta.only(weights != 0)
        if not self.combination.is_linear and delta.factors:
            return CombinedFold(self.combination, delta, weights, self.adapter_names)
        return LinearFold(*fold_factors(delta, self.gains_of(delta)), fold_factor(delta, weights))

    def svd_of(self, delta: ModuleDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The singular value decomposition of one module's delta weight [out, in]: U [out, k], S [k] descending, V^T [k, in].

        Of the weighted sum it is that of the two factors; else the matrix is formed.
        """
        import torch

        fold = self.fold_of(delta) if not self.combination.is_linear else None
        if isinstance(fold, CombinedFold):
            dense = fold.dense()
            u, s, vt = torch.linalg.svd(dense.T if delta.layout.transposed else dense, full_matrices=False)
            return u, s, vt
        return low_rank_svd(delta.lora_A, delta.lora_B.double() * self.gains_of(delta))

    @cached_property
    def _rows(self) -> dict[str, int]:
        return rows_of(self.groups)

    @classmethod
    def from_model(cls, model: torch.nn.Module, base: str | Path | BaseModel | None = None) -> Mixture:
        """The mixture of a model that `attach` has changed and a loop has trained.

        Args:
            model: the model (unwrap DistributedDataParallel first).
            base: the folder or hub id that the model was loaded from; None takes `model.config._name_or_path`.

        Returns:
            A mixture whose modules have the base files' names; the trained head, if any, under its parameter names; the task
            that the model's class tells, where it tells one.

        Raises:
            MixtureError: the model has no adapters attached, or its base is not known.
        """
        attachment: Any = getattr(model, "wlora", None)
        if not hasattr(attachment, "to_mixture"):
            raise MixtureError(NOT_ATTACHED)
        mixture: Mixture = attachment.to_mixture(model, base)
        return mixture

    # -------------------------------------------------------------------------------------------------- files

    def save(
        self,
        folder: str | Path,
        *,
        force: bool = False,
        inputs: Iterable[Path] = (),
        beside: Callable[[Path], object] | None = None,
    ) -> None:
        """Write `mixture.json` and `mixture.safetensors`, all or nothing. The same mixture gives the same bytes.

        Args:
            folder: it must not exist or be empty, unless `force`.
            force: replace what is in the folder.
            inputs: folders that it must not lie in or hold.
            beside: called with the folder before it is put in place, to write more into it.

        Raises:
            OutputError: the folder exists and is not empty, or cannot be written.
        """
        out = Path(folder)
        with staged(out, force=force, inputs=inputs) as staging:
            self.write(staging.path, out)
            if beside is not None:
                beside(staging.path)
        self.remember_new(out)

    def write(self, folder: Path, final: Path) -> None:
        """Write the two files into an existing folder that will be renamed to `final`."""
        tensors = {"mixture_weights": self.mixture_weights.float(), "wlora_weights": self.wlora_weights.float()}
        tensors |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        write_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, folder / MIXTURE_TENSORS)
        table = self.record(lambda ref: _portable(ref, final), digits=9).table()
        text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MIXTURE_FILE).write_text(text + "\n", encoding="utf-8")
        self.write_new(folder)

    def write_new(self, folder: Path) -> Path:
        """Write the adapter that the fit trained, if there is one and no folder holds it, below `folder`; where it lies then."""
        own = folder / NEW_FOLDER
        if self.new_files:
            own.mkdir()
        for name, content in self.new_files.items():
            (own / name).write_bytes(content)
        return own

    def remember_new(self, folder: Path) -> None:
        """Remember where the adapter that the fit trained lies, so that `verify` finds it: below `folder`, put in place just now."""
        for digests in (a.sha256 for a in self.adapters if a.source == NEW_FOLDER):
            for name, sha256 in digests.items():
                remember(folder / NEW_FOLDER / name, sha256)

    def record(self, named: Callable[[InputRef], str], digits: int | None = None) -> MixtureRecord:
        """What a file holds of it.

        Args:
            named: how the file calls an input.
            digits: of the weights behind the point; None gives them as they are, so that float32 comes back bit for bit.
        """
        from .record import AdapterRecord, BaseRecord, CombinationRecord, MixtureRecord, Prefixes

        base, weights, how = self.base, self.mixture_weights.tolist(), self.combination
        rows = [[w if digits is None else round(w, digits) for w in row] for row in weights]
        return MixtureRecord.model_construct(
            base_model=BaseRecord.model_construct(source=named(base), revision=base.revision, sha256=base.sha256),
            adapters=[
                AdapterRecord.model_construct(name=a.name, source=named(a), revision=a.revision, sha256=a.sha256)
                for a in self.adapters
            ],
            granularity=self.granularity,
            normalize=self.normalize,
            delta_scale=self.delta_scale,
            combination=None if how.is_linear else CombinationRecord.model_construct(**how.table()),
            groups=self.groups,
            weights={
                g: dict(zip(self.adapter_names, row, strict=True)) for g, row in zip(self.groups, rows, strict=True)
            },
            task=self.task,
            config=self.config,
            metrics=self.metrics,
            modules_to_save=self.modules_to_save,
            resize_vocab=self.resize_vocab,
            pooling=self.pooling,
            prefixes=Prefixes.model_construct(in_file=self.prefixes[0], in_model=self.prefixes[1]),
            data=self.data,
            head=self.head_tensors,
        )

    @classmethod
    def load(cls, folder: str | Path) -> Mixture:
        """Read a mixture folder; what `save` wrote comes back bit for bit.

        Raises:
            MixtureError: a missing or broken file, or weights that are not finite or of another shape.
        """
        return origin_of(folder).mixture()

    @classmethod
    def from_record(
        cls, record: MixtureRecord, tensors: Mapping[str, torch.Tensor], folder: Path, file: str = MIXTURE_TENSORS
    ) -> Mixture:
        """A mixture from what its two files hold.

        Args:
            record: the record.
            tensors: the weights, and each tensor of the head as `head.<name>`.
            folder: what relative sources are relative to.
            file: where the tensors stand, for messages.

        Raises:
            MixtureError: weights of another shape or dtype, or a tensor that is not finite or that no mixture has.
        """
        _check_tensors(record, tensors, folder / file)
        base, adapters = refs_of(record, folder)
        return cls(
            base=base,
            adapters=adapters,
            granularity=record.granularity,
            normalize=record.normalize,
            delta_scale=record.delta_scale,
            groups=record.groups,
            mixture_weights=tensors["mixture_weights"],
            wlora_weights=tensors["wlora_weights"],
            task=record.task,
            config=record.config,
            metrics=record.metrics,
            head={name.removeprefix("head."): tensors[name] for name in sorted(tensors) if name.startswith("head.")},
            head_tensors=record.head,
            combination=combination_of(record),
            modules_to_save=record.modules_to_save,
            resize_vocab=record.resize_vocab,
            pooling=record.pooling,
            data=record.data,
            prefixes=(record.prefixes.in_file, record.prefixes.in_model),
        )


@dataclass(frozen=True)
class Origin:
    """What a mixture was made from; `mixture` gives the mixture itself, whose tensors may not be read yet."""

    base: InputRef
    adapters: list[InputRef]
    mixture: Callable[[], Mixture]


def origin_of(mixture: str | Path | Mixture) -> Origin:
    """What a mixture was made from; of a folder by its record alone.

    Raises:
        MixtureError: a missing or broken record.
    """
    if isinstance(mixture, Mixture):
        return Origin(mixture.base, mixture.adapters, lambda: mixture)
    from .files import read_mixture_record, read_mixture_tensors

    folder = Path(mixture)
    record = read_mixture_record(folder)
    base, adapters = refs_of(record, folder)
    return Origin(base, adapters, lambda: Mixture.from_record(record, read_mixture_tensors(folder), folder))


def judged_on(metrics: FitMetrics) -> str:
    """What the scores of a fit were measured on, as a title."""
    return "Held out" if metrics.get("held_out", {}).get("examples") else "On the shots themselves"


def combination_of(record: MixtureRecord) -> Combination:
    """How a record says that delta weights become one."""
    return Combination(**(record.combination.model_dump(exclude_none=True) if record.combination else {}))


def refs_of(record: MixtureRecord, folder: Path) -> tuple[InputRef, list[InputRef]]:
    """The base and the adapters that a record names; `folder` is what relative sources are relative to."""
    adapters = [_ref_of(adapter, folder, adapter.name) for adapter in record.adapters]
    return _ref_of(record.base_model, folder), adapters


def adapter_ref(adapter: Adapter) -> InputRef:
    """How a mixture remembers an adapter."""
    source = adapter.source
    return InputRef(source.location, source.revision, adapter.digests(), adapter.name)


def base_ref(base: BaseModel) -> InputRef:
    """How a mixture remembers a base model."""
    return InputRef(base.source.location, base.source.revision, base.sha256())


def _portable(ref: InputRef, final: Path) -> str:
    """A local folder relative to the mixture's, so that a tree that moves together stays whole; a hub id as it is."""
    if ref.name and ref.source == NEW_FOLDER:
        return f"./{NEW_FOLDER}"
    if not Path(ref.source).is_absolute():
        return ref.source  # a hub id, though a folder may happen to have that name
    relative = os.path.relpath(Path(ref.source).resolve(), final.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _ref_of(record: BaseRecord | AdapterRecord, folder: Path, name: str = "") -> InputRef:
    source = record.source
    if source.startswith("."):
        source = os.path.normpath(folder.resolve() / source)
    return InputRef(source, record.revision, record.sha256, name)


def _check_tensors(record: MixtureRecord, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuse tensors that are not the weights of these groups and adapters, or no head."""
    from .files import wrong_weights

    expected = (len(record.groups), len(record.adapters))
    for name, tensor in tensors.items():
        if name in ("mixture_weights", "wlora_weights"):
            finite = str(tensor.dtype) == "torch.float32" and bool(tensor.isfinite().all())
            if not finite or tuple(tensor.shape) != expected:
                raise wrong_weights(file, name, tensor.shape, str(tensor.dtype), expected)
        elif not name.startswith("head."):
            raise MixtureError(f"{file}: holds an unknown tensor {name!r}: make the mixture again.")
        elif not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise MixtureError(f"{file}: tensor {name!r} holds what is not a finite number: make the mixture again.")
