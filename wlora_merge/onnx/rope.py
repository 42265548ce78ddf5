"""Rotary positions whose frequencies depend on the length, in a graph that keeps nothing between two runs.

Transformers recomputes dynamic NTK's frequencies once a sequence is longer than any before, by asking for the number, which a
graph cannot do. Here they are computed in each run from the length that the run sees, by the same formula.

Source: `transformers.modeling_rope_utils.dynamic_rope_update`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DYNAMIC = "dynamic"
LONG = "longrope"


@contextlib.contextmanager
def stateless_rope(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model's dynamic rotary embeddings keep no frequencies of an earlier, longer sequence."""
    changed = [module for module in model.modules() if DYNAMIC in _kinds(module).values()]
    for module in changed:
        module.forward = _stateless(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own again


def lengths_that_matter(model: torch.nn.Module) -> set[int]:
    """The lengths behind which the model's rotary frequencies are others."""
    found = set()
    for module in model.modules():
        for layer_type, kind in _kinds(module).items():
            config: Any = module.config
            table = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
            if kind == DYNAMIC:
                found.add(int(config.max_position_embeddings))
            elif kind == LONG:
                found.add(int(table["original_max_position_embeddings"]))
    return found


def _kinds(module: torch.nn.Module) -> dict[str | None, str]:
    """Layer type -> kind of rotary embedding, of a module that is one; the layer type is None where it has one for all."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        return dict(kind)
    return {None: kind} if isinstance(kind, str) else {}


def _stateless(module: torch.nn.Module) -> Callable[..., Any]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original: Any = module.forward
    plain: Any = inspect.unwrap(type(module).forward)
    kinds = _kinds(module)

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        told = {} if layer_type is None else {"layer_type": layer_type}
        if kinds[layer_type] != DYNAMIC:
            return original(x, position_ids, **told)
        length: Any = position_ids.max() + 1
        frequencies, scaling = ROPE_INIT_FUNCTIONS[DYNAMIC](module.config, x.device, seq_len=length, **told)
        prefix = f"{layer_type}_" if layer_type else ""
        return plain(
            _Instead(module, {f"{prefix}inv_freq": frequencies, f"{prefix}attention_scaling": scaling}),
            x,
            position_ids,
            **told,
        )

    return forward


class _Instead:
    """A module with other values for some of its attributes."""

    def __init__(self, module: torch.nn.Module, values: dict[str, Any]) -> None:
        self._module, self._values = module, values

    def __getattr__(self, name: str) -> Any:
        """The value given, else the module's own."""
        return self._values[name] if name in self._values else getattr(self._module, name)
