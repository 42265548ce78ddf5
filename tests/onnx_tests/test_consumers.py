"""Who the exports are for: transformers.js in Node, OpenVINO and sentence-transformers, on local files alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.models import make_adapter
from support.onnx_models import VOCABULARY, Exported, export_once, sentence_folder

from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix
from wlora_merge.onnx.convert import write_onnx

onnxruntime = pytest.importorskip("onnxruntime")

PACKAGE = "@huggingface/transformers@4.3.1"
SCRIPT = Path(__file__).parent / "transformers_js.mjs"


@pytest.fixture(scope="session")
def library() -> Path:
    """transformers.js with its CPU runtime, installed once in the user's cache."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not here")
    folder = Path(os.environ.get("WLORA_MERGE_NODE", Path.home() / ".cache" / "wlora_merge" / "node"))
    file = folder / "node_modules/@huggingface/transformers/dist/transformers.node.mjs"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode or not file.is_file():
            pytest.skip(f"npm cannot install {PACKAGE}: {done.stderr.strip()[-200:]}")
    return file


def in_node(library: Path, kind: str, folder: Path, given: list[Any], dtype: str = "fp32") -> Any:
    command = ["node", str(SCRIPT), str(library), kind, str(folder), json.dumps(given), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_js_classifies_as_pytorch_does(exported: Callable[[str], Exported], library: Path) -> None:
    made, ids = exported("bert"), torch.tensor([[5, 9, 23, 42], [7, 8, 3, 90]])
    with torch.no_grad():
        expected = made.model()(input_ids=ids).logits.numpy()
    got = in_node(library, "SequenceClassification", made.out, ids.tolist())
    np.testing.assert_allclose(np.array(got), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "CausalLM"), ("t5 of one layer", "Seq2SeqLM"), ("bert", "SequenceClassification")]
)
def test_transformers_js_finds_a_float16_graph_under_its_own_dtype(
    library: Path, name: str, kind: str, tmp_path: Path
) -> None:
    made, ids = export_once(name, tmp_path, dtype="float16"), torch.tensor([[5, 9, 23, 42]])
    (made.out / "onnx" / "model.onnx").unlink(missing_ok=True)  # so that no other file can be what it finds
    got = in_node(library, kind, made.out, ids.tolist(), dtype="fp16")
    if kind == "SequenceClassification":
        expected = made.model()(input_ids=ids).logits.detach().numpy()
        np.testing.assert_allclose(np.array(got), expected, atol=0.05)
    else:
        assert len(got[0]) > 4


@pytest.mark.parametrize(("name", "kind"), [("llama", "CausalLM"), ("t5", "Seq2SeqLM")])
def test_transformers_js_generates_what_generate_does(
    exported: Callable[[str], Exported], library: Path, name: str, kind: str
) -> None:
    made, seen = exported(name), set[int]()
    model = made.model()
    for prompt in ([5, 9, 23, 42], [90, 17], [61]):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8).tolist()
        seen |= set(expected[0])
        assert in_node(library, kind, made.out, ids.tolist()) == expected
    assert len(seen) > 3


def test_transformers_js_embeds_sentences(library: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    dense = sentence_folder(tmp_path / "dense", {"pooling_mode": "mean"}, ["Normalize"])
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", pad_token="w0")
    tokenizer.save_pretrained(dense)
    (tmp_path / "out").mkdir()
    write_onnx(dense, tmp_path / "out", task="feature-extraction", cached_as="mean")
    texts = ["w5 w9 w23", "w90 w3 w7 w61 w12"]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = transformers.BertModel.from_pretrained(dense)(**batch).last_hidden_state
    mean = [row[kept.bool()].mean(0) for row, kept in zip(tokens, batch["attention_mask"], strict=True)]
    expected = torch.nn.functional.normalize(torch.stack(mean), dim=1).numpy()
    pooled_there, pooled_in_the_graph = in_node(library, "embed", tmp_path / "out", texts)
    np.testing.assert_allclose(pooled_in_the_graph, expected, atol=2e-5)
    np.testing.assert_allclose(pooled_there, expected, atol=2e-5)


# ------------------------------------------------------------------------------------------ OpenVINO, sentence-transformers


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_openvino_computes_what_pytorch_does(exported: Callable[[str], Exported], name: str) -> None:
    openvino = pytest.importorskip("openvino")
    made, ids = exported(name), torch.tensor([[5, 9, 23, 42, 7], [7, 8, 3, 90, 2]])
    model = openvino.compile_model(str(made.file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 5), np.int64)}
    inputs = {port.get_any_name(): port for port in model.inputs}
    given["position_ids"] = np.tile(np.arange(5), (2, 1))
    given["token_type_ids"] = np.zeros((2, 5), np.int64)
    for name_, port in inputs.items():
        if name_.startswith("past_key_values"):
            shape = [2, port.partial_shape[1].get_length(), 0, port.partial_shape[3].get_length()]
            given[name_] = np.zeros(shape, np.float32)
    got = model({name_: given[name_] for name_ in inputs})[model.output("logits")]
    with torch.no_grad():
        expected = made.model()(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_sentence_transformers_loads_a_dense_export_and_gives_what_its_graph_gives(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    base = sentence_folder(tmp_path / "base", {"pooling_mode": "mean", "word_embedding_dimension": 32}, ["Normalize"])
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", pad_token="w0").save_pretrained(base)
    adapter = make_adapter(
        transformers.AutoModel.from_pretrained(base), tmp_path / "a", 0, r=2, target_modules=["query"]
    )
    made = mix(base, [adapter], task="feature-extraction")
    export(made, "dense", tmp_path / "dense", server="sentence-transformers")
    export(made, "onnx", tmp_path / "onnx")
    texts = ["w5 w9 w23", "w90 w3 w7"]
    got = library.SentenceTransformer(str(tmp_path / "dense"), device="cpu").encode(texts)
    ids = np.array([words.encode(text).ids for text in texts])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "onnx" / "model.onnx")
    hidden, tokens, sentence = session.run(["last_hidden_state", "token_embeddings", "sentence_embedding"], feed)
    np.testing.assert_allclose(got, sentence, atol=2e-5)
    np.testing.assert_array_equal(hidden, tokens)
