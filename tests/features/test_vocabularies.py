"""Adapters of resized vocabularies, grown and shrunk, against PEFT on the base that transformers has resized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import assert_equal_but_for_rounding, peft_changes, tiny_llama, trained_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from wlora_merge.adapters.adapter import load_adapter
from wlora_merge.adapters.added_tokens import resized as added_tokens
from wlora_merge.cli.inspect_tables import inspect_paths
from wlora_merge.errors import AdapterError, UnsupportedError, WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.models.base_model import open_base

ROWS, WORDS = 96, 88  # the base's table is padded
IDS = torch.tensor([[5, 17, 88, 40, 90, 2], [9, 89, 60, 1, 7, 33]])
EMBEDDINGS = ["embed_tokens", "lm_head"]
TOKENS = [88, 89, 90]

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding|mean_resizing|save_embedding_layers).*")


def tokenizer(folder: Path, *added: str) -> None:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w1")
    made.add_tokens(list(added))
    made.save_pretrained(folder)


def base_at(folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    made = LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=ROWS, pad_token_id=1, **config,
    )  # fmt: skip
    LlamaForCausalLM(made).save_pretrained(folder)
    tokenizer(folder)
    return folder


def resized(base: Path, rows: int, cls: Any = LlamaForCausalLM) -> Any:
    """The base with `rows` tokens, as transformers draws the new rows."""
    model = cls.from_pretrained(base, dtype=torch.float32).eval()
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def adapter(base: Path, folder: Path, rows: int, *added: str, seed: int = 3, **config: Any) -> Path:
    torch.manual_seed(seed)
    trained_adapter(resized(base, rows), folder, **{"target_modules": ["q_proj"]} | config)
    tokenizer(folder, *(added or ("<a>", "<b>", "<c>")))
    return folder


def in_peft(base: Path, folder: Path, rows: int) -> Any:
    return PeftModel.from_pretrained(resized(base, rows), folder).eval()


def exported(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), load_file(folder / "model.safetensors")


KINDS: dict[str, dict[str, Any]] = {
    "no embedding trained": {},
    "new rows": {"trainable_token_indices": TOKENS},
    "rows of both": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3, *TOKENS]}},
    "lora of the input": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora of the output": {"target_modules": ["q_proj", "lm_head"]},
    "lora of both": {"target_modules": ["q_proj", *EMBEDDINGS]},
    "dora of both": {"target_modules": ["q_proj", *EMBEDDINGS], "use_dora": True},
    "saved both": {"modules_to_save": EMBEDDINGS},
    "saved input": {"modules_to_save": ["embed_tokens"]},
    "saved output": {"modules_to_save": ["lm_head"]},
    "weight tying, saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "weight tying, lora": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "weight tying, rows": {"trainable_token_indices": TOKENS, "ensure_weight_tying": True},
}


ONE_SIDED = ("lora of the input", "lora of the output", "weight tying, lora")
"""PEFT saves the copy of one embedding alone; where the other is no tensor of its own, its added rows are in no file."""


@pytest.mark.parametrize("rows", [91, 99])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_resized_vocabulary_gives_what_peft_computes(
    kind: str, tie: bool, rows: int, tmp_path: Path
) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=tie)
    folder = adapter(base, tmp_path / "a", rows, **KINDS[kind])
    if kind in ONE_SIDED and not tie and rows > ROWS:
        with pytest.raises(
            UnsupportedError, match=r"lacks tensor '.*weight' \[99, 32\], of which the base has 96 rows.*as it was"
        ):
            mix(base, [folder], weights=[1.0], resize_vocab="a")
        return
    expected = in_peft(base, folder, rows)
    with torch.no_grad():
        logits = expected(IDS).logits
    options: dict[str, Any] = {"modules_to_save": "mix"} if "modules_to_save" in KINDS[kind] else {}
    mix(base, [folder], tmp_path / "m", weights=[1.0], resize_vocab="a", task="causal-lm", **options)
    export(tmp_path / "m", "dense", tmp_path / "out")
    model, tensors = exported(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, logits, atol=5e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    assert tensors["model.embed_tokens.weight"].shape[0] == rows
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 <b>")["input_ids"] == [5, 89]
    checked = verify(tmp_path / "out", base=base, adapters=[f"a={folder}"])
    assert not checked.skipped
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5
    if not tie:
        merged = PeftModel.from_pretrained(resized(base, rows).double(), folder).double().merge_and_unload()
        assert_equal_but_for_rounding(tensors, merged.state_dict())


@pytest.mark.parametrize("told", [TOKENS, {"embed_tokens": TOKENS}])
@pytest.mark.parametrize("tie", [False, True])
def test_rows_of_the_added_tokens_alone_are_enough_where_no_other_is_missing(
    tie: bool, told: Any, tmp_path: Path
) -> None:
    """As PEFT saves them where it is told to save no embedding layers: it puts them into any base of that size."""
    base = base_at(tmp_path / "base", tie_word_embeddings=tie)
    tokens = [96, 97, 98]
    told = tokens if isinstance(told, list) else {"embed_tokens": tokens}
    folder = adapter(base, tmp_path / "a", 99, *(f"<{i}>" for i in range(11)), trainable_token_indices=told)
    file = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k and "base_layer" not in k}, file)
    if not tie:
        with pytest.raises(UnsupportedError, match=r"lacks tensor 'lm_head.weight' .*save_embedding_layers=True"):
            mix(base, [folder], weights=[1.0], resize_vocab="a")
        return
    export(mix(base, [folder], weights=[1.0], resize_vocab="a", task="causal-lm"), "dense", tmp_path / "out")
    ids = torch.tensor([[5, 97, 3, 96, 98, 88]])
    assert torch.allclose(exported(tmp_path / "out")[0](ids).logits, in_peft(base, folder, 99)(ids).logits, atol=5e-6)
    verify(tmp_path / "out", base=base, adapters=[f"a={folder}"])


def test_a_tied_heads_rows_are_those_that_the_config_names_of_its_embedding(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=True)
    folder = adapter(base, tmp_path / "a", 91, trainable_token_indices={"embed_tokens": [3, *TOKENS]})
    assert any("lm_head.token_adapter" in key for key in load_file(folder / "adapter_model.safetensors"))
    export(mix(base, [folder], weights=[1.0], resize_vocab="a"), "dense", tmp_path / "out")
    assert torch.allclose(exported(tmp_path / "out")[0](IDS).logits, in_peft(base, folder, 91)(IDS).logits, atol=5e-6)


def fitted(change: torch.Tensor, rows: int, shared: int, before: int) -> torch.Tensor:
    """A change of a table, for the tokens that two vocabularies share, at the size of one of them."""
    if len(change) != before:
        return change
    kept = change[: min(shared, rows)]
    return torch.cat([kept, kept.new_zeros(rows - len(kept), *kept.shape[1:])])


OTHERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["v_proj", *EMBEDDINGS]},
    "rows": {"trainable_token_indices": [3, 70]},
    "saved": {"modules_to_save": EMBEDDINGS},
}


@pytest.mark.parametrize("rows", [91, 99])
@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_the_bases_own_vocabulary_mix_beside_one_of_another(kind: str, rows: int, tmp_path: Path) -> None:
    base, weights = base_at(tmp_path / "base", tie_word_embeddings=False), (0.75, -0.5)
    named = adapter(base, tmp_path / "a", rows, target_modules=["q_proj", *EMBEDDINGS])
    other = trained_adapter(resized(base, ROWS), tmp_path / "b", **{"target_modules": ["k_proj"]} | OTHERS[kind])
    mixture = mix(base, [named, other], weights=weights, resize_vocab="a", modules_to_save="mix", task="causal-lm")
    export(mixture, "dense", tmp_path / "out")
    there = resized(base, rows)
    copies = load_file(named / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        there.get_submodule(name).weight.data = copies[f"base_model.model.{name}.base_layer.weight"]
    expected = {name: tensor.double() for name, tensor in there.state_dict().items()}
    for name, change in peft_changes(there, named).items():
        expected[name] += weights[0] * change
    for name, change in peft_changes(resized(base, ROWS), other).items():
        expected[name] += weights[1] * fitted(change, rows, rows, ROWS)
    assert_equal_but_for_rounding(exported(tmp_path / "out")[1], expected)
    verify(tmp_path / "out", base=base, adapters=[f"a={named}", f"b={other}"])


@pytest.mark.parametrize(
    ("rows", "added", "shared"), [(91, ("<a>", "<x>", "<y>"), 89), (94, ("<a>", "<b>", "<c>", "<d>"), 91)]
)
def test_rows_of_other_tokens_are_left_out_and_said(
    rows: int, added: tuple[str, ...], shared: int, tmp_path: Path
) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=False)
    named = adapter(base, tmp_path / "a", 91)
    other = adapter(base, tmp_path / "b", rows, *added, target_modules=EMBEDDINGS)
    with pytest.warns(WloraMergeWarning, match=rf"tokens from {shared} on are left out.*--resize-vocab b"):
        mixture = mix(base, [named, other], weights=[0.5, 0.5], resize_vocab="a", task="causal-lm")
    with pytest.warns(WloraMergeWarning, match="left out"):
        export(mixture, "dense", tmp_path / "out")
    expected = {name: tensor.double() for name, tensor in resized(base, 91).state_dict().items()}
    for name, change in peft_changes(resized(base, 91), named).items():
        expected[name] += 0.5 * change
    for name, change in peft_changes(resized(base, rows), other).items():
        expected[name] += 0.5 * fitted(change, 91, shared, rows)
    assert_equal_but_for_rounding(exported(tmp_path / "out")[1], expected)


def test_a_dora_of_another_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=False)
    named = adapter(base, tmp_path / "a", 99)
    dora = trained_adapter(resized(base, ROWS), tmp_path / "b", target_modules=EMBEDDINGS, use_dora=True)
    with pytest.raises(UnsupportedError, match=r"its DoRA of '.*' is of 96 tokens, and the vocabulary here has 99"):
        mix(base, [named, dora], resize_vocab="a")


BART = BartConfig(
    vocab_size=ROWS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=1,
    forced_eos_token_id=None,
)  # fmt: skip
T5 = T5Config(
    vocab_size=ROWS, d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16, decoder_start_token_id=0, pad_token_id=0
)


@pytest.mark.parametrize("rows", [91, 99])
@pytest.mark.parametrize("cls", [BartForConditionalGeneration, T5ForConditionalGeneration])
def test_an_encoder_decoder_of_another_vocabulary_gives_what_peft_computes(cls: Any, rows: int, tmp_path: Path) -> None:
    """A BART's bias of its logits, [1, vocabulary], follows too; what is trained of the shared embedding is refused by name."""
    torch.manual_seed(0)
    base, config = tmp_path / "base", BART if cls is BartForConditionalGeneration else T5
    cls(config).save_pretrained(base)
    tokenizer(base)
    target = ["q_proj"] if config is BART else ["q"]
    folder = trained_adapter(resized(base, rows, cls), tmp_path / "a", target_modules=target)
    tokenizer(folder, "<a>", "<b>", "<c>")
    export(mix(base, [folder], weights=[1.0], resize_vocab="a", task="seq2seq-lm"), "dense", tmp_path / "out")
    got = cls.from_pretrained(tmp_path / "out").state_dict()
    expected = PeftModel.from_pretrained(resized(base, rows, cls).double(), folder).double().merge_and_unload()
    assert_equal_but_for_rounding(got, expected.state_dict())
    verify(tmp_path / "out", base=base, adapters=[f"a={folder}"])
    shared = "shared" if config is T5 else "model.shared"
    trained = trained_adapter(
        resized(base, rows, cls), tmp_path / "b", target_modules=target, trainable_token_indices={"shared": TOKENS}
    )
    tokenizer(trained, "<a>", "<b>", "<c>")
    with pytest.raises(UnsupportedError, match=rf"it changes '(lm_head|{shared})', which this model uses in several"):
        mix(base, [trained], resize_vocab="b")


