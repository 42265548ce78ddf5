"""Groups: which modules share mixture weights.

It knows names of modules. It knows no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ..constants import GRANULARITIES
from ..errors import MixtureError
from ..models.names import NUMERIC_PART, natural_key

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


def group_count(groups: Collection[str]) -> str:
    """How many groups there are, in words: `1 group`, `24 groups`."""
    return f"{len(groups)} group{'' if len(groups) == 1 else 's'}"


def prefixes(pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """The leading parts in which the file's and the model's names of all modules differ; empty where no one pair does.

    >>> prefixes([("lm_head", "lm_head"), ("encoder.layer.0", "bert.encoder.layer.0")])
    ('', 'bert.')
    """
    found = {_leading(in_file, in_model) for in_file, in_model in pairs}
    return (found.pop() if len(found) == 1 else None) or ("", "")


def _leading(in_file: str, in_model: str) -> tuple[str, str] | None:
    if f".{in_model}".endswith(f".{in_file}"):
        return "", in_model.removesuffix(in_file)
    return (in_file.removesuffix(in_model), "") if in_file.endswith(f".{in_model}") else None


def make_groups(
    modules: Iterable[str], granularity: str, stored: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """Group name -> modules, in natural order.

    Args:
        modules: their names.
        granularity: `module`, `layer` or `global`.
        stored: which tensors of the files hold a module. Those that share one (query, key and value in one tensor) share a group, as
            a mixture has one row for each tensor.

    Raises:
        MixtureError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise MixtureError(f"granularity is {granularity!r}, expected one of {', '.join(GRANULARITIES)}.")
    groups: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for module in sorted(set(modules), key=natural_key):
        tensors = stored.get(module, ()) if stored else ()
        leader = next((first[tensor] for tensor in tensors if tensor in first), module)
        first |= dict.fromkeys(tensors, leader)
        groups.setdefault(group_of(leader, granularity), []).append(module)
    return groups


def rows_of(groups: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Module -> the row of its group."""
    return {module: g for g, modules in enumerate(groups.values()) for module in modules}
