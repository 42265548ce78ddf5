"""Reports in headless Chromium: nothing overflows, nothing is cut, nothing is loaded or run, on light and on dark paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browsers import chromium, measured
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.mixtures import made

from wlora_merge.adapters.deltas import ModuleDelta
from wlora_merge.adapters.factors import Factors
from wlora_merge.adapters.layouts import Layout
from wlora_merge.exporters.export import export
from wlora_merge.exporters.report import FILE, write_report
from wlora_merge.mixture.mixture import Mixture

WIDTHS = (400, 1280)


def crowd(names: list[str]) -> tuple[Mixture, list[ModuleDelta]]:
    """A mixture of adapters of rank 1 with these names, every third of which is like the first, and their deltas."""
    generator, count = torch.Generator().manual_seed(0), len(names)
    modules = [f"model.layers.{i}.q" for i in range(12)]
    weights = torch.rand(len(modules), count, generator=generator)
    found = made(
        adapters=[replace(made().adapters[0], name=name) for name in names],
        groups={module: [module] for module in modules},
        mixture_weights=weights / weights.sum(1, keepdim=True),
        wlora_weights=weights,
        granularity="module",
        metrics={
            "metric": "accuracy", "higher_is_better": True, "kept": names[0], "note": f"Of {names[0]}.",
            "candidates": {name: {"loss": 1.0, "accuracy": i / count} for i, name in enumerate(names)},
            "held_out": {"examples": 30},
        },
    )  # fmt: skip
    deltas = []
    for module in modules:
        factors = [
            Factors(
                torch.randn(1, 8, generator=generator), torch.randn(8, 1, generator=generator), 1.0, embedding=False
            )
            for _ in names
        ]
        like = tuple(factors[0] if i % 3 == 0 else factor for i, factor in enumerate(factors))
        deltas.append(ModuleDelta(module, Layout.LINEAR, (8, 8), like, tuple(range(count)), count))
    return found, deltas


def seen(page: Path, scratch: Path, drawings: int) -> None:
    """Assert that a page is whole at each width, on light and on dark paper."""
    rows = measured(page, WIDTHS, scratch)
    assert [(row["dark"], row["inner_width"]) for row in rows] == [
        (d, width) for d in (False, True) for width in WIDTHS
    ]
    for row in rows:
        assert row["scroll_width"] <= row["inner_width"]
        assert row["contrast"] >= 7  # WCAG's AAA
        assert row["scripts"] == 0
        assert [row[what] for what in ("handlers", "outside", "loaded", "refused", "cut")] == [[]] * 5
        assert row["drawings"] == drawings
        assert row["texts"] > drawings


def test_the_page_of_a_fit_and_those_of_its_exports_are_whole(zoo: Zoo, tmp_path: Path) -> None:
    chromium()
    fitted(zoo, tmp_path / "mixture", report=True)
    seen(tmp_path / "mixture" / FILE, tmp_path, 3)
    for kind, drawings in (("dense", 3 + 1), ("lora", 3 + 2)):
        export(tmp_path / "mixture", kind, tmp_path / kind, report=True)
        seen(tmp_path / kind / FILE, tmp_path, drawings)


@pytest.mark.parametrize("count", [2, 24, 200])
def test_the_page_of_many_adapters_with_long_names_is_whole(tmp_path: Path, count: int) -> None:
    chromium()
    names = ["x" * 150, "an-adapter-with-a-name-" * 6, *(f"adapter_{i}" for i in range(count - 2))]
    mixture, deltas = crowd(names)
    (tmp_path / "page").mkdir()
    drawn = write_report(tmp_path / "page", mixture, deltas, title="w" * 200, rank=4)
    assert drawn == [
        name for name in ("weights", "similarity", "spectrum", "error") if (name, count) != ("similarity", 2)
    ]
    seen(tmp_path / "page" / FILE, tmp_path, len(drawn))


def test_the_probe_finds_what_is_wrong_with_a_page(tmp_path: Path) -> None:
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    body = (
        "<body onclick='x()' style='color: #777; background: #888'><script>x()</script><img src='https://example.org/a.png'>"
        "<div style='width: 3000px'>wide</div><svg viewBox='0 0 9 9' width='90'><g id='a-text_1'><path d='M8 1h5v2z'/></g></svg>"
    )
    (tmp_path / "bad.html").write_text(
        f'<!doctype html>{policy}<meta name="viewport" content="width=device-width">{body}'
    )
    found: dict[str, Any]
    found, _ = measured(tmp_path / "bad.html", [400], tmp_path)
    assert found["scroll_width"] > found["inner_width"]
    assert found["contrast"] < 2
    assert found["scripts"] == 1
    assert [len(found[what]) for what in ("handlers", "outside", "cut")] == [1, 1, 1]
    assert any(refused.startswith("img-src") for refused in found["refused"])
