"""A base with the vocabulary of one adapter (`--resize-vocab NAME`), and all adapters at its size.

An adapter that was trained on a resized base has embeddings with more rows than the base's or, where the base's table is padded,
with fewer. Rows that the base lacks are no deltas. They are taken from the adapter that the user names, and stand behind the base's
own. They are those that it was trained on where its file has them, else those that it trained. Rows that it lacks are cut. So the
base is what `resize_token_embeddings` made of it before the training, and has that adapter's tokenizer.

On the base so resized every adapter mixes as ever. One of another size is brought to this size first: rows that it lacks stay as
they are, and so do those of tokens that are others in its own tokenizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import AdapterError, UnsupportedError, WloraMergeWarning
from ..io.safetensors_file import Entry
from ..io.tensors import equal
from ..models.base_model import BaseModel
from ..models.names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS
from ..models.vocabulary import Vocabulary, vocabulary, with_vocabulary
from .adapter import Adapter
from .factors import Factors, Stored, TokenRows, numbers
from .targets import tensors_of
from .tokenizers import tokenizer_beside, tokenizer_files, tokens

if TYPE_CHECKING:
    import torch


def resized(base: BaseModel, adapters: Sequence[Adapter], name: str | None) -> tuple[BaseModel, list[Adapter]]:
    """The base with the vocabulary that adapter `name` was trained with and its tokenizer, and the adapters at that size.

    Args:
        base: the opened base model.
        adapters: N adapters, in mixture order.
        name: of one of the adapters; None gives all as they are.

    Raises:
        AdapterError: no adapter has that name, its vocabulary is the base's, or its tokenizer has more tokens than its embeddings.
        UnsupportedError: a quantized base; the adapter lacks the added rows of a tensor that grows, or has no tokenizer; a DoRA of
            embeddings of another size.
    """
    if name is None:
        return base, list(adapters)
    named = next((a for a in adapters if a.name == name), None)
    if named is None:
        raise AdapterError(f"--resize-vocab {name}: expected one of {', '.join(a.name for a in adapters)}.")
    if base.quantized:
        raise UnsupportedError(
            f"--resize-vocab {name}: {base.folder} is quantized ({base.quantized}), so it exports one LoRA alone, which has no "
            "room for another vocabulary: give the original 16-bit base."
        )
    rows = _Tables(named, vocabulary(base)).rows
    if rows is None:
        raise AdapterError(
            f"--resize-vocab {name}: {named.where} carries no embedding with more rows than the base's, or with fewer: leave that "
            f"option out; `wlora-merge export --tokenizer-from {name}` carries its tokenizer."
        )
    made = vocabulary(base, rows)
    result = with_vocabulary(made, _added(_Tables(named, made)))
    result.tokenizer = tokenizer_files(named, rows, "--resize-vocab")
    _check_ids(result, named, rows)
    return result, [_brought(_Tables(a, made), result, a is named) for a in adapters]


def other_vocabulary(base: BaseModel, adapter: Adapter) -> int | None:
    """How many rows the vocabulary has that an adapter was trained with; None where it is the base's, as far as its files say.

    Raises:
        AdapterError: its tensors are of several sizes.
    """
    modules = [*adapter.modules, *adapter.token_rows, *(name.rpartition(".")[0] for name in adapter.tensors)]
    if not any(module.rpartition(".")[2] in (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS) for module in modules):
        return None
    try:
        made = vocabulary(base)
    except UnsupportedError:  # of a class that is not known, or has no vocabulary of its own
        return None
    return _Tables(adapter, made).rows


@dataclass
class _Tables:
    """What an adapter has of the tensors that follow the vocabulary, by the model's names of them."""

    adapter: Adapter
    made: Vocabulary

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Its whole tensors."""
        found = {self.made.name_of(name): tensor for name, tensor in self.adapter.tensors.items()}
        return {name: tensor for name, tensor in found.items() if name is not None}

    @cached_property
    def token_rows(self) -> dict[str, TokenRows]:
        """Its trained rows."""
        found = {self.made.name_of(f"{name}.weight"): rows for name, rows in self.adapter.token_rows.items()}
        return {name: rows for name, rows in found.items() if name is not None}

    @property
    def rows(self) -> int | None:
        """The rows of its embeddings where these are not the base's; a trained row behind the base's last tells it too.

        Raises:
            AdapterError: tensors of several sizes.
        """
        sizes = set(self._sizes())
        if len(sizes) > 1:
            raise AdapterError(
                f"{self.adapter.where}: carries embeddings of several sizes, {sorted(sizes)} rows: leave it out."
            )
        return sizes.pop() if sizes else self.last if self.last > self.made.rows_before else None

    @property
    def last(self) -> int:
        """One more than the last token whose rows it trained by themselves."""
        return max((i + 1 for rows in self.token_rows.values() for i in rows.indices), default=0)

    def _sizes(self) -> Iterator[int]:
        """The rows of its tensors and factors that are not the base's."""
        own = {name: entry.shape for name in self.made.shapes if (entry := self.made.stored(name)) is not None}
        for name, tensor in self.tensors.items():
            if name in own and tensor.shape[1:] == own[name][1:] and tensor.shape[0] != own[name][0]:
                yield tensor.shape[0]
        for module, factors in self.adapter.modules.items():
            shape = own.get(self.made.name_of(f"{module}.weight") or "")
            if shape is not None and (size := _size(factors)) != shape[0]:
                yield size


