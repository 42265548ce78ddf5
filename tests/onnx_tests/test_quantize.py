"""What an ONNX export can be besides plain: fused, quantized, an onnxruntime-genai folder; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from support.models import inputs_of, make_adapter, tiny_bert, tiny_llama

from wlora_merge.cli.main import main
from wlora_merge.errors import UnsupportedError, VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.manifest import read_manifest
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.onnx import convert as onnx_writer
from wlora_merge.onnx import quantize
from wlora_merge.onnx.js_names import dtype_for_js, name_half
from wlora_merge.onnx.session import check_files

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters on a tiny Llama whose heads are wide enough for onnxruntime-genai's attention, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("options")
    model = tiny_llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(root / "base")
    tokenizer = Tokenizer(models.BPE({f"w{i}": i for i in range(96)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(root / "base")
    adapters = [make_adapter(model, root / f"a{i}", i, r=2, target_modules=["q_proj", "down_proj"]) for i in (0, 1)]
    mix(root / "base", adapters, root / "mixture", task="causal-lm")
    return root / "mixture"


def test_onnxruntime_genai_generates_what_generate_does(mixture: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    from transformers import AutoModelForCausalLM

    result = export(mixture, "onnx", tmp_path / "out", onnx_runtime="genai")
    assert result.report == {"same_tokens": 1.0}
    assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    export(mixture, "dense", tmp_path / "dense")
    prompt = [5, 9, 23, 42]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").generate(
        torch.tensor([prompt]), do_sample=False, max_length=16
    )
    model = og.Model(str(tmp_path / "out"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=16, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected[0].tolist()
    assert (
        verify(tmp_path / "out", **inputs_of(mixture)).done[-1]
        == "100.0% of the greedy tokens are the unmerged mixture's"
    )


def test_onnxruntime_genai_in_int4_says_how_many_tokens_are_pytorchs(mixture: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    result = export(mixture, "onnx", tmp_path / "out", onnx_runtime="genai", quantize="int4")
    share = result.report["same_tokens"]
    assert 0.3 <= share <= 1
    assert any(node.op_type == "MatMulNBits" for node in onnx.load(tmp_path / "out/model.onnx").graph.node)
    done = verify(tmp_path / "out", **inputs_of(mixture)).done[-1]
    assert done == f"{share:.1%} of the greedy tokens are the unmerged mixture's"


def test_quantized_graphs_stand_beside_the_float_one_and_their_error_is_reported(
    mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for (
        kind,
        name,
        js,
        operator,
        most,
    ) in (  # transformers.js's names
        ("int8", "model_quantized.onnx", "q8", "MatMulInteger", 0.2),  # on any CPU: 8 bits would overflow without VNNI
        ("int4", "model_q4.onnx", "q4", "MatMulNBits", 0.6),
    ):
        arguments = ["export", str(mixture), "--format", "onnx", "--quantize", kind, "--allow-loss"]
        arguments += ["--out", str(tmp_path / kind)]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        error = read_manifest(tmp_path / kind).report.table()["quantized"]
        assert "root" not in {record.name for record in caplog.records}  # where ONNX Runtime's quantizer warns
        assert f"{error['file']}: off by {error['relative']:.2e}" in done.output
        assert error["file"] == f"onnx/{name}"
        assert f"with `dtype: '{js}'`" in (tmp_path / kind / "README.md").read_text()
        assert 0 < error["relative"] < most
        assert 0 < error["same_choice"] <= 1
        graph = onnx.load(tmp_path / kind / "onnx" / name).graph
        assert sum(operator in node.op_type for node in graph.node) >= 14
        assert operator not in {n.op_type for n in onnx.load(tmp_path / kind / "onnx" / "model.onnx").graph.node}
        assert (
            verify(tmp_path / kind, **inputs_of(mixture))
            .done[-1]
            .startswith("outputs equal the unmerged mixture's: off by ")
        )


def test_a_graph_that_keeps_too_few_choices_is_refused_and_the_next_way_is_tried(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of a random model keeps what its scores happen to keep, so the threshold moves here."""
    shares = {}
    for kind, scheme in (("int8", "output channels"), ("int4", "blocks of 32 weights")):
        report = export(mixture, "onnx", tmp_path / kind, quantize=kind, allow_loss=True).report["quantized"]
        shares[kind] = report["same_choice"]
        assert report["scheme"] == scheme
    monkeypatch.setattr(quantize, "ENOUGH", shares["int8"] + 1e-9)
    report = export(mixture, "onnx", tmp_path / "again", quantize="int8").report["quantized"]
    assert report["scheme"] == "blocks of 32 weights"
    assert report["same_choice"] > shares["int8"]
    graph = onnx.load(tmp_path / "again" / report["file"]).graph
    assert {a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"} == {8}
    monkeypatch.setattr(quantize, "ENOUGH", 1.01)
    for kind, advice in (("int4", "say --quantize int8, leave it out"), ("int8", ": leave it out")):
        with pytest.raises(
            UnsupportedError, match=rf"--quantize {kind}: the graph would keep .*{advice}.*--allow-loss"
        ):
            export(mixture, "onnx", tmp_path / "no", quantize=kind)
        assert not (tmp_path / "no").exists()


def test_of_embeddings_the_cosine_is_said_and_not_the_choice(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["query"])
    made = mix(tmp_path / "base", [adapter], task="feature-extraction")
    done = export(made, "onnx", tmp_path / "out", quantize="int8")
    quantized = done.report["quantized"]
    assert "same_choice" not in quantized
    assert 0.9 < quantized["cosine"] < 1
    assert f"cosine {quantized['cosine']:.4f}" in done.detail
    assert f"cosine {quantized['cosine']:.4f}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("options", [{}, {"quantize": "int4", "onnx_runtime": "genai"}])
def test_allow_loss_is_for_a_graph_beside_the_float_one(mixture: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="--allow-loss is for a quantized graph beside the float one"):
        export(mixture, "onnx", tmp_path / "out", allow_loss=True, **options)


def test_a_float16_export_has_the_names_that_transformers_js_looks_for(mixture: Path, tmp_path: Path) -> None:
    export(mixture, "onnx", tmp_path / "out", dtype="float16", quantize="int4", allow_loss=True)
    folder = tmp_path / "out" / "onnx"
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "model_fp16.onnx", "model_q4f16.onnx"}
    assert (folder / "model.onnx").samefile(folder / "model_fp16.onnx")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "{ dtype: 'fp16' }" in card
    assert "with `dtype: 'q4f16'`" in card
    assert verify(tmp_path / "out", **inputs_of(mixture))
    (folder / "model_fp16.onnx").unlink()
    with pytest.raises(VerifyError, match=r"model_fp16\.onnx"):
        verify(tmp_path / "out", **inputs_of(mixture))


