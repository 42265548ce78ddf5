"""A model in memory, as a fit finds its target modules in it: their names, shapes and weights.

Which layers a fit cannot train through is said here too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..adapters.targets import Find, Known, Target
from ..errors import MixtureError, UnsupportedError, WloraMergeError
from ..models.base_model import BaseModel
from ..models.module_tree import ModuleTree
from ..models.names import NameResolver
from ..models.tied_embeddings import tied_to_input

CHANNELS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
"""Layers whose output has its rows in dimension 1."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose numbers are the weights themselves; an 8-bit float comes with scales."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LiveNames:
    """A model's own names of tensors that an adapter, or the files of its base, may call otherwise.

    Args:
        model: a PyTorch model.
        base: whose files it was loaded from; None where they are not known.
    """

    def __init__(self, model: nn.Module, base: BaseModel | None) -> None:
        self.model, self.base = model, base
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._names = NameResolver(self.parameters)

    @cached_property
    def tree(self) -> ModuleTree | None:
        """The model's module tree over the files; None of a model that is not one of transformers."""
        from transformers import PreTrainedModel

        entries = self.base.entries if self.base is not None else {}
        return ModuleTree(self.model, entries) if isinstance(self.model, PreTrainedModel) else None

    def find(self, name: str) -> str | None:
        """The model's tensor: the one that it reads from the files' tensor that the base calls so. None where there is none.

        Of a name that the base does not know, it is the one of that name, with or without the model prefix, or as transformers
        renames it.

        Raises:
            WloraMergeError: the model has a tensor of just that name, and reads the files' tensor of that name as another; or several
                tensors fit.
        """
        own, in_files = name in self.parameters, self.base is not None and name in self.base.entries
        if own and not in_files:
            return name
        entry = self.base.find_tensor(name) if self.base is not None and self.tree is not None else None
        if entry is None or self.tree is None:
            return self._names.find(name) or self._names.find(self._renamed(name))
        read = self.tree.place(entry.name)
        if own and read not in (None, name):
            raise WloraMergeError(
                f"{name!r} fits two tensors of {type(self.model).__name__}: its own of that name, and {read!r}, which it reads from "
                "the base's files under that name: rename it in the adapter."
            )
        return name if own else read

    def _renamed(self, name: str) -> str:
        """What transformers makes of a name from before a renaming, as older adapters have it."""
        return self.tree.rename(name)[0] if self.tree is not None else name

    def stored_modules(self, modules: Iterable[str]) -> dict[str, list[str]]:
        """The model's modules -> how the files call each; several where they hold its rows in several tensors.

        Raises:
            MixtureError: the files have no tensor for one.
            UnsupportedError: transformers makes its tensor by more than moving rows.
        """
        found = {name: self._stored(name) for name in modules}
        for name, stored in found.items():
            if not stored and self.base is not None:
                raise MixtureError(
                    f"{self.base.folder}: has no tensor for target module {name!r}: is this the model's base?"
                )
        return found

    def are_stored(self, modules: Iterable[str]) -> bool:
        """Whether the files hold all of these modules of the model, so that a mixture can name what changes them."""
        with suppress(MixtureError, UnsupportedError):
            self.stored_modules(modules)
            return True
        return False

    def _stored(self, module: str) -> list[str]:
        own = self.tree.stored_modules(module) if self.tree is not None else []
        return own or (self.base.find_modules(module) if self.base is not None else [])


def live_modules(tensors: LiveNames) -> Find:
    """Finds target modules in a live model, by the names of its tensors."""
    model, base = tensors.model, tensors.base
    layers = dict(model.named_modules())
    without_weight = NameResolver(name for name in layers if name and f"{name}.weight" not in tensors.parameters)
    parameters = _names_of_parameters(model)

    def find(name: str) -> Target | None:
        """The module of that name, as `LiveNames` finds its weight; None where there is none."""
        weight = tensors.find(f"{name}.weight")
        found = weight.removesuffix(".weight") if weight and weight.endswith(".weight") else without_weight.find(name)
        if found is None and ".experts." in name:
            raise UnsupportedError(
                f"target module {name!r}: the model has its experts in one tensor, and a fit does not train through that yet: "
                "`wlora-merge mix` and an export fold it."
            )
        if found is None and base is not None and base.find_modules(name):
            raise UnsupportedError(
                f"target module {name!r}: the base has it, and the {type(model).__name__} that is loaded of it has not, so nothing "
                "is trained through it: leave out the adapters that change it, or use `wlora-merge mix`."
            )
        if found is None:
            return None
        layer = layers[found]
        return Target(
            found,
            _weight_shape(found, layer),
            len(parameters[id(layer.weight)]) > 2,
            partial(_weight, layer),
            partial(tied_to_input, model, layer),
            lambda: isinstance(layer, nn.Embedding),
        )

    return Known(find, lambda: [name for name, layer in layers.items() if hasattr(layer, "weight")])