def _added(named: _Tables) -> dict[str, torch.Tensor]:
    """The rows that the base lacks, by the name of its tensor or, of one that is no longer tied, the model's.

    Raises:
        UnsupportedError: the adapter's file lacks them, or the base has no tensor that they stand behind.
    """
    made, added = named.made, dict[str, "torch.Tensor"]()
    tree, where = made.tree, f"--resize-vocab {named.adapter.name}"
    for name in sorted(made.shapes, key=lambda name: tree.stored(name) is None):
        own, source = tree.stored(name), made.stored(name)
        if source is None:
            raise UnsupportedError(f"{where}: {made.base.folder} has no tensor {name!r} to add rows to.")
        rows = _rows_behind(named, name, source)
        same = added.get(source.name)
        if rows is not None and (own is not None or same is None or not equal(same, rows)):
            added[own.name if own else name] = rows
    return added


def _rows_behind(named: _Tables, name: str, own: Entry) -> torch.Tensor | None:
    """The rows of one tensor that the base lacks; None where it lacks none.

    Of a tied tensor the file may have the rows under another of its names: PEFT loads a copy of a base weight into the one tensor
    that both are. A tensor of `modules_to_save` is none.
    """
    import torch

    shape, first = named.made.shapes[name], own.shape[0]
    if shape[0] == 1:  # a BART's bias of its logits, which resize_token_embeddings fills with zeros
        return torch.zeros(1, max(0, shape[-1] - own.shape[-1])) if shape[-1] > own.shape[-1] else None
    if shape[0] <= first:
        return None
    names = [name, *sorted(named.made.tree.ties.of(name) - {name})]
    for other in names:
        tensor = named.tensors.get(other)
        if tensor is not None and tuple(tensor.shape) == shape and (other == name or not _asked(named.adapter, other)):
            return numbers(tensor)[first:]
    for other in names:
        values = named.token_rows.get(other)
        if values is not None and set(range(first, shape[0])) <= set(values.indices):
            return numbers(_token_rows(values, range(first, shape[0])).values)
    # where a LoRA is of an embedding, or copies are there, PEFT has saved all that it saves
    done = named.tensors or any(named.made.name_of(f"{module}.weight") for module in named.adapter.modules)
    anew = "" if done else "save it anew with save_pretrained(folder, save_embedding_layers=True), or "
    raise UnsupportedError(
        f"--resize-vocab {named.adapter.name}: {named.adapter.where} lacks tensor {name!r} {list(shape)}, of which the base has "
        f"{first} rows, so that the others are not known: {anew}give the base as it was resized for the training "
        "(model.save_pretrained before it), without that option."
    )


def _asked(adapter: Adapter, name: str) -> bool:
    """Whether the config's `modules_to_save` names the module of a tensor, which is then trained apart from what it is tied to."""
    module = name.rpartition(".")[0]
    return any(f".{module}".endswith(f".{asked}") for asked in adapter.config.get("modules_to_save") or [])


def _check_ids(base: BaseModel, adapter: Adapter, rows: int) -> None:
    """Refuse a smaller vocabulary that lacks a token which the base's config names."""
    before = base.vocabulary.rows_before if base.vocabulary is not None else rows
    for table in (base.config, *(part for part in base.config.values() if isinstance(part, dict))):
        for key, value in table.items():
            if key.endswith("_token_id") and type(value) is int and rows <= value < before:
                raise UnsupportedError(
                    f"--resize-vocab {adapter.name}: {adapter.where} has a vocabulary of {rows} rows, and {base.folder}/config.json "
                    f"says {key} {value}, which is not among them: set that key there to the tokenizer's own."
                )


# ------------------------------------------------------------------------------------------------ all at one size


