"""How a base model calls its tensors and modules: names of one spelling found among those of another.

It maps strings to strings. It knows no files, no tensors and no library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import WloraMergeError

OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "proj_out", "output_projection", "output", "decoder")
"""How models call their output embedding, the one that a checkpoint with tied embeddings lacks."""
INPUT_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "shared", "tok_embeddings")

MODULE_TENSORS = ("weight", "bias")
"""The tensors by which the files know a module: its weight or, where it has none, its bias."""
NUMERIC_PART = re.compile(r"[0-9]{1,18}")
"""A part of a dotted name that counts: a layer, an expert."""


class NameResolver:
    """Finds names of one spelling among names of another that differs by a leading component (`bert.`, `model.`)."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._without_first: dict[str, list[str]] = {}
        for name in self._names:
            self._without_first.setdefault(name.partition(".")[2], []).append(name)

    def find(self, name: str) -> str | None:
        """The one known name that is `name`, or differs from it by one leading component; None when there is none.

        Raises:
            WloraMergeError: when several known names fit.
        """
        if name in self._names:
            return name
        shorter = name.partition(".")[2]
        found = [*self._without_first.get(name, []), *([shorter] if shorter in self._names else [])]
        if len(found) > 1:
            raise WloraMergeError(f"{name!r} fits several names of the base model: {', '.join(sorted(found))}.")
        return found[0] if found else None


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key that puts layer 2 before layer 10."""
    return tuple((int(part), "") if NUMERIC_PART.fullmatch(part) else (-1, part) for part in name.split("."))
