"""Refolding into an ONNX export of the base, against a traced export of the same mixture and ONNX Runtime."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import assert_verified, inputs_of, make_adapter, tiny_llama
from support.refold import onnx_of

from wlora_merge import Mixture
from wlora_merge.errors import BaseModelError, OutputError, UnsupportedError, VerifyError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.onnx_refold import plan_refold
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.models.base_model import open_base
from wlora_merge.onnx.protobuf import read_onnx

ort = pytest.importorskip("onnxruntime")

Zoo = Callable[..., tuple[Path, list[Path]]]
Array = np.ndarray[Any, Any]
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def made(llama_zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(a mixture, an ONNX export of its base, a traced ONNX export of the mixture)."""
    root = tmp_path_factory.mktemp("refold")
    base, adapters = llama_zoo()
    mix(base, adapters, root / "mixture", weights=[0.5, 0.3, 0.2], task="causal-lm")
    export(root / "mixture", "onnx", root / "traced")
    return root / "mixture", onnx_of(base, root / "base"), root / "traced"


def weights_of(file: Path) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}


def logits_of(file: Path, dtype: type = np.float32) -> Array:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    ids = np.array([[5, 9, 23, 42, 7], [1, 2, 3, 4, 90]])
    feed: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["token_type_ids"] = np.zeros_like(ids)
    feed["position_ids"] = np.tile(np.arange(5), (2, 1))
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feed[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), dtype)
    result: Array = session.run(["logits"], {value.name: feed[value.name] for value in session.get_inputs()})[0]
    return result


def test_a_refold_equals_a_traced_export_bit_for_bit(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    mixture, base, traced = made
    result = export(mixture, "onnx", tmp_path / "out", onnx_base=base)
    got, expected, before = (
        weights_of(f) for f in (tmp_path / "out/onnx/model.onnx", traced / "onnx/model.onnx", base)
    )
    assert set(got) == set(expected) == set(before)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    changed = [name for name in got if not np.array_equal(got[name], before[name])]
    assert len(changed) == result.report["rewritten"] == 14
    np.testing.assert_array_equal(
        logits_of(tmp_path / "out/onnx/model.onnx"), logits_of(traced / "onnx" / "model.onnx")
    )
    done = verify(tmp_path / "out", **inputs_of(mixture)).done
    assert done[-1].startswith("outputs equal the unmerged mixture's: off by ")
    assert done[-2].endswith("at several shapes, and in a greedy generation")
    manifest = json.loads((tmp_path / "out/wlora_merge.json").read_text())
    assert set(manifest["report"]["onnx_base"]) == {"model.onnx"}
    assert f"--format onnx --onnx-base {base.name} " in (tmp_path / "out/README.md").read_text()


def test_a_graph_of_another_name_becomes_the_one_that_is_looked_for(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    mixture, base, _ = made
    (tmp_path / "base" / "onnx").mkdir(parents=True)
    shutil.copyfile(base, tmp_path / "base/onnx/model_optimized.onnx")
    export(mixture, "onnx", tmp_path / "out", onnx_base=tmp_path / "base")
    assert [p.name for p in (tmp_path / "out" / "onnx").iterdir()] == ["model.onnx"]
    assert_verified(tmp_path / "out", **inputs_of(mixture))
    shutil.copyfile(base, tmp_path / "base/onnx/model_other.onnx")
    with pytest.raises(UnsupportedError, match=r"holds model_optimized.onnx, model_other.onnx, expected model.onnx"):
        export(mixture, "onnx", tmp_path / "other", onnx_base=tmp_path / "base")


@pytest.mark.parametrize("one_file", [True, False])
def test_weights_in_data_files_are_rewritten_there(
    made: tuple[Path, Path, Path], tmp_path: Path, one_file: bool
) -> None:
    mixture, base, traced = made
    (tmp_path / "base").mkdir()
    onnx.save(
        onnx.load(base), tmp_path / "base/model.onnx", save_as_external_data=True, all_tensors_to_one_file=one_file,
        location="model.onnx_data" if one_file else None, size_threshold=512,
    )  # fmt: skip
    export(mixture, "onnx", tmp_path / "out", onnx_base=tmp_path / "base")
    folder = tmp_path / "out" / "onnx"
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "base").iterdir()}
    assert len(list(folder.iterdir())) == 2 if one_file else len(list(folder.iterdir())) > 14
    assert (folder / "model.onnx").read_bytes() == (tmp_path / "base/model.onnx").read_bytes()
    np.testing.assert_array_equal(logits_of(folder / "model.onnx"), logits_of(traced / "onnx/model.onnx"))


