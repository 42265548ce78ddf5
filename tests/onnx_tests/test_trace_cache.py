"""A traced graph that was kept, against tracing: the same bytes, for weights that it never saw; the key; what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.commands import run
from support.models import make_adapter
from support.onnx_models import BERT, LLAMA, MODELS, TEXT, VOCABULARY, make_dense, sentence_folder

from wlora_merge import export, mix
from wlora_merge.data.tasks import get_task
from wlora_merge.io.cache import cache_folder
from wlora_merge.onnx import convert, trace_cache
from wlora_merge.onnx.convert import write_onnx
from wlora_merge.onnx.dummy_inputs import load_model
from wlora_merge.onnx.skeleton import Skeleton
from wlora_merge.onnx.trace_cache import TraceKey, keep_graphs, kept_graphs, read_graphs, trace_key
from wlora_merge.onnx.weights import Weight, structure_of, take_weights, weights_of

pytest.importorskip("onnxruntime")


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks of the models that are traced."""
    seen: list[str] = []
    trace = convert.trace

    def counted(model: Any, task: Any, opset: int) -> Any:
        seen.append(task.name)
        return trace(model, task, opset)

    monkeypatch.setattr(convert, "trace", counted)
    return seen


def files_of(out: Path) -> dict[str, str]:
    """The sha256 of each file below a folder."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def written(dense: Path, out: Path, **options: Any) -> dict[str, str]:
    out.mkdir()
    write_onnx(dense, out, **options)
    return files_of(out / "onnx")


SHORT_LLAMA = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True)
KINDS = ["bert", "clip vision", "gpt2", "t5 of one layer"]


@pytest.mark.parametrize("name", KINDS)
def test_a_kept_graph_filled_with_other_weights_is_their_own_traced_export(
    name: str, traces: list[str], tmp_path: Path
) -> None:
    class_name, config, task = MODELS[name]
    first, second = (make_dense(tmp_path / f"dense{seed}", class_name, config, seed) for seed in (0, 1))
    before = written(first, tmp_path / "first", task=task, cached_as="base")
    filled = written(second, tmp_path / "filled", task=task, cached_as="base")
    assert len(traces) == 1
    traced = written(second, tmp_path / "traced", task=task)
    assert len(traces) == 2
    assert filled == traced
    assert filled != before


def test_the_weights_of_a_filled_graph_are_those_of_the_models_file(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "LlamaForCausalLM", SHORT_LLAMA)
    for out in (tmp_path / "traced", tmp_path / "filled"):
        written(dense, out, task="causal-lm", cached_as="base")
        stored = onnx.load(str(out / "onnx" / "model.onnx")).graph.initializer
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in stored]
        for name, tensor in load_file(dense / "model.safetensors").items():
            assert any(
                np.array_equal(array, form) for array in arrays for form in (tensor.numpy(), tensor.numpy().T)
            ), name


def test_float16_has_its_second_name_and_the_same_bytes_with_a_kept_graph(traces: list[str], tmp_path: Path) -> None:
    first, second = (make_dense(tmp_path / f"dense{seed}", "BertModel", BERT, seed) for seed in (0, 1))
    asked = {"task": "feature-extraction", "dtype": "float16"}
    written(first, tmp_path / "first", cached_as="base", **asked)
    filled = written(second, tmp_path / "filled", cached_as="base", **asked)
    assert len(traces) == 1
    assert filled == written(second, tmp_path / "traced", **asked)
    one, other = (tmp_path / "filled" / "onnx" / name for name in ("model.onnx", "model_fp16.onnx"))
    assert one.samefile(other)


def test_fusions_and_a_data_file_are_the_same_with_a_kept_graph(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "INLINE_LIMIT", 1000)
    first, second = (make_dense(tmp_path / f"dense{seed}", "LlamaForCausalLM", SHORT_LLAMA, seed) for seed in (0, 1))
    written(first, tmp_path / "plain", task="causal-lm", cached_as="base")
    written(first, tmp_path / "first", task="causal-lm", ort_fusions="cpu", cached_as="base")
    filled = written(second, tmp_path / "filled", task="causal-lm", ort_fusions="cpu", cached_as="base")
    assert len(traces) == 1  # what is kept is the graph before the fusions
    assert "model.onnx_data" in filled
    assert filled == written(second, tmp_path / "traced", task="causal-lm", ort_fusions="cpu")


ASKED: dict[str, Any] = {
    "task": "text-classification",
    "dtype": "float32",
    "opset": 20,
    "pooling": None,
    "base": "base",
}
SMALL = {**TEXT, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "num_labels": 3}


def key_of(folder: Path, seed: int = 0, config: dict[str, Any] | None = None, **asked: Any) -> TraceKey:
    """The key of a small BERT, seen as the export sees it."""
    made = transformers.BertConfig(**{**SMALL, **(config or {})})
    dense = make_dense(folder, "BertForSequenceClassification", made, seed)
    model = transformers.BertForSequenceClassification.from_pretrained(dense)
    return trace_key(dense, structure_of(model), **{**ASKED, **asked})


def test_other_weights_have_the_same_key(tmp_path: Path) -> None:
    assert key_of(tmp_path / "a", 0).facts == key_of(tmp_path / "b", 1, base="another name").facts


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        ({"num_labels": 5}, {}),
        ({"layer_norm_eps": 1e-3}, {}),
        ({"hidden_act": "relu"}, {}),
        ({"vocab_size": VOCABULARY + 1}, {}),
        ({"max_position_embeddings": 256}, {}),
        ({}, {"dtype": "float16"}),
        ({}, {"opset": 21}),
        ({}, {"pooling": "mean"}),
        ({}, {"task": "feature-extraction"}),
    ],
    ids=str,
)
def test_what_a_graph_depends_on_belongs_to_the_key(
    config: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    assert key_of(tmp_path / "a").name != key_of(tmp_path / "b", config=config, **asked).name


def test_the_pooling_of_a_sentence_transformer_belongs_to_the_structure(tmp_path: Path) -> None:
    said = []
    for mode in ("mean", "max"):
        folder = sentence_folder(tmp_path / mode, {"pooling_mode": mode})
        said.append(structure_of(load_model(folder, get_task("feature-extraction"), torch.float32)))
    assert said[0] != said[1]


def test_versions_and_untied_weights_belong_to_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_dense(tmp_path / "dense", "LlamaForCausalLM", LLAMA)
    asked: dict[str, Any] = {"task": "causal-lm", "dtype": "float32", "opset": 20, "pooling": None, "base": "b"}
    model = transformers.LlamaForCausalLM(LLAMA)
    name = trace_key(dense, structure_of(model), **asked).name
    other = transformers.LlamaForCausalLM(LLAMA)  # other weights
    assert trace_key(dense, structure_of(other), **asked).name == name
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert trace_key(dense, structure_of(model), **asked).name != name
    monkeypatch.setattr(trace_cache, "version", lambda package: "0")
    assert trace_key(dense, structure_of(other), **asked).name != name


def test_constants_that_a_module_keeps_belong_to_the_structure_and_weights_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    before = structure_of(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert structure_of(model) == before
    for key, value in (("scale", 0.5), ("table", torch.ones(3))):
        setattr(model[0], key, value)
        after = structure_of(model)
        assert after != before
        before = after
    model.register_buffer("mask", torch.zeros(2), persistent=False)
    after = structure_of(model)
    assert after != before
    model.mask += 1
    assert structure_of(model) != after
    json.dumps(after)


def test_a_graph_with_numbers_of_unknown_origin_is_traced_for_each_mixture(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(graph: Any, model: torch.nn.Module) -> list[str]:
        """As if the exporter had put a copy of a weight in the place of one."""
        found = next(value for value in graph.initializers.values() if value.const_value.size > 100)
        raw = found.const_value.raw
        found.const_value = type(found.const_value)(raw.detach().clone())
        return take_weights(graph, model)

    monkeypatch.setattr(convert, "take_weights", forgetful)
    for seed in (0, 1):
        dense = make_dense(tmp_path / f"dense{seed}", "BertForSequenceClassification", BERT, seed)
        written(dense, tmp_path / f"out{seed}", task="text-classification", cached_as="base")
    assert len(traces) == 2
    assert not kept_graphs()


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _reseal(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A sound seal on another content, as a foreign program might leave it."""
    table = json.loads(file.read_bytes()[65:])
    change(table)
    content = json.dumps(table).encode()
    file.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _link(file: Path) -> None:
    file.rename(file.with_suffix(".x"))
    file.symlink_to(file.with_suffix(".x"))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "a flipped bit": _flip,
    "empty": lambda file: file.write_bytes(b""),
    "no table": lambda file: file.write_bytes(hashlib.sha256(b"[]").hexdigest().encode() + b"\n[]"),
    "of another key": lambda file: _reseal(file, lambda table: table["key"].update(opset=19)),
    "rows of another kind": lambda file: _reseal(file, lambda table: table.update(graphs={"model": [1]})),
    "writable by others": lambda file: file.chmod(0o666),
    "a link": _link,
    "in a folder that others may write": lambda file: file.parent.chmod(0o777),
}
KEY = TraceKey({"task": "causal-lm", "opset": 20}, "base")
GRAPHS = {"model": Skeleton(b"\x00graph\xff", {"a": Weight("a.weight", (1, 0)), "b": Weight("b.weight")})}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_that_cannot_be_trusted_is_never_used(damage: str) -> None:
    keep_graphs(KEY, GRAPHS)
    assert read_graphs(KEY) == GRAPHS
    (entry,) = kept_graphs()
    DAMAGES[damage](entry.file.path)
    assert read_graphs(KEY) is None
    assert [found.sound for found in kept_graphs()] == [damage in ("of another key", "rows of another kind")]
    keep_graphs(KEY, GRAPHS)
    assert (read_graphs(KEY) == GRAPHS) == ("folder" not in damage)  # replaced, where the folder can be trusted


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("what", ["the file", "the folder"])
def test_an_entry_of_another_user_is_never_used(what: str) -> None:
    keep_graphs(KEY, GRAPHS)
    (entry,) = kept_graphs()
    os.chown(entry.file.path if what == "the file" else entry.file.path.parent, 12345, -1)
    assert read_graphs(KEY) is None


