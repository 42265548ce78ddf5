"""What a check predicts is what a run takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.language_models import ROWS, fitted_lm
from support.language_models import llamas as llamas
from support.models import make_adapter, tiny_llama
from support.schemas import invoked
from support.shots import others

import wlora_merge.training.learner as training
from wlora_merge.cli.costs import REPORT
from wlora_merge.cli.main import main
from wlora_merge.data.labels import label_set
from wlora_merge.fit_options import fit_options
from wlora_merge.training.candidates import Situation


def test_a_check_predicts_as_many_judgements_as_the_fit_of_a_language_model_makes(
    llamas: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wlora_merge.cli.costs import _trainings
    from wlora_merge.data.examples import read_examples
    from wlora_merge.fit_options import FitRequest

    judge, judged = training.Learner.judge, list[int]()

    def counted(self: Any, rows: Any, *features: Any) -> Any:
        judged.append(len(rows))
        return judge(self, rows, *features)

    monkeypatch.setattr(training.Learner, "judge", counted)
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(row | {"prompt": f"{row['prompt']} w9"}) for row in ROWS))
    for given in ({}, {"eval_data": str(held)}):
        judged.clear()
        fitted_lm(llamas, folds=3, max_steps=None, new_adapter=None, **given)
        examples, recipe = (
            read_examples(llamas[2], task="causal-lm"),
            FitRequest(data="shots.jsonl", task="causal-lm", **given),
        )
        now = Situation(head=False, enough=True, generates=True)
        asked = fit_options({"granularity": "module", "folds": 3})
        _, passes = _trainings(asked, recipe, examples, None, ["a0", "a1"], now)
        assert sum(judged) == passes * len(ROWS)


def test_a_check_predicts_as_many_trainings_as_a_fit_makes(zoo: Zoo, tmp_path: Path) -> None:
    from wlora_merge.cli.costs import _trainings
    from wlora_merge.data.examples import read_examples
    from wlora_merge.fit_options import FitRequest

    examples = read_examples(zoo[2], task="text-classification")
    for given in (
        {"settings": 1},
        {"settings": 3, "method": "auto"},
        {"method": "best-single", "folds": 0},
        {"folds": 0},
        {"folds": 0, "interpolation": 0.5},
        {"settings": 2, "interpolation": 0.5},
        {"settings": 2, "eval_data": others(zoo[2], tmp_path)},
        {"settings": 1, "eval_data": others(zoo[2], tmp_path)},
        {"method": "uniform", "eval_data": others(zoo[2], tmp_path)},
    ):
        trained: list[str] = []
        first = lambda n, step, steps, *_, to=trained: to.append(n) if step == 1 < steps else None  # noqa: E731
        fitted(zoo, progress=first, **given)
        options = fit_options({"folds": 2, "max_steps": 4} | {k: v for k, v in given.items() if k != "eval_data"})
        fit_recipe = FitRequest(data="shots.csv", task="text-classification", eval_data=given.get("eval_data"))
        labels = label_set(examples.column("label"))
        now = Situation(head=True, enough=True, solved=True, left_out=True)
        learned, _ = _trainings(replace(options, new_adapter=0), fit_recipe, examples, labels, ["a0", "a1", "a2"], now)
        assert learned == len(trained) or (options.method == "auto" and learned == len(trained) + 1), (given, trained)


def test_a_check_predicts_what_an_export_takes_on_disk(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    exports = [{"format": "dense"}, {"format": "lora"}, {"format": "lora", "name": "l3", "rank": 3}]
    job = {"base": str(base), "adapters": list(map(str, folders)), "mix": {}, "exports": exports, "report": False}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(job | {"verify": False}))
    predicted = invoked("run", tmp_path / "r.yaml", "--check")["predicted"]
    reported = invoked("run", tmp_path / "r.yaml", "--check", "--set", "report=true")["predicted"]
    assert [a["disk"] - b["disk"] for a, b in zip(reported, predicted, strict=True)] == [REPORT] * 3
    done = invoked("run", tmp_path / "r.yaml", "--out", tmp_path / "tree")
    for row in predicted:
        folder = tmp_path / "tree" / row["step"].removeprefix("export ")
        weights = sum(p.stat().st_size for p in folder.iterdir() if p.name not in ("README.md", "wlora_merge.json"))
        assert row["disk"] == pytest.approx(weights, abs=4096), row  # headers and configs
        assert row["memory"] > 0
        assert row["seconds"] > 0
    assert set(done["exports"]) == {"dense", "lora", "l3"}


def test_a_check_takes_what_a_run_takes_of_tied_embeddings_and_residuals(tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["embed_tokens"])
    config = make_adapter(base, tmp_path / "pissa", 2, r=2, target_modules=["q_proj"]) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    job = {
        "base": "./base",
        "adapters": ["./a", "./pissa"],
        "mix": {"task": "causal-lm"},
        "exports": [{"format": "dense"}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(job | {"report": False}))
    refused = CliRunner().invoke(main, ["run", str(tmp_path / "r.yaml"), "--check"])
    assert refused.exit_code == 1
    assert "--base-is-residual NAME" in refused.stderr
    predicted = invoked("run", tmp_path / "r.yaml", "--check", "--set", "mix.residual=pissa")["predicted"]
    words = ["--set", "mix.residual=pissa", "--set", "verify=false", "--out", tmp_path / "tree"]
    invoked("run", tmp_path / "r.yaml", *words)
    written = tmp_path / "tree" / "dense" / "model.safetensors"
    assert predicted[0]["disk"] == pytest.approx(written.stat().st_size, abs=4096)


def test_a_check_predicts_a_fit(llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    base, folders = llama_zoo()
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps({"text": f"word {i} " * 8}) + "\n" for i in range(8)))
    fit = {"data": "./shots.jsonl", "task": "causal-lm"}
    job = {"base": str(base), "adapters": list(map(str, folders)), "fit": fit, "exports": [{"format": "dense"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(job))

    def row(**options: Any) -> dict[str, Any]:
        words = [word for key, value in options.items() for word in ("--set", f"fit.{key}={value}")]
        found: dict[str, Any] = invoked("run", tmp_path / "r.yaml", "--check", *words)["predicted"][0]
        return found

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "about 1 trainings of at most 40 steps" in row()["step"]
    assert "about 4 trainings of at most 40 steps" in row(folds=3)["step"]
    assert "about 1 trainings of at most 7 steps" in row(folds=0, max_steps=7)["step"]
    assert row(quantize="4bit")["memory"] < row()["memory"]
    assert row(device="cuda")["seconds"] is None
