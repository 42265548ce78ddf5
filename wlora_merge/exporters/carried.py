"""What an export has beside its weights: the files that the base carries, and the config with the keys that the mixture changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BaseModelError
from ..mixture.inputs import Inputs
from ..models.base_model import BaseModel
from ..models.config_spellings import older_spellings
from ..models.files import INDEX
from .dense import OutputFile, changed_config, index_bytes, with_dtype


def write_beside(
    inputs: Inputs,
    files: Sequence[OutputFile],
    out: Path,
    dtype: str | None,
    config: Mapping[str, Any],
) -> None:
    """Write what a dense folder has beside its weights: index, every file that the base carries, and its config.

    Args:
        inputs: the mixture and its base.
        files: the weight files.
        out: the folder.
        dtype: that the weights are cast to; None: the base's own.
        config: keys that change beside the mixture's own.
    """
    index = index_bytes(inputs.base, files)
    if index is not None:
        (out / INDEX).write_bytes(index)
    changes = dict(inputs.mixture.config) | dict(config)
    changes |= inputs.untied.config
    if dtype is not None:
        changes = with_dtype(inputs.base, changes, dtype)
    changes |= older_spellings({**inputs.base.config, **changes})
    copy_carried(inputs.base, out)
    (out / "config.json").write_bytes(changed_config(inputs.base, changes))


def carried_bytes(base: BaseModel) -> int:
    """Bytes of the files that a base carries beside its weights."""
    return sum(path.stat().st_size for path in base.carried_files().values())


def copy_carried(base: BaseModel, out: Path, *, config: bool = True) -> None:
    """Copy what a base carries beside its weights: tokenizer, processor, generation config, chat template."""
    for name, path in base.carried_files().items():
        if config or str(name) not in ("config.json", "generation_config.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with open(out / name, "xb") as stream:
                stream.writelines(_chunks(path))


def _chunks(file: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time.

    Raises:
        BaseModelError: it cannot be read.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 20):
                yield chunk
    except OSError as error:
        raise BaseModelError(f"{file}: cannot be read ({error.strerror or error}).") from error
