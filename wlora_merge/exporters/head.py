"""The trained head in an export's own files: how its model calls their tensors, where a writer has put it, and back out of there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.keys import PEFT_PREFIX
from ..errors import UnsupportedError, VerifyError
from ..io.safetensors_file import read_header, read_tensor

if TYPE_CHECKING:
    import torch

    from ..models.base_model import BaseModel


def names_with_head(
    base: BaseModel, task: str, config: Mapping[str, Any], names: Iterable[str]
) -> dict[str, str | None]:
    """How the class that has the head saves tensors that the base, or a plan on it, calls so; None for those that it lacks.

    A bare encoder's files call a layer `encoder.layer.0`, and the classifier on it `bert.encoder.layer.0`; the head of another task
    has no place in it. Transformers 5 loads either; other programs want what `save_pretrained` gives.

    Args:
        base: the opened base.
        task: what the head is for.
        config: keys that the export's config has otherwise than the base's.
        names: of tensors.
    """
    from ..data.tasks import get_task
    from ..models.loading import class_for
    from ..models.module_tree import ModuleTree, empty_model

    auto, _ = class_for(base.folder, get_task(task).auto_class(), or_named=True)
    make = getattr(auto, "from_config", auto)
    return ModuleTree(empty_model(base.folder, make, **config), base.entries).saved_names(names)


def left_out_note(names: Mapping[str, str | None], architecture: str) -> str:
    """Which tensors of the base the model with the head does not have, in words; empty where it has all."""
    gone = sorted(name for name, written in names.items() if written is None)
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return f"Left out, as a {architecture} has no such tensor: `{gone[0]}`{more}." if gone else ""


def read_stored_head(folder: Path, names: Collection[str], base: BaseModel) -> dict[str, torch.Tensor]:
    """The trained head out of safetensors, under its parameter names; what replaces a tensor of the base has that one's.

    Raises:
        VerifyError: it is not there.
    """
    stored = {entry: name for name, entry in base.stored_names(sorted(names)).items()} | {name: name for name in names}
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, entry in read_header(file).entries.items():
            if (name := stored.get(key.removeprefix(PEFT_PREFIX))) is not None:
                found[name] = read_tensor(entry)
    if missing := sorted(set(names) - set(found)):
        raise VerifyError(f"{folder}: the tensor {missing[0]!r} of its trained head is not there.")
    return found


def locate_head(folder: Path, head: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Where the tensors of a head lie in a traced graph: name -> [name of the initializer, whether it is transposed there].

    A product of three dimensions has its weight transposed under a name of its own, and of two equal tensors a graph keeps one. What
    is not found as a whole, as it went into a product of constants, is left out.
    """
    import numpy as np
    import onnx

    wanted = {name: tensor.detach().float().cpu().numpy() for name, tensor in head.items()}
    shapes = {shape for value in wanted.values() for shape in (value.shape, value.T.shape)}
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for file in sorted((folder / "onnx").glob("*.onnx"))[:1]
        for tensor in (onnx.load(str(file)).graph.initializer if head else ())
        if tuple(tensor.dims) in shapes
    }
    places = {
        name: next(
            (
                [at, transposed]
                for at, array in sorted(stored.items(), key=lambda item: item[0].removeprefix("model.") != name)
                for transposed, form in ((False, value), (True, value.T))
                if np.array_equal(array, form.astype(array.dtype))
            ),
            None,
        )
        for name, value in wanted.items()
    }
    return {name: place for name, place in places.items() if place is not None}


def read_graph_head(file: Path, names: Collection[str], places: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
    """The trained head out of a graph, from where `locate_head` found it.

    Raises:
        VerifyError: it is not there.
        UnsupportedError: the graph has it in no form that can be read back.
    """
    if not names:
        return {}
    import onnx
    import torch

    if missing := sorted(set(names) - set(places)):
        raise UnsupportedError(
            f"{file}: the tensor {missing[0]!r} of the trained head does not stand in the graph as a whole."
        )
    stored = {tensor.name: tensor for tensor in onnx.load(str(file)).graph.initializer}
    found = {}
    for name in sorted(names):
        at, transposed = places[name]
        if at not in stored:
            raise VerifyError(f"{file}: the tensor {name!r} of its trained head is not there: export again.")
        array = onnx.numpy_helper.to_array(stored[at])
        found[name] = torch.from_numpy((array.T if transposed else array).copy())
    return found
