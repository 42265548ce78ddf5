"""The report: what it measures against dense float64 sums, one file with nothing outside it, the same bytes again."""

from __future__ import annotations

import html
import json
import math
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models import make_adapter, peft_changes, tiny_llama

from wlora_merge.adapters.layouts import stored_factors
from wlora_merge.errors import WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.exporters.report import CAPTIONS, FILE, MISSING, weights_by_layer, write_report
from wlora_merge.exporters.report_answer import interval
from wlora_merge.exporters.report_data import adapter_similarity, changes, error_by_rank, spectra
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix

VOID = ("meta", "br", "img", "link", "path", "use", "rect", "stop", "image")


@pytest.fixture
def mixed(llama_zoo: Callable[..., Any], tmp_path: Path) -> Path:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "mixture", weights=[0.5, 0.3, 0.2], task="causal-lm")
    return tmp_path / "mixture"


def test_similarity_is_the_cosine_of_pefts_delta_weights(llama_zoo: Callable[..., Any], mixed: Path) -> None:
    _, folders = llama_zoo()
    found = adapter_similarity(find_inputs(mixed).deltas)
    deltas = [peft_changes(tiny_llama(), folder) for folder in folders]
    names = sorted({name for delta in deltas for name in delta})
    shapes = tiny_llama().state_dict()
    flat = [
        np.concatenate([d.get(n, torch.zeros_like(shapes[n])).double().numpy().ravel() for n in names]) for d in deltas
    ]
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat] for a in flat]
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_the_spectrum_and_the_error_are_those_of_the_dense_delta_weights(mixed: Path) -> None:
    inputs = find_inputs(mixed)
    found = spectra(inputs.deltas, inputs.mixture)
    lost, whole = np.zeros(4), 0.0
    for delta in inputs.deltas:
        dense = (delta.lora_B.double() * inputs.mixture.gains_of(delta)) @ delta.lora_A.double()  # type: ignore[union-attr]
        s = np.linalg.svd(dense.numpy(), compute_uv=False)
        values = found[delta.module].numpy()
        assert np.allclose(values, s[: len(values)], rtol=1e-9, atol=1e-12)
        lost += [float((s[k:] ** 2).sum()) for k in range(4)]
        whole += float((s**2).sum())
    assert np.allclose(error_by_rank(found)[:4], np.sqrt(lost / whole), atol=1e-9)


def test_an_export_of_that_rank_has_that_error(mixed: Path, tmp_path: Path) -> None:
    inputs = find_inputs(mixed)
    errors = error_by_rank(spectra(inputs.deltas, inputs.mixture))
    for rank in (1, 3, 5):
        done = export(mixed, "lora", tmp_path / f"r{rank}", rank=rank)
        assert done.report["relative_error"] == pytest.approx(errors[rank], rel=1e-6)


def test_changes_are_those_of_the_files_and_rounding_loses_more_in_bf16(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        base, folders = llama_zoo(dtype)
        name = str(dtype)
        mix(base, folders, tmp_path / name, task="causal-lm")
        export(tmp_path / name, "dense", tmp_path / f"{name}.dense")
        inputs = find_inputs(tmp_path / name)
        rows = changes(inputs.base, inputs.deltas, inputs.mixture, tmp_path / f"{name}.dense")
        before, after = (
            load_file(base / "model.safetensors"),
            load_file(tmp_path / f"{name}.dense" / "model.safetensors"),
        )
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert {row.tensor for row in rows} == changed
        for row in rows:  # no matrix here has more than 64 rows: all are looked at
            w, v = before[row.tensor].double(), after[row.tensor].double()
            assert row.relative_change == pytest.approx(float((v - w).norm() / w.norm()), rel=1e-9)
        for delta in inputs.deltas:
            row = next(r for r in rows if r.tensor == f"{delta.module}.weight")
            gained = delta.lora_B.double() * inputs.mixture.gains_of(delta)  # type: ignore[union-attr]
            left, right = stored_factors(delta.layout, delta.lora_A.double(), gained)  # type: ignore[union-attr]
            w, v, d = before[row.tensor].double(), after[row.tensor].double(), left @ right
            assert row.lost == pytest.approx(float((v - w - d).norm() / d.norm()), rel=1e-6)
        lost[dtype] = max(row.lost for row in rows if row.lost is not None)
    assert lost[torch.float32] < 1e-4 < lost[torch.bfloat16]


def test_a_tall_tensor_is_sampled_evenly_and_the_estimate_is_near(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16, vocab_size=96, intermediate_size=512)
    model.save_pretrained(tmp_path / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj"]}
    folders = [make_adapter(model.float(), tmp_path / f"a{i}", i, **config) for i in range(2)]
    mixture = mix(tmp_path / "base", folders, tmp_path / "m")
    export(tmp_path / "m", "dense", tmp_path / "d")
    inputs = find_inputs(tmp_path / "m")
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "d" / "model.safetensors")
    for row in changes(inputs.base, inputs.deltas, mixture, tmp_path / "d"):
        w, v = before[row.tensor].double(), after[row.tensor].double()
        assert row.relative_change == pytest.approx(float((v - w).norm() / w.norm()), rel=0.2)


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Wilson 1927; Brown, Cai, DasGupta 2001
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_layers_are_the_mean_of_their_modules(mixed: Path) -> None:
    names, table = weights_by_layer(find_inputs(mixed).mixture)
    assert names == ["model.layers.0", "model.layers.1"]
    assert np.allclose(table, [[0.5, 0.3, 0.2]] * 2)


# ------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Every tag is closed; ids are unique; what refers to something refers into the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.outside.append(f"{key}={value}")
        if tag in VOID:
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.handle_starttag(tag, attrs)
            self.open.pop()
        else:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("dense", {"weights", "similarity", "changes"}),
        ("lora", {"weights", "similarity", "spectrum", "error"}),
    ],
)
def test_a_page_stands_alone_is_digested_and_has_the_same_bytes_again(
    mixed: Path, tmp_path: Path, kind: str, figures: set[str]
) -> None:
    for name in ("one", "two"):
        export(mixed, kind, tmp_path / name, report=True)
    text = (tmp_path / "one" / FILE).read_text()
    page = Page(text)
    assert not page.open
    assert not page.outside
    assert len(page.ids) == len(set(page.ids))
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]+)\)", text))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", text)
    assert str(tmp_path) not in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    pictures = {p.stem for p in (tmp_path / "one" / "figures").iterdir()}
    assert pictures == figures
    card = (tmp_path / "one" / "README.md").read_text()
    assert all(f"(figures/{name}.png)\n\n*{CAPTIONS[name].title}.* {CAPTIONS[name]}" in card for name in figures)
    assert all(str(CAPTIONS[name]) in html.unescape(text) for name in figures)
    files = json.loads((tmp_path / "one" / "wlora_merge.json").read_text())["files"]
    assert {FILE, *(f"figures/{name}.png" for name in figures)} <= set(files)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    verify(tmp_path / "one", quick=True)


