"""The attached modules: what trains, the gradient against finite differences, the forward pass against every export."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.attached import IDS, attached, attached_llama, randomized
from support.models import EVERY_LINEAR, make_adapter, tiny_bert, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from wlora_merge.errors import AdapterError, MixtureError, WloraMergeError, WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.mixture.attach import attach, detach, regroup
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.mixture.stacked_lora import StackedLora


def test_only_the_mixture_weights_and_the_head_asked_for_require_gradients(llama_zoo: Callable[..., Any]) -> None:
    model, _ = attached(llama_zoo)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["wlora_weights"]
    model, _ = attached(llama_zoo, head=["lm_head"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"wlora_weights", "lm_head.weight"}


def test_attaching_leaves_the_state_dict_and_detaching_leaves_no_trace(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before, keys = model(IDS).logits, set(model.state_dict())
    attach(model, folders)
    assert set(model.state_dict()) == keys | {"wlora_weights"}
    assert not torch.equal(model(IDS).logits, before)
    detach(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(model(IDS).logits, before)
    assert not any(hasattr(m, "wlora") for m in model.modules())


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
def test_forward_equals_the_dense_export_and_the_lora_loaded_by_peft(
    llama_zoo: Callable[..., Any], tmp_path: Path, normalize: str
) -> None:
    model, base = attached(llama_zoo, normalize=normalize, granularity="layer", delta_scale=1.3)
    randomized(model).eval()
    expected = model(IDS).logits.detach()
    mixture = Mixture.from_model(model)
    export(mixture, "dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(dense(IDS).logits, expected, atol=2e-6)
    export(mixture, "lora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    assert torch.allclose(lora(IDS).logits, expected, atol=2e-6)


def test_gpt2_conv1d_and_embedding_equal_their_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, n_positions=32, tie_word_embeddings=False)
    base = GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    targets = [["c_attn", "c_proj"], ["c_attn", "c_fc"]]
    folders = [
        make_adapter(base, tmp_path / f"a{i}", i, r=3, target_modules=t, fan_in_fan_out=True)
        for i, t in enumerate(targets)
    ]
    model = randomized(attach(copy.deepcopy(base), folders)).eval()
    mixture = Mixture.from_model(model, tmp_path / "base")
    export(mixture, "dense", tmp_path / "dense")
    export(mixture, "lora", tmp_path / "lora")
    expected = model(IDS).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits, expected, atol=2e-6)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    assert torch.allclose(lora(IDS).logits, expected, atol=2e-6)


def test_an_embedding_lora_equals_its_exports(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folders = [make_adapter(base, tmp_path / f"a{i}", i, r=3, target_modules=["v_proj"]) for i in range(2)]
    from safetensors.torch import load_file, save_file

    for i, folder in enumerate(folders):  # PEFT would also save the base embedding beside an embedding's LoRA
        tensors = load_file(folder / "adapter_model.safetensors")
        torch.manual_seed(i)
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(3, 96)
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(32, 3)
        save_file(tensors, folder / "adapter_model.safetensors")
    model = randomized(attach(copy.deepcopy(base), folders)).eval()
    mixture = Mixture.from_model(model, tmp_path / "base")
    expected = model(IDS).logits
    export(mixture, "dense", tmp_path / "dense")
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits, expected, atol=2e-5)
    export(mixture, "lora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    assert torch.allclose(lora(IDS).logits, expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_lora_of_an_embedding_that_scales_its_output_equals_its_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24,
        vocab_size=96, max_position_embeddings=24, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    base = Gemma3ForCausalLM(config).eval()
    assert float(base.model.embed_tokens.embed_scale) == 4
    base.save_pretrained(tmp_path / "base")
    folders = [make_adapter(base, tmp_path / f"a{i}", i, r=2, target_modules=["embed_tokens"]) for i in range(2)]
    model = attach(copy.deepcopy(base), folders).eval()
    expected = model(IDS).logits
    assert not torch.allclose(base(IDS).logits, expected, atol=1e-3)
    export(Mixture.from_model(model, tmp_path / "base"), "dense", tmp_path / "dense")
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits, expected, atol=5e-6)


def test_a_base_without_the_model_prefix_keeps_its_own_names(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    folders = [
        make_adapter(start, tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        for i in range(2)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    randomized(attach(model, folders, head=["classifier"])).eval()
    mixture = Mixture.from_model(model)
    mixture.task = "text-classification"
    mixture.config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    assert mixture.prefixes == ("", "bert.")
    assert all(module.startswith("encoder.layer.") for modules in mixture.groups.values() for module in modules)
    export(mixture, "dense", tmp_path / "dense")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = IDS % 64
    assert torch.allclose(again.eval()(ids).logits, model(ids).logits, atol=1e-6)
    export(mixture, "lora", tmp_path / "lora")
    peft = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "lora"
    ).eval()
    assert torch.allclose(peft(ids).logits, model(ids).logits, atol=1e-6)


def test_trainer_fits_an_attached_model_and_the_mixture_comes_off_it(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = attached(llama_zoo)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n != "wlora_weights"}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, save_strategy="no", report_to=[], disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert bool(model.wlora_weights.any())
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    mixture = Mixture.from_model(model)
    assert (mixture.task, mixture.data) == ("causal-lm", {"method": "training loop"})
    mixture.save(tmp_path / "mixture")
    export(tmp_path / "mixture", "dense", tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "wlora-merge mix " not in card


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_trainer_fits_an_attached_model_that_is_quantized(
    llama_zoo: Callable[..., Any], tmp_path: Path, bits: str
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    base, folders = llama_zoo()
    how = BitsAndBytesConfig(load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, device_map={"": "cpu"})
    attach(model, folders)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=0.1,
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert bool(model.wlora_weights.any())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert len(Mixture.from_model(model).adapters) == len(folders)
    detach(model)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=rows)


def test_a_copy_of_an_attached_model_has_its_own_weights(llama_zoo: Callable[..., Any]) -> None:
    model, _ = attached(llama_zoo)
    other = copy.deepcopy(model)
    randomized(other)
    assert not torch.allclose(model(IDS).logits, other(IDS).logits)


def test_attaching_twice_or_no_adapter_is_refused(llama_zoo: Callable[..., Any]) -> None:
    model, base = attached(llama_zoo)
    _, folders = llama_zoo()
    with pytest.raises(MixtureError, match="attached already"):
        attach(model, folders)
    with pytest.raises(WloraMergeError, match="an adapter or more"):
        attach(AutoModelForCausalLM.from_pretrained(base), folders[:0])
    with pytest.raises(MixtureError, match="no adapters attached"):
        Mixture.from_model(AutoModelForCausalLM.from_pretrained(base))


def test_every_linear_is_a_target_of_the_second_adapter(llama_zoo: Callable[..., Any]) -> None:
    model, _ = attached(llama_zoo)
    assert len(model.wlora.groups) == 2 * len(EVERY_LINEAR)


def test_a_learned_delta_scale_and_a_temperature_are_in_the_export(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    model, _ = attached(llama_zoo, delta_scale="learned", temperature=2.0)
    randomized(model).eval()
    model.wlora_delta_scale.data.fill_(1.7)
    expected = model(IDS).logits
    mixture = Mixture.from_model(model)
    assert mixture.delta_scale == pytest.approx(1.7)
    assert torch.allclose(mixture.mixture_weights, (mixture.wlora_weights.double() / 2).softmax(-1).float())
    export(mixture, "dense", tmp_path / "dense")
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits, expected, atol=2e-6)
    assert set(detach(model).state_dict()) == set(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict())


def test_regrouping_starts_other_groups_at_uniform_composition(llama_zoo: Callable[..., Any]) -> None:
    model, _ = attached(llama_zoo)
    uniform_logits = model(IDS).logits
    for granularity, normalize in itertools.product(["global", "layer", "module"], ["all", "none"]):
        parameter = regroup(randomized(model), granularity, normalize)
        assert parameter is model.wlora_weights
        assert torch.allclose(model(IDS).logits, uniform_logits, atol=1e-6)
        assert Mixture.from_model(model).granularity == granularity


def test_an_attach_that_is_stopped_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["q_proj", "v_proj"]) for i in range(2)]
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    real, made = StackedLora.__init__, list[int]()

    def stopping(*args: Any) -> None:
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(StackedLora, "__init__", stopping)
        with pytest.raises(KeyboardInterrupt):
            attach(model, folders)
    assert not [name for name, _ in model.named_modules() if "wlora" in name]
    assert torch.equal(model(ids).logits, before)
    once = attach(copy.deepcopy(model), folders)(ids).logits
    assert torch.equal(attach(model, folders)(ids).logits, once)


@pytest.mark.parametrize("why", ["other weights", "an adapter", "a module"])
def test_an_attach_that_is_refused_leaves_the_model_as_it_was(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model.model.embed_tokens.weight.requires_grad_(False)
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    if why == "other weights":  # known only once everything hangs
        with torch.no_grad():
            model.model.norm.weight.add_(1)
    elif why == "an adapter":
        folder = make_adapter(tiny_llama(hidden_size=16, head_dim=8), tmp_path / "b", 1, r=2, target_modules=["q_proj"])
    else:
        monkeypatch.setattr(StackedLora, "__init__", lambda *_: (_ for _ in ()).throw(MemoryError()))
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises((MixtureError, AdapterError, MemoryError)):
        attach(model, [folder], modules_to_save="a" if why != "an adapter" else None)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
    assert not hasattr(model, "wlora")
    assert model.lm_head.weight.requires_grad


def test_a_mixture_that_would_not_be_what_the_model_computes_is_refused(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(MixtureError, match=r"'lm_head.weight' is trained, and belongs to no head"):
        Mixture.from_model(model, tmp_path / "base")
    model.lm_head.weight.requires_grad_(False)
    with torch.no_grad():
        model.wlora_weights[0, 0] = float("nan")
    with pytest.raises(MixtureError, match="hold a NaN"):
        Mixture.from_model(model, tmp_path / "base")
    state = {"wlora_weights": torch.nn.Parameter(torch.ones_like(model.wlora_weights))}
    model.load_state_dict(state, strict=False, assign=True)
    with pytest.raises(MixtureError, match="without assign=True"):
        Mixture.from_model(model, tmp_path / "base")
    with pytest.raises(MixtureError, match="expected one of all, present, none"):
        regroup(model, "layer", "al")
    with pytest.raises(MixtureError, match="delta_scale is nan"):
        attach(detach(model), [tmp_path / "a0", tmp_path / "a1"], delta_scale=float("nan"))


def test_a_compiled_model_is_refused_by_attach_and_read_afterwards(tmp_path: Path) -> None:
    model = attached_llama(tmp_path, head=["lm_head"])
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(MixtureError, match=r"compiled.*attach first"):
        attach(compiled, [tmp_path / "a0"])
    randomized(model)
    assert torch.allclose(compiled(IDS).logits, model(IDS).logits)
    assert "lm_head.weight" in Mixture.from_model(compiled, tmp_path / "base").head
    assert detach(compiled) is compiled
    assert not hasattr(model, "wlora_weights")


def test_a_model_without_numbers_is_refused(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    detach(model)
    with pytest.raises(MixtureError, match=r"meta device.*load it whole"):
        attach(model.to("meta"), [tmp_path / "a0"])


def test_a_head_of_16_bits_is_warned_of(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    detach(model)
    with pytest.warns(WloraMergeWarning, match=r"'lm_head.weight' is trained in 16 bits"):
        attach(model.bfloat16(), [tmp_path / "a0"], head=["lm_head"])
