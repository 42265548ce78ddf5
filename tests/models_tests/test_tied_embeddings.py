"""Tied embeddings with an adapter on one side or on both: the export unties what is no longer equal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import assert_verified, make_adapter, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.models.config_spellings import older_spellings

IDS = torch.tensor([[5, 17, 3, 40, 41, 2], [9, 9, 60, 1, 7, 33]])

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding).*")


def llama() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=96, n_positions=32)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=96, max_position_embeddings=32, **sizes)).eval()


SIDES = {
    "input": (llama, [["embed_tokens", "q_proj"], ["embed_tokens"]], "lm_head.weight"),
    "output": (llama, [["lm_head"], ["lm_head", "q_proj"]], "lm_head.weight"),
    "both": (llama, [["embed_tokens", "lm_head"], ["lm_head"]], "lm_head.weight"),
    "input of a GPT-2": (gpt2, [["wte"], ["c_attn"]], "lm_head.weight"),
    "output of a GPT-2": (gpt2, [["lm_head", "c_attn"], ["lm_head"]], "lm_head.weight"),
    "input of a BERT": (bert, [["word_embeddings"], ["query"]], "cls.predictions.decoder.weight"),
}


def zoo(side: str, root: Path) -> tuple[Any, Path, list[Path], str]:
    make, targets, output = SIDES[side]
    base = make()
    base.save_pretrained(root / "base")
    assert output not in load_file(root / "base" / "model.safetensors")
    folders = [make_adapter(base, root / f"a{i}", i, r=2 + i, target_modules=t) for i, t in enumerate(targets)]
    return base, root / "base", folders, output


def load(folder: Path, side: str) -> Any:
    kind = AutoModelForMaskedLM if "BERT" in side else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("side", SIDES)
def test_an_adapter_alone_gives_what_peft_computes_with_it_unmerged(side: str, tmp_path: Path) -> None:
    """PEFT's own merge would write the change of one side into the other, as both are one parameter there."""
    base, folder, folders, output = zoo(side, tmp_path)
    export(mix(folder, folders[:1], weights=[1.0]), "dense", tmp_path / "out")
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folders[0]).eval()(IDS).logits
    assert torch.allclose(load(tmp_path / "out", side)(IDS).logits, expected, atol=5e-6)
    assert output in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("side", SIDES)
def test_the_attached_forward_of_a_tied_model_is_the_dense_exports(side: str, tmp_path: Path) -> None:
    base, folder, folders, _ = zoo(side, tmp_path)
    model = attach(copy.deepcopy(base), folders, delta_scale=0.7)
    torch.manual_seed(3)
    model.wlora_weights.data.normal_()
    expected = model.eval()(IDS).logits
    export(Mixture.from_model(model, folder), "dense", tmp_path / "out")
    assert torch.allclose(load(tmp_path / "out", side)(IDS).logits, expected, atol=5e-6)
    assert not torch.allclose(base(IDS).logits, expected, atol=1e-3)


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_the_lora_of_a_tied_model_changes_the_same_side_in_peft(side: str, tmp_path: Path) -> None:
    base, folder, folders, _ = zoo(side, tmp_path)
    mixture = mix(folder, folders, weights=[0.5, -0.25])
    export(mixture, "dense", tmp_path / "dense")
    export(mixture, "lora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert torch.allclose(lora(IDS).logits, load(tmp_path / "dense", side)(IDS).logits, atol=5e-6)


def test_the_manifest_and_the_card_say_what_was_untied_and_verify_accepts_it(tmp_path: Path) -> None:
    _, folder, folders, _ = zoo("input", tmp_path)
    export(mix(folder, folders, task="causal-lm"), "dense", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "wlora_merge.json").read_text())
    assert manifest["report"]["untied"] == ["lm_head.weight"]
    assert "`tie_word_embeddings` is false" in (tmp_path / "out" / "README.md").read_text()
    checked = verify(tmp_path / "out", base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


def test_a_tied_model_whose_embeddings_no_adapter_changes_stays_tied(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    export(mix(tmp_path / "base", [folder]), "dense", tmp_path / "out")
    own, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
    assert written == own | older_spellings(own)
    assert written["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_embedding_that_an_adapter_carries_whole_is_untied_too(saved: list[str], tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    config: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": saved}
    folders = [make_adapter(base, tmp_path / f"a{i}", i, **config) for i in range(2)]
    for i, folder in enumerate(folders):
        found = load_file(folder / "adapter_model.safetensors")
        torch.manual_seed(i)
        changed = {k: v + torch.randn(v.shape) * 0.1 for k, v in found.items() if k.split(".")[-2] in saved}
        save_file(found | changed, folder / "adapter_model.safetensors")
    export(
        mix(tmp_path / "base", folders, weights=[1.0, 0.0], modules_to_save="a0", task="causal-lm"),
        "dense",
        tmp_path / "out",
    )
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folders[0]).eval()(IDS).logits
    assert torch.allclose(load(tmp_path / "out", "")(IDS).logits, expected, atol=5e-6)
    export(
        mix(tmp_path / "base", folders, weights=[1.0, 0.0], modules_to_save="a0", task="causal-lm"),
        "lora",
        tmp_path / "lora",
    )
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert torch.allclose(lora(IDS).logits, expected, atol=5e-6)
    mixture = mix(tmp_path / "base", folders, weights=[1.0, 0.0], modules_to_save="mix", task="causal-lm")
    export(mixture, "dense", tmp_path / "mixed")
    assert torch.allclose(load(tmp_path / "mixed", "")(IDS).logits, expected, atol=5e-6)
    attached = attach(copy.deepcopy(base), folders, modules_to_save="a0", normalize="none")
    attached.wlora_weights.data = torch.tensor([[1.0, 0.0]]).repeat(len(attached.wlora_weights), 1)
    assert torch.allclose(attached.eval()(IDS).logits, expected, atol=5e-6)
    export(Mixture.from_model(attached, tmp_path / "base"), "dense", tmp_path / "fitted")
    assert torch.allclose(load(tmp_path / "fitted", "")(IDS).logits, expected, atol=5e-6)
    for out in ("out", "mixed"):
        verify(tmp_path / out, base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders])


