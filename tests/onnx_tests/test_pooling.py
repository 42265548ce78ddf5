"""Sentence embeddings in the graph, against formulas written out in NumPy, and towers with a projection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from support.models import assert_verified, inputs_of, make_adapter
from support.onnx_models import BERT, CLIP_TEXT, CLIP_VISION, VOCABULARY, Exported, make_dense, sentence_folder

from wlora_merge.errors import BaseModelError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix
from wlora_merge.models.pooling import pool_tokens
from wlora_merge.onnx.convert import write_onnx
from wlora_merge.onnx.pooling import SWITCHES, add_pooling, own_pooling

ort = pytest.importorskip("onnxruntime")
Array = np.ndarray[Any, Any]
MASKS = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
HIDDEN = BERT.hidden_size
LINEAR = {"in_features": HIDDEN, "out_features": 7, "bias": True}


def oracle(tokens: Array, mask: Array, mode: str) -> Array:
    """One row after the other, in float64."""
    rows = []
    for row, kept in zip(tokens.astype(np.float64), mask.astype(bool), strict=True):
        found, places = row[kept], np.flatnonzero(kept)[:, None] + 1
        rows.append(
            {
                "cls": lambda found=found: found[0],
                "lasttoken": lambda found=found: found[-1],
                "max": lambda found=found: found.max(0),
                "mean": lambda found=found: found.mean(0),
                "mean_sqrt_len_tokens": lambda found=found: found.sum(0) / np.sqrt(len(found)),
                "weightedmean": lambda found=found, places=places: (found * places).sum(0) / places.sum(),
            }[mode]()
        )
    return np.stack(rows)


def given(folder: Path, mask: Array, ids: Array) -> dict[str, Array]:
    session = ort.InferenceSession(str(folder / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return dict(zip([v.name for v in session.get_outputs()], session.run(None, feed), strict=True))


def tokens_of(dense: Path, ids: Array, mask: Array) -> Array:
    with torch.no_grad():
        model = transformers.BertModel.from_pretrained(dense)
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", SWITCHES.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pooling_equals_its_formula_with_padding_on_either_side(mode: str, dtype: torch.dtype) -> None:
    tokens = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.tensor(MASKS)
    got = pool_tokens(tokens, mask, mode)
    assert got.dtype == dtype
    expected = oracle(tokens.numpy(), mask.numpy(), mode)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-6)
    long = pool_tokens(torch.full((1, 2000, 1), 60.0, dtype=dtype), torch.ones(1, 2000, dtype=torch.int64), mode)
    assert torch.isfinite(long).all()  # a sum of 120,000 is none in float16


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_a_row_without_a_token_is_pooled_to_zero(mode: str) -> None:
    assert not pool_tokens(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64), mode).any()


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ["mean"]),
        ({"pooling_mode": "lasttoken"}, ["lasttoken"]),
        (
            {"pooling_mode_weightedmean_tokens": True, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True},
            ["cls", "max", "weightedmean"],
        ),
        ({"pooling_mode": ["mean_sqrt_len_tokens", "mean"]}, ["mean_sqrt_len_tokens", "mean"]),
    ],
    ids=["mean", "lasttoken", "three concatenated", "two in a given order"],
)
def test_a_sentence_transformers_folder_becomes_a_graph_with_both_outputs(
    tmp_path: Path, config: dict[str, Any], modes: list[str]
) -> None:
    dense = sentence_folder(tmp_path / "dense", {"word_embedding_dimension": HIDDEN, **config}, ["Normalize"])
    out = tmp_path / "out"
    out.mkdir()
    report = write_onnx(dense, out, task="feature-extraction", cached_as="pooled")
    assert report.output_names == ("last_hidden_state", "token_embeddings", "sentence_embedding")
    assert report.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert json.loads((out / "1_Pooling/config.json").read_text())["word_embedding_dimension"] == HIDDEN
    assert (out / "modules.json").read_bytes() == (dense / "modules.json").read_bytes()
    for mask in (np.array(MASKS), np.array([[1]]), np.array([[1] * 11])):
        ids = np.random.default_rng(0).integers(3, VOCABULARY, mask.shape)
        got, tokens = given(out, mask, ids), tokens_of(dense, ids, mask)
        np.testing.assert_allclose(got["token_embeddings"], tokens, atol=2e-5)
        pooled = np.concatenate([oracle(tokens, mask, mode) for mode in modes], axis=1)
        expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        np.testing.assert_allclose(got["sentence_embedding"], expected, atol=2e-5)


def test_a_dense_module_has_its_weights_in_the_graph(tmp_path: Path) -> None:
    table = LINEAR | {"activation_function": "torch.nn.modules.activation.Tanh"}
    dense = sentence_folder(tmp_path / "dense", {"pooling_mode": "mean"}, ["Dense", "Normalize"], table)
    adapters = [
        make_adapter(transformers.BertModel(BERT), tmp_path / f"a{i}", i, r=2, target_modules=["query"]) for i in (0, 1)
    ]
    mix(dense, adapters, tmp_path / "mixture", task="feature-extraction")
    export(tmp_path / "mixture", "dense", tmp_path / "folded")
    export(tmp_path / "mixture", "onnx", tmp_path / "traced")
    ids, mask = np.random.default_rng(0).integers(3, VOCABULARY, (4, 5)), np.array(MASKS)
    got, tokens = given(tmp_path / "traced", mask, ids), tokens_of(tmp_path / "folded", ids, mask)
    weight, bias = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(0)).numpy(), np.ones(7)
    projected = np.tanh(oracle(tokens, mask, "mean") @ weight.T + bias)
    np.testing.assert_allclose(
        got["sentence_embedding"], projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=2e-5
    )
    assert {p.name for p in (tmp_path / "folded/2_Dense").iterdir()} == {"config.json", "model.safetensors"}
    (tmp_path / "base").mkdir()
    write_onnx(dense, tmp_path / "base", task="feature-extraction", cached_as="pooled")
    export(tmp_path / "mixture", "onnx", tmp_path / "refolded", onnx_base=tmp_path / "base")
    for name, value in given(tmp_path / "refolded", mask, ids).items():
        np.testing.assert_array_equal(value, got[name])
    for way in ("folded", "traced", "refolded"):
        assert_verified(tmp_path / way, **inputs_of(tmp_path / "mixture"))


def test_a_graph_without_pooling_is_verified_by_what_it_gives(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    dense = sentence_folder(tmp_path / "dense", {"pooling_mode": "mean"})
    adapters = [
        make_adapter(transformers.BertModel(BERT), tmp_path / f"a{i}", i, r=2, target_modules=["query"]) for i in (0, 1)
    ]
    mix(dense, adapters, tmp_path / "mixture", task="feature-extraction")
    export(tmp_path / "mixture", "onnx", tmp_path / "out", onnx_base=exported("features").out)
    assert [o.name for o in onnx.load(tmp_path / "out/onnx/model.onnx").graph.output] == ["last_hidden_state"]
    assert_verified(tmp_path / "out", **inputs_of(tmp_path / "mixture"))


@pytest.mark.parametrize(
    ("pooling", "rows", "error", "message"),
    [
        ({"pooling_mode": "attention"}, None, UnsupportedError, "1_Pooling/config.json: pooling mode 'attention'"),
        ({"pooling_mode_dream_tokens": True}, None, UnsupportedError, "pooling mode 'pooling_mode_dream_tokens'"),
        ({"pooling_mode": "mean", "include_prompt": False}, None, UnsupportedError, "include_prompt is false"),
        ({}, ["Transformer", "WordWeights"], UnsupportedError, "module 1 is 'sentence_transformers.models.WordWeights'"),
        ({}, ["Transformer", "Pooling", "LSTM"], UnsupportedError, "module 2 is 'sentence_transformers.models.LSTM'"),
        ({}, ["CLIPModel"], UnsupportedError, "module 0 is 'sentence_transformers.models.CLIPModel'"),
        ({}, ["Transformer"], UnsupportedError, "has no module that pools"),
        ({}, ["Transformer", "Pooling", "Dense"], BaseModelError, "2_Dense: has no model.safetensors"),
        ({}, None, BaseModelError, "is not a list of modules"),
    ],
)  # fmt: skip
def test_what_is_not_pooled_here_is_refused_by_name(
    tmp_path: Path, pooling: dict[str, Any], rows: list[str] | None, error: type[Exception], message: str
) -> None:
    folder = sentence_folder(tmp_path / "dense", pooling)
    if rows is not None:
        table = [
            {"path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(rows)
        ]
        (folder / "modules.json").write_text(json.dumps(table))
    elif not pooling:
        (folder / "modules.json").write_text('{"a": 1}')
    with pytest.raises(error, match=message):
        add_pooling(transformers.BertModel(BERT), folder)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"use_residual": True}, "use_residual is true"),
        ({"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
    ],
)
def test_a_dense_module_that_does_more_than_a_linear_is_refused(
    tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    table = LINEAR | {"activation_function": "torch.nn.modules.activation.Tanh"} | extra
    folder = sentence_folder(tmp_path / "dense", {"pooling_mode": "mean"}, ["Dense"], table)
    with pytest.raises(UnsupportedError, match=message):
        add_pooling(transformers.BertModel(BERT), folder)


def test_a_dense_module_that_names_no_activation_has_a_tanh(tmp_path: Path) -> None:
    model = transformers.BertModel(BERT).eval()
    add_pooling(model, sentence_folder(tmp_path / "dense", {"pooling_mode": "mean"}, ["Dense"], LINEAR))
    assert any(isinstance(module, torch.nn.Tanh) for module in model.get_submodule("sentence_transformers").modules())


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_tower_with_a_projection_gives_its_embedding(tmp_path: Path, tower: str) -> None:
    name = f"CLIP{tower.title()}ModelWithProjection"
    base = make_dense(tmp_path / "base", name, CLIP_TEXT if tower == "text" else CLIP_VISION)
    model = getattr(transformers, name).from_pretrained(base)
    adapters = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj", "fc1"]) for i in (0, 1)]
    mix(base, adapters, tmp_path / "mixture", task="feature-extraction")
    export(tmp_path / "mixture", "onnx", tmp_path / "out")
    export(tmp_path / "mixture", "dense", tmp_path / "dense")
    session = ort.InferenceSession(str(tmp_path / "out/onnx/model.onnx"), providers=["CPUExecutionProvider"])
    embeds = "text_embeds" if tower == "text" else "image_embeds"
    assert [v.name for v in session.get_outputs()] == [embeds, "last_hidden_state"]
    if tower == "text":
        ids = np.random.default_rng(0).integers(3, VOCABULARY, (3, 6))
        feed: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    else:
        feed = {"pixel_values": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}
    folded = getattr(transformers, name).from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        expected = folded(**{key: torch.tensor(value) for key, value in feed.items()})
    got = session.run(None, feed)
    np.testing.assert_allclose(got[0], expected[embeds].numpy(), atol=2e-5)
    np.testing.assert_allclose(got[1], expected.last_hidden_state.numpy(), atol=2e-5)
    for way in ("out", "dense"):
        assert_verified(tmp_path / way, **inputs_of(tmp_path / "mixture"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode": ["mean", "max"]}, None),
    ],
)
def test_a_fit_pools_as_a_sentence_transformers_folder_does(
    config: dict[str, object], expected: str | None, tmp_path: Path
) -> None:
    assert own_pooling(tmp_path) is None
    kinds = ("Transformer", "Pooling")
    rows = [{"type": f"sentence_transformers.models.{kind}", "path": f"{n}_{kind}" * n} for n, kind in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert own_pooling(tmp_path) == expected