def test_a_fits_page_has_its_comparison_and_its_loss(mixed: Path, tmp_path: Path) -> None:
    mixture = find_inputs(mixed).mixture
    mixture.metrics = {
        "candidates": {
            "base": {"loss": 1.5, "accuracy": 0.25, "f1": 0.5, "f1_se": 0.125},
            "learned": {"loss": 0.5, "accuracy": 1.0},
        },
        "held_out": {"examples": 8, "of": 32},
        "history": {"learned": [[1, 2.0], [2, 1.0]]},
        "note": "<b>",
    }
    drawn = write_report(tmp_path, mixture, find_inputs(mixed).deltas, title="A & B")
    text = (tmp_path / FILE).read_text()
    assert drawn == ["weights", "loss", "similarity"]
    assert "<title>A &amp; B</title>" in text
    assert "&lt;b&gt;" in text
    assert "1.0000 [0.68, 1.00]" in text
    assert "0.5000 ± 0.1250" in text
    assert "f1_se" not in text


@pytest.mark.parametrize(("value", "examples"), [(1.5, 8), (-1.0, 8), (0.5, -5), (math.nan, 8)])
def test_an_accuracy_that_none_can_be_has_no_interval(mixed: Path, tmp_path: Path, value: float, examples: int) -> None:
    mixture = find_inputs(mixed).mixture
    mixture.metrics = {"candidates": {"a": {"accuracy": value}}, "held_out": {"examples": examples}}
    write_report(tmp_path, mixture, [], title="t")
    assert f"<td>{value:.4f}</td>" in (tmp_path / FILE).read_text()


def test_nothing_that_a_mixture_says_becomes_markup(mixed: Path, tmp_path: Path) -> None:
    mixture = find_inputs(mixed).mixture
    mixture.metrics = {
        "candidates": {"<b>c": {"<b>m": 1.0}, "<b>d": {"<b>m": 2.0}},
        "settings": {"<b>s": {"loss": 1.0}, "<b>t": {"loss": 2.0}},
        "kept": "<b>c",
        "note": "<b>n",
    }
    mixture.data = {"<b>method": "<b>x", "data": {"<b>name": "<b>y"}}
    write_report(tmp_path, mixture, [], title="<b>", facts={"<b>f": "<b>z"})
    text = (tmp_path / FILE).read_text()
    assert "<b>" not in text
    assert all(f"&lt;b&gt;{said}" in text for said in ("c", "m", "s", "n", "x", "y", "z", "f", "method", "name"))
    assert '<tr class="strong"><td>&lt;b&gt;c' in text