def test_a_key_finds_its_own_entry_alone() -> None:
    keep_graphs(KEY, GRAPHS)
    assert read_graphs(TraceKey({**KEY.facts, "opset": 21}, "base")) is None
    assert read_graphs(TraceKey(KEY.facts, "another name")) == GRAPHS


def _swapped(table: dict[str, Any]) -> None:
    weights = table["graphs"]["model"]["weights"]
    alike = [key for key, (name, _) in weights.items() if name.endswith(("query.weight", "key.weight"))]
    weights[alike[0]], weights[alike[1]] = weights[alike[1]], weights[alike[0]]


def _of_another_model(table: dict[str, Any]) -> None:
    table["graphs"]["model"]["weights"] = {"classifier.weight": ["no such tensor", None]}


def _no_graph(table: dict[str, Any]) -> None:
    table["graphs"]["model"]["graph"] = "AAAA"


def test_a_kept_graph_that_fails_the_check_is_traced_again(traces: list[str], tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "BertForSequenceClassification", transformers.BertConfig(**SMALL))
    good = written(dense, tmp_path / "first", task="text-classification", cached_as="base")
    for number, change in enumerate((_swapped, _of_another_model, _no_graph), 2):
        (entry,) = kept_graphs()
        _reseal(entry.file.path, change)
        out = tmp_path / f"out{number}"
        assert written(dense, out, task="text-classification", cached_as="base") == good
        assert len(traces) == number
    assert written(dense, tmp_path / "last", task="text-classification", cached_as="base") == good
    assert len(traces) == 4


