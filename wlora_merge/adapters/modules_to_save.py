"""What becomes of the whole tensors that adapters carry: `modules_to_save`, and an embedding's copy beside its LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError
from ..io.tensors import equal
from ..models.names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, natural_key
from .adapter import Adapter
from .deltas import ModuleDelta, TensorDelta
from .factors import numbers
from .targets import OTHER_VOCABULARY, Find, Target, refuse_tied

if TYPE_CHECKING:
    import torch


def stack_tensors(
    adapters: Sequence[Adapter], choice: str | None, replaced: Iterable[str], find: Find
) -> tuple[list[TensorDelta], dict[str, torch.Tensor]]:
    """What becomes of the whole tensors that adapters carry: `modules_to_save`, and copies of base embeddings.

    PEFT saves an embedding's weight beside a LoRA of it, and loads it into the base: one that is equal to the base's has no
    effect, one that differs is a delta like any other, whatever the choice.

    Args:
        adapters: N adapters, in mixture order.
        choice: an adapter's name takes that one's, `drop` leaves all out, `mix` mixes them as deltas against the base's; None
            refuses any that is not `replaced`.
        replaced: names of the parameters that a trained head replaces.
        find: as for `stack`, for whole tensor names.

    Returns:
        The deltas, and the tensors taken as they are, under the names that the adapter gives them.

    Raises:
        UnsupportedError: tensors that nobody said what to do with, or that cannot be mixed; a copy of another shape, or one
            that differs beside a DoRA.

    Source: `peft.utils.save_and_load.get_peft_model_state_dict`.
    """
    taken: dict[str, torch.Tensor] = {}
    saved = _Saved({}, {})
    if choice not in (None, "drop", "mix", *(a.name for a in adapters)):
        raise AdapterError(
            f"--modules-to-save {choice}: expected drop, mix, or one of {', '.join(a.name for a in adapters)}."
        )
    for n, adapter in enumerate(adapters):
        for name in sorted(set(adapter.tensors) - set(replaced)):
            beside = _is_beside(adapter, name)
            if choice not in (None, "mix", adapter.name) and not beside:
                continue
            _refuse_other_vocabulary(adapter, name, find)
            is_copy = beside or _is_unasked_copy(adapter, name)
            if choice is None and not is_copy:
                raise _unasked(adapter, name)
            value = _without_token_rows(adapter, name, find)
            copied = _changed_copy(adapter, name, value, find) if is_copy else None
            if copied is not None:
                saved.add_copies(adapter, n, name, copied, value)
            elif choice is None:
                raise _unasked(adapter, name)
            elif choice == "mix":
                target = _whole_target(adapter, name, tuple(value.shape), find)
                saved.add(n, target.module, target.shape, value)
            else:
                _check_taken(adapter, name, find)
                taken[name] = value
    return saved.deltas(len(adapters)), taken


def _unasked(adapter: Adapter, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{adapter.where}: it carries its own copy of tensor {name!r}: say --modules-to-save NAME to take one adapter's, drop to "
        "leave them out, or mix to mix them against the base's."
    )


@dataclass
class _Saved:
    """The adapters' own values of whole tensors: tensor -> adapter's number -> value, and each tensor's shape."""

    values: dict[str, dict[int, torch.Tensor]]
    shapes: dict[str, tuple[int, ...]]

    def add(self, n: int, tensor: str, shape: tuple[int, ...], value: torch.Tensor) -> None:
        """Adapter n's value of a tensor."""
        self.values.setdefault(tensor, {})[n] = value
        self.shapes[tensor] = shape

    def add_copies(self, adapter: Adapter, n: int, name: str, tensors: Iterable[str], value: torch.Tensor) -> None:
        """Adapter n's copy of an embedding, for each tensor of the base that it stands for."""
        for tensor in tensors:
            if n in self.values.get(tensor, {}) and not equal(self.values[tensor][n], value):
                raise UnsupportedError(
                    f"{adapter.where}: its copies of the two embeddings that the base model ties differ ({name!r}), so "
                    "neither can be meant for both: leave this adapter out."
                )
            self.add(n, tensor, tuple(value.shape), value)

    def deltas(self, n: int) -> list[TensorDelta]:
        """What the tensors become in a mixture of n adapters."""
        names = sorted(self.values, key=natural_key)
        return [TensorDelta(name, self.shapes[name], self.values[name], n) for name in names]


def _without_token_rows(adapter: Adapter, name: str, find: Find) -> torch.Tensor:
    """An adapter's whole tensor; of an embedding's copy the rows that it trained by themselves are the base's, as they are deltas
    of their own."""
    import torch

    saved, rows = numbers(adapter.tensors[name]), adapter.token_rows.get(name.removesuffix(".weight"))
    target = find(name) if rows is not None else None
    if rows is None or target is None or target.read is None or target.shape != tuple(saved.shape):
        return saved
    base, indices = target.read(), torch.tensor(rows.indices)
    dtype = torch.promote_types(saved.dtype, base.dtype)
    return saved.to(dtype).index_copy(0, indices, base[indices].to(dtype))


def _whole_target(adapter: Adapter, name: str, shape: tuple[int, ...], find: Find) -> Target:
    target = find(name)
    if target is None or target.shape != shape:
        got = "is not in the base model" if target is None else f"is {list(target.shape)} there and {list(shape)} here"
        raise UnsupportedError(
            f"{adapter.where}: its tensor {name!r} {got}, so it cannot be mixed: take one adapter's, or drop it."
        )
    refuse_tied(adapter, name, target)
    return target


