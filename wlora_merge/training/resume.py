"""A fit's resumable state: one file beside the output, `OUT.fit-state`, with what has been trained and nothing of the model.

It holds the judgements of finished trainings, and of the one under way the trained tensors, the optimizer and the random
state. It is replaced in one step, so a kill at any moment leaves the old one or the new one. It is read with `weights_only`, so
no code in it is ever run. It goes when the fit is done.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..constants import FIT_STATE
from ..errors import MixtureError, OutputError
from ..io.staging import reserved
from ..progress import LOG

SAVE_EVERY_S = 5.0


class FitState:
    """The state of one fit.

    Args:
        file: where it is kept; None keeps none.
        fingerprint: of all that decides the result; a state with another is not taken up.
        resume: take up what a killed run left; otherwise start anew.

    Raises:
        MixtureError: what lies there is no state of a fit, or, to be taken up, that of another.
    """

    def __init__(self, file: Path | None, fingerprint: str, *, resume: bool) -> None:
        self.file, self.last = file, time.monotonic()
        self.table: dict[str, Any] = {"fingerprint": fingerprint, "done": {}, "current": None}
        if file is None:
            return
        found = _read_state(file) if os.path.lexists(file) else None
        if not resume:
            if found:
                LOG.info("%s: a fit to this folder was stopped; it starts over, as --resume is not given.", file)
        elif found is None:
            LOG.info("%s: there is no stopped fit to take up; it starts from the beginning.", file)
        elif found["fingerprint"] != fingerprint:
            raise MixtureError(
                f"{file}: belongs to a fit with other inputs, options or versions, so it would not give the same result: delete "
                "it, or run without --resume."
            )
        else:
            self.table = found

    def done(self, key: str) -> Any:
        """What a finished training left; None if it has not finished."""
        return self.table["done"].get(key)

    def finish(self, key: str, value: Any) -> None:
        """Remember what a training gave, as plain containers and tensors."""
        self.table["done"][key], self.table["current"] = value, None
        self._write()

    def current(self, key: str) -> Any:
        """The state of the training under way, if it is this one."""
        saved = self.table["current"]
        return saved["state"] if saved and saved["key"] == key else None

    def save_current(self, key: str, state: Callable[[], dict[str, Any]]) -> None:
        """Save the training under way, if the last save is long enough ago."""
        if self.file is None or time.monotonic() - self.last < SAVE_EVERY_S:
            return
        self.table["current"] = {"key": key, "state": state()}
        self._write()

    def remove(self) -> None:
        """The fit is done."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            self._part(self.file).unlink(missing_ok=True)  # of a killed run

    @staticmethod
    def _part(file: Path) -> Path:
        return file.with_name(f"{file.name}.part")

    def _write(self) -> None:
        import torch

        if self.file is None:
            return
        part, memory = self._part(self.file), io.BytesIO()
        torch.save(self.table, memory)  # torch's own writer to a file does not survive a full disk
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as stream:
                stream.write(memory.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, self.file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"{self.file}: the fit's state cannot be written ({error.strerror}).") from error
        self.last = time.monotonic()


def state_file(out: str | Path) -> Path:
    """Where the state of a fit to `out` lies."""
    folder = Path(os.path.abspath(out))
    return folder.with_name(folder.name + FIT_STATE)


@contextmanager
def only_fit(out: str | Path | None) -> Iterator[None]:
    """Keep other fits to `out`, which would share the state, from running until the block ends; None keeps no state.

    Raises:
        OutputError: another fit to `out` runs.
    """
    if out is None:
        yield
        return
    with reserved(Path(out), state_file(out)):
        yield


def _read_state(file: Path) -> dict[str, Any]:
    import torch

    again = "move it away, or choose another --out, as a fit keeps its state there."
    try:
        table = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # the reader of pickles raises all kinds; whatever it is, the file is at fault
        raise MixtureError(
            f"{file}: is no state of a fit ({type(error).__name__} while reading it): {again}"
        ) from error
    if not isinstance(table, dict) or set(table) != {"fingerprint", "done", "current"}:
        raise MixtureError(f"{file}: is no state of a fit: {again}")
    return table
