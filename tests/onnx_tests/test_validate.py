"""What the check of a graph must not accept: outputs that are not finite, in PyTorch's arithmetic or the graph's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx.reference import ReferenceEvaluator
from support.models import inputs_of, make_adapter, tiny_llama
from support.onnx_models import LLAMA, TEXT, Exported, make_dense

from wlora_merge.errors import NotFiniteError, VerifyError, WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.onnx import convert, session, validate
from wlora_merge.onnx.convert import check_onnx
from wlora_merge.onnx.genai import compare_genai
from wlora_merge.onnx.session import has_half_weights

pytest.importorskip("onnxruntime")

IN_HALF = r"'logits' in float16: \d+ of \d+ numbers are NaN or infinite, .*export with --dtype float32"


def write_onnx(dense: Path, out: Path, **options: Any) -> None:
    out.mkdir()
    convert.write_onnx(dense, out, cached_as=dense.name, **options)


def overflowing(folder: Path, factor: float = 3e5) -> Path:
    """A Llama whose hidden numbers pass float16's largest, 65504, though each weight fits; in float32 all is well."""
    make_dense(folder, "LlamaForCausalLM", LLAMA)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= factor**0.5
            layer.mlp.up_proj.weight *= factor**0.5
    model.save_pretrained(folder)
    return folder


def test_float16_that_overflows_in_pytorch_is_refused_though_onnx_runtime_computes_it(tmp_path: Path) -> None:
    dense = overflowing(tmp_path / "dense")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        half = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16)(ids).logits
    assert not torch.isfinite(half).any()
    write_onnx(dense, tmp_path / "32", task="causal-lm")
    with pytest.raises(NotFiniteError, match=IN_HALF):
        write_onnx(dense, tmp_path / "16", task="causal-lm", dtype="float16")
    file = tmp_path / "16" / "onnx" / "model.onnx"
    feed: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 12), np.int64)}
    feed["position_ids"] = np.arange(12)[None]
    for value in onnx.load(file).graph.input:
        feed.setdefault(value.name, np.zeros((1, 2, 0, 8), np.float16))
    assert not np.isfinite(ReferenceEvaluator(str(file)).run(["logits"], feed)[0]).any()  # ONNX's own arithmetic agrees
    with pytest.raises(NotFiniteError, match=IN_HALF):  # not the fault of the fusions
        write_onnx(dense, tmp_path / "fused", task="causal-lm", dtype="float16", ort_fusions="cpu")


def test_a_mixture_that_overflows_in_float16_leaves_nothing_behind_and_its_dense_export_is_warned_of(
    tmp_path: Path,
) -> None:
    base = overflowing(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    mix(base, [folder], tmp_path / "mixture", task="causal-lm")
    with pytest.raises(NotFiniteError, match=IN_HALF):
        export(tmp_path / "mixture", "onnx", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "mixture", "dense", tmp_path / "dense", dtype="float16")
    with pytest.warns(WloraMergeWarning, match="in float16 PyTorch's own 'logits' is NaN or infinite"):
        verify(tmp_path / "dense", **inputs_of(tmp_path / "mixture"))


def test_a_float16_export_that_was_made_before_the_check_fails_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = overflowing(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    mix(base, [folder], tmp_path / "mixture", task="causal-lm")
    monkeypatch.setattr(convert, "compare_with", lambda *args, **named: 0.0)
    export(tmp_path / "mixture", "onnx", tmp_path / "out", dtype="float16")
    with pytest.raises(NotFiniteError, match=IN_HALF):
        verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))


def test_a_float16_graph_with_float32_outputs_is_judged_as_float16(tmp_path: Path) -> None:
    """As onnxconverter-common's `keep_io_types` and transformers.js's `model_fp16.onnx` are."""
    dense = make_dense(
        tmp_path / "dense", "BertForSequenceClassification", transformers.BertConfig(**TEXT, vocab_size=99)
    )
    write_onnx(dense, tmp_path / "out", task="text-classification", dtype="float16")
    assert has_half_weights(tmp_path / "out")
    file = tmp_path / "out" / "onnx" / "model.onnx"
    graph = onnx.load(file)
    output = graph.graph.output[0]
    cast = onnx.helper.make_node("Cast", ["half_logits"], [output.name], to=onnx.TensorProto.FLOAT)
    for node in graph.graph.node:
        node.output[:] = ["half_logits" if name == output.name else name for name in node.output]
    graph.graph.node.append(cast)
    output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(graph, file)
    assert 1e-4 < check_onnx(tmp_path / "out", dense, task="text-classification") < 0.05


def test_outputs_that_are_not_finite_in_float32_are_refused_and_widen_nothing(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("llama")
    model = made.model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NotFiniteError, match="'logits' in float32"):
        check_onnx(made.out, tmp_path / "broken", task="causal-lm")
    monkeypatch.setattr("wlora_merge.onnx.genai._require_genai", lambda: None)
    monkeypatch.setattr("wlora_merge.onnx.genai._greedy", lambda folder, row, prompt: [5] * (len(row) - prompt))
    with pytest.raises(NotFiniteError, match="'logits' in float32"):
        compare_genai(made.out, model)


def test_a_quantized_graph_whose_outputs_are_nan_is_not_reported_as_near(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("llama")

    def of_nan(sessions: Any, feed: Any, past: int) -> dict[str, np.ndarray]:
        found = run_graphs(sessions, feed, past)
        return found if sessions is seen.setdefault("float", sessions) else {n: v * np.nan for n, v in found.items()}

    seen: dict[str, Any] = {}
    run_graphs = validate.run_graphs
    shutil.copytree(made.out, tmp_path / "out")
    monkeypatch.setattr("wlora_merge.onnx.validate.run_graphs", of_nan)
    from wlora_merge.data.tasks import get_task
    from wlora_merge.onnx.quantize import quantize_onnx

    with pytest.raises(NotFiniteError, match=r"model_q4\.onnx: output 'logits'.*export without --quantize"):
        quantize_onnx(tmp_path / "out", made.dense, task=get_task("causal-lm"), kind="int4")


@pytest.mark.parametrize(("name", "given"), [("llama", 4), ("t5", 1)])
@pytest.mark.parametrize("broken", [0, 7, 15, 16])
def test_a_graph_that_chooses_another_token_than_pytorch_fails_from_the_first_to_the_last(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch, name: str, given: int, broken: int
) -> None:
    def next_scores(*arguments: Any) -> Any:
        steps, number, token = session.next_scores(*arguments), 0, None
        while True:
            scores = next(steps) if token is None else steps.send(token)
            token = yield -scores if number == broken else scores
            number += 1

    made = exported(name)  # which checks, too
    monkeypatch.setattr(validate, "next_scores", next_scores)
    task = "seq2seq-lm" if name == "t5" else "causal-lm"
    if broken == 16:  # behind the last token
        assert check_onnx(made.out, made.dense, task=task) < 1e-4
        return
    with pytest.raises(VerifyError, match=rf"greedy generation differs at token {given + broken}: ONNX Runtime gives"):
        check_onnx(made.out, made.dense, task=task)


def test_an_infinite_effect_does_not_widen_the_tolerance_of_a_lora(tmp_path: Path) -> None:
    """A rank that loses half the norm may lose four times that of the effect: of an infinite effect, everything."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = 3e38
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 0, r=4, scale=1.0, target_modules=["q_proj", "down_proj"])
    mix(tmp_path / "base", [folder], tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "lora", tmp_path / "out", rank=1)
    with pytest.raises(NotFiniteError, match="output 'logits' of the unmerged mixture on the probe"):
        verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))
