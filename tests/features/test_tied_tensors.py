"""Every way in which models tie tensors: an export computes what PEFT computes, in transformers 5 and in transformers 4."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import make_adapter, trained_adapter

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.models.names import NUMERIC_PART

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding).*")

OLD = os.environ.get("WLORA_MERGE_TRANSFORMERS_4", "")
"""A Python with transformers 4.57, torch and safetensors."""
Old = subprocess.Popen[str] | None
IDS = [[5, 17, 3, 40, 41, 2], [9, 9, 60, 1, 7, 33]]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 96, "pad_token_id": 0, "decoder_start_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 96,
    "decoder_start_token_id": 0,
}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 96}
GEMMA = {
    **SMALL, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_key_value_heads": 2, "head_dim": 8,
    "global_head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
ONE_EACH = {**SEQ2SEQ, "share_encoder_decoder_embeddings": False}
LLAMA = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}
BERT_BIAS = {"target_modules": ["decoder"], "bias": "all"}

KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "head of a Gemma with two tables": ("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA, {"target_modules": ["lm_head"]}),
    "tokens of a Gemma with two tables": (
        "Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    ),
    "head of a DistilBERT": ("DistilBertForMaskedLM", "DistilBertConfig", DISTIL, {"target_modules": ["vocab_projector"]}),
    "input of a DistilBERT": ("DistilBertForMaskedLM", "DistilBertConfig", DISTIL, {"target_modules": ["word_embeddings"]}),
    "tokens of a DistilBERT": (
        "DistilBertForMaskedLM", "DistilBertConfig", DISTIL,
        {"target_modules": ["q_lin"], "trainable_token_indices": {"word_embeddings": [3, 5]}},
    ),
    "head of an ELECTRA": (
        "ElectraForMaskedLM", "ElectraConfig", {**SMALL, "embedding_size": 16}, {"target_modules": ["generator_lm_head"]},
    ),
    "head of a BERT, with biases": ("BertForMaskedLM", "BertConfig", SMALL, BERT_BIAS),
    "input of a BERT": ("BertForMaskedLM", "BertConfig", SMALL, {"target_modules": ["word_embeddings"]}),
    "head of a ModernBERT": (
        "ModernBertForMaskedLM", "ModernBertConfig", {**SMALL, "pad_token_id": 0}, {"target_modules": ["decoder"]},
    ),
    "head of an XLM": (
        "XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "n_words": 96},
        {"target_modules": ["pred_layer.proj"]},
    ),
    "head of a GPT-2": (
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 96}, {"target_modules": ["lm_head"]},
    ),
    "head of a Marian with two vocabularies": (
        "MarianMTModel", "MarianConfig", {**ONE_EACH, "decoder_vocab_size": 80},
        {"target_modules": ["lm_head"]},
    ),
    "encoder of a Marian with two vocabularies": (
        "MarianMTModel", "MarianConfig", {**ONE_EACH, "decoder_vocab_size": 96},
        {"target_modules": ["encoder.embed_tokens"]},
    ),
    "decoder of a Marian with two vocabularies": (
        "MarianMTModel", "MarianConfig", {**ONE_EACH, "decoder_vocab_size": 96},
        {"target_modules": ["decoder.embed_tokens"]},
    ),
    "untied head of a T5": (
        "T5ForConditionalGeneration", "T5Config", {**T5, "tie_word_embeddings": False},
        {"target_modules": ["lm_head", "q"]},
    ),
    "head of a Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, {"target_modules": ["lm_head", "q_proj"]}),
    "input of a Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, {"target_modules": ["embed_tokens"]}),
    "both ends of a Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole head of a Llama": (
        "LlamaForCausalLM", "LlamaConfig", LLAMA,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip

WRONG_IN_4 = ("encoder of a Marian with two vocabularies", "head of a Marian with two vocabularies")
"""Transformers 4 ties the head of these bases to the encoder's embedding, or does not load them."""


def make(kind: str, root: Path) -> tuple[str, dict[str, Any]]:
    """A tiny base of this kind in `root/base`: its class, and the adapter's config."""
    name, config_name, sizes, lora = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**sizes))
    if "untied head of a T5" in kind:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(root / "base")
    if "untied" in kind:
        edit(root / "base" / "config.json", tie_word_embeddings=False)
    return name, lora


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def load(folder: Path, name: str) -> Any:
    model, info = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor(IDS)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs_of(model)).logits
    return found


@pytest.fixture(scope="module")
def old() -> Iterator[Old]:
    """A process of transformers 4 that says what it computes with a folder; None where there is no such environment."""
    code = (
        "import sys, torch, transformers; from safetensors.torch import save_file\n"
        f"ids = torch.tensor({IDS})\n"
        "for line in sys.stdin:\n"
        "    folder, name = line.split()\n"
        "    if not hasattr(transformers, name): print('none', flush=True); continue\n"
        "    try:\n"
        "        m = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()\n"
        "        more = {'decoder_input_ids': ids} if m.config.is_encoder_decoder else {}\n"
        "        with torch.no_grad(): found = m(input_ids=ids, **more).logits.contiguous()\n"
        "        save_file({'logits': found}, folder + '-logits.safetensors'); print('done', flush=True)\n"
        "    except Exception as error: print(' '.join(repr(error).split()), flush=True)\n"
    )
    if not OLD:
        yield None
        return
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [OLD, "-c", code], env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as run:
        yield run
        run.kill()