def test_the_embeddings_of_an_encoder_decoder_are_refused_by_name(tmp_path: Path) -> None:
    """T5 scales its output where embeddings are tied, and uses them at three places."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    one, other = (make_adapter(base, tmp_path / name, i, r=2, target_modules=["shared"]) for i, name in enumerate("ab"))
    for call in (lambda: mix(tmp_path / "base", [one]), lambda: attach(base, [one, other])):
        with pytest.raises(UnsupportedError, match=r"'shared'.*in several places.*tie_word_embeddings"):
            call()


def test_an_embedding_of_an_encoder_decoder_that_the_files_lack_is_refused_for_being_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 1), ("ffn_dim", 24))}
    config = BartConfig(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=96, **sizes)
    base = BartForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedError, match=r"embed_tokens', which this model uses in several places"):
        mix(tmp_path / "base", [folder])


def test_a_tied_embedding_taken_whole_is_untied_where_the_files_call_it_otherwise(tmp_path: Path) -> None:
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file)  # as GPT-2's own files
    folders = [
        make_adapter(base, tmp_path / f"a{i}", i, r=2, target_modules=["c_attn"], modules_to_save=saved)
        for i, saved in enumerate([["wte"], None])
    ]
    adapter = folders[0] / "adapter_model.safetensors"
    tensors = load_file(adapter)
    save_file({k: v if "lora_" in k else v + 0.1 * torch.randn_like(v) for k, v in tensors.items()}, adapter)
    model = attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), folders, modules_to_save="a0")
    mixture = Mixture.from_model(model, tmp_path / "base")
    assert mixture.head_tensors == {"transformer.wte.weight": "wte.weight"}
    export(mixture, "dense", tmp_path / "out")
    assert torch.allclose(load(tmp_path / "out", "")(IDS).logits, model(IDS).logits, atol=5e-6)
    export(mixture, "lora", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"] == ["transformer.wte"]
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert torch.allclose(lora(IDS).logits, model(IDS).logits, atol=5e-6)
    checked = verify(tmp_path / "out", base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


@pytest.mark.parametrize("head", ["model.embed_tokens", "lm_head"])
def test_a_tied_embedding_that_a_loop_trains_as_a_head_changes_both_sides_of_the_export(
    head: str, tmp_path: Path
) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    model = attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), [folder], head=[head])
    assert sum(p.requires_grad for p in model.parameters()) == 2
    model(IDS).logits.square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    export(Mixture.from_model(model, tmp_path / "base"), "dense", tmp_path / "out")
    got = load(tmp_path / "out", "")(IDS).logits
    assert torch.allclose(got, model(IDS).logits, atol=5e-6)
    assert not torch.allclose(got, base(IDS).logits, atol=1e-3)
    assert_verified(tmp_path / "out", base=tmp_path / "base", adapters=[f"a={folder}"])


def test_a_tied_embedding_of_an_encoder_decoder_is_no_head(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=96, tie_word_embeddings=True, **sizes))  # type: ignore[arg-type]
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q"])
    with pytest.raises(UnsupportedError, match=r"head: 'shared\.weight' is an embedding that this model uses"):
        attach(base, [folder], head=["shared"])
