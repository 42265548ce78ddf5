"""One loader for every purpose: in safety, no larger than the files, and with one sentence where a folder is at fault."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.models import make_adapter, tiny_bert, tiny_llama
from support.shots import save_tokenizer

from wlora_merge.cli.main import main
from wlora_merge.data.tasks import get_task
from wlora_merge.errors import BaseModelError, UnsupportedError, VerifyError, WloraMergeError
from wlora_merge.exporters.unmerged import load_checked
from wlora_merge.models.loading import LoadingReport, bounded, class_for, library_errors, load, quiet
from wlora_merge.models.module_tree import empty_model
from wlora_merge.onnx.dummy_inputs import load_model
from wlora_merge.training.fit import fit

FAR_LARGER = ({"intermediate_size": 4_000_000}, {"num_hidden_layers": 3000}, {"max_position_embeddings": 10**9})
NOT_ITS_CONFIG = "it is not the config of these weights"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT with a tokenizer, two adapters and four shots."""
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    for i in range(2):
        make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"])
    (tmp_path / "shots.csv").write_text("text,label\nw1 w2,low\nw3 w4,high\nw5 w6,low\nw7 w8,high\n")
    return tmp_path / "base"


def change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    found = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: t for name, t in found.items() if t is not None}, file, {"format": "pt"})


def fit_on(base: Path) -> Any:
    root = base.parent
    return fit(base, [root / "a0", root / "a1"], root / "shots.csv", "text-classification", max_steps=1, folds=0)


@pytest.mark.parametrize("keys", FAR_LARGER, ids=lambda keys: next(iter(keys)))
def test_a_config_of_a_far_larger_model_gets_its_sentence_wherever_the_model_is_loaded(
    keys: dict[str, Any], bert: Path
) -> None:
    change(bert, **keys)
    with pytest.raises(BaseModelError, match=f"config.json: describes a model of .*{NOT_ITS_CONFIG}"):
        fit_on(bert)
    with pytest.raises(VerifyError, match=NOT_ITS_CONFIG):
        load_checked(bert, "feature-extraction")
    with pytest.raises(BaseModelError, match=NOT_ITS_CONFIG):
        load_model(bert, get_task("feature-extraction"), torch.float32)
    with pytest.raises(BaseModelError, match=NOT_ITS_CONFIG):
        empty_model(bert)
    change(bert, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(BaseModelError, match=NOT_ITS_CONFIG):  # packed weights are more numbers, but not that many
        empty_model(bert)


@pytest.mark.parametrize("keys", [{"intermediate_size": 4_000_000}, {"num_hidden_layers": 3000}, {"num_labels": 10**9}])
def test_every_command_that_opens_such_a_base_says_so(keys: dict[str, Any], bert: Path) -> None:
    root = bert.parent
    adapters = [part for i in range(2) for part in ("--adapter", f"a{i}={root / f'a{i}'}")]
    recipe = {"base": "base", "adapters": {"a0": "a0", "a1": "a1"}, "mix": {}, "exports": [{"format": "dense"}]}
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    made = (
        ["mix", "--base", bert, *adapters, "--out", root / "m"],
        ["export", root / "m", "--format", "dense", "--out", root / "d"],
    )
    for line in made:
        assert CliRunner().invoke(main, list(map(str, line))).exit_code == 0
    change(bert, **keys)
    data = ["--data", root / "shots.csv", "--task", "text-classification"]
    for line in (
        ["mix", "--base", bert, *adapters, "--out", root / "x"],
        ["fit", "--base", bert, *adapters, *data, "--out", root / "x"],
        *(["export", root / "m", "--format", kind, "--out", root / "x"] for kind in ("dense", "lora", "onnx")),
        ["verify", root / "d", "--base", bert, *adapters],
        ["run", root / "recipe.yaml", "--out", root / "x"],
    ):
        result = CliRunner().invoke(main, list(map(str, line)))
        assert (result.exit_code, NOT_ITS_CONFIG in result.output) == (1, True), result.output
        assert not (root / "x").exists()


def test_the_bound_holds_for_what_is_built_in_memory_too(bert: Path) -> None:
    with bounded(bert, VerifyError):
        torch.nn.Linear(1000, 1000)
        with torch.device("meta"):
            torch.nn.Linear(3000, 3000)
    with pytest.raises(VerifyError, match=NOT_ITS_CONFIG), bounded(bert, VerifyError):
        torch.nn.Embedding(12_000, 1000)
    with pytest.raises(VerifyError, match=NOT_ITS_CONFIG), bounded(bert, VerifyError):
        torch.nn.ParameterList([torch.nn.Parameter(torch.empty(0)) for _ in range(20_000)])
    torch.nn.Embedding(12_000, 1000)  # and no longer than that


def test_a_new_head_of_far_more_labels_than_the_files_could_tell_apart_is_refused(bert: Path) -> None:
    labels = {i: f"L{i}" for i in range(400_000)}
    cls, _ = class_for(bert, transformers.AutoModelForSequenceClassification)
    with pytest.raises(BaseModelError, match=NOT_ITS_CONFIG):
        load(cls, bert, torch.float32, complete=False, id2label=labels)


def test_the_class_is_the_auto_class_or_the_one_that_the_config_names(bert: Path) -> None:
    assert class_for(bert, transformers.AutoModelForMaskedLM) == (transformers.AutoModelForMaskedLM, "bert")
    assert class_for(bert, None)[0] is transformers.BertModel
    assert class_for(bert, transformers.AutoModelForSeq2SeqLM) == (None, "bert")
    assert class_for(bert, transformers.AutoModelForSeq2SeqLM, or_named=True)[0] is transformers.BertModel
    change(bert, architectures=["NoSuchModel"])
    assert class_for(bert, None)[0] is transformers.AutoModel
    (bert / "config.json").write_text("{")
    with pytest.raises(VerifyError, match=r"config\.json: is not valid JSON"):
        class_for(bert, None, VerifyError)


def test_a_tower_with_a_projection_keeps_it_as_features(tmp_path: Path) -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    assert class_for(tmp_path, transformers.AutoModel)[0] is transformers.CLIPTextModelWithProjection


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"encoder__layer__1__output__dense__bias": None}, "missing"),
        ({"encoder__layer__1__other": torch.ones(2)}, "unexpected"),
        ({"encoder__layer__1__output__dense__bias": torch.ones(5)}, "mismatched"),
    ],
)
def test_a_complete_model_is_just_the_tensors_of_its_files(
    tensors: dict[str, torch.Tensor | None], said: str, bert: Path
) -> None:
    sound, report = load(transformers.AutoModel, bert, torch.float32)
    assert report == LoadingReport(frozenset(), frozenset(), {})
    assert not sound.training
    change_tensors(bert, **tensors)
    name = next(iter(tensors)).replace("__", ".")
    with pytest.raises(VerifyError, match=f"leaves {said} keys: 1 tensors are {said}, first '{name}'"):
        load(transformers.AutoModel, bert, torch.float32, error=VerifyError)
    _, report = load(transformers.AutoModel, bert, torch.float32, complete=False)
    assert name in getattr(report, said)
    if said != "mismatched":
        load(transformers.AutoModel, bert, torch.float32, replaced=[name], unused=lambda tensor: tensor == name)


