"""The task that adapters, base and head agree on; transformers' classes and PEFT's task types are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.models import inputs_of, make_adapter, tiny_bert, tiny_llama

from wlora_merge.adapters.adapter import load_adapters
from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.manifest import read_manifest
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.told_task import told_task
from wlora_merge.models.base_model import open_base


def llama(root: Path, *types: str | None, architecture: str | None = None) -> tuple[Path, list[Path]]:
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(root / "base")
    if architecture is not None:
        file = root / "base" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [architecture]}))
    folders = [make_adapter(model, root / f"a{i}", i, r=2, target_modules=["q_proj"]) for i in range(len(types))]
    for folder, kind in zip(folders, types, strict=True):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": kind}))
    return root / "base", folders


@pytest.mark.parametrize(
    ("types", "architecture", "expected"),
    [
        ((None, None), "LlamaForCausalLM", "causal-lm"),
        (("CAUSAL_LM", None), "LlamaForCausalLM", "causal-lm"),
        (("SEQ_CLS", "SEQ_CLS"), "LlamaForSequenceClassification", "text-classification"),
        (("TOKEN_CLS",), "NoSuchModel", "token-classification"),
        (("FEATURE_EXTRACTION",), "LlamaModel", "feature-extraction"),
        ((None,), "T5ForConditionalGeneration", "seq2seq-lm"),
        ((None,), "ViTForImageClassification", "image-classification"),
        ((None,), "BertForQuestionAnswering", "question-answering"),
    ],
)
def test_the_task_is_what_all_who_say_something_say(
    tmp_path: Path, types: tuple[str | None, ...], architecture: str, expected: str
) -> None:
    base, folders = llama(tmp_path, *types, architecture=architecture)
    assert told_task(open_base(base), load_adapters(folders), {}) == expected


@pytest.mark.parametrize(
    ("types", "architecture", "said"),
    [
        (("SEQ_CLS",), "LlamaForCausalLM", "task_type SEQ_CLS .*architecture LlamaForCausalLM says causal-lm"),
        (("SEQ_CLS", "TOKEN_CLS"), "NoSuchModel", "says text-classification; .*says token-classification"),
        ((None,), "BertForMaskedLM", "neither its architectures nor a task_type says it"),
    ],
)
def test_who_disagrees_is_named_and_task_overrides(
    tmp_path: Path, types: tuple[str | None, ...], architecture: str, said: str
) -> None:
    base, folders = llama(tmp_path, *types, architecture=architecture)
    mix(base, folders, tmp_path / "mixture")
    with pytest.raises(UnsupportedError, match=rf"{said}.*say --task TASK"):
        export(tmp_path / "mixture", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "mixture", "dense", tmp_path / "out", task="causal-lm")
    assert read_manifest(tmp_path / "out").mixture.task == "causal-lm"


def test_an_onnx_export_without_a_task_is_a_decoders_and_is_verified(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    base, folders = llama(tmp_path, "CAUSAL_LM", None)
    mix(base, folders, tmp_path / "mixture")
    report = export(tmp_path / "mixture", "onnx", tmp_path / "out").report
    assert "past_key_values.0.key" in report["inputs"]
    assert not verify(tmp_path / "out", **inputs_of(tmp_path / "mixture")).skipped


def test_a_head_of_an_adapter_tells_its_task_with_the_adapters_type(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    config: dict[str, Any] = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    folder = make_adapter(model, tmp_path / "a", 0, task_type="SEQ_CLS", **config)
    mixture = mix(tmp_path / "base", [folder], tmp_path / "mixture", modules_to_save="a")
    assert (mixture.task, mixture.config["architectures"]) == ("text-classification", ["BertForSequenceClassification"])
    with pytest.raises(UnsupportedError, match="has a head for text-classification"):
        export(tmp_path / "mixture", "dense", tmp_path / "out", task="causal-lm")
