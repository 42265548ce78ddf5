"""What a fit logs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.language_models import fitted_lm
from support.language_models import llamas as llamas
from support.shots import others

from wlora_merge.errors import UnsupportedError


def test_report_to_logs_the_final_training_with_accelerates_trackers(
    llamas: Zoo, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import tracking

    logged: list[tuple[int, dict[str, float]]] = []

    started: list[bool] = []

    class Memory(tracking.GeneralTracker):  # type: ignore[misc]
        def start(self) -> None:  # accelerate opens its files here
            started.append(True)

        name = "memory"
        requires_logging_directory = False
        tracker: ClassVar[None] = None

        def __init__(self, run_name: str) -> None:
            super().__init__(_blank=True)

        def log(self, values: dict[str, float], step: int, **_: Any) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "memory", Memory)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["memory"])
    fitted_lm(llamas, report_to="memory", device="cpu")
    assert [step for step, _ in logged] == [1, 2, 3, 4, -1]
    assert started == [True]
    assert set(logged[0][1]) == {"loss", "weight/a0", "weight/a1"}
    logged.clear()
    fitted(zoo, folds=0, interpolation=0.5, report_to="memory", device="cpu")  # whose head is trained before it
    assert [step for step, _ in logged] == [1, 2, 3, 4, -1]
    logged.clear()
    mixture = fitted_lm(llamas, eval_data=others(llamas[2], tmp_path), report_to="memory", device="cpu")
    assert [step for step, _ in logged] == [1, 2, 3, 4, -1]
    mean = dict(zip(("weight/a0", "weight/a1"), mixture.mixture_weights.mean(0).tolist(), strict=True))
    assert logged[3][1] == pytest.approx(mean | {"loss": mixture.metrics["history"]["learned"][-1][1]})
    with pytest.raises(UnsupportedError, match=r"finds no such tracker.*memory"):
        fitted_lm(
            llamas, report_to="nothing", device="cpu", progress=lambda *_: pytest.fail("trained before it refused")
        )
