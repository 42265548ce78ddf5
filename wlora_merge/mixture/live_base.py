"""Whether a model in memory is what its base's files say, and the mixture that a checkpoint of an attached model holds.

An export adds to the base's files, so what a model has beside them would be lost. Each tensor is compared in a few rows: a merged
adapter, or a step of training, changes them all. Quantized weights are rounded, and not compared.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import nn

from ..constants import PARAMETER, SCALE_PARAMETER
from ..errors import MixtureError, UnsupportedError
from ..io.hub import folder_here
from ..io.safetensors_file import FLOATING, Entry, opened, read_rows, read_tensor, torch_dtype
from ..models.base_model import BaseModel, open_base
from ..models.loading import is_made
from ..models.module_tree import ModuleTree, Part, whole
from .live_model import FLOATS

ROWS = 8
"""How many rows are compared of a tensor; of one that is made of several, of the first and the last of these."""
WHOLE = 1 << 14
"""A tensor of at most so many numbers is compared in whole."""
ANEW = "load the base anew and attach to it, or save this model (model.save_pretrained(FOLDER)) and load it from there"


def base_of(model: nn.Module) -> BaseModel | None:
    """The base that a model was loaded from, where it says so and is on this machine.

    Raises:
        BaseModelError: its files are broken.
    """
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    folder = folder_here(name, getattr(config, "_commit_hash", None)) if name else None
    return open_base(folder) if folder is not None else None


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model in which PEFT has wrapped modules: what its adapter adds there is in no file of the base.

    Raises:
        MixtureError: with the first such module.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = f"module {name!r} is" if name else "the model is"
            raise MixtureError(
                f"{where} a {type(module).__name__} of PEFT's, whose adapter no export would have: load the base anew, and "
                "give that adapter to attach along with the others."
            )


def refuse_other_weights(model: nn.Module, base: BaseModel, trained: Collection[str]) -> None:
    """Refuse a model whose weights are not those of its base's files.

    Args:
        model: loaded from the base; of one that is no transformers model only tensors of the files' names are compared.
        base: the opened base.
        trained: names of the parameters that a mixture keeps itself (a head, tensors taken from an adapter).

    Raises:
        MixtureError: with the first tensor that differs, or those of a head that the files lack.
    """
    from transformers import PreTrainedModel

    if base.quantized:
        return
    tree = ModuleTree(model, base.entries) if isinstance(model, PreTrainedModel) else None
    kept = {id(model.get_parameter(name)) for name in trained}
    every = dict(model.named_parameters(remove_duplicate=False))
    new = []
    for name, tensor in {**every, **dict(model.named_buffers())}.items():
        own = name in (PARAMETER, SCALE_PARAMETER) or ".wlora" in name
        if own or id(tensor) in kept or tensor.dtype not in FLOATS:
            continue
        if parts := _parts(name, base, tree):
            _compare(name, tensor.detach(), parts)
        elif tree is not None and name in every and _is_new(model, name, tree):
            new.append(name)
    if new:
        modules = sorted({name.rpartition(".")[0] or name for name in new})
        raise MixtureError(
            f"{base.folder}: has no tensor {new[0]!r}, so this model drew it anew, and an export would lack it: train it along, as "
            f"attach(model, adapters, head={modules}), or load a base that has it."
        )


def take_up(base: BaseModel, weights: nn.Parameter, scale: nn.Parameter | None) -> None:
    """Give the parameters of a mixture the values that a checkpoint of an attached model holds.

    Args:
        base: the opened checkpoint; nothing happens where it is none.
        weights: `wlora_weights` [groups, adapters].
        scale: `wlora_delta_scale`, where it is learned.

    Raises:
        MixtureError: the checkpoint has other groups or adapters, or a learned delta_scale where none is asked for.
    """
    for name, entry in base.mixture.items():
        parameter = weights if name == PARAMETER else scale
        if parameter is None or tuple(parameter.shape) != entry.shape:
            expected = (
                f"{list(parameter.shape)} [groups, adapters]" if parameter is not None else "no learned delta_scale"
            )
            raise MixtureError(
                f"{entry.file}: {name!r} is {list(entry.shape)}, expected {expected}: attach the adapters that this checkpoint was "
                "trained with, with the same granularity and delta_scale, or load the base that it was trained on."
            )
        with torch.no_grad():
            parameter.copy_(read_tensor(entry))


def _parts(name: str, base: BaseModel, tree: ModuleTree | None) -> list[Part]:
    """The tensors of the files of which a model's tensor is made; empty where there are none, or more than rows were moved."""
    if tree is None:
        entry = base.entries.get(name)
        return [] if entry is None else [whole(entry)]
    try:
        if tree.holds(name):
            return tree.parts(name)
    except UnsupportedError:
        return []
    entry = base.find_tensor(name)  # under the prefix of another class
    return [whole(entry)] if entry is not None else []