def logits_in_4(run: subprocess.Popen[str], folder: Path, name: str) -> torch.Tensor | None:
    """What transformers 4 computes with a folder; None where it has no such class."""
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(f"{folder} {name}\n")
    run.stdin.flush()
    answer = run.stdout.readline().strip()
    assert answer in ("done", "none"), answer
    return load_file(f"{folder}-logits.safetensors")["logits"] if answer == "done" else None


def check(root: Path, name: str, lora: dict[str, Any], tied: bool, old: Old) -> None:
    """Export one adapter of the base in `root`: every reader computes what PEFT does, and the config says what is written."""
    folder = trained_adapter(load(root / "base", name), root / "a", **lora)
    peft = PeftModel.from_pretrained(load(root / "base", name), folder).eval()
    # a merge writes a change of one side into both; unmerged, trained tokens of a head lose its bias
    expected = logits(peft.merge_and_unload() if "trainable_token_indices" in lora else peft)
    assert not torch.allclose(logits(load(root / "base", name)), expected, atol=1e-4)
    choice = "a" if "modules_to_save" in lora else None
    export(mix(root / "base", [folder], weights=[1.0], modules_to_save=choice), "dense", root / "out")
    torch.testing.assert_close(logits(load(root / "out", name)), expected, atol=3e-5, rtol=3e-5)
    assert json.loads((root / "out" / "config.json").read_text()).get("tie_word_embeddings") is tied
    verify(root / "out", base=root / "base", adapters=[f"a={folder}"])
    if old is not None and (found := logits_in_4(old, root / "out", name)) is not None:
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_tied_tensor_gives_what_peft_computes(kind: str, tmp_path: Path, old: Old) -> None:
    name, lora = make(kind, tmp_path)
    stays = "encoder of" in kind
    check(tmp_path, name, lora, stays, None if kind in WRONG_IN_4 else old)


def stored_twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def stored_apart(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1


def stored_as_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def made_and_stored(store: Callable[[dict[str, torch.Tensor]], None], root: Path) -> str:
    """The class of a Llama with a tied head whose files hold its tensors as `store` leaves them."""
    name, _ = make("head of a Llama", root)
    file = root / "base" / "model.safetensors"
    tensors = load_file(file)
    store(tensors)
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head", "embed_tokens"]])
@pytest.mark.parametrize("store", [stored_twice, stored_apart, stored_as_head])
def test_a_base_may_store_both_tied_tensors_or_the_other_one(
    store: Callable[[dict[str, torch.Tensor]], None], targets: list[str], tmp_path: Path, old: Old
) -> None:
    name = made_and_stored(store, tmp_path)
    check(tmp_path, name, {"target_modules": targets}, False, old)


@pytest.mark.parametrize(("store", "tied"), [(stored_twice, True), (stored_apart, False)])
def test_the_config_follows_the_tensors_where_no_adapter_changes_them(
    store: Callable[[dict[str, torch.Tensor]], None], tied: bool, tmp_path: Path, old: Old
) -> None:
    name = made_and_stored(store, tmp_path)
    check(tmp_path, name, {"target_modules": ["q_proj"]}, tied, old)


def test_an_adapter_of_another_table_of_the_vocabularys_size_leaves_the_head_tied(tmp_path: Path, old: Old) -> None:
    name, _ = make("head of a Gemma with two tables", tmp_path)
    check(tmp_path, name, {"target_modules": ["embed_tokens_per_layer"]}, True, old)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_the_config_of_the_text_is_untied_too(tmp_path: Path, old: Old) -> None:
    """Transformers 4 and vLLM ask the part of the config that is the text's, where a missing key means true."""
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    ids = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, **ids)  # type: ignore[arg-type]
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    parts = json.loads(file.read_text())
    parts["text_config"].pop("tie_word_embeddings", None)
    file.write_text(json.dumps(parts | {"tie_word_embeddings": True}))
    check(tmp_path, "Gemma3ForConditionalGeneration", {"target_modules": ["lm_head"]}, False, old)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False


def test_transformers_4_was_there_to_compare_with(old: Old) -> None:
    if old is None:
        pytest.skip("WLORA_MERGE_TRANSFORMERS_4 names no Python with transformers 4.57, torch and safetensors")
    assert old.poll() is None


def test_the_tied_head_of_a_t5_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))  # type: ignore[arg-type]
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"'lm_head', which this model uses in several places"):
        mix(tmp_path / "base", [folder])


def test_no_decoder_without_parts_ties_what_lies_in_a_numbered_layer() -> None:
    """What `may_be_tied` relies on, asked of every class of transformers."""
    import transformers.models as models

    numbered, classes = {}, 0
    for family in pkgutil.iter_modules(models.__path__):
        for file in pkgutil.iter_modules([str(Path(models.__path__[0]) / family.name)]):
            if not file.name.startswith("modeling_"):
                continue
            try:
                module = importlib.import_module(f"transformers.models.{family.name}.{file.name}")
            except (ImportError, RuntimeError):  # of a library that is not installed
                continue
            for name, cls in vars(module).items():
                ties = getattr(cls, "_tied_weights_keys", None) if isinstance(cls, type) else None
                if not isinstance(ties, dict) or cls.__module__ != module.__name__:
                    continue
                classes += 1
                if any(
                    "\\" in key or any(map(NUMERIC_PART.fullmatch, key.split("."))) for key in (*ties, *ties.values())
                ):
                    numbered[name] = cls
    assert classes > 300
    alone = [name for name, cls in numbered.items() if not getattr(cls.config_class, "sub_configs", None)]
    assert [name for name in alone if not numbered[name].config_class().is_encoder_decoder] == []