def test_a_float16_file_of_a_bfloat16_base_gets_the_sum_rounded_once_to_float16(llama_zoo: Zoo, tmp_path: Path) -> None:
    source, adapters = llama_zoo(torch.bfloat16)
    mix(source, adapters, tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "onnx", tmp_path / "traced", dtype="float16")
    onnx_of(source, tmp_path / "base", dtype="float16")
    export(tmp_path / "mixture", "onnx", tmp_path / "out", onnx_base=tmp_path / "base")
    got, expected = (weights_of(tmp_path / name / "onnx/model.onnx") for name in ("out", "traced"))
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    export(tmp_path / "mixture", "dense", tmp_path / "dense", dtype="float16")
    product = got["model.model.embed_tokens.weight"]
    with safe_open(tmp_path / "dense/model.safetensors", "np") as file:
        np.testing.assert_array_equal(product, file.get_tensor("model.embed_tokens.weight"))
        q_proj = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    assert any(np.array_equal(array, q_proj.T) for array in got.values())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    np.testing.assert_array_equal(
        logits_of(tmp_path / "out/onnx/model.onnx", np.float16),
        logits_of(tmp_path / "traced/onnx/model.onnx", np.float16),
    )


def fused(file: Path, out: Path, rows: bool) -> Path:
    """The graph with q, k and v of each layer as one product and a split, all weights under meaningless names."""
    model = onnx.load(file)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = list(model.graph.node)
    products = [n for n in nodes if n.op_type == "MatMul" and n.input[1] in arrays]
    by_input: dict[str, list[Any]] = {}
    for node in products:
        by_input.setdefault(node.input[0], []).append(node)
    drop, count = set[str](), 0
    for x, group in by_input.items():
        if len(group) != 3:
            continue
        joined = np.concatenate([arrays[n.input[1]] for n in group], axis=1)
        name, sizes = f"qkv_{count}", [arrays[n.input[1]].shape[1] for n in group]
        new = [onnx.helper.make_node("Split", [f"{name}_out", f"{name}_sizes"], [n.output[0] for n in group], axis=-1)]
        if rows:
            new = [
                onnx.helper.make_node("Transpose", [name], [f"{name}_t"]),
                onnx.helper.make_node("MatMul", [x, f"{name}_t"], [f"{name}_out"]),
                *new,
            ]
        else:
            new = [onnx.helper.make_node("MatMul", [x, name], [f"{name}_out"]), *new]
        at = min(nodes.index(n) for n in group)
        nodes[at:at] = new
        for node in group:
            nodes.remove(node)
            drop.add(node.input[1])
        arrays[name] = np.ascontiguousarray(joined.T if rows else joined)
        arrays[f"{name}_sizes"] = np.array(sizes)
        count += 1
    assert count == 2
    new_names = {name: f"w{i}" for i, name in enumerate(sorted(set(arrays) - drop))}
    for node in nodes:
        for i, given in enumerate(node.input):
            node.input[i] = new_names.get(given, given)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(arrays[old], new) for old, new in new_names.items())
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("rows", [False, True], ids=["beside each other", "below each other"])
def test_fused_weights_under_any_name_are_found(made: tuple[Path, Path, Path], tmp_path: Path, rows: bool) -> None:
    mixture, base, traced = made
    file = fused(base, tmp_path / "other.onnx", rows)
    np.testing.assert_allclose(logits_of(file), logits_of(base), atol=1e-5)
    result = export(mixture, "onnx", tmp_path / "out", onnx_base=file)
    assert result.report["rewritten"] == 14 - 4
    got, expected = logits_of(tmp_path / "out/onnx/model.onnx"), logits_of(traced / "onnx/model.onnx")
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(got - logits_of(base)).max() > 1e-2


