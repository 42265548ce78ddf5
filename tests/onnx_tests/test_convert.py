"""The ONNX writer against PyTorch, in ONNX Runtime, on tiny random models; the real ones carry the marker `real`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from support.onnx_models import LLAMA, MODELS, VOCABULARY, Exported, make_dense

from wlora_merge.errors import BaseModelError, OutputError, UnsupportedError, VerifyError, WloraMergeError
from wlora_merge.onnx import convert
from wlora_merge.onnx import trace as onnx_trace
from wlora_merge.onnx.convert import check_onnx, run_probe, write_onnx
from wlora_merge.progress import listening

ort = pytest.importorskip("onnxruntime")


def tokens(batch: int, sequence: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, sequence), generator=torch.Generator().manual_seed(7))


def feed_for(
    session: Any, ids: np.ndarray, start: int = 0, cache: dict[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Inputs for the tokens `ids` after `start` earlier ones."""
    batch, sequence = ids.shape
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, start + sequence), dtype=np.int64),
        "position_ids": np.tile(np.arange(start, start + sequence), (batch, 1)),
        "token_type_ids": np.zeros_like(ids),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            empty = np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=np.float32)
            feed[value.name] = empty if cache is None else cache[value.name.replace("past_key_values", "present")]
    return {value.name: feed[value.name] for value in session.get_inputs()}


def run(session: Any, feed: dict[str, Any]) -> dict[str, np.ndarray]:
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


@pytest.mark.parametrize("name", ["bert", "answers", "features", "deberta", "clip text"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (4, 1), (3, 11)])
def test_encoders_equal_pytorch_at_shapes_that_were_not_traced(
    exported: Callable[[str], Exported], name: str, shape: tuple[int, int]
) -> None:
    made = exported(name)
    session, ids = made.session(), tokens(*shape)
    got = run(session, feed_for(session, ids.numpy()))
    with torch.no_grad():
        expected = made.model()(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert set(got) <= {"logits", "start_logits", "end_logits", "last_hidden_state"}
    for key, value in got.items():
        np.testing.assert_allclose(value, expected[key].numpy(), atol=2e-5)


def test_a_masked_token_does_not_change_an_encoder(exported: Callable[[str], Exported]) -> None:
    session, ids = exported("bert").session(), tokens(2, 5).numpy()
    short = run(session, feed_for(session, ids))["logits"]
    feed = feed_for(session, np.concatenate([ids, ids[:, :2]], axis=1))
    feed["attention_mask"][:, 5:] = 0
    np.testing.assert_allclose(run(session, feed)["logits"], short, atol=2e-5)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("name", "output"), [("vit", "logits"), ("clip vision", "last_hidden_state")])
def test_image_models_equal_pytorch(exported: Callable[[str], Exported], name: str, output: str, batch: int) -> None:
    made = exported(name)
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = made.model()(pixel_values=pixels)[output].numpy()
    np.testing.assert_allclose(run(made.session(), {"pixel_values": pixels.numpy()})[output], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("batch", "past", "sequence"), [(1, 0, 1), (1, 1, 1), (3, 0, 9), (4, 6, 1), (1, 3, 8)])
def test_one_decoder_graph_serves_prefill_and_decode(
    exported: Callable[[str], Exported], name: str, batch: int, past: int, sequence: int
) -> None:
    made = exported(name)
    session, ids = made.session(), tokens(batch, past + sequence)
    cache = run(session, feed_for(session, ids[:, :past].numpy())) if past else None
    got = run(session, feed_for(session, ids[:, past:].numpy(), past, cache))
    with torch.no_grad():
        expected = made.model()(input_ids=ids, use_cache=True)
    np.testing.assert_allclose(got["logits"], expected.logits[:, past:].numpy(), atol=2e-5)
    for i, layer in enumerate(expected.past_key_values.layers):
        np.testing.assert_allclose(got[f"present.{i}.key"], layer.keys.numpy(), atol=2e-5)
        np.testing.assert_allclose(got[f"present.{i}.value"], layer.values.numpy(), atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_generation_equals_generate(exported: Callable[[str], Exported], name: str) -> None:
    made = exported(name)
    session, ids = made.session(), tokens(1, 4)
    wanted = made.model().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0]
    outputs = run(session, feed_for(session, ids.numpy()))
    row = ids[0].tolist()
    while len(row) < len(wanted):
        token = int(outputs["logits"][0, -1].argmax())
        outputs = run(session, feed_for(session, np.array([[token]]), len(row), outputs))
        row.append(token)
    assert row == wanted.tolist()