def live_tensors(names: LiveNames) -> Find:
    """Finds whole tensors in a live model."""
    parameters = names.parameters
    shared = _names_of_parameters(names.model)

    def find(name: str) -> Target | None:
        """The parameter of that name, as `LiveNames` finds it; None where there is none."""
        found = names.find(name)
        if found is None or found not in parameters:  # a buffer, as BART's final_logits_bias
            return None
        one = parameters[found]
        others = [name for name in shared[id(one)] if name != found]
        twin = (lambda: others[0].removesuffix(".weight")) if others else None
        return Target(found, tuple(one.shape), len(others) > 1, lambda: one.detach().cpu(), twin)

    return find


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter -> all its names."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name)
    return found


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give one parameter a value of its own: where it was tied to another, that one keeps the old value."""
    module, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    value = torch.empty_like(old).copy_(tensor.detach())
    setattr(model.get_submodule(module), leaf, nn.Parameter(value.detach(), requires_grad=old.requires_grad))


def _weight_shape(name: str, layer: nn.Module) -> tuple[int, ...]:
    attention = (
        nn.MultiheadAttention,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    )  # it never calls its out_proj
    if isinstance(layer, attention) or not isinstance(getattr(layer, "weight", None), torch.Tensor):
        raise UnsupportedError(
            f"target module {name!r} is a {type(layer).__name__}, which a fit does not train through: `wlora-merge mix` and a dense "
            "export fold a MultiheadAttention."
        )
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)  # a quantized linear packs its weight
    if isinstance(layer, nn.modules.conv._ConvNd):
        _check_convolution(name, layer)
    weight = layer.weight
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()


def _check_convolution(name: str, layer: nn.modules.conv._ConvNd) -> None:
    """Refuse a convolution whose LoRA PEFT trains as another function than its merge: its lora_A has kernel, stride and
    padding of the layer, and neither its groups nor its dilation nor its padding mode."""
    spread = layer.dilation != (1,) * len(layer.kernel_size) and layer.kernel_size != (1,) * len(layer.kernel_size)
    padded = layer.padding_mode != "zeros" and layer.kernel_size != (1,) * len(layer.kernel_size)
    if not isinstance(layer, CONVOLUTIONS) or layer.groups > 1 or spread or padded:
        raise UnsupportedError(
            f"target module {name!r} is {layer}, and a LoRA of it cannot be folded: PEFT's has no groups, dilation or padding mode, "
            "so leave this adapter out."
        )


def _weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer computes with, on the CPU; a quantized one dequantized."""
    weight = layer.weight
    if isinstance(weight, torch.Tensor) and weight.dtype in FLOATS:
        return weight.detach().cpu()
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        raise UnsupportedError(
            f"{type(layer).__name__}: a {str(weight.dtype).removeprefix('torch.')} weight means numbers only with its scales, which "
            "are not read: load the original model."
        )
    from peft.utils.integrations import dequantize_module_weight

    dequantized: torch.Tensor = dequantize_module_weight(layer).detach().cpu()
    return dequantized


def check_bias(name: str, layer: nn.Module) -> None:
    """Refuse a trained bias of a layer that does more with its bias than add it to its output."""
    from transformers.pytorch_utils import Conv1D

    adds = isinstance(layer, (nn.Linear, Conv1D, nn.LayerNorm, *CHANNELS)) or type(layer).__name__.endswith("Norm")
    if not adds or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UnsupportedError(
            f"module {name!r} is a {type(layer).__name__}, whose trained bias a fit cannot mix: leave that adapter out, or use "
            "`wlora-merge mix`."
        )


def refuse_uncalled(model: nn.Module, layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> None:
    """Refuse a model that multiplies with a target module's weight without calling the module (Mamba's dt_proj): what is attached
    there would do nothing, and an export would.

    Args:
        model: the PyTorch model.
        layers: the target modules by name.
        forward: runs the model once.

    Raises:
        UnsupportedError: with the module's name.
    """
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    try:
        with _Operands() as operands:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if name not in called and id(layer.weight) in operands.seen:
            raise UnsupportedError(
                f"target module {name!r}: {type(model).__name__} uses its weight without calling it, so a fit does not train through "
                "it: leave out the adapters that change it, or use `wlora-merge mix`."
            )


class _Operands(TorchFunctionMode):
    """Remembers which parameters torch's functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the parameters among the arguments, and call the function; what only asks for an attribute uses no numbers."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.update(
                id(value) for value in (*args, *(kwargs or {}).values()) if isinstance(value, nn.Parameter)
            )
        return result
