"""A killed fit, taken up again: the same bytes as one that was never interrupted; and states that are not to be trusted."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.processes import start

from wlora_merge.cli.main import main
from wlora_merge.errors import MixtureError, OutputError
from wlora_merge.training.resume import FitState, state_file

OPTIONS = {
    "max_steps": 6,
    "settings": 2,
    "new_adapter": None,
    "method": "auto",
    "prune_below": 0.01,
    "interpolation": 0.5,
    "pooling": "cls",
}


def killed(zoo: Zoo, out: Path, calls: int) -> None:
    """Run the fit in a process that SIGKILLs itself after so many steps of all its trainings."""
    base, folders, shots = zoo
    code = (
        "import os, signal, warnings; warnings.simplefilter('ignore')\n"
        "import wlora_merge, wlora_merge.training.resume as state\n"
        "state.SAVE_EVERY_S = 0.0\n"
        "calls = 0\n"
        "def progress(*_):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    if calls == {calls}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"wlora_merge.fit({str(base)!r}, {[str(f) for f in folders]!r}, {str(shots)!r}, 'text-classification', {str(out)!r}, "
        f"folds=2, resume=True, progress=progress, **{OPTIONS!r})"
    )
    process = start(code)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, errors
    assert not out.exists()
    assert state_file(out).is_file()


def test_a_fit_killed_three_times_and_resumed_has_the_bytes_of_one_that_was_not(zoo: Zoo, tmp_path: Path) -> None:
    fitted(zoo, tmp_path / "whole", **OPTIONS)
    out = tmp_path / "killed"
    total: list[int] = []
    fitted(zoo, progress=lambda *_: total.append(1), **OPTIONS)
    for calls in (8, 12, len(total) - 20):  # within the folds of fixed candidates, of the learned, at the end
        killed(zoo, out, calls)
    resumed: list[int] = []
    fitted(zoo, out, resume=True, progress=lambda *_: resumed.append(1), **OPTIONS)
    assert len(resumed) < 0.5 * len(total)
    for name in ("mixture.json", "mixture.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert set(os.listdir(tmp_path)) == {"whole", "killed"}


def test_the_state_holds_the_trained_tensors_and_nothing_of_the_model(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(zoo, out, 20)
    table = torch.load(state_file(out), weights_only=True)
    shapes = [tuple(t.shape) for t in table["current"]["state"]["tensors"]]
    assert set(shapes) == {(4, 3), (8, 32), (32, 8), (8, 48), (48, 8)}
    with pytest.raises(MixtureError, match="other inputs, options or versions"):
        fitted(zoo, out, resume=True, **(OPTIONS | {"seed": 5}))
    fitted(zoo, out, **OPTIONS)  # without --resume it starts anew
    assert not state_file(out).exists()


def test_a_stopped_fit_names_its_state_and_the_next_one_says_that_it_starts_over(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders, shots = zoo
    out = tmp_path / "out"
    words = ["fit", "--base", base, *(w for f in folders for w in ("--adapter", f)), "--data", shots, "--out", out]
    words += ["--task", "text-classification", "--max-steps", "2", "--folds", "2", "--settings", "1", "--no-report"]

    @contextmanager
    def stopping() -> Iterator[Callable[..., None]]:
        calls: list[None] = []

        def progress(*_: object) -> None:
            calls.append(None)
            if len(calls) == 3:
                raise KeyboardInterrupt

        yield progress

    with monkeypatch.context() as patch:
        patch.setattr("wlora_merge.cli.commands.fit_progress", stopping)
        stopped = CliRunner().invoke(main, [str(w) for w in words])
    assert stopped.exit_code == 130, stopped.output
    assert f"{state_file(out)} holds what has been trained: the same command with --resume goes on." in stopped.stderr
    resumed = CliRunner().invoke(main, [str(w) for w in [*words, "--resume"]])
    assert resumed.exit_code == 0, resumed.output
    assert "starts over" not in resumed.stderr
    torch.save({"fingerprint": "of another", "done": {}, "current": None}, state_file(out))
    again = CliRunner().invoke(main, [str(w) for w in [*words, "--force"]])
    assert again.exit_code == 0, again.output
    assert again.stderr.count("starts over") == 1


@pytest.mark.parametrize("other", [{"modules_to_save": "drop"}, {"columns": {"text": "text"}}, {"seed": 1}])
def test_a_state_is_not_taken_up_with_other_inputs_or_options(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, object]
) -> None:
    def stop(*_: object) -> None:
        if state_file(tmp_path / "m").is_file():
            raise KeyboardInterrupt

    monkeypatch.setattr("wlora_merge.training.resume.SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fitted(zoo, tmp_path / "m", progress=stop, max_steps=2)
    with pytest.raises(MixtureError, match="other inputs, options or versions"):
        fitted(zoo, tmp_path / "m", resume=True, max_steps=2, **other)


def test_a_state_is_not_taken_up_with_other_logits_in_the_file(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        if state_file(tmp_path / "m").is_file():
            raise KeyboardInterrupt

    def write(*logits: float) -> Path:
        (tmp_path / "start.json").write_text(json.dumps({"all": dict(zip(("a0", "a1", "a2"), logits, strict=True))}))
        return tmp_path / "start.json"

    monkeypatch.setattr("wlora_merge.training.resume.SAVE_EVERY_S", 0.0)
    options = {"max_steps": 2, "granularity": "global"}
    with pytest.raises(KeyboardInterrupt):
        fitted(zoo, tmp_path / "m", progress=stop, initial_logits=write(1, 2, 3), **options)
    with pytest.raises(MixtureError, match="other inputs, options or versions"):
        fitted(zoo, tmp_path / "m", resume=True, initial_logits=write(1, 2, 4), **options)
    fitted(zoo, tmp_path / "m", resume=True, initial_logits=write(1, 2, 3), **options)


def test_of_two_fits_to_one_out_one_wins_and_the_other_says_so_before_it_trains(zoo: Zoo, tmp_path: Path) -> None:
    out, said = tmp_path / "deep" / "out", []

    def second(*_: object) -> None:
        if not said:
            with pytest.raises(OutputError) as caught:
                fitted(zoo, out, progress=lambda *_: said.append("trained"), **OPTIONS)
            said.append(str(caught.value))

    fitted(zoo, out, progress=second, max_steps=2, settings=1)
    assert said == [
        f"{out}: another run (process {os.getpid()}) is writing to it; wait until it has ended or choose another --out."
    ]
    assert os.listdir(out.parent) == ["out"]
    killed(zoo, tmp_path / "next", 5)
    fitted(zoo, tmp_path / "next", **OPTIONS)  # the lock of a killed fit holds nobody up
    assert sorted(os.listdir(tmp_path)) == ["deep", "next"]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.file), "w"))


def test_a_state_that_holds_code_or_nonsense_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    file = tmp_path / "out.fit-state"
    torch.save({"fingerprint": "f", "done": Evil(tmp_path / "ran"), "current": None}, file)
    for content in (None, pickle.dumps(Evil(tmp_path / "ran")), b"", b"PK\x03\x04nonsense", bytes(range(256))):
        if content is not None:
            file.write_bytes(content)
        before = file.read_bytes()
        for resume in (True, False):
            with pytest.raises(MixtureError, match="no state of a fit"):
                FitState(file, "f", resume=resume)
        assert file.read_bytes() == before
    assert not (tmp_path / "ran").exists()