def test_inputs_outputs_and_axes_have_their_conventional_names(exported: Callable[[str], Exported]) -> None:
    made = exported("llama")
    pasts = tuple(f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value"))
    assert made.report.input_names == ("input_ids", "attention_mask", "position_ids", *pasts)
    assert made.report.output_names == ("logits", *(name.replace("past_key_values", "present") for name in pasts))
    axes = {value.name: value.shape for value in [*made.session().get_inputs(), *made.session().get_outputs()]}
    assert axes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert axes["position_ids"] == axes["input_ids"] == ["batch_size", "sequence_length"]
    assert axes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert axes["present.1.key"] == ["batch_size", 2, "total_sequence_length", 8]
    assert axes["logits"] == ["batch_size", "sequence_length", VOCABULARY]
    assert exported("bert").report.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert exported("vit").report.input_names == ("pixel_values",)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_embedding_is_stored_once(exported: Callable[[str], Exported], name: str) -> None:
    made = exported(name)
    embedding = made.model().get_input_embeddings().weight.detach().numpy()
    copies = [
        tensor.name
        for tensor in onnx.load(made.file).graph.initializer
        if sorted(tensor.dims) == sorted(embedding.shape)
        and any(np.array_equal(onnx.numpy_helper.to_array(tensor), form) for form in (embedding, embedding.T))
    ]
    assert len(copies) == 1


def test_a_decoder_graph_has_one_matmul_for_each_linear_layer_and_product_of_attention(
    exported: Callable[[str], Exported],
) -> None:
    graph = onnx.load(exported("llama").file).graph
    linear_layers, attention = 2 * 7 + 1, 2 * 2
    assert sum(node.op_type in ("MatMul", "Gemm") for node in graph.node) == linear_layers + attention


def test_two_exports_have_equal_bytes_that_name_no_local_path(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    made, again = exported("llama"), tmp_path / "elsewhere"
    again.mkdir()
    write_onnx(make_dense(tmp_path / "dense", "LlamaForCausalLM", LLAMA), again, task="causal-lm")
    first, second = made.file.read_bytes(), (again / "onnx" / "model.onnx").read_bytes()
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    assert (made.out / "config.json").read_bytes() == (again / "config.json").read_bytes()
    for trace in (b"site-packages", b".py", str(made.dense.parent).encode()):
        assert trace not in first


def test_large_weights_lie_in_one_data_file_that_the_graph_names(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("bert")
    monkeypatch.setattr(convert, "INLINE_LIMIT", 1000)
    report = write_onnx(made.dense, tmp_path, task=made.task, cached_as="bert")
    assert set(report.sizes) == {"model.onnx", "model.onnx_data"}
    assert report.sizes["model.onnx_data"] > 10 * 32 * 64
    tensors = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.initializer
    places = {item.value for tensor in tensors for item in tensor.external_data if item.key == "location"}
    assert places == {"model.onnx_data"}
    data = tmp_path / "onnx" / "model.onnx_data"
    data.rename(tmp_path / "onnx" / "model.onnx.data")
    with pytest.raises(VerifyError, match=r"model\.onnx_data: missing"):
        check_onnx(tmp_path, made.dense, task=made.task)


def test_side_files_are_copied_without_weights(exported: Callable[[str], Exported]) -> None:
    made = exported("llama")
    assert {path.name for path in made.out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "onnx"
    }  # fmt: skip
    assert json.loads((made.out / "config.json").read_text())["dtype"] == "float32"


def test_an_export_says_nothing_of_its_own(
    exported: Callable[[str], Exported], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made, steps = exported("vit"), list[str]()
    capfd.readouterr()
    with listening(lambda done: steps.append(done.what)):
        write_onnx(made.dense, tmp_path, task=made.task)
    assert capfd.readouterr() == ("", "")
    assert steps == ["loading the model", "tracing", "tidying the graph", "writing", "checking against PyTorch"]


def test_float16_halves_the_weights_and_stays_near(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    made = exported("llama")
    report = write_onnx(made.dense, tmp_path, task=made.task, dtype="float16", cached_as="llama")
    weights = [t for t in onnx.load(tmp_path / "onnx" / "model.onnx").graph.initializer if len(t.dims) == 2]
    assert {tensor.data_type for tensor in weights if min(tensor.dims) >= 16} == {onnx.TensorProto.FLOAT16}
    assert 0 < report.largest_difference < 0.05
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_the_opset_is_the_one_asked_for(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    made = exported("vit")
    assert write_onnx(made.dense, tmp_path, task=made.task, opset=18).opset == 18
    assert {item.domain: item.version for item in onnx.load(tmp_path / "onnx" / "model.onnx").opset_import} == {"": 18}


def test_skipping_idle_decompositions_gives_the_graph_that_running_them_gives(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = exported("llama"), list[bool]()
    respell = onnx_trace._respell
    monkeypatch.setattr(onnx_trace, "_respell", lambda *args: asked.append(respell(*args)))
    write_onnx(made.dense, tmp_path, task=made.task)
    assert asked == [True]  # it could be skipped, and was not

    def kinds(file: Path) -> list[str]:
        return sorted(
            node.op_type for node in onnx.load(file).graph.node if node.op_type in ("MatMul", "Softmax", "Mul")
        )

    assert kinds(tmp_path / "onnx" / "model.onnx") == kinds(made.file)


def test_run_probe_fills_in_what_the_graph_takes(exported: Callable[[str], Exported]) -> None:
    for name in ("bert", "llama"):
        made, ids = exported(name), tokens(2, 7)
        with torch.no_grad():
            expected = made.model()(input_ids=ids).logits
        got = run_probe(made.out, {"input_ids": ids})
        assert set(got) == {"logits"}
        torch.testing.assert_close(got["logits"], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "output"), [("bert", "logits"), ("answers", "start_logits"), ("llama", "logits")])
def test_a_graph_of_other_weights_does_not_pass(
    exported: Callable[[str], Exported], tmp_path: Path, name: str, output: str
) -> None:
    made = exported(name)
    other = make_dense(tmp_path / "other", *MODELS[name][:2], seed=1)
    with pytest.raises(VerifyError, match=f"^{output} differs by .* from PyTorch"):
        check_onnx(made.out, other, task=made.task)


def test_broken_files_do_not_pass(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    made = exported("bert")
    with pytest.raises(VerifyError, match=r"model\.onnx: missing"):
        check_onnx(tmp_path, made.dense, task=made.task)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"not a protobuf")
    with pytest.raises(VerifyError, match="not an ONNX file"):
        check_onnx(tmp_path, made.dense, task=made.task)
    (tmp_path / "onnx" / "model.onnx").write_bytes(made.file.read_bytes())
    (tmp_path / "onnx" / "model.onnx_data").write_bytes(b"left over")
    with pytest.raises(VerifyError, match=r"no weight of model\.onnx refers to it"):
        check_onnx(tmp_path, made.dense, task=made.task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "no bfloat16 MatMul"),
        ({"dtype": "int4"}, "--dtype is 'int4', expected one of float32, bfloat16, float16"),
        ({"opset": 16}, "--opset is 16, expected 17 or more"),
        ({"task": "translation"}, "no task 'translation'; tasks are causal-lm"),
        ({"task": "seq2seq-lm"}, "has no AutoModelForSeq2SeqLM"),
        ({"task": "image-classification"}, "has no AutoModelForImageClassification"),
    ],
)
def test_options_that_cannot_be_done_are_refused_by_name(
    exported: Callable[[str], Exported], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(WloraMergeError, match=message):
        write_onnx(exported("bert").dense, tmp_path, **{"task": "text-classification", **options})
    assert not list(tmp_path.iterdir())


def test_a_decoder_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=4)
    dense = make_dense(tmp_path / "dense", "MambaForCausalLM", config)
    with pytest.raises(UnsupportedError, match=r"^MambaForCausalLM keeps a state .*--format dense"):
        write_onnx(dense, tmp_path, task="causal-lm")


def test_what_the_exporter_raises_becomes_one_sentence(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.exporters import OnnxExporter

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("step 3 of 3") from NotImplementedError("no translation of aten.fft\nand much more")

    monkeypatch.setattr(OnnxExporter, "export_program", fail)
    with pytest.raises(UnsupportedError) as caught:
        write_onnx(exported("vit").dense, tmp_path, task="image-classification")
    assert str(caught.value) == (
        "ViTForImageClassification cannot be exported to ONNX (NotImplementedError: no translation of aten.fft);"
        " export with `--format dense` instead."
    )


def test_a_head_that_is_missing_is_not_exported_at_random(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"2 tensors .* missing, first 'classifier.bias'"):
        write_onnx(exported("features").dense, tmp_path, task="text-classification")


def test_an_existing_export_and_a_missing_extra_are_refused(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("vit")
    with pytest.raises(OutputError, match="exists already"):
        write_onnx(made.dense, made.out, task=made.task)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'wlora-merge\[onnx\]'"):
        write_onnx(made.dense, made.out, task=made.task)


@pytest.mark.real
def test_minilm_features_equal_pytorch(real_models: Path, tmp_path: Path) -> None:
    report = write_onnx(real_models / "minilm", tmp_path, task="feature-extraction")
    assert report.largest_difference < 1e-4
    assert report.input_names == ("input_ids", "attention_mask", "token_type_ids")


@pytest.mark.real
def test_smollm2_generates_in_onnx_runtime_what_pytorch_generates(real_models: Path, tmp_path: Path) -> None:
    report = write_onnx(real_models / "smollm2", tmp_path, task="causal-lm")
    parameters = 134_515_008  # the tied embedding counted once
    assert report.largest_difference < 1e-2
    assert 4 * parameters < sum(report.sizes.values()) < 4 * parameters + 2**20
