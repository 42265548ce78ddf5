"""A head on pooled tokens in ONNX Runtime, for every encoder: PEFT's merge and float64 are the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pooled import IDS, MASK, pooled

from wlora_merge.errors import VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify

ort = pytest.importorskip("onnxruntime")
LAYERS = {"DistilBert": 2}
"""Of other families one, as tracing costs what the layers cost; in one of DistilBERT's, float32 rounds more than is allowed."""


def run(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    session = ort.InferenceSession(str(folder / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["logits"]
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": np.zeros_like(ids.numpy())}
    logits = session.run(["logits"], {value.name: feed[value.name] for value in session.get_inputs()})[0]
    return torch.from_numpy(logits).double()


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("family", "pooling"),
    [(family, "mean") for family in ("Bert", "Electra", "DistilBert", "MPNet", "DebertaV2")] + [("Roberta", "last")],
)
def test_a_graph_computes_the_head_on_the_pooled_tokens(family: str, pooling: str, tmp_path: Path) -> None:
    layers = LAYERS.get(family, 1)
    made = pooled(family, tmp_path, pooling, layers=layers)
    export(made.mixture, "onnx", tmp_path / "out")
    generator = torch.Generator().manual_seed(2)
    for batch, sequence in ((1, 1), (1, 13), (4, 7)):
        ids = torch.randint(2, 60, (batch, sequence), generator=generator)
        mask = torch.ones_like(ids)
        assert off(run(tmp_path / "out", ids, mask), made.logits(ids, mask)) < 1e-5
    assert off(run(tmp_path / "out", IDS, MASK), made.logits()) < 1e-5
    padding = IDS + 20 * (1 - MASK)
    assert torch.equal(run(tmp_path / "out", IDS, MASK), run(tmp_path / "out", padding, MASK)), "padding must not count"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert layers in (config.get("num_hidden_layers"), config.get("n_layers")), "the graph pools, no layer does"
    said = {"mean": "the mean of its tokens", "last": "the last of its tokens"}[pooling]
    assert f"The graph gives its head {said}, normalized" in (tmp_path / "out" / "README.md").read_text()
    checked = verify(tmp_path / "out", **made.inputs)
    assert not checked.skipped
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-5


def test_a_graph_that_reads_the_first_token_is_not_the_mixture_s(tmp_path: Path) -> None:
    made = pooled("Bert", tmp_path, layers=1)
    made.mixture.pooling = None
    export(made.mixture, "onnx", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "wlora_merge.json").read_text())
    manifest["mixture"]["pooling"] = "mean"
    (tmp_path / "out" / "wlora_merge.json").write_text(json.dumps(manifest))
    with pytest.raises(VerifyError, match="logits differs by"):
        verify(tmp_path / "out", **made.inputs)


def test_a_float16_graph_is_off_by_rounding(tmp_path: Path) -> None:
    made = pooled("Roberta", tmp_path, layers=1)
    export(made.mixture, "onnx", tmp_path / "out", dtype="float16")
    assert off(run(tmp_path / "out", IDS, MASK), made.logits()) < 1e-2
    verify(tmp_path / "out", **made.inputs)


def test_a_quantized_graph_is_measured_against_the_pooled_one(tmp_path: Path) -> None:
    result = export(pooled("Bert", tmp_path, layers=1).mixture, "onnx", tmp_path / "out", quantize="int8")
    assert result.report["quantized"]["relative"] < 0.3