def test_a_pooler_that_was_never_trained_is_left_out_of_a_bare_model_alone(bert: Path) -> None:
    change_tensors(bert, pooler__dense__weight=None, pooler__dense__bias=None)
    assert load(transformers.AutoModel, bert, torch.float32)[0].pooler is None
    head = ["classifier.weight", "classifier.bias"]
    with pytest.raises(BaseModelError, match=r"leaves missing keys: .* first 'bert\.pooler\.dense\.bias'"):
        load(transformers.AutoModelForSequenceClassification, bert, torch.float32, replaced=head)


@pytest.mark.parametrize(
    "keys", [{"hidden_act": "none"}, {"hidden_size": "x"}, {"num_hidden_layers": None}, {"model_type": "nothing"}]
)
def test_what_transformers_raises_of_a_base_is_one_sentence_in_a_fit(keys: dict[str, Any], bert: Path) -> None:
    change(bert, **keys)
    with pytest.raises(WloraMergeError, match=r"^[^\n]+\.$"):
        fit_on(bert)


def test_too_little_memory_and_our_own_sentences_pass_as_they_are() -> None:
    for failure in (MemoryError(), torch.OutOfMemoryError("full"), UnsupportedError("ours.")):
        with pytest.raises(type(failure)), library_errors("folder", VerifyError):
            raise failure
    with pytest.raises(VerifyError, match=r"^folder: two lines\.$"), library_errors("folder", VerifyError):
        raise RuntimeError("two\n  lines.")


def test_the_libraries_are_quiet_for_a_while_alone(capfd: pytest.CaptureFixture[str]) -> None:
    log, root = logging.getLogger("transformers"), logging.getLogger()
    before, handlers = log.level, list(root.handlers)
    with quiet():
        log.warning("a load report")
        warnings.warn("a deprecation", stacklevel=1)
        print("a step")
        assert not transformers.utils.logging.is_progress_bar_enabled()
    assert (log.level, root.handlers) == (before, handlers)
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


def test_a_model_that_transformers_has_not_for_a_task_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="model of type 'llama' has no AutoModelForImageClassification"):
        load_model(tmp_path, get_task("image-classification"), torch.float32)
