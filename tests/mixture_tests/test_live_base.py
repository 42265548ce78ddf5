"""Whether a model is its base's files: what PEFT and transformers make of one, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.attached import IDS, randomized
from support.models import assert_verified, make_adapter, tiny_bert, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from wlora_merge.errors import MixtureError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture


def loaded(base: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).eval()


def merged(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload()


def active(base: Path, adapter: Path) -> Any:
    model = loaded(base)
    model.load_adapter(str(adapter))
    return model


def edited(base: Path, adapter: Path) -> Any:
    model = loaded(base)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    return model


def normed(base: Path, adapter: Path) -> Any:
    model = loaded(base)
    model.model.norm.weight.data[3] += 1e-3
    return model


def resized(base: Path, adapter: Path) -> Any:
    model = loaded(base)
    model.resize_token_embeddings(101)
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (merged, ("model.safetensors", "not the file's numbers", "merged into it", "load the base anew")),
        (edited, ("down_proj.weight", "layers.1", "not the file's numbers")),
        (normed, ("model.norm.weight", "not the file's numbers")),
        (resized, ("embed_tokens.weight", "[101, 32]", "[96, 32]")),
        (active, ("module 'model.layers.0.self_attn.q_proj'", "PEFT's")),
        (lambda base, adapter: PeftModel.from_pretrained(loaded(base), adapter), ("PeftModel", "PEFT's")),
    ],
)
def test_a_model_that_is_not_its_bases_files_is_refused_and_left_alone(
    llama_zoo: Callable[..., Any], change: Callable[..., Any], words: tuple[str, ...]
) -> None:
    base, folders = llama_zoo()
    model = change(base, folders[0])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(MixtureError) as refused:
        attach(model, folders[1:])
    assert all(word in str(refused.value) for word in words), refused.value
    assert set(model.state_dict()) == set(before)
    assert not hasattr(model, "wlora")
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_model_that_does_not_say_its_base_is_compared_once_the_base_is_given(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    model = merged(base, folders[0])
    model.config._name_or_path = ""
    attach(model, folders[1:])
    with pytest.raises(MixtureError, match="not the file's numbers"):
        Mixture.from_model(model, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_loaded_in_another_dtype_is_its_files(llama_zoo: Callable[..., Any], dtype: torch.dtype) -> None:
    base, folders = llama_zoo()
    attach(loaded(base).to(dtype), folders)
    attach(loaded(base).to(dtype).float(), folders)


def test_a_tensor_trained_as_head_may_differ(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    model = loaded(base)
    model.lm_head.weight.data.mul_(2)
    attach(model, folders, head=["lm_head"])
    assert torch.equal(Mixture.from_model(model).head["lm_head.weight"], model.lm_head.weight)


@pytest.fixture
def bert(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A BERT without a head, and two adapters."""
    model = tiny_bert()
    model.save_pretrained(tmp_path / "bert")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"]) for i in range(2)]
    return tmp_path / "bert", folders


def test_a_head_that_the_base_lacks_is_trained_or_refused(bert: tuple[Path, list[Path]]) -> None:
    base, folders = bert
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with pytest.raises(MixtureError, match=r"'classifier.weight'.*head=\['classifier'\]"):
        attach(model, folders)
    attach(model, folders, head=["classifier"])
    assert set(Mixture.from_model(model).head) == {"classifier.weight", "classifier.bias"}


def test_a_bare_models_pooler_may_be_absent(bert: tuple[Path, list[Path]]) -> None:
    base, folders = bert
    file = base / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if not name.startswith("pooler.")}
    save_file(tensors, file, {"format": "pt"})
    attach(AutoModel.from_pretrained(base), folders)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with pytest.raises(MixtureError, match=r"head=\['bert.pooler.dense', 'classifier'\]"):
        attach(model, folders)


def test_a_base_that_has_the_head_needs_none(bert: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = bert
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "whole")
    attach(AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole"), folders)


@pytest.mark.parametrize("options", [{}, {"granularity": "global", "delta_scale": "learned"}])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_trainers_checkpoint_is_taken_up_and_leaves_no_trace_in_an_export(
    llama_zoo: Callable[..., Any], tmp_path: Path, options: dict[str, Any], shards: str
) -> None:
    base, folders = llama_zoo()
    model = randomized(attach(loaded(base), folders, **options)).eval()
    if options:
        model.wlora_delta_scale.data.fill_(1.7)
    expected, checkpoint = model(IDS).logits.detach(), tmp_path / "checkpoint-6"
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "runs"), report_to=[], use_cpu=True))
    trainer.save_model(str(checkpoint)) if shards == "1GB" else model.save_pretrained(checkpoint, max_shard_size=shards)
    again = attach(loaded(checkpoint), folders, **options)
    assert torch.equal(again.wlora_weights, model.wlora_weights)
    assert torch.equal(again(IDS).logits, expected)
    export(Mixture.from_model(again), "dense", tmp_path / "dense")
    names = {name for file in (tmp_path / "dense").glob("*.safetensors") for name in load_file(file)}
    assert names == set(loaded(base).state_dict())
    assert "wlora_" not in "".join(f.read_text() for f in (tmp_path / "dense").glob("*.index.json"))
    assert_verified(tmp_path / "dense", base=checkpoint, adapters=[f"{f.name}={f}" for f in folders])
    assert torch.allclose(loaded(tmp_path / "dense")(IDS).logits, expected, atol=1e-5)


def test_a_checkpoint_of_other_adapters_or_for_a_mixture_of_its_own_is_refused(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    base, folders = llama_zoo()
    attach(loaded(base), folders, delta_scale="learned").save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(MixtureError, match=r"wlora_weights' is \[.*expected \["):
        attach(loaded(tmp_path / "checkpoint"), folders[:1])
    with pytest.raises(MixtureError, match="no learned delta_scale"):
        attach(loaded(tmp_path / "checkpoint"), folders)
    with pytest.raises(UnsupportedError, match=r"model.safetensors: has 'wlora_weights'"):
        mix(tmp_path / "checkpoint", folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_transformers_fuses_and_renames_is_its_files(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4)).eval()
    model.save_pretrained(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj"]) for i in range(2)]
    attach(loaded(tmp_path / "base"), folders)
    model = loaded(tmp_path / "base")
    model.model.layers[0].mlp.experts.down_proj.data.mul_(1.5)
    with pytest.raises(MixtureError, match=r"experts\.down_proj"):
        attach(model, folders)


def test_tied_embeddings_are_the_files(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj"]) for i in range(2)]
    attach(loaded(tmp_path / "base"), folders)