def _brought(tables: _Tables, base: BaseModel, named: bool) -> Adapter:
    """An adapter at the vocabulary's size: rows of tokens that it lacks, or knows as others, stay as the base's.

    Raises:
        UnsupportedError: a DoRA of an embedding of another size.
    """
    adapter, made = tables.adapter, tables.made
    shared = made.rows if named else _shared(tables, base)
    find = tensors_of(base)

    def whole(name: str, tensor: Stored) -> Stored:
        """A whole tensor at that size."""
        found, target = made.name_of(name), find(name)
        if found is None or target is None or target.read is None:
            return tensor
        return _whole(tensor, target.read, shared, made.shapes[found])

    def factors(module: str, own: Factors) -> Factors:
        """Factors at that size."""
        found = made.name_of(f"{module}.weight")
        return own if found is None else _factors(adapter, module, own, shared, made.shapes[found][0])

    def token_rows(module: str, own: TokenRows) -> TokenRows:
        """The rows of tokens that are there, and are deltas."""
        if made.name_of(f"{module}.weight") is None:
            return own
        kept = _token_rows(own, [i for i in own.indices if i < shared])
        target = find(f"{module}.weight")
        if not named or target is None or target.read is None:
            return kept
        there = target.read()  # rows that the base has from here are no deltas
        new = [
            i
            for i, row in zip(kept.indices, numbers(kept.values), strict=True)
            if i < made.rows_before or not equal(there[i], row)
        ]
        return _token_rows(kept, new)

    rows = {name: token_rows(name, own) for name, own in adapter.token_rows.items()}
    return replace(
        adapter,
        tensors={name: whole(name, tensor) for name, tensor in adapter.tensors.items()},
        biases={name: whole(f"{name}.bias", tensor) for name, tensor in adapter.biases.items()},
        modules={name: factors(name, own) for name, own in adapter.modules.items()},
        token_rows={name: own for name, own in rows.items() if own.indices},
    )


def _shared(tables: _Tables, base: BaseModel) -> int:
    """How many of the first tokens are the same for an adapter and for the base as another one has resized it."""
    made, rows = tables.made, tables.rows
    known = tokens({str(name): path for name, path in made.base.carried_files().items()})
    first = max(known) + 1 if known else min(made.rows_before, made.rows)
    shared = min(made.rows, rows or made.rows_before)
    one, other = tokens(tokenizer_beside(tables.adapter)), tokens(base.tokenizer)
    shared = min([shared, *(i for i in one.keys() & other.keys() if i >= first and one[i] != other[i])])
    if not one and rows not in (None, made.rows):
        shared = min(shared, first)
    if shared < max(rows or 0, tables.last):
        warnings.warn(
            f"{tables.adapter.where}: its rows of the tokens from {shared} on are left out, as the export has the tokens of another "
            f"adapter: to mix on its own, say --resize-vocab {tables.adapter.name}.",
            WloraMergeWarning,
            stacklevel=4,
        )
    return shared


def _whole(tensor: Stored, read: Callable[[], torch.Tensor], shared: int, shape: tuple[int, ...]) -> Stored:
    """A whole tensor [n, ...] at that shape: its first `shared` rows, and behind them the base's."""
    import torch

    if tensor.shape[1:] != shape[1:] or (tensor.shape[0] == shape[0] and shared >= shape[0]):
        return tensor
    shared, first, own = min(shared, tensor.shape[0], shape[0]), numbers(tensor), read()
    dtype = torch.promote_types(first.dtype, own.dtype)
    return torch.cat([first[:shared].to(dtype), own[shared:].to(dtype)])


def _factors(adapter: Adapter, module: str, own: Factors, shared: int, rows: int) -> Factors:
    """Factors of an embedding of `rows` rows: those of its first `shared` tokens, and zeros behind them."""
    size = _size(own)
    if size == rows and shared >= rows:
        return own
    if own.magnitude is not None:
        raise UnsupportedError(
            f"{adapter.where}: its DoRA of {module!r} is of {size} tokens, and the vocabulary here has {rows}: a DoRA scales by "
            "norms of all rows, so leave this adapter out."
        )
    lora_A, lora_B = numbers(own.stored_A), numbers(own.stored_B)
    if own.embedding:
        return replace(own, stored_A=_zeros_behind(lora_A.T, shared, rows).T.contiguous())
    bias = None if own.bias is None else _zeros_behind(numbers(own.bias), shared, rows)
    return replace(own, stored_B=_zeros_behind(lora_B, shared, rows), bias=bias)


def _size(factors: Factors) -> int:
    """The rows of the embedding that factors are of."""
    return factors.stored_A.shape[1] if factors.embedding else factors.stored_B.shape[0]


def _zeros_behind(tensor: torch.Tensor, shared: int, rows: int) -> torch.Tensor:
    """The first `shared` rows of a tensor, and zeros up to `rows`."""
    import torch

    kept = tensor[: min(shared, rows)]
    return torch.cat([kept, kept.new_zeros(rows - len(kept), *kept.shape[1:])])


def _token_rows(own: TokenRows, indices: Sequence[int]) -> TokenRows:
    """The trained rows of some of the tokens."""
    return TokenRows(tuple(indices), numbers(own.values)[[own.indices.index(i) for i in indices]])
