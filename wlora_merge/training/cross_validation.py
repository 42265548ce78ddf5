"""The folds: parts of the shots that are held out in turn, stratified, equal shots together.

This room knows the classes of the examples alone, and imports nothing heavy.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

FEWEST = 4
"""Different examples without which nothing is held out, and no new adapter is trained by default: two or three teach it nothing that
lasts, and tell nothing of what to keep (recipes/bench_fit/README.md)."""
FOLDS = 3


def fold_indices(
    classes: Sequence[Sequence[str]], twins: Sequence[int], folds: int | None, seed: int
) -> list[list[int]]:
    """Parts of the examples, each to be held out once; classes spread evenly, the only one of a class never held out.

    An example of several classes counts for its rarest one, as in iterative stratification (Sechidis et al. 2011).

    Args:
        classes: those of each example.
        twins: for each example the first that is equal to it; they are held out together.
        folds: how many parts at most; None: `FOLDS`.
        seed: decides every draw.

    Returns:
        up to `folds` parts; none where fewer than two examples can be held out, or fewer than `FEWEST` are different.
    """
    count = Counter(name for index in set(twins) for name in classes[index])
    groups: dict[str, list[int]] = {}
    for index in sorted(set(twins)):
        groups.setdefault(min(classes[index], key=lambda name: (count[name], name), default=""), []).append(index)
    generator = random.Random(seed)
    usable = []
    for key in sorted(groups):
        generator.shuffle(groups[key])
        usable += groups[key] if count[key] != 1 else []
    folds = min(FOLDS if folds is None else folds, len(usable))
    parts = [set(usable[fold::folds]) for fold in range(folds)] if folds > 1 and len(set(twins)) >= FEWEST else []
    return [[index for index, twin in enumerate(twins) if twin in part] for part in parts]


def enough(classes: Sequence[Sequence[str]], twins: Sequence[int], *, head: bool) -> bool:
    """Whether the examples are enough for a new adapter: `FEWEST` different ones, with a new head two per class too, on average."""
    distinct = [name for index in set(twins) for name in classes[index]]
    return len(set(twins)) >= FEWEST and (not head or len(distinct) >= 2 * len(set(distinct)))