def _is_new(model: nn.Module, name: str, tree: ModuleTree) -> bool:
    """Whether a parameter was drawn when the model was loaded: neither in the files, nor tied, nor computed.

    A bare model's pooler counts for nothing: an export has none, as its base has none.
    """
    bare = getattr(model, "base_model", None) is model and name.startswith("pooler.")
    return not (bare or tree.holds(name) or tree.ties.of(name) or is_made(model, name))


def _compare(name: str, tensor: torch.Tensor, parts: list[Part]) -> None:
    """Refuse a tensor of a model that is not what the files hold, in a few rows."""
    fits = tensor.numel() % (parts[0].width or 1) == 0
    matrix = tensor.reshape(-1, parts[0].width if fits else tensor.numel())
    rows = sum(len(part.rows) for part in parts)
    for part in (parts[0], parts[-1]):
        if part.entry.dtype not in FLOATING:
            continue
        width = part.width
        if len(part.rows) == part.entry.rows and len(parts) == 1 and part.entry.shape != tuple(tensor.shape):
            _refuse(name, part.entry, f"{list(tensor.shape)} in the model, {list(part.entry.shape)} in the file")
        if (len(matrix), matrix.shape[1]) != (rows, width):
            _refuse(name, part.entry, f"{list(tensor.shape)} in the model, {rows} rows of {width} in the files")
        chosen = _sampled_rows(len(part.rows), width)
        live = matrix[part.rows[chosen].to(matrix.device)].cpu()
        if not _are_as_loaded(live, _read_sample(part.entry, [part.start + row for row in chosen], width)):
            _refuse(name, part.entry, "not the file's numbers")


def _refuse(name: str, entry: Entry, what: str) -> None:
    raise MixtureError(
        f"{entry.file}: tensor {name!r} of the model is {what}, and an export adds to the file's: it would not be this model. An "
        f"adapter may have been merged into it, or it was trained or resized: {ANEW}."
    )


def _sampled_rows(count: int, width: int) -> list[int]:
    """Rows from the first to the last, all of a small tensor."""
    few = count if count * width <= WHOLE else min(ROWS, count)
    return sorted({round(i * (count - 1) / max(few - 1, 1)) for i in range(few)})


def _read_sample(entry: Entry, rows: list[int], width: int) -> torch.Tensor:
    """Some rows of a tensor of the files, [n, width] in its own dtype."""
    size = width * torch_dtype(entry.dtype).itemsize
    data, descriptor = bytearray(size * len(rows)), opened(entry)
    try:
        for place, row in enumerate(rows):
            read_rows(descriptor, entry, memoryview(data)[place * size : (place + 1) * size], row * size)
    finally:
        os.close(descriptor)
    return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).reshape(len(rows), width)


def _are_as_loaded(live: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a model's numbers are the file's, as they are in the model's dtype, or were when it was loaded in 16 bits."""
    loaded = (stored.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(stored.to(dtype).to(live.dtype), live) for dtype in loaded)