def test_tied_weights_are_said_to_be_one() -> None:
    model = transformers.LlamaForCausalLM(LLAMA)
    weights = weights_of(model)
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    row = structure_of(model)["weights"]["lm_head.weight"]
    assert row[2] == "model.embed_tokens.weight"


def test_two_mixtures_of_a_base_are_one_trace_and_the_command_shows_and_clears_it(
    traces: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    model.save_pretrained(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"]) for i in range(2)]
    task = "text-classification"
    for name, weights in (("one", [0.9, 0.1]), ("two", [0.2, 0.8])):
        mix(tmp_path / "base", folders, tmp_path / name, task=task, weights=weights)
    export(tmp_path / "one", "onnx", tmp_path / "first")
    export(tmp_path / "two", "onnx", tmp_path / "filled")
    assert len(traces) == 1
    export(tmp_path / "two", "onnx", tmp_path / "traced", trace_cache=False)
    assert len(traces) == 2
    assert files_of(tmp_path / "filled") == files_of(tmp_path / "traced")  # with card and manifest
    shown = json.loads(run("cache", "--json").stdout)
    (row,) = shown["graphs"]
    assert (row["base"], row["task"], row["dtype"], row["opset"]) == ("base", task, "float32", 20)
    assert row["bytes"] == sum(path.stat().st_size for path in Path(shown["folder"]).iterdir())
    assert Path(shown["folder"]).parent == cache_folder()
    assert task in run("cache").stdout
    assert "removed 1 traced graphs" in run("cache", "--clear").stdout
    assert json.loads(run("cache", "--json").stdout)["graphs"] == []
    assert "no traced graph is kept" in run("cache").stdout
