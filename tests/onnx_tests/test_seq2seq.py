"""Encoder-decoders in ONNX Runtime against PyTorch, fed here as Optimum and transformers.js feed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.models import assert_verified, inputs_of, make_adapter
from support.onnx_models import MODELS, VOCABULARY, Exported, make_dense

from wlora_merge.errors import VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix
from wlora_merge.onnx.convert import check_onnx, run_probe

ort = pytest.importorskip("onnxruntime")
Array = np.ndarray[Any, Any]


def session(made: Exported, name: str) -> Any:
    return ort.InferenceSession(str(made.out / "onnx" / f"{name}.onnx"), providers=["CPUExecutionProvider"])


def run(session: Any, feed: dict[str, Array]) -> dict[str, Array]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: feed[v.name] for v in session.get_inputs()}), strict=True))


def decode(decoder: Any, feed: dict[str, Array], ids: Array, cache: dict[str, Array] | None) -> dict[str, Array]:
    empty = {
        v.name: np.zeros((len(ids), v.shape[1], 0, v.shape[3]), np.float32)
        for v in decoder.get_inputs()
        if v.name.startswith("past_key_values.")
    }
    past = empty if cache is None else {k.replace("present", "past_key_values"): v for k, v in cache.items()}
    return run(decoder, {**feed, **past, "input_ids": ids, "use_cache_branch": np.array([cache is not None])})


@pytest.mark.parametrize("name", ["t5", "t5 of a deeper decoder", "bart"])
@pytest.mark.parametrize(
    ("batch", "source", "past", "sequence"), [(1, 1, 0, 1), (3, 9, 0, 4), (2, 6, 5, 1), (1, 4, 1, 3)]
)
def test_prefill_and_decode_equal_pytorch(
    exported: Callable[[str], Exported], name: str, batch: int, source: int, past: int, sequence: int
) -> None:
    made = exported(name)
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, VOCABULARY, (batch, source), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, -2:] = 0
    decoder_ids = torch.randint(3, VOCABULARY, (batch, past + sequence), generator=generator)
    with torch.no_grad():
        expected = made.model()(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=True)
    hidden = run(session(made, "encoder_model"), {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    kept = mask.bool().numpy()
    want = expected.encoder_last_hidden_state.numpy()
    np.testing.assert_allclose(hidden["last_hidden_state"][kept], want[kept], atol=2e-5)
    decoder = session(made, "decoder_model_merged")
    feed = {"encoder_attention_mask": mask.numpy(), "encoder_hidden_states": hidden["last_hidden_state"]}
    cache = None
    if past:
        cache = decode(decoder, feed, decoder_ids[:, :past].numpy(), None)
        cache.pop("logits")
    got = decode(decoder, feed, decoder_ids[:, past:].numpy(), cache)
    np.testing.assert_allclose(got["logits"], expected.logits[:, past:].numpy(), atol=2e-5)
    for i, layer in enumerate(expected.past_key_values.self_attention_cache.layers):
        np.testing.assert_allclose(got[f"present.{i}.decoder.key"], layer.keys.numpy(), atol=2e-5)
    for i, layer in enumerate(expected.past_key_values.cross_attention_cache.layers):
        np.testing.assert_allclose(got[f"present.{i}.encoder.value"], layer.values.numpy(), atol=2e-5)


def test_names_are_those_of_the_merged_convention_and_each_weight_is_stored_once(
    exported: Callable[[str], Exported],
) -> None:
    made = exported("t5")
    assert {path.name for path in (made.out / "onnx").iterdir()} == {"encoder_model.onnx", "decoder_model_merged.onnx"}
    encoder, decoder = session(made, "encoder_model"), session(made, "decoder_model_merged")
    assert [v.name for v in encoder.get_inputs()] == ["input_ids", "attention_mask"]
    layers = [f"{i}.{part}.{kind}" for i in range(2) for part in ("decoder", "encoder") for kind in ("key", "value")]
    assert {v.name for v in decoder.get_inputs()} == {
        "encoder_attention_mask", "input_ids", "encoder_hidden_states", "use_cache_branch",
        *(f"past_key_values.{layer}" for layer in layers),
    }  # fmt: skip
    assert [v.name for v in decoder.get_outputs()] == ["logits", *(f"present.{layer}" for layer in layers)]
    axes = {v.name: v.shape for v in decoder.get_inputs()}
    assert axes["past_key_values.1.decoder.key"] == ["batch_size", 4, "past_sequence_length", 8]
    assert axes["past_key_values.1.encoder.key"] == ["batch_size", 4, "encoder_sequence_length", 8]
    graph = onnx.load(made.out / "onnx" / "decoder_model_merged.onnx").graph
    big = [t.raw_data for t in graph.initializer if np.prod(t.dims) >= 32 * 32]
    assert len(big) == len(set(big))
    (branch,) = (node for node in graph.node if node.op_type == "If")
    assert not any(attribute.g.initializer for attribute in branch.attribute)


def test_greedy_generation_is_checked(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    for name in ("t5", "bart"):
        made = exported(name)
        assert check_onnx(made.out, made.dense, task="seq2seq-lm") < 1e-4
        other = make_dense(tmp_path / name, *MODELS[name][:2], seed=1)
        with pytest.raises(VerifyError, match=r"^logits differs by"):
            check_onnx(made.out, other, task="seq2seq-lm")
    probe = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 8]])}
    with torch.no_grad():
        expected = exported("t5").model()(**probe).logits
    torch.testing.assert_close(run_probe(exported("t5").out, probe)["logits"], expected, atol=2e-5, rtol=0)


def test_a_mixture_of_an_encoder_decoder_is_exported_refolded_and_verified(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    made = exported("t5")
    targets = {"r": 2, "target_modules": ["q", "v", "wo"]}
    adapters = [make_adapter(made.model(), tmp_path / f"a{i}", i, task_type="SEQ_2_SEQ_LM", **targets) for i in (0, 1)]
    mix(made.dense, adapters, tmp_path / "mixture", task="seq2seq-lm")
    export(tmp_path / "mixture", "onnx", tmp_path / "traced")
    result = export(tmp_path / "mixture", "onnx", tmp_path / "refolded", onnx_base=made.out)
    assert set(result.report["onnx_base"]) == {"encoder_model.onnx", "decoder_model_merged.onnx"}
    for name in result.report["onnx_base"]:
        tensors = [
            {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / way / "onnx" / name).graph.initializer}
            for way in ("traced", "refolded")
        ]
        assert set(tensors[0]) == set(tensors[1])
        for key, array in tensors[0].items():
            np.testing.assert_array_equal(tensors[1][key], array, err_msg=key)
    for way in ("traced", "refolded"):
        assert_verified(tmp_path / way, **inputs_of(tmp_path / "mixture"))
