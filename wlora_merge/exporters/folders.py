"""Which folders of ours lie in a folder. It imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from ..constants import MANIFEST_FILE, MIXTURE_FILE


def below(folder: Path) -> dict[str, str]:
    """The exports and mixtures in a folder that `run` wrote: path -> `export` or `mixture`."""
    kinds = {MANIFEST_FILE: "export", MIXTURE_FILE: "mixture"}
    return {
        str(folder / child.name): kind
        for child in (sorted(folder.iterdir()) if folder.is_dir() else ())
        for file, kind in kinds.items()
        if (child / file).is_file()
    }
