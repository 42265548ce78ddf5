"""Groups: which modules share mixture weights.

It knows names of modules. It knows no weights.
"""

from __future__ import annotations

from .models.names import NUMERIC_PART

GLOBAL_GROUP = "all"


def group_of(module: str, granularity: str) -> str:
    """The group of a module: itself, the prefix through its first numeric part, or `all`.

    >>> group_of("model.layers.3.self_attn.q_proj", "layer")
    'model.layers.3'
    """
    if granularity == "global":
        return GLOBAL_GROUP
    if granularity == "layer":
        parts = module.split(".")
        for i, part in enumerate(parts):
            if NUMERIC_PART.fullmatch(part):
                return ".".join(parts[: i + 1])
    return module