def _changed_copy(adapter: Adapter, name: str, saved: torch.Tensor, find: Find) -> list[str] | None:
    """The base's tensors that a copy of a base weight changes, none where it is equal; None where `name` is no such copy.

    A tied weight has two names, and PEFT loads the copy into both.
    """
    target = find(name)
    if target is None or target.read is None:
        return None
    base = target.read()
    if equal(saved, base):
        return []
    if not _is_beside(adapter, name):
        return None
    if saved.shape != base.shape:
        raise UnsupportedError(
            f"{adapter.where}: its copy of tensor {name!r} is {list(saved.shape)}, the base model's is {list(base.shape)}, so its "
            "LoRA belongs to another embedding: leave this adapter out."
        )
    lora = adapter.modules.get(name.removesuffix(".weight"))
    if lora is not None and lora.magnitude is not None:
        raise UnsupportedError(
            f"{adapter.where}: its copy of tensor {name!r} is not equal to the base model's, and its LoRA there is a DoRA, which "
            "would scale the copy: leave this adapter out."
        )
    refuse_tied(adapter, name, target)
    twin = target.twin() if target.twin is not None else None
    return sorted({target.module, target.stored or target.module, *([f"{twin}.weight"] if twin else [])})


def _is_beside(adapter: Adapter, name: str) -> bool:
    """True for the weight of a module of which the adapter has a LoRA or trained rows: PEFT loads it into the base."""
    module = name.removesuffix(".weight")
    return module in adapter.modules or module in adapter.token_rows


def _is_unasked_copy(adapter: Adapter, name: str) -> bool:
    """True for an embedding that PEFT saved though the config does not ask for it."""
    asked = adapter.config.get("modules_to_save") or []
    return name.split(".")[-2] in (*OUTPUT_EMBEDDINGS, *INPUT_EMBEDDINGS) and name.split(".")[-2] not in asked


def _refuse_other_vocabulary(adapter: Adapter, name: str, find: Find) -> None:
    """Refuse an embedding that has other rows than the base's."""
    shape = tuple(adapter.tensors[name].shape)
    embedding = name.split(".")[-2] in (*OUTPUT_EMBEDDINGS, *INPUT_EMBEDDINGS)
    target = (
        find(name) if embedding else None
    )  # a head that the base lacks is looked for in its classes, which takes seconds
    if target is None or target.shape == shape or target.shape[1:] != shape[1:]:
        return
    raise UnsupportedError(
        f"{adapter.where}: its copy of tensor {name!r} {list(shape)} has {shape[0]} tokens, and the base model's "
        f"{list(target.shape)} has {target.shape[0]}: {OTHER_VOCABULARY}"
    )


def _check_taken(adapter: Adapter, name: str, find: Find) -> None:
    target = find(name)
    if target is None:
        return
    refuse_tied(adapter, name, target)
    if target.module != name:
        raise UnsupportedError(
            f"{adapter.where}: its tensor {name!r} is called {target.module!r} by the base model, so it cannot be taken as it is: "
            "drop it, or mix it."
        )


@dataclass(frozen=True)
class Names:
    """Names of the base's tensors that adapters change: by factors or as biases, as biases, as whole tensors, and those that a head
    replaces."""

    changed: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, deltas: Sequence[ModuleDelta], tensors: Sequence[TensorDelta], head: Iterable[str], find: Find
    ) -> Names:
        """The names of some changes; arguments as for `join_changes`."""
        return cls(
            frozenset(name for delta in deltas for name in delta.changes),
            frozenset(delta.bias_name for delta in deltas if delta.biases),
            frozenset(t.tensor for t in tensors),
            frozenset(target.module if (target := find(name)) else name for name in head),
        )

    def __or__(self, other: Names) -> Names:
        """Those of both."""
        return Names(
            self.changed | other.changed,
            self.biases | other.biases,
            self.tensors | other.tensors,
            self.replaced | other.replaced,
        )

    def refuse_both(self) -> None:
        """Refuse what cannot both be.

        Raises:
            UnsupportedError: a tensor that changes and is replaced, or a bias that is trained and mixed as a whole.
        """
        for name in sorted(self.tensors & self.biases) + sorted(self.replaced & self.changed):
            raise UnsupportedError(
                f"tensor {name!r}: one adapter changes it by a LoRA, or trains it as a bias, and another or the head replaces it "
                "as a whole, which cannot both be: leave one adapter out, or say --modules-to-save drop."
            )


def join_changes(
    deltas: Sequence[ModuleDelta], tensors: Sequence[TensorDelta], head: Iterable[str], find: Find
) -> list[ModuleDelta | TensorDelta]:
    """All changes in one list; where a weight changes by a LoRA and as a whole, each knows the other's adapters.

    Args:
        deltas: what the adapters change by factors.
        tensors: what the adapters change as whole tensors.
        head: names of tensors that replace the base's.
        find: as for `stack_tensors`.

    Raises:
        UnsupportedError: a tensor that changes and is replaced, or a bias that is trained and mixed as a whole.
    """
    Names.of(deltas, tensors, head, find).refuse_both()
    present: dict[str, set[int]] = {}
    for d in deltas:
        present.setdefault(d.module, set()).update(d.owners, d.biases)
    for t in tensors:
        present.setdefault(t.module, set()).update(t.saved)
    shared = {t.module for t in tensors}
    changes: list[ModuleDelta | TensorDelta] = [*deltas, *tensors]
    return [replace(c, others=frozenset(present[c.module])) if c.module in shared else c for c in changes]
