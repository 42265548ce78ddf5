"""Rows of an embedding that adapters trained (`trainable_token_indices`), as factors.

A change of k rows is a product of rank k: one factor picks the rows, the other holds their changes. So token rows fold, fit
and export as any LoRA does, and nothing else needs to know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError
from .adapter import Adapter
from .factors import Factors, TokenRows, numbers
from .targets import OTHER_VOCABULARY

if TYPE_CHECKING:
    from .targets import Target


def with_token_rows(adapter: Adapter, find: Callable[[str], Target]) -> Adapter:
    """The adapter with its token rows among its modules, as factors of scaling 1.

    Where the base ties the embedding, its twin changes in the same way, as PEFT has it.

    Args:
        adapter: an adapter with trained rows of embeddings.
        find: the target of a module's name; it raises where there is none.

    Raises:
        UnsupportedError: a module that also has a LoRA, or a token that the base's vocabulary lacks.
    """
    modules = dict(adapter.modules)
    for name, rows in adapter.token_rows.items():
        target = find(name)
        twin = target.twin() if target.twin is not None else None
        for module in (name, *([twin] if twin and twin not in adapter.token_rows else [])):
            if module in modules:
                raise UnsupportedError(
                    f"{adapter.where}: it has a LoRA and trained tokens of {module!r}, which cannot both be: leave it out."
                )
            modules[module] = _row_factors(adapter, module, rows, find(module))
    return replace(adapter, modules=modules, token_rows={})


def _row_factors(adapter: Adapter, module: str, rows: TokenRows, target: Target) -> Factors:
    """lora_A @ lora_B of the rows' changes [k, dim] float64 and of ones that pick them [vocab, k] float32."""
    import torch

    if target.read is None or len(target.shape) != 2 or target.shape[1] != rows.values.shape[1]:
        raise AdapterError(
            f"{adapter.where}: its token rows of {module!r} are {list(rows.values.shape)}, and the base weight is "
            f"{list(target.shape)}: this adapter was trained on another base."
        )
    vocabulary = target.shape[0]
    if beyond := [index for index in rows.indices if index >= vocabulary]:
        raise UnsupportedError(
            f"{adapter.where}: it trained token {beyond[0]} of {module!r}, and the base's vocabulary has {vocabulary}: "
            f"{OTHER_VOCABULARY}"
        )
    indices = torch.tensor(rows.indices)
    change = numbers(rows.values).double() - target.read()[indices].cpu().double()
    pick = torch.zeros(len(indices), vocabulary)
    pick[torch.arange(len(indices)), indices] = 1
    if target.is_embedding():
        return Factors(pick, change.T.contiguous(), 1.0, embedding=True)
    return Factors(change, pick.T.contiguous(), 1.0, embedding=False)