def test_a_traced_mixture_has_the_nodes_of_the_bases_own_export(made: tuple[Path, Path, Path]) -> None:
    _, base, traced = made
    kinds = [sorted(n.op_type for n in onnx.load(f).graph.node) for f in (base, traced / "onnx/model.onnx")]
    assert kinds[0] == kinds[1]
    assert kinds[0].count("MatMul") == 2 * 7 + 1 + 2 * 2


def test_the_scan_of_a_file_agrees_with_the_onnx_library(made: tuple[Path, Path, Path]) -> None:
    _, base, _ = made
    found = {entry.name: entry for entry in read_onnx(base).tensors}
    raw = base.read_bytes()
    floats = [t for t in onnx.load(base).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert {t.name for t in floats} <= set(found)
    for tensor in floats:
        entry = found[tensor.name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.dims), "F32")
        assert raw[entry.start : entry.end] == tensor.raw_data


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -5000, -1])
def test_a_file_that_is_cut_or_no_graph_is_refused(made: tuple[Path, Path, Path], tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.onnx").write_bytes(made[1].read_bytes()[:cut])
    with pytest.raises(BaseModelError, match=r"cut\.onnx: "):
        read_onnx(tmp_path / "cut.onnx")
    with pytest.raises(WloraMergeError):
        export(made[0], "onnx", tmp_path / "out", onnx_base=tmp_path / "cut.onnx")
    assert not (tmp_path / "out").exists()


def test_random_bytes_in_the_graph_never_raise_anything_but_an_error_of_ours(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    raw = made[1].read_bytes()
    rng = np.random.default_rng(0)
    weights = [(e.start, e.end) for e in read_onnx(made[1]).tensors]
    for _ in range(200):
        broken = bytearray(raw)
        for at in rng.integers(0, len(raw), 3):
            if not any(a <= at < b for a, b in weights):
                broken[at] = rng.integers(256)
        (tmp_path / "broken.onnx").write_bytes(broken)
        with contextlib.suppress(BaseModelError):
            read_onnx(tmp_path / "broken.onnx")


def test_another_model_or_revision_is_refused_with_the_first_weight_that_differs(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    other = tiny_llama(seed=1)
    other.save_pretrained(tmp_path / "other")
    adapters = [make_adapter(other, tmp_path / f"a{i}", i, r=2, target_modules=["down_proj"]) for i in range(2)]
    mix(tmp_path / "other", adapters, tmp_path / "mixture", task="causal-lm")
    with pytest.raises(BaseModelError, match=r"'model\.model\.embed_tokens\.weight' differs .* at \[1, 0\] it holds"):
        export(tmp_path / "mixture", "onnx", tmp_path / "out", onnx_base=made[1])

    def nudged(name: str, at: tuple[int, ...]) -> Path:
        model = onnx.load(made[1])
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[at] += 1e-3
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        onnx.save(model, tmp_path / "nudged.onnx")
        return tmp_path / "nudged.onnx"

    norm = next(t.name for t in onnx.load(made[1]).graph.initializer if t.name.endswith("norm.weight"))
    with pytest.raises(BaseModelError, match=rf"weight '{norm}' differs .* at \[0, 7\] it holds 1\.001, expected 1"):
        export(made[0], "onnx", tmp_path / "out", onnx_base=nudged(norm, (7,)))
    product = next(t.name for t in onnx.load(made[1]).graph.initializer if list(t.dims) == [56, 32])
    with pytest.raises(BaseModelError, match=rf"weight '{product}' .*another model or revision"):
        export(made[0], "onnx", tmp_path / "out", onnx_base=nudged(product, (50, 30)))
    assert not (tmp_path / "out").exists()


def test_a_quantized_file_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(made[1]), str(tmp_path / "int8.onnx"))
    with pytest.raises(UnsupportedError, match=r"int8\.onnx: its weight '.*_quantized' is quantized \(\w+\)"):
        export(made[0], "onnx", tmp_path / "out", onnx_base=tmp_path / "int8.onnx")


def test_in_a_folder_the_quantized_graphs_are_left_out(
    made: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    mixture, base, traced = made
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.onnx").write_bytes(base.read_bytes())
    quantize_dynamic(str(base), str(tmp_path / "base/model_int8.onnx"))
    with caplog.at_level("INFO", "wlora_merge"):
        result = export(mixture, "onnx", tmp_path / "out", onnx_base=tmp_path / "base")
    assert "model_int8.onnx is quantized and left out: quantize the new graph again." in caplog.text
    assert set(result.report["onnx_base"]) == {"model.onnx"} == {p.name for p in (tmp_path / "out/onnx").iterdir()}
    np.testing.assert_array_equal(logits_of(tmp_path / "out/onnx/model.onnx"), logits_of(traced / "onnx/model.onnx"))


def test_stacks_of_experts_are_matched_matrix_by_matrix(tmp_path: Path) -> None:
    """The files have each expert's linears by themselves, the graph their transposes, side by side and stacked."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=96,
        max_position_embeddings=64, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    chosen = [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]]
    adapters = [
        make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj"], target_parameters=names)
        for i, names in enumerate(chosen)
    ]
    mix(tmp_path / "base", adapters, tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "onnx", tmp_path / "traced")
    base = onnx_of(tmp_path / "base", tmp_path / "exported")
    assert any(len(t.dims) == 3 for t in onnx.load(base).graph.initializer)
    export(tmp_path / "mixture", "onnx", tmp_path / "out", onnx_base=base)
    got, expected = (weights_of(tmp_path / name / "onnx/model.onnx") for name in ("out", "traced"))
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    assert sum(not np.array_equal(got[name], old) for name, old in weights_of(base).items()) == 3


def test_a_stack_that_the_files_have_in_one_tensor_and_the_graph_transposed_is_refused(tmp_path: Path) -> None:
    experts = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    save_file({"layer.experts": experts}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    weight = onnx.numpy_helper.from_array(experts.transpose(1, 2).contiguous().numpy(), "w")
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 6, 8])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [value], [weight])), tmp_path / "m.onnx")
    with pytest.raises(
        UnsupportedError, match=r"'w' \[3, 6, 8\] may be the matrices of 'layer\.experts', each transposed"
    ):
        plan_refold(tmp_path / "m.onnx", open_base(tmp_path), [], Mixture)  # type: ignore[arg-type]


def test_a_weight_that_is_there_twice_or_not_at_all_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = onnx.load(made[1])
    product = next(t for t in model.graph.initializer if list(t.dims) == [56, 32])
    again = onnx.TensorProto()
    again.CopyFrom(product)
    again.name = "again"
    model.graph.initializer.append(again)
    onnx.save(model, tmp_path / "twice.onnx")
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight' is found more than once, as .* and as 'again'"):
        export(made[0], "onnx", tmp_path / "out", onnx_base=tmp_path / "twice.onnx")
    del model.graph.initializer[-1]
    model.graph.initializer.remove(product)
    onnx.save(model, tmp_path / "without.onnx")
    with pytest.raises(BaseModelError, match=r"'model\.layers\.\d\.mlp\.down_proj\.weight' \[32, 56\] is in none"):
        export(made[0], "onnx", tmp_path / "out", onnx_base=tmp_path / "without.onnx")


def test_equal_target_modules_cannot_be_told_apart(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.copy_(base.model.layers[0].mlp.down_proj.weight)
    base.save_pretrained(tmp_path / "base")
    adapters = [make_adapter(base, tmp_path / f"a{i}", i, r=2, target_modules=["down_proj"]) for i in range(2)]
    mix(tmp_path / "base", adapters, tmp_path / "mixture", task="causal-lm")
    model = onnx.load(made[1])
    one, two = (t for t in model.graph.initializer if list(t.dims) == [56, 32])
    two.raw_data = one.raw_data = base.model.layers[0].mlp.down_proj.weight.detach().numpy().T.tobytes()
    onnx.save(model, tmp_path / "twins.onnx")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.down_proj\.weight' and 'model\.layers\.1\.mlp\.down"):
        export(tmp_path / "mixture", "onnx", tmp_path / "out", onnx_base=tmp_path / "twins.onnx")


def test_a_head_is_replaced_where_the_graph_has_the_bases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.bias.normal_()
    model.save_pretrained(tmp_path / "base")
    bodies = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"]) for i in range(2)]
    mixture = mix(tmp_path / "base", bodies, tmp_path / "plain", task="text-classification")
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    mixture.head = head
    mixture.save(tmp_path / "mixture")
    export(tmp_path / "mixture", "onnx", tmp_path / "traced")
    file = onnx_of(tmp_path / "base", tmp_path / "base_onnx", "text-classification")
    export(tmp_path / "mixture", "onnx", tmp_path / "out", onnx_base=file)
    np.testing.assert_array_equal(
        logits_of(tmp_path / "out/onnx/model.onnx"), logits_of(tmp_path / "traced/onnx/model.onnx")
    )
    checked = verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-4
    assert not checked.skipped
    assert (
        "ONNX Runtime agrees with the unmerged mixture at several shapes" in checked.done
    )  # a classifier generates nothing
    transformers.BertModel(config).save_pretrained(tmp_path / "body")
    bare = mix(tmp_path / "body", [
        make_adapter(transformers.BertModel(config), tmp_path / f"b{i}", i, r=2, target_modules=["query"]) for i in (0, 1)
    ])  # fmt: skip
    bare.head, bare.task = head, "text-classification"
    with pytest.raises(UnsupportedError, match=r"brings a tensor 'classifier\.\w+' that the base lacks"):
        export(bare, "onnx", tmp_path / "never", onnx_base=file)


def test_verify_finds_a_bit_that_the_disk_did_not_keep(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    export(made[0], "onnx", tmp_path / "out", onnx_base=made[1])
    file = tmp_path / "out/onnx/model.onnx"
    data, at = bytearray(file.read_bytes()), min(entry.start for entry in read_onnx(file).tensors)
    written = json.loads((tmp_path / "out/wlora_merge.json").read_text())["files"]["onnx/model.onnx"]["sha256"]
    assert written == hashlib.sha256(data).hexdigest()  # hashed as the bytes passed, never read again
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerifyError, match=r"model\.onnx.*sha256"):
        verify(tmp_path / "out", quick=True)


def test_options_that_a_refold_cannot_follow_are_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    mixture, base, _ = made
    with pytest.raises(UnsupportedError, match="leave --dtype and --opset out"):
        export(mixture, "onnx", tmp_path / "out", onnx_base=base, dtype="float16")
    with pytest.raises(UnsupportedError, match="--onnx-base: of --format onnx alone"):
        export(mixture, "dense", tmp_path / "out", onnx_base=base)
    with pytest.raises(BaseModelError, match="no ONNX file there"):
        export(mixture, "onnx", tmp_path / "out", onnx_base=tmp_path)
    with pytest.raises(OutputError, match="input"):
        export(mixture, "onnx", base.parent.parent, onnx_base=base, force=True)


def test_a_refold_imports_neither_transformers_nor_peft_nor_onnx(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from wlora_merge import export;"
        f"export({str(made[0])!r}, 'onnx', {str(tmp_path / 'out')!r}, onnx_base={str(made[1])!r});"
        "print(sorted({'transformers', 'peft', 'onnx', 'torch.onnx', 'onnxscript', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert isinstance(Mixture.load(made[0]), Mixture)