def test_a_second_table_that_grows_too_is_named_where_its_rows_are_in_no_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Gemma3nTextConfig(
        vocab_size=ROWS, vocab_size_per_layer_input=80, hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=0, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    Gemma3nForCausalLM(made).save_pretrained(tmp_path / "base")
    model = resized(tmp_path / "base", 99, Gemma3nForCausalLM)
    folder = trained_adapter(model, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(
        UnsupportedError, match=r"'model.embed_tokens_per_layer.weight' \[99, 16\], of which the base has 80"
    ):
        mix(tmp_path / "base", [folder], resize_vocab="a")


def test_no_advice_leads_back_to_where_it_came_from(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=True)
    smaller = adapter(base, tmp_path / "smaller", 91)
    within = trained_adapter(
        resized(base, ROWS), tmp_path / "within", trainable_token_indices=TOKENS, target_modules=["q_proj"]
    )
    with pytest.raises(
        UnsupportedError, match=r"has 91 tokens, and the base model's \[96, 32\].*mix --resize-vocab NAME"
    ):
        mix(base, [smaller])
    assert mix(base, [smaller], modules_to_save="drop").resize_vocab is None
    with pytest.raises(AdapterError, match=r"or with fewer: leave that option out; .*--tokenizer-from within"):
        mix(base, [within], resize_vocab="within")
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 93}))
    with pytest.raises(UnsupportedError, match=r"vocabulary of 91 rows, and .*config.json says eos_token_id 93"):
        mix(base, [smaller], resize_vocab="smaller")


