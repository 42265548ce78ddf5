"""Attachment: what `attach` has done to a model, the owner of the layers and hooks that it put there.

The model holds it as `model.wlora`. Each target module holds its own factors as a child, `wlora`: what takes a module elsewhere, as
accelerate's device maps do, takes them along. The replicas of nn.DataParallel share the hooks of the model that they are copies
of, and each finds its own. The parameter `wlora_weights` is the model's own, so that its name in a state dict is that.

An attachment keeps no reference to its model, so that a model is freed when its last user lets it go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapters.adapter import Adapter
from ..adapters.deltas import ModuleDelta
from ..constants import NORMALIZE, PARAMETER, SCALE_PARAMETER
from ..errors import MixtureError
from .combined_adapter import as_combination
from .groups import make_groups, prefixes, rows_of
from .live_base import refuse_other_weights, take_up
from .live_model import LiveNames
from .mixture import NOT_ATTACHED, TRAINING_LOOP, Mixture, adapter_ref, base_ref
from .model_gains import ModelGains, close_gains, open_gains
from .stacked_lora import StackedLora, add_delta
from .weights import mixture_weights, uniform_start

if TYPE_CHECKING:
    from ..models.base_model import BaseModel
    from .new_lora import NewLora


@dataclass
class Attachment:
    """The adapters of a model, their weights, and the target modules on which their factors hang.

    Attributes:
        weights: [G, N], the model's parameter `wlora_weights`.
        delta_scale: a number, or the model's parameter `wlora_delta_scale`.
        groups: {group: [module, ...]}, in the order of the weights' rows.
        head: names of the parameters that are trained along.
        taken: names of the parameters that became one adapter's.
        layers: the target modules by name.
        new: the modules that a new adapter changes, with its factors.
        base_folder: of the base whose weights the model is known to have; None where it did not say which.
        stored: how the files of that base call each target module; empty where it is None.
        combined: the mixture of the adapters before the last, whose delta weight the last has; None of those that have files.
    """

    adapters: list[Adapter]
    granularity: str
    normalize: str
    temperature: float
    delta_scale: float | nn.Parameter
    weights: nn.Parameter
    groups: dict[str, list[str]]
    head: list[str]
    taken: list[str] = field(default_factory=list)
    modules_to_save: str | None = None
    base_folder: Path | None = None
    stored: dict[str, list[str]] = field(default_factory=dict)
    combined: Mixture | None = None
    layers: dict[str, nn.Module] = field(default_factory=dict)
    new: dict[str, NewLora] = field(default_factory=dict)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _new_hooks: list[RemovableHandle] = field(default_factory=list)
    _new_layers: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.row = rows_of(self.groups)
        self.gains: ModelGains

    # ---------------------------------------------------------------------------------------------- layers and hooks

    def hang(self, model: nn.Module, deltas: Sequence[ModuleDelta]) -> None:
        """Put the factors of each module on it, with the hook that adds their output; and the hooks that make their gains."""
        self.gains = ModelGains(self, deltas)
        self._hooks.append(model.register_forward_pre_hook(open_gains))
        self._hooks.append(model.register_forward_hook(close_gains, always_call=True))
        for delta in deltas:
            self.layers[delta.module] = layer = model.get_submodule(delta.module)
            layer.add_module("wlora", StackedLora(delta, layer, self))
            self._hooks.append(layer.register_forward_hook(add_delta, with_kwargs=True))

    def open_gains(self) -> None:
        """Make the gains of all modules, where and as each needs them, for a forward pass of the model."""
        self.gains.open([self.stacked(module).place(kind) for module, kind in self.gains.parts])

    def stacked(self, module: str) -> StackedLora:
        """The factors of one target module."""
        lora: StackedLora = self.layers[module].wlora  # type: ignore[assignment]
        return lora

    def hang_new(self, module: str, layer: nn.Module, lora: NewLora) -> None:
        """Put the new adapter's factors on a module, and the hook that adds their output after the mixture's."""
        from .new_lora import add_new_delta

        self.new[module] = lora
        self._new_layers.append(layer)
        layer.add_module("wlora_new", lora)
        self._new_hooks.append(layer.register_forward_hook(add_new_delta, with_kwargs=True))

    def remove_new(self) -> None:
        """Take the new adapter off the model."""
        for handle in self._new_hooks:
            handle.remove()
        for layer in self._new_layers:
            layer._modules.pop("wlora_new", None)
        self.new, self._new_hooks, self._new_layers = {}, [], []

    def remove(self) -> None:
        """Take everything off the target modules."""
        self.remove_new()
        for handle in self._hooks:
            handle.remove()
        for layer in self.layers.values():
            layer._modules.pop("wlora", None)  # the last may have none yet, where hanging it has failed
        self.layers, self._hooks = {}, []

    # -------------------------------------------------------------------------------------------------------- weights

    def regroup(self, granularity: str, normalize: str) -> nn.Parameter:
        """Take other groups or another normalization, at uniform composition; the new weights, which the model must have too.

        Raises:
            MixtureError: an unknown granularity or normalize.
        """
        check_normalize(normalize)
        modules = [m for group in self.groups.values() for m in group]
        self.groups = make_groups(modules, granularity, self.stored)
        self.granularity, self.normalize, self.row = granularity, normalize, rows_of(self.groups)
        self.weights = uniform_weights(len(self.groups), len(self.adapters), normalize, self.weights.device)
        self.gains.regroup()
        return self.weights

    # ----------------------------------------------------------------------------------------------------------- base

    def refuse_other_weights(self, model: nn.Module, base: BaseModel) -> None:
        """Refuse a model whose weights, but for those that a mixture keeps, are not those of its base's files.

        Raises:
            MixtureError: with the first tensor that differs.
        """
        refuse_other_weights(model, base, [*self.head, *self.taken])

    def take_up(self, base: BaseModel) -> None:
        """Take the parameters of a mixture that a base holds, where it is a checkpoint of an attached model.

        Raises:
            MixtureError: they are those of other adapters or groups.
        """
        take_up(base, self.weights, self.delta_scale if isinstance(self.delta_scale, nn.Parameter) else None)

    # -------------------------------------------------------------------------------------------------------- mixture

    def to_mixture(self, model: nn.Module, base: str | Path | BaseModel | None = None) -> Mixture:
        """The Mixture of the model that this is attached to; see `Mixture.from_model`."""
        from ..data.tasks import task_of
        from ..models.base_model import BaseModel, open_base

        model = whole_model(model)
        source = base or getattr(getattr(model, "config", None), "_name_or_path", "")
        if not source:
            raise MixtureError(
                "the model does not say which base it was loaded from: call Mixture.from_model(model, base=PATH)."
            )
        opened = source if isinstance(source, BaseModel) else open_base(source)
        _check_trained(model, self)
        names = self.stored
        if self.base_folder is None or self.base_folder.resolve() != opened.folder.resolve():
            self.refuse_other_weights(model, opened)
            names = LiveNames(model, opened).stored_modules(self.row)
        row = self._rows_of(names)
        groups = make_groups(row, self.granularity)
        logits = self.weights.detach().float().cpu()[[row[modules[0]] for modules in groups.values()]]
        scale = self.delta_scale
        head = self._trained(model)
        mixture = Mixture(
            base=base_ref(opened),
            adapters=[adapter_ref(a) for a in self.given],
            granularity=self.granularity,
            normalize=self.normalize,
            delta_scale=float(scale.detach() if isinstance(scale, torch.Tensor) else scale),
            groups=groups,
            mixture_weights=mixture_weights(logits, self.normalize, self.temperature),
            wlora_weights=logits,
            task=task_of(model),
            config=_config_of(model, opened) if head else {},
            modules_to_save=self.modules_to_save,
            data={"method": TRAINING_LOOP},
            prefixes=prefixes((in_file, live) for live, stored in names.items() for in_file in stored),
            head=head,
            head_tensors=opened.stored_names(head),
        )
        return mixture if self.combined is None else as_combination(mixture, self.combined)

    @property
    def given(self) -> list[Adapter]:
        """The adapters that have files: all, but for one that stands for their combination."""
        return self.adapters if self.combined is None else self.adapters[:-1]

    def _rows_of(self, names: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """How the files call the target modules -> the row of their weights."""
        rows: dict[str, int] = {}
        for module, g in self.row.items():
            for stored in names[module]:
                if rows.setdefault(stored, g) != g:
                    raise MixtureError(
                        f"target module {module!r} lies with another in {stored!r} of the base's files, and each has weights of its "
                        "own: attach to a model that was loaded from the base's folder, which gives them the same."
                    )
        return rows

    def _trained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of the head, and those taken from an adapter, as a file has them."""
        every = dict(model.named_parameters(remove_duplicate=False))
        trained = {id(every[name]) for name in self.head}  # a tied parameter has two names, and both sides changed
        named = [name for name, parameter in every.items() if id(parameter) in trained or name in self.taken]
        return {name: every[name].detach().cpu().clone() for name in sorted(named)}


