"""The inputs of a mixture, found again: opened, their digests checked, their changes stacked."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..adapters.adapter import Adapter, load_adapter, split_adapter_spec
from ..adapters.added_tokens import resized
from ..adapters.deltas import ModuleDelta, TensorDelta
from ..adapters.modules_to_save import join_changes, stack_tensors
from ..adapters.stacking import stack
from ..adapters.targets import modules_of, tensors_of
from ..constants import NEW_FOLDER
from ..errors import MixtureError
from ..io.hub import is_here
from ..io.tensors import one_torch_thread
from ..models.base_model import BaseModel, open_base
from ..models.tied_embeddings import Untied, untied
from .mixture import InputRef, Mixture, Origin, origin_of


@dataclass
class Inputs:
    """What a mixture was made from, found again, opened and checked."""

    mixture: Mixture
    base: BaseModel
    adapters: list[Adapter]
    deltas: list[ModuleDelta | TensorDelta] = field(default_factory=list)

    @property
    def tensors(self) -> list[TensorDelta]:
        """The changes of whole tensors alone."""
        return [delta for delta in self.deltas if isinstance(delta, TensorDelta)]

    @cached_property
    def untied(self) -> Untied:
        """What an export has because tied tensors are no longer equal; see `tied_embeddings.untied`."""
        changed = {name: d.shape for d in self.deltas if isinstance(d, ModuleDelta) for name in d.changes}
        changed |= {d.tensor: d.shape for d in self.tensors}
        stored = self.base.stored_names(self.mixture.head)
        changed |= {stored[name] or name: tuple(tensor.shape) for name, tensor in self.mixture.head.items()}
        changed |= {name: tuple(rows.shape) for name, rows in self.base.added.items() if name not in self.base.entries}
        return untied(self.base, changed, self.mixture.config)

    @property
    def folders(self) -> list[Path]:
        """Every input folder."""
        return [self.base.folder, *(a.source.folder for a in self.adapters)]


def find_inputs(
    mixture: str | Path | Mixture,
    *,
    base: str | Path | None = None,
    adapters: Iterable[str | Path] = (),
    any_digest: bool = False,
    instead: str = "make the mixture again, or say --any-digest",
    check_base: Callable[[BaseModel], None] = lambda base: None,
) -> Inputs:
    """Open the base and the adapters that a mixture was made from, and stack the adapters on the base.

    What records and headers tell is refused before any number is read.

    Args:
        mixture: a mixture folder, or a Mixture.
        base: the base model, if it has moved.
        adapters: adapters that have moved, as NAME=PATH.
        any_digest: accept inputs whose bytes are others.
        instead: what the caller lets people do about an input that is not the original.
        check_base: what else the caller asks of the base; it raises.

    Raises:
        MixtureError: an input that has moved, or whose sha256 is another one.
    """
    origin = origin_of(mixture)
    moved = _moved(adapters, [ref.name for ref in origin.adapters])
    _refuse_gone(origin, moved if base is None else {"": str(base), **moved})
    opened = open_base(base or _source(origin.base))
    check_base(opened)
    loaded = [
        load_adapter(moved.get(ref.name) or _written(mixture, ref) or _source(ref), ref.name, base_is_residual=True)
        for ref in origin.adapters
    ]
    if not any_digest:
        _check_digests(origin, opened, loaded, instead)
    made = origin.mixture()
    opened.known = made.head_tensors
    with one_torch_thread():
        opened, loaded = resized(opened, loaded, made.resize_vocab)
        return stacked_inputs(made, opened, loaded)


def stacked_inputs(mixture: Mixture, base: BaseModel, adapters: Sequence[Adapter]) -> Inputs:
    """A mixture with its opened inputs, the adapters stacked on the base.

    Raises:
        WloraMergeError: an adapter that does not fit the base, changes that cannot both be, or a group of modules that the base
            lacks.
    """
    deltas = _deltas(mixture, base, adapters)
    mixture.combination.refuse_changes(adapters, (d for d in deltas if isinstance(d, TensorDelta)))
    _refuse_unknown(mixture, base, {delta.module for delta in deltas})
    return Inputs(mixture, base, list(adapters), deltas)


def _refuse_unknown(mixture: Mixture, base: BaseModel, changed: Collection[str]) -> None:
    """Refuse a group with a module that the base lacks; one that no adapter changes any more is there where weights were pruned."""
    for group, modules in mixture.groups.items():
        for module in modules:
            if module not in changed and base.find_module(module) is None:
                raise MixtureError(
                    f"{base.folder}: has no module {module!r}, which is in group {group!r} of the mixture: made on another base."
                )


def _deltas(mixture: Mixture, base: BaseModel, adapters: Sequence[Adapter]) -> list[ModuleDelta | TensorDelta]:
    modules = stack(adapters, modules_of(base), tensors_of(base), model_type=base.model_type)
    choice = (
        mixture.modules_to_save if mixture.modules_to_save == "mix" else "drop"
    )  # the rest was settled when it was made
    tensors, _ = stack_tensors(adapters, choice, mixture.head, tensors_of(base))
    return join_changes(modules, tensors, mixture.head, tensors_of(base))


def _written(mixture: str | Path | Mixture, ref: InputRef) -> str | None:
    """The adapter that a fit trained, of a mixture that is in memory alone: a folder that goes when the mixture does."""
    if ref.source != NEW_FOLDER or not isinstance(mixture, Mixture):
        return None
    scratch = Path(tempfile.mkdtemp(prefix="wlora-"))
    weakref.finalize(mixture, shutil.rmtree, scratch, ignore_errors=True)
    return str(mixture.write_new(scratch))


def _source(ref: InputRef) -> str:
    hub = not Path(ref.source).is_absolute() and ref.revision
    return f"{ref.source}@{ref.revision}" if hub else ref.source  # the hub's main branch may be another by now


def _refuse_gone(origin: Origin, moved: Mapping[str, str]) -> None:
    """Refuse a mixture whose folders are not where it says and not among `moved`, by name; the base's name is ""."""
    refs = [origin.base, *origin.adapters]
    gone = [r for r in refs if r.name not in moved and Path(r.source).is_absolute() and not is_here(r.source)]
    if gone:
        options = " ".join(f"--adapter {ref.name}=PATH" if ref.name else "--base PATH" for ref in gone)
        raise MixtureError(
            f"{', '.join(ref.source for ref in gone)}: the mixture was made from {'this folder' if len(gone) == 1 else 'these'}, "
            f"which it looks for beside its own place, and nothing is there: say {options}."
        )


def _moved(specs: Iterable[str | Path], names: Sequence[str]) -> dict[str, str]:
    moved = {}
    for spec in specs:
        name, path = split_adapter_spec(spec)
        if name not in names:
            raise MixtureError(f"--adapter {spec}: expected NAME=PATH with a NAME of the mixture: {', '.join(names)}.")
        moved[str(name)] = path
    return moved


def _check_digests(origin: Origin, base: BaseModel, adapters: Sequence[Adapter], instead: str) -> None:
    found: dict[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
        "base model": (str(base.folder), origin.base.sha256, base.sha256())
    }
    for ref, adapter in zip(origin.adapters, adapters, strict=True):
        found[f"adapter {ref.name!r}"] = (str(adapter.source.folder), ref.sha256, adapter.digests())
    for what, (folder, expected, got) in found.items():
        for file in sorted(set(expected) | set(got)):
            if expected.get(file) != got.get(file):
                raise MixtureError(
                    f"{folder}/{file}: the {what} is not the one that the mixture was made from (sha256 "
                    f"{str(got.get(file))[:12]}…, expected {str(expected.get(file))[:12]}…): give the original, {instead}."
                )