def test_a_quantized_base_is_refused_as_its_only_export_has_no_room(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=True)
    file = base / "config.json"
    table = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    file.write_text(json.dumps(table))
    loaded = [load_adapter(trained_adapter(tiny_llama(), tmp_path / "a", target_modules=["q_proj"]))]
    with pytest.raises(
        UnsupportedError, match=r"base is quantized .*no room for another vocabulary: give the original"
    ):
        added_tokens(open_base(base), loaded, "a")


def test_inspect_says_whose_vocabulary_is_another(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=True)
    folders = [
        adapter(base, tmp_path / "grown", 99, trainable_token_indices=[96, 97, 98]),
        adapter(base, tmp_path / "shrunk", 91, modules_to_save=EMBEDDINGS),
        trained_adapter(resized(base, ROWS), tmp_path / "own", target_modules=["q_proj", "embed_tokens"]),
    ]
    tables = inspect_paths([base, *folders])
    assert [row["mixes"] for row in tables["Adapters"]] == ["yes, with --resize-vocab"] * 2 + ["yes"]
    said = {row["adapter"]: row["reason"] for row in tables["What adapters need to be mixed"]}
    assert said["grown"] == "was trained with a vocabulary of 99 rows: say --resize-vocab grown."
    assert said["shrunk"].startswith(
        "was trained with a vocabulary of 91 rows: say --resize-vocab shrunk. carries whole"
    )