def uniform_weights(groups: int, n: int, normalize: str, device: torch.device) -> nn.Parameter:
    """`wlora_weights` [groups, n] float32 at uniform composition."""
    return nn.Parameter(torch.tensor([uniform_start(n, normalize)] * groups, dtype=torch.float32, device=device))


def check_normalize(normalize: str) -> None:
    """Refuse an unknown `normalize`.

    Raises:
        MixtureError: with those that there are.
    """
    if normalize not in NORMALIZE:
        raise MixtureError(f"normalize is {normalize!r}, expected one of {', '.join(NORMALIZE)}.")


def attachment_of(model: nn.Module) -> Attachment:
    """What `attach` has done to this model.

    Raises:
        MixtureError: it has no adapters attached.
    """
    attachment = getattr(whole_model(model), "wlora", None)
    if not isinstance(attachment, Attachment):
        raise MixtureError(NOT_ATTACHED)
    return attachment


def whole_model(model: nn.Module) -> nn.Module:
    """The model that torch.compile has wrapped, or itself."""
    whole = getattr(model, "_orig_mod", model)
    return whole if isinstance(whole, nn.Module) else model


def _check_trained(model: nn.Module, attachment: Attachment) -> None:
    """Refuse a model whose mixture would not be what it computes."""
    if model.get_parameter(PARAMETER) is not attachment.weights:
        raise MixtureError(
            f"the model's {PARAMETER} is not the one that its layers use any more: load a state dict without assign=True."
        )
    if bool(attachment.weights.isnan().any()):
        raise MixtureError(f"the model's {PARAMETER} hold a NaN: the training diverged; use a smaller learning rate.")
    known = {id(model.get_parameter(name)) for name in (PARAMETER, *attachment.head)}  # a tied one has two names
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known and name != SCALE_PARAMETER and ".wlora" not in name:
            raise MixtureError(
                f"parameter {name!r} is trained, and belongs to no head, so no export would have it: name it in "
                "attach(head=[...]), or freeze it."
            )


def _config_of(model: nn.Module, base: BaseModel) -> dict[str, Any]:
    """The config keys in which a model with a head of its own differs from its base, as JSON has them."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    now = json.loads(config.to_json_string(use_diff=False))
    keys = ("id2label", "label2id", "problem_type", "pad_token_id")
    changed = {key: now[key] for key in keys if now.get(key) is not None and now[key] != base.config.get(key)}
    return {"architectures": [type(model).__name__], **changed}