def test_a_refold_of_float16_graphs_has_them_too(mixture: Path, tmp_path: Path) -> None:
    root = mixture.parent
    mix(root / "base", [root / "a0"], tmp_path / "none", weights=[0.0], task="causal-lm")
    export(tmp_path / "none", "onnx", tmp_path / "of_base", dtype="float16")
    for onnx_base in (tmp_path / "of_base", tmp_path / "of_base" / "onnx" / "model_fp16.onnx"):
        export(mixture, "onnx", tmp_path / "out", onnx_base=str(onnx_base), force=True)
        names = {p.name for p in (tmp_path / "out" / "onnx").iterdir()}
        assert names == {"model.onnx", "model_fp16.onnx"}
        assert len({(tmp_path / "out" / "onnx" / name).read_bytes() for name in names}) == 1
        assert "{ dtype: 'fp16' }" in (tmp_path / "out" / "README.md").read_text()
        assert verify(tmp_path / "out", **inputs_of(mixture))


def test_a_graph_with_a_data_file_keeps_its_one_name(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    (tmp_path / "onnx").mkdir()
    weight = numpy_helper.from_array(np.ones((64, 64), np.float16), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 64]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", shapes[:1], shapes[1:], [weight]))
    save(model, tmp_path / "onnx" / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    name_half(tmp_path)
    assert {p.name for p in (tmp_path / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    assert dtype_for_js(tmp_path) == "fp32"


def test_fusions_use_onnx_runtimes_own_operators_and_are_checked(mixture: Path, tmp_path: Path) -> None:
    export(mixture, "onnx", tmp_path / "out", ort_fusions="cpu", opset=20)
    kinds = {node.op_type for node in onnx.load(tmp_path / "out/onnx/model.onnx").graph.node}
    assert {"SimplifiedLayerNormalization", "RotaryEmbedding"} & kinds
    check_files(tmp_path / "out" / "onnx")
    model = onnx.load(tmp_path / "out/onnx/model.onnx")
    model.graph.node[-1].op_type = "NoSuchOperator"  # the checker judges what stands beside the runtime's own operators
    for large in (False, True):
        folder = tmp_path / f"broken {large}"
        folder.mkdir()
        onnx.save(
            model, folder / "model.onnx", save_as_external_data=large, size_threshold=0, convert_attribute=False,
            location="model.onnx_data" if large else None,
        )  # fmt: skip
        with pytest.raises(VerifyError, match=r"onnx\.checker refuses it \(No Op registered for NoSuchOperator"):
            check_files(folder)
    with pytest.raises(UnsupportedError, match=r"--ort-fusions webgpu: ONNX Runtime has no such provider here \(.*cpu"):
        export(mixture, "onnx", tmp_path / "never", ort_fusions="webgpu")
    assert not (tmp_path / "never").exists()


def test_fusions_that_break_a_graph_are_named(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_writer, "_fuse", lambda graph, provider: graph.graph.outputs.pop())
    with pytest.raises(
        UnsupportedError, match=r"the fusions for cpu break this model's graph .*leave --ort-fusions out"
    ):
        export(mixture, "onnx", tmp_path / "never", ort_fusions="cpu")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dense", {"quantize": "int8"}, "--quantize: of --format onnx alone"),
        ("onnx", {"dtype": "bfloat16"}, "no bfloat16 MatMul"),
        ("onnx", {"quantize": "int3"}, "expected one of int8, int4"),
        ("onnx", {"ort_fusions": "cpus"}, "--ort-fusions is 'cpus', expected one of cpu, cuda"),
        ("onnx", {"onnx_runtime": "genai", "opset": 18}, "chooses opset and operators"),
        ("onnx", {"onnx_runtime": "genai", "quantize": "int8"}, "quantizes to int4 alone"),
        ("onnx", {"onnx_runtime": "genai", "dtype": "float16"}, "does not run the float16 folder"),
        ("onnx", {"onnx_base": "model.onnx", "quantize": "int8"}, "--quantize needs a traced export"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    mixture: Path, tmp_path: Path, kind: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        export(mixture, kind, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