@pytest.mark.parametrize("kind", ["new rows", "lora of both"])
def test_a_model_is_attached_to_where_it_has_that_vocabulary_and_refused_before(kind: str, tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=False)
    folder = adapter(base, tmp_path / "a", 99, **KINDS[kind])
    with pytest.raises((UnsupportedError, AdapterError), match=r"for a fit resize the base first"):
        attach(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), [folder], modules_to_save="mix")
    resized(base, 99).save_pretrained(tmp_path / "larger")
    model = attach(
        LlamaForCausalLM.from_pretrained(tmp_path / "larger", dtype=torch.float32).eval(),
        [folder],
        modules_to_save="mix",
    )
    assert torch.allclose(model(IDS).logits, in_peft(base, folder, 99)(IDS).logits, atol=5e-6)


def test_an_onnx_export_has_the_smaller_vocabulary_and_a_lora_is_refused(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=True)
    folder = adapter(base, tmp_path / "a", 91, trainable_token_indices=TOKENS)
    mixture = mix(base, [folder], weights=[1.0], resize_vocab="a", task="causal-lm")
    export(mixture, "onnx", tmp_path / "onnx")
    checked = verify(tmp_path / "onnx", base=base, adapters=[f"a={folder}"])
    assert checked.largest_difference is not None
    with pytest.raises(UnsupportedError, match=r"--resize-vocab a: .* another vocabulary .* no LoRA .*--format dense"):
        export(mixture, "lora", tmp_path / "lora")


def test_inspect_needs_no_class_of_transformers(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", tie_word_embeddings=False)
    folder = trained_adapter(resized(base, ROWS), tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "unheard-of", "architectures": ["Own"]}))
    assert inspect_paths([base, folder])["Adapters"][0]["mixes"] == "yes"
