"""Mixture: how much of each adapter, group by group; its maths and its files.

A Mixture is the small part that a fit learns, one weight per group and adapter, with enough provenance to find its inputs
again. The maths of mixture weights (softmax, presence, gains) stand here once, for the fit and for the export.

Source of the method: Asadi et al. 2024, https://arxiv.org/abs/2402.15414.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import WEIGHTS_FILE, Adapter
from .base_model import BaseModel
from .checkpoint import read_header, read_tensor
from .errors import MixtureError
from .names import GRANULARITIES, group_of, natural_key
from .stacking import ModuleDelta, TensorDelta
from .staging import staged

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
NORMALIZE = ("all", "present", "none")
JSON_FILE = "mixture.json"
TENSOR_FILE = "mixture.safetensors"


# ------------------------------------------------------------------------------------------------ mixture weights


def mixture_weights(logits: torch.Tensor, normalize: str) -> torch.Tensor:
    """Logits [..., N] -> mixture weights [..., N]: softmax over all N adapters, or the free weights themselves."""
    return logits if normalize == "none" else logits.softmax(-1)


def at_module(weights: torch.Tensor, present: torch.Tensor, normalize: str) -> torch.Tensor:
    """Mixture weights [N] as a module uses them: `present` renormalizes over the adapters that target it [N] bool."""
    if normalize != "present":
        return weights
    kept = weights * present
    total = kept.sum(-1, keepdim=True)
    return kept / total.where(total != 0, 1.0)


def gains(
    weights: torch.Tensor, scaling: torch.Tensor, adapter_index: torch.Tensor, delta_scale: float | torch.Tensor
) -> torch.Tensor:
    """gains [R] = delta_scale · mixture weight · scaling, one for each stacked row; differentiable in `weights` [N]."""
    return delta_scale * weights[adapter_index] * scaling


# -------------------------------------------------------------------------------------------------- the mixture


@dataclass(frozen=True)
class InputRef:
    """An input as a mixture remembers it: a folder or hub id, a hub commit, and the sha256 of each weight file."""

    source: str
    revision: str | None
    sha256: dict[str, str]
    name: str = ""


@dataclass
class Mixture:
    """Which adapters, in which groups, with which weights.

    `mixture_weights` [G, N] float32 are what an export reads; `wlora_weights` [G, N] the logits (free weights with
    `normalize: none`), kept to continue a fit; row g belongs to the g-th group of `groups`.
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
    metrics: dict[str, Any] = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    modules_to_save: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, str] = ("", "")

    def live_name(self, module: str) -> str:
        """A module's name in the model that loads the base: where that adds a prefix to the file's names, or drops one."""
        in_file, in_model = self.prefixes
        return in_model + module.removeprefix(in_file)

    @property
    def adapter_names(self) -> list[str]:
        """The adapters' names, in the order of the weights' columns."""
        return [a.name for a in self.adapters]

    def weights_of(self, delta: ModuleDelta | TensorDelta) -> torch.Tensor:
        """Mixture weights [N] float64 of one module, renormalized over those present where the mixture says so.

        Raises:
            MixtureError: the module belongs to no group.
        """
        row = self._rows().get(delta.module)
        if row is None:
            raise MixtureError(
                f"module {delta.module!r} belongs to no group of the mixture: it was made from other adapters."
            )
        weights = self.mixture_weights[row].double()
        if isinstance(delta, TensorDelta):
            return weights
        return at_module(weights, delta.present, self.normalize)

    def gains_of(self, delta: ModuleDelta) -> torch.Tensor:
        """gains [R] float64 of one module: delta_scale · mixture weight · scaling."""
        return gains(self.weights_of(delta), delta.scaling, delta.adapter_index, self.delta_scale)

    def _rows(self) -> dict[str, int]:
        return {module: g for g, modules in enumerate(self.groups.values()) for module in modules}

    @classmethod
    def from_model(cls, model: torch.nn.Module, base: str | Path | BaseModel | None = None) -> Mixture:
        """Read the mixture off a model that `attach` has changed; see `wlora_merge.layers.read_mixture`."""
        from .layers import read_mixture

        return read_mixture(model, base)

    # -------------------------------------------------------------------------------------------------- files

    def save(self, folder: str | Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
        """Write `mixture.json` and `mixture.safetensors`, all or nothing. The same mixture gives the same bytes.

        Args:
            folder: it must not exist or be empty, unless `force`.
            inputs: folders that it must not lie in or hold.

        Raises:
            OutputError: the folder exists and is not empty, or cannot be written.
        """
        out = Path(folder)
        with staged(out, force=force, inputs=inputs) as staging:
            self.write(staging.path, out)

    def write(self, folder: Path, final: Path) -> None:
        """Write the two files into an existing folder that will be renamed to `final`."""
        from safetensors.torch import save_file

        tensors = {"mixture_weights": self.mixture_weights.float(), "wlora_weights": self.wlora_weights.float()}
        tensors |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / TENSOR_FILE, {"format": "pt"}
        )
        text = json.dumps(self._json(final), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")

    def _json(self, final: Path) -> dict[str, Any]:
        table = {
            group: {name: round(float(w), 9) for name, w in zip(self.adapter_names, row, strict=True)}
            for group, row in zip(self.groups, self.mixture_weights.tolist(), strict=True)
        }
        adapters = [
            {"name": a.name, "source": _portable(a.source, final), "revision": a.revision, "sha256": a.sha256}
            for a in self.adapters
        ]
        return {
            "format_version": FORMAT_VERSION,
            "base_model": {
                "source": _portable(self.base.source, final),
                "revision": self.base.revision,
                "sha256": self.base.sha256,
            },
            "adapters": adapters,
            "granularity": self.granularity,
            "normalize": self.normalize,
            "delta_scale": self.delta_scale,
            "groups": self.groups,
            "weights": table,
            "task": self.task,
            "config": self.config,
            "metrics": self.metrics,
            "modules_to_save": self.modules_to_save,
            "prefixes": {"in_file": self.prefixes[0], "in_model": self.prefixes[1]},
            "data": self.data,
        }

    @classmethod
    def load(cls, folder: str | Path) -> Mixture:
        """Read a mixture folder; what `save` wrote comes back bit for bit.

        Raises:
            MixtureError: a missing or broken file, or weights that are not finite or of another shape.
        """
        folder = Path(folder)
        table = _read_table(folder)
        tensors = _read_tensors(folder)
        try:
            mixture = cls(
                base=_read_ref(table["base_model"], folder),
                adapters=[_read_ref(row, folder) for row in table["adapters"]],
                granularity=table["granularity"],
                normalize=table["normalize"],
                delta_scale=float(table["delta_scale"]),
                groups={str(g): [str(m) for m in modules] for g, modules in table["groups"].items()},
                mixture_weights=tensors.pop("mixture_weights"),
                wlora_weights=tensors.pop("wlora_weights"),
                task=table.get("task"),
                config=dict(table.get("config") or {}),
                metrics=dict(table.get("metrics") or {}),
                modules_to_save=table.get("modules_to_save"),
                data=dict(table.get("data") or {}),
                prefixes=(str(table["prefixes"]["in_file"]), str(table["prefixes"]["in_model"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MixtureError(f"{folder / JSON_FILE}: {_complaint(error)}; make the mixture again.") from error
        mixture.head = {name.removeprefix("head."): tensor for name, tensor in tensors.items()}
        _check(mixture, tensors, folder)
        return mixture


def uniform(n: int) -> list[float]:
    """Mixture weights of uniform composition."""
    return [1.0 / n] * n


def prefixes(in_file: str, in_model: str) -> tuple[str, str]:
    """The leading parts in which two spellings of one module's name differ.

    >>> prefixes("encoder.layer.0", "bert.encoder.layer.0")
    ('', 'bert.')
    """
    longer, shorter = max(in_file, in_model, key=len), min(in_file, in_model, key=len)
    extra = longer.removesuffix(shorter)
    return ("", extra) if longer == in_model else (extra, "")


def make_groups(modules: Iterable[str], granularity: str) -> dict[str, list[str]]:
    """Group name -> modules, in natural order.

    Raises:
        MixtureError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise MixtureError(f"granularity is {granularity!r}, expected one of {', '.join(GRANULARITIES)}.")
    groups: dict[str, list[str]] = {}
    for module in sorted(modules, key=natural_key):
        groups.setdefault(group_of(module, granularity), []).append(module)
    return groups


def adapter_ref(adapter: Adapter) -> InputRef:
    """How a mixture remembers an adapter."""
    source = adapter.source
    return InputRef(source.location, source.revision, {WEIGHTS_FILE: adapter.sha256}, adapter.name)


def base_ref(base: BaseModel) -> InputRef:
    """How a mixture remembers a base model."""
    return InputRef(base.source.location, base.source.revision, base.sha256())


def _portable(source: str, final: Path) -> str:
    """A local folder relative to the mixture's, so that a tree that moves together stays whole; a hub id as it is."""
    if not Path(source).is_dir():
        return source
    relative = os.path.relpath(Path(source).resolve(), final.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _read_ref(row: Mapping[str, Any], folder: Path) -> InputRef:
    source = str(row["source"])
    if source.startswith("."):
        source = os.path.normpath(folder.resolve() / source)
    digests = row["sha256"]
    if not isinstance(digests, dict):
        raise TypeError("sha256 is not a table of file names")
    return InputRef(
        source, row.get("revision"), {str(k): str(v) for k, v in digests.items()}, str(row.get("name") or "")
    )


def _read_table(folder: Path) -> dict[str, Any]:
    file = folder / JSON_FILE
    if not file.is_file():
        raise MixtureError(f"{folder}: has no {JSON_FILE}: give the folder that `wlora-merge fit` or `mix` wrote.")
    try:
        table = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MixtureError(f"{file}: is not valid JSON ({error}).") from error
    version = table.get("format_version") if isinstance(table, dict) else None
    if version != FORMAT_VERSION:
        raise MixtureError(
            f"{file}: format_version is {version!r}, this version of wlora-merge reads {FORMAT_VERSION}."
        )
    return dict(table)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / TENSOR_FILE
    if not file.is_file():
        raise MixtureError(f"{folder}: has no {TENSOR_FILE}: the mixture is not whole.")
    return {name: read_tensor(entry) for name, entry in read_header(file).entries.items()}


def _check(mixture: Mixture, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    file, expected = folder / TENSOR_FILE, (len(mixture.groups), len(mixture.adapters))
    for name in ("mixture_weights", "wlora_weights"):
        weights = getattr(mixture, name)
        if tuple(weights.shape) != expected or not bool(weights.isfinite().all()):
            raise MixtureError(
                f"{file}: {name} is {list(weights.shape)} and must be finite [groups, adapters] = {list(expected)}."
            )
    foreign = [name for name in tensors if not name.startswith("head.")]
    if foreign:
        raise MixtureError(f"{file}: holds an unknown tensor {foreign[0]!r}.")
    if (
        mixture.normalize not in NORMALIZE
        or mixture.granularity not in GRANULARITIES
        or not math.isfinite(mixture.delta_scale)
    ):
        raise MixtureError(
            f"{folder / JSON_FILE}: granularity {mixture.granularity!r}, normalize {mixture.normalize!r} or delta_scale "
            f"{mixture.delta_scale!r} is not one that this version knows."
        )
    if len(set(mixture.adapter_names)) != len(mixture.adapters):
        raise MixtureError(f"{folder / JSON_FILE}: two adapters have the same name.")


def _complaint(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
