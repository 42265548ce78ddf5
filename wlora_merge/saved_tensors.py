"""What becomes of the whole tensors that adapters carry: `modules_to_save`, and an embedding's copy beside its LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .adapters import Adapter
from .base_model import OUTPUT_EMBEDDINGS
from .deltas import ModuleDelta, TensorDelta
from .errors import AdapterError, UnsupportedError
from .names import natural_key
from .targets import Find, Target, refuse_tied

if TYPE_CHECKING:
    import torch


INPUT_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "shared", "tok_embeddings")


def stack_tensors(
    adapters: Sequence[Adapter], choice: str | None, replaced: Iterable[str], find: Find
) -> tuple[list[TensorDelta], dict[str, torch.Tensor]]:
    """What becomes of the whole tensors (`modules_to_save`) that adapters carry.

    Args:
        choice: an adapter's name takes that one's, `drop` leaves all out, `mix` mixes them as deltas against the base's; None
            refuses any that is not `replaced`.
        replaced: names of the parameters that a trained head replaces.
        find: as for `stack`, for whole tensor names.

    Returns:
        The deltas, and the tensors taken as they are, under the names that the adapter gives them.

    Raises:
        UnsupportedError: tensors that nobody said what to do with, or that cannot be mixed; a copy of the weight of one of
            the adapter's own target modules (PEFT saves that of an embedding) which is not equal to the base's.
    """
    taken: dict[str, torch.Tensor] = {}
    saved: dict[str, dict[int, torch.Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if choice not in (None, "drop", "mix", *(a.name for a in adapters)):
        raise AdapterError(
            f"--modules-to-save {choice}: expected drop, mix, or one of {', '.join(a.name for a in adapters)}."
        )
    for n, adapter in enumerate(adapters):
        for name in sorted(set(adapter.tensors) - set(replaced)):
            if _is_base_copy(adapter, name, find):
                continue
            if choice is None:
                raise UnsupportedError(
                    f"{adapter.where}: it carries its own copy of tensor {name!r}: say --modules-to-save NAME to take one adapter's, "
                    "drop to leave them out, or mix to mix them against the base's."
                )
            if choice == adapter.name:
                _check_taken(adapter, name, find)
                taken[name] = adapter.tensors[name]
            if choice == "mix":
                target = _whole_target(adapter, name, find)
                saved.setdefault(target.module, {})[n] = adapter.tensors[name]
                shapes[target.module] = target.shape
    return [
        TensorDelta(name, shapes[name], saved[name], len(adapters)) for name in sorted(saved, key=natural_key)
    ], taken


def _whole_target(adapter: Adapter, name: str, find: Find) -> Target:
    target, shape = find(name), tuple(adapter.tensors[name].shape)
    if target is None or target.shape != shape:
        got = "is not in the base model" if target is None else f"is {list(target.shape)} there and {list(shape)} here"
        raise UnsupportedError(
            f"{adapter.where}: its tensor {name!r} {got}, so it cannot be mixed: take one adapter's, or drop it."
        )
    refuse_tied(adapter, name, target)
    return target


def _is_base_copy(adapter: Adapter, name: str, find: Find) -> bool:
    """True for the copy of a target module's base weight that PEFT saves beside an embedding's LoRA, which changes nothing."""
    if name.removesuffix(".weight") not in adapter.modules:
        return False
    target = find(name)
    if target is None or target.read is None:
        return False
    saved, base = adapter.tensors[name], target.read()
    if saved.shape != base.shape or not bool((saved.double() == base.double()).all()):
        raise UnsupportedError(
            f"{adapter.where}: its copy of tensor {name!r} {list(saved.shape)} is not equal to the base model's {list(base.shape)}, "
            "so its LoRA belongs to another or a resized embedding: leave this adapter out."
        )
    return True


def _check_taken(adapter: Adapter, name: str, find: Find) -> None:
    target, shape = find(name), tuple(adapter.tensors[name].shape)
    if target is None:
        return
    embedding = name.split(".")[-2] in (*OUTPUT_EMBEDDINGS, *INPUT_EMBEDDINGS)
    if embedding and len(target.shape) == 2 and target.shape[1:] == shape[1:] and target.shape != shape:
        raise UnsupportedError(
            f"{adapter.where}: its {name!r} has {shape[0]} tokens, and the base model's has {target.shape[0]}: a vocabulary is never "
            "resized here: resize the base (model.resize_token_embeddings), save it with the adapter's tokenizer, and give that."
        )
    refuse_tied(adapter, name, target)
    if target.module != name:
        raise UnsupportedError(
            f"{adapter.where}: its tensor {name!r} is called {target.module!r} by the base model, so it cannot be taken as it is: "
            "drop it, or mix it."
        )


def refuse_overlap(
    deltas: Sequence[ModuleDelta], tensors: Sequence[TensorDelta], head: Iterable[str], find: Find
) -> None:
    """Refuse a tensor that changes in two ways: by a LoRA or as a trained bias, and as a whole.

    Args:
        head: names of tensors that replace the base's.
        find: as for `stack_tensors`.

    Raises:
        UnsupportedError: names the tensor.
    """
    low_rank = {name for delta in deltas for name in delta.changes}
    found = [(name, find(name)) for name in head]
    whole = [*(t.tensor for t in tensors), *(target.module if target else name for name, target in found)]
    for name in whole:
        if name in low_rank:
            raise UnsupportedError(
                f"tensor {name!r}: one adapter changes it by a LoRA, or trains it as a bias, and another or the head replaces it as "
                "a whole, which cannot both be: leave one adapter out, or say --modules-to-save drop."
            )
