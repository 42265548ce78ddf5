"""The speed table compares ways to compute the same: the loss of uniform composition, and the gradient of its logits."""

from __future__ import annotations

import io
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.paths import ROOT
from transformers import AutoModelForCausalLM

from wlora_merge.mixture.attach import attach

RECIPE = ROOT / "recipes" / "bench_fit"
IDS = torch.tensor([[5, 17, 3, 80, 41, 2], [9, 9, 60, 1, 7, 33]])


def test_what_the_speed_table_compares_gives_one_loss_and_one_gradient(
    llama_zoo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    import speed

    base, _ = llama_zoo()
    folders = speed.make_adapters(base, base.parent / "speed", 3)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=IDS, labels=IDS).loss.item()
    losses, gradients = [], []
    for contender in speed.CONTENDERS[1:]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
        if contender == "separate paths":
            model, before_step = speed.separate_paths(model, folders)
            before_step()
        else:
            attach(model, folders)
        if contender == "folded once a step":
            speed.fold_once_a_step(model)
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        if contender != "separate paths":  # whose logits are its own
            loss.backward()
            gradients.append(model.wlora_weights.grad)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert abs(losses[0] / plain - 1) > 1e-5  # the adapters do something
    stacked, folded = gradients
    assert stacked.abs().max() > 0
    assert torch.allclose(folded, stacked, rtol=1e-3, atol=1e-5 * float(stacked.abs().max()))


def test_a_step_launches_at_most_half_more_than_the_bases(
    llama_zoo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    import launches

    base, _ = llama_zoo()
    for adapters, dtype, *counted, _ in launches.launch_rows(base, base.parent / "speed"):
        floor, stacked = (int(number.replace(",", "")) for number in counted)
        assert floor > 200, (adapters, dtype)
        assert floor < stacked <= 1.5 * floor, (adapters, dtype)


def test_what_launches_is_counted_once() -> None:
    launches = runpy.run_path(str(RECIPE / "launches.py"))["launches"]
    x, weight, bias = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)

    def step() -> None:
        product = torch.nn.functional.linear(x, weight, bias)  # one
        (product.view(2, 2, 5).transpose(0, 1).reshape(4, 5) * 2).sum(0)  # a copy, a product, a sum

    assert launches(step) == 4


def test_the_lead_of_the_fit_is_over_the_cells_that_both_methods_have() -> None:
    ahead = runpy.run_path(str(RECIPE / "__main__.py"))["_ahead"]
    accuracies = {"wlora-merge fit": [70.0, 80.0, 99.0], "uniform composition": [69.0, 77.0]}  # none for the third draw
    rows = [
        {"job": "minilm:mr", "method": method, "shots": 1, "seed": seed, "accuracy": accuracy}
        for method, found in accuracies.items()
        for seed, accuracy in enumerate(found)
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(ahead(rows, ["uniform composition"], [1, 2]))
    row = console.export_text().splitlines()[-2]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "uniform composition",
        "+2.0 ± 1.0",
        "–",
        "+2.0 ± 1.0",
        "2",
    ]


def test_a_job_with_label_names_has_the_same_shots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    import jobs

    if not (jobs.SHARED / "data").is_dir():
        pytest.skip(f"needs the data and adapters of {jobs.SHARED}")
    plain, named = (jobs.get_job(name, Path("models")) for name in ("minilm:subj", "minilm:subj+names"))
    assert plain.shots(2, 0) == named.shots(2, 0)
    assert (plain.label_names, named.label_names) == (False, True)
    with pytest.raises(SystemExit, match=r"minilm:subj\+more: expected one of banking"):
        jobs.get_job("minilm:subj+more", Path("models"))
