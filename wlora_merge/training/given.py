"""Given: what a fit works on, opened and not yet loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import Adapter
from ..data.task import Task
from ..fit_options import FitCall, FitOptions
from ..io.hub import is_here
from ..models.base_model import BaseModel

if TYPE_CHECKING:
    from ..data.sources import Source


@dataclass(frozen=True)
class Given:
    """What a fit is given: the request, its options as the mixture to start from has them, base and adapters opened."""

    task: Task
    request: FitCall
    options: FitOptions
    base: BaseModel
    adapters: list[Adapter]
    read: tuple[Source, Source | None]
    """The shots and the evaluation data, which the request has by their names."""
    screened: bool = False
    """Whether the adapters were chosen on the shots."""

    @property
    def sources(self) -> list[Path]:
        """The local files and folders that it reads."""
        start = self.options.initial_logits
        files = (self.request.data, self.request.eval_data, start if isinstance(start, str) else None)
        return [
            self.base.folder, *(a.source.folder for a in self.adapters), *(Path(f) for f in files if f and is_here(f)),
        ]  # fmt: skip
