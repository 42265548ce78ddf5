"""What a mixture remembers of its fit, and says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fits import Zoo, fitted
from support.fits import zoo as zoo

from wlora_merge.training.candidates import UNIFORM, single


def test_the_note_says_first_what_did_better_and_what_was_kept(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "wlora_merge.training.selection.rivals", lambda *_: ({single("a1"): (0.1, 0.05)}, {UNIFORM: (-0.01, 0.02)})
    )
    learned = fitted(zoo).metrics
    assert (learned["better"], learned["as_good"]) == (["a1"], ["uniform"])
    better, good, kept = (
        learned["note"].index(w) for w in ("a1 alone (+0.100 ±", "uniform (-0.010 ±", "Kept: learned;")
    )
    assert better < good < kept
    assert "Kept: learned; --select best keeps a1 alone." in learned["note"]
    best = fitted(zoo, select="best").metrics
    assert best["kept"] == "a1"
    assert (best["better"], best["as_good"]) == (["a1"], ["uniform"])
    assert "Better than learned in accuracy: a1 alone (+0.100 ± 0.050)." in best["note"]
    assert "Kept: a1 alone." in best["note"]
    alone = fitted(zoo, method="best-single").metrics
    assert f"Kept: {alone['kept']} alone." in alone["note"]


def test_options_that_come_to_nothing_are_said(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\nw1 w2,low\nw9 w8,high\n")
    options = {"settings": 5, "new_adapter": None, "new_adapter_learning_rate": 1e-4}
    note = fitted((*zoo[:2], tmp_path / "one.csv"), **options).metrics["note"]
    assert (
        "Without effect: --settings (there were no folds), --new-adapter-learning-rate (no new adapter was kept)."
        in note
    )
    assert (
        "Without effect"
        not in fitted(zoo, **(options | {"new_adapter": 2, "settings": 1, "max_steps": 1})).metrics["note"]
    )