def test_without_matplotlib_an_export_goes_on_and_says_what_to_install(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        n for n in sys.modules if n.split(".")[0] == "matplotlib" or n == "wlora_merge.exporters.report_figures"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(WloraMergeWarning, match=re.escape(MISSING)):
        export(mixed, "dense", tmp_path / "out", report=True)
    assert not (tmp_path / "out" / FILE).exists()
    verify(tmp_path / "out", quick=True)


def test_figures_have_whole_steps_whole_names_and_the_range_of_their_values() -> None:
    figures = pytest.importorskip("wlora_merge.exporters.report_figures")

    loss = figures.lines({"learned": ([1, 2, 3], [0.5, 0.4, 0.3])}, "step", "loss")
    assert all(float(tick).is_integer() for tick in loss.axes[0].get_xticks())
    name = "base_model.model.vision_tower.encoder.layers.11.self_attn.q_proj"
    drawn = figures.dots([name], {"change": [0.1]}, "ratio")
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == [name]
    (cells,) = figures.heatmap([[0.48, 0.52], [0.49, 0.51]], ["0", "1"], ["a", "b"], "weight").axes[0].collections
    assert cells.get_clim() == (0.48, 0.52)
    (cells,) = figures.heatmap([[0.5, 0.5]], ["0"], ["a", "b"], "weight").axes[0].collections
    assert cells.get_clim() == (0.0, 1.0)


def test_a_figure_that_would_repeat_one_number_is_that_number(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    mixture = mix(base, folders[:2], tmp_path / "m", task="causal-lm")
    deltas = find_inputs(tmp_path / "m").deltas
    mixture.metrics = {"history": {"learned": [[1, 0.25]]}}
    (tmp_path / "page").mkdir()
    assert write_report(tmp_path / "page", mixture, deltas, title="t") == []
    text = (tmp_path / "page" / FILE).read_text()
    cosine = float(adapter_similarity(deltas)[0, 1])
    assert all(f"<p>{said} everywhere.</p>" in text for said in ("0.5", "0.25", f"{cosine:.4g}"))
    assert all(CAPTIONS[name].title in html.unescape(text) for name in ("weights", "loss", "similarity"))
    assert "<svg" not in text
    assert not (tmp_path / "page" / "figures").exists()


def test_nothing_in_a_mixture_without_weight_is_drawn_of_its_delta_weights(mixed: Path, tmp_path: Path) -> None:
    mixture = find_inputs(mixed).mixture
    mixture.mixture_weights = torch.zeros_like(mixture.mixture_weights)
    assert write_report(tmp_path, mixture, find_inputs(mixed).deltas, title="t", rank=1) == ["similarity"]
    text = (tmp_path / FILE).read_text()
    assert "<p>0 everywhere.</p>" in text
    assert "<p>There is nothing to draw.</p>" in text


def test_every_caption_is_a_line_that_says_what_is_shown_and_when_to_worry() -> None:
    for caption in CAPTIONS.values():
        assert caption.shows.endswith(".")
        assert re.match("(if|about) ", caption.worry)
        assert len(str(caption)) <= 150


def test_weights_that_no_layer_has_otherwise_are_a_row_for_each_adapter(mixed: Path, tmp_path: Path) -> None:
    write_report(tmp_path, find_inputs(mixed).mixture, [], title="t")
    assert "<!-- mixture weight, the same in all layers -->" in (tmp_path / FILE).read_text()


def test_a_new_adapter_is_not_drawn_beside_the_adapters_whose_weights_are_learned(mixed: Path, tmp_path: Path) -> None:
    mixture = find_inputs(mixed).mixture
    mixture.data = {"new_adapter": {"name": mixture.adapter_names[2], "r": 8}}
    write_report(tmp_path, mixture, [], title="t")
    text = (tmp_path / FILE).read_text()
    given, new = mixture.adapter_names[:2], mixture.adapter_names[2]
    assert f"The new adapter, {new}, is not drawn: its weight is 0.2 in all layers." in text
    assert all(f"<!-- {name} -->" in text for name in given)
    assert f"<!-- {new} -->" not in text


def test_a_mixture_of_one_adapter_has_a_page(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, (folder, *_) = llama_zoo()
    mixture = mix(base, [folder], tmp_path / "m", task="causal-lm")
    mixture.data = {"new_adapter": {"name": mixture.adapter_names[0], "r": 8}}
    (tmp_path / "page").mkdir()
    assert write_report(tmp_path / "page", mixture, find_inputs(tmp_path / "m").deltas, title="t") == []
    assert "<p>1 everywhere.</p>" in (tmp_path / "page" / FILE).read_text()


def test_a_line_of_one_point_is_a_point_and_a_cell_without_a_number_says_so() -> None:
    figures = pytest.importorskip("wlora_merge.exporters.report_figures")
    (line,) = figures.lines({"one": ([1], [0.5])}, "rank", "error").axes[0].lines
    assert line.get_marker() == "o"
    cells = figures.heatmap([[1.0, np.nan], [np.nan, 1.0]], ["a", "b"], ["a", "b"], "cosine", signed=True)
    assert [text.get_text() for text in cells.axes[0].texts] == ["1.00", "–", "–", "1.00"]


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    figures = pytest.importorskip("wlora_merge.exporters.report_figures")
    drawn = figures.heatmap([[0.1]], ["layer"], ["sst2-llama-lora-r16-alpha32-v3-final"], "weight").axes[0]
    (label,) = [tick.get_text() for tick in drawn.get_xticklabels()]
    assert len(label) == 20
    assert label.startswith("sst2-l…")
    assert label.endswith("-v3-final")
