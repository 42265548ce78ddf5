"""A larger vocabulary (`--resize-vocab`): the export against PEFT's merge on a model that transformers has resized."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import assert_equal_but_for_rounding, make_adapter, peft_sum, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from wlora_merge.cli.inspect_tables import inspect_paths
from wlora_merge.errors import AdapterError, MixtureError, UnsupportedError, WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture

IDS = torch.tensor([[5, 17, 97, 40, 98, 2], [9, 96, 60, 1, 7, 33]])
BOTH = ["embed_tokens", "lm_head"]

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding|mean_resizing).*")


def larger(model: Any, tokens: int = 99) -> Any:
    torch.manual_seed(tokens)
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (resized.get_input_embeddings(), resized.get_output_embeddings()):
        layer.weight.data = layer.weight.data + 0.1 * torch.randn_like(layer.weight)
    resized.tie_weights()
    return resized


def tokenizer(folder: Path, *added: str, words: int = 96) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    made.add_tokens(list(added))
    made.save_pretrained(folder)


def zoo(root: Path, *, tie: bool = False) -> tuple[Any, Path, list[Path]]:
    """Two adapters that were trained with the same three added tokens, one with the base's vocabulary that carries its own
    embeddings, and one without any."""
    base = tiny_llama(tie_word_embeddings=tie)
    base.save_pretrained(root / "base")
    tokenizer(root / "base")
    config: list[tuple[Any, dict[str, Any]]] = [
        (larger(base), {"target_modules": ["q_proj"], "modules_to_save": BOTH}),
        (larger(base), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (base, {"target_modules": ["k_proj"], "modules_to_save": BOTH}),
        (base, {"target_modules": ["v_proj"]}),
    ]
    folders = [make_adapter(model, root / f"a{i}", i, r=2 + i, **c) for i, (model, c) in enumerate(config)]
    for i, folder in enumerate(folders):
        file = folder / "adapter_model.safetensors"
        torch.manual_seed(i)
        tensors = load_file(file)
        changed = {k: v + 0.1 * torch.randn_like(v) for k, v in tensors.items() if "lora_" not in k}
        if tie:  # PEFT saves both sides of one parameter
            changed = {k: v for k, v in changed.items() if "base_layer" not in k}
        save_file(tensors | changed, file)
    for folder in folders[:2]:
        tokenizer(folder, "<a>", "<b>", "<c>")
    return base, root / "base", folders


def loaded(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def in_peft(base: Any, folder: Path) -> Any:
    """The adapter on the base that transformers has resized, whose own added rows PEFT replaces."""
    return PeftModel.from_pretrained(larger(base), folder).eval()


@pytest.mark.parametrize("choice", ["mix", "a0"])
@pytest.mark.parametrize("tie", [False, True])
def test_one_adapter_with_added_tokens_gives_what_peft_computes(tie: bool, choice: str, tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path, tie=tie)
    out = tmp_path / "out"
    mixture = mix(
        folder,
        folders[:1],
        weights=[1.0],
        task="causal-lm",
        modules_to_save=choice,
        resize_vocab="a0",
        out=tmp_path / "m",
    )
    assert mixture.config["vocab_size"] == 99
    export(tmp_path / "m", "dense", out)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 99
    model = loaded(out)
    assert torch.allclose(model(IDS).logits, in_peft(base, folders[0])(IDS).logits, atol=5e-6)
    assert AutoTokenizer.from_pretrained(out)("w5 <b>")["input_ids"] == [5, 97]
    checked = verify(out, base=folder, adapters=[f"a0={folders[0]}"])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


@pytest.mark.parametrize("tie", [False, True])
def test_a_lora_of_embeddings_with_added_tokens_gives_what_peft_computes(tie: bool, tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path, tie=tie)
    mixture = mix(folder, [folders[1]], weights=[1.0], resize_vocab="a1", task="causal-lm")
    export(mixture, "dense", tmp_path / "out", report=True)
    expected = in_peft(base, folders[1])(IDS).logits
    assert torch.allclose(loaded(tmp_path / "out")(IDS).logits, expected, atol=5e-6)
    verify(tmp_path / "out", base=folder, adapters=[f"a1={folders[1]}"])


def test_the_model_names_of_a_gpt2_grow_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=96, n_positions=32)).eval()
    base.save_pretrained(tmp_path / "base")
    config: dict[str, Any] = {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}
    folder = make_adapter(larger(base), tmp_path / "a", 1, r=2, **config)
    tokenizer(folder, "<a>", "<b>", "<c>")
    mixture = mix(tmp_path / "base", [folder], weights=[1.0], modules_to_save="mix", resize_vocab="a", task="causal-lm")
    export(mixture, "dense", tmp_path / "out")
    assert torch.allclose(loaded(tmp_path / "out")(IDS).logits, in_peft(base, folder)(IDS).logits, atol=5e-6)


def test_a_tied_base_whose_embeddings_stay_equal_stays_tied(tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path, tie=True)
    file = folders[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    one, other = (k for k in tensors if k.endswith(("embed_tokens.weight", "lm_head.weight")))
    save_file(tensors | {other: tensors[one].clone()}, file)
    export(mix(folder, folders[:1], modules_to_save="drop", resize_vocab="a0"), "dense", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in got
    assert torch.equal(got["model.embed_tokens.weight"][:96], base.model.embed_tokens.weight)
    assert torch.equal(got["model.embed_tokens.weight"][96:], tensors[one][96:])
    assert loaded(tmp_path / "out").lm_head.weight.shape == (99, 32)


def test_the_added_rows_of_two_adapters_are_mixed_as_deltas_against_the_named_ones(tmp_path: Path) -> None:
    _, folder, folders = zoo(tmp_path)
    mixture = mix(folder, folders[:2], weights=[0.75, 0.5], modules_to_save="mix", resize_vocab="a0")
    export(mixture, "dense", tmp_path / "out")
    key, lora = "base_model.model.lm_head.weight", "base_model.model.lm_head."
    first, second = (load_file(f / "adapter_model.safetensors") for f in folders[:2])
    delta = second[lora + "lora_B.weight"].double() @ second[lora + "lora_A.weight"].double() * (8 / 3)
    own = first[key].double()
    expected = own + 0.5 * (second[lora + "base_layer.weight"].double() - own + delta)
    got = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"][96:]
    assert torch.allclose(got.double(), expected[96:], rtol=2**-22, atol=1e-12)


def test_what_cannot_be_resized_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path)
    for call, error, what in (
        (lambda: mix(folder, folders[:1], modules_to_save="mix"), UnsupportedError, r"\[96, 32\].*--resize-vocab NAME"),
        (
            lambda: mix(folder, folders[:1], modules_to_save="a0"),
            UnsupportedError,
            "99 tokens.*96.*--resize-vocab NAME",
        ),
        (lambda: mix(folder, [folders[1]]), AdapterError, r"\[99, 3\].*--resize-vocab NAME"),
        (lambda: mix(folder, folders[:1], resize_vocab="x"), AdapterError, "--resize-vocab x: expected one of a0"),
        (lambda: mix(folder, folders[2:], resize_vocab="a2"), AdapterError, "no embedding with more rows"),
        (lambda: mix(folder, folders[:1], resize_vocab="a0"), UnsupportedError, "say --modules-to-save"),
        (lambda: attach(copy.deepcopy(base), folders[:1], modules_to_save="a0"), UnsupportedError, "99 tokens"),
    ):
        with pytest.raises(error, match=what):
            call()
    mixture = mix(folder, folders[:1], modules_to_save="drop", resize_vocab="a0", task="causal-lm")
    with pytest.raises(UnsupportedError, match=r"--resize-vocab a0: .* no LoRA .*--format dense"):
        export(mixture, "lora", tmp_path / "lora")
    rows = inspect_paths([folder, *folders])["Adapters"]
    assert [row["mixes"] for row in rows][2:] == ["yes, with --modules-to-save or a fit that trains a head", "yes"]


def test_an_end_that_the_config_does_not_know_is_told(tmp_path: Path) -> None:
    _, base, folders = zoo(tmp_path)
    file = folders[0] / "tokenizer_config.json"
    name = next(
        t["content"] for t in json.loads((folders[0] / "tokenizer.json").read_text())["added_tokens"] if t["id"] == 96
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": name}))
    with pytest.warns(WloraMergeWarning, match=rf"ends a text with '{name}' \(96\), the base's config says"):
        mix(base, folders[:1], modules_to_save="drop", resize_vocab="a0")


def test_an_adapter_that_lacks_an_embedding_or_a_tokenizer_cannot_resize(tmp_path: Path) -> None:
    base, folder, _ = zoo(tmp_path)
    half = make_adapter(larger(base), tmp_path / "half", 5, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"lacks tensor 'model\.embed_tokens\.weight' \[99, 32\]"):
        mix(folder, [half], modules_to_save="drop", resize_vocab="half")
    bare = make_adapter(larger(base), tmp_path / "bare", 5, r=2, target_modules=["q_proj"], modules_to_save=BOTH)
    with pytest.raises(UnsupportedError, match=r"bare has no tokenizer.*save_pretrained"):
        mix(folder, [bare], modules_to_save="drop", resize_vocab="bare")
    tokenizer(bare, *(f"<{i}>" for i in range(9)))
    with pytest.raises(AdapterError, match=r"has a token 104, and its embeddings have 99 rows"):
        mix(folder, [bare], modules_to_save="drop", resize_vocab="bare")


def test_a_mixture_remembers_whose_tokens_it_has(tmp_path: Path) -> None:
    _, folder, folders = zoo(tmp_path)
    mix(folder, folders[:1], tmp_path / "m", modules_to_save="drop", resize_vocab="a0")
    assert Mixture.load(tmp_path / "m").resize_vocab == "a0"
    file = tmp_path / "m" / "mixture.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resize_vocab": 3}))
    with pytest.raises(MixtureError, match="resize_vocab is 3, expected text"):
        Mixture.load(tmp_path / "m")


def test_several_adapters_mix_on_the_base_as_the_one_resizes_it(tmp_path: Path) -> None:
    """The oracle is the base with a0's added rows, and on it PEFT's own merge of each adapter alone."""
    base, folder, folders = zoo(tmp_path)
    pair, weights = [folders[0], folders[2], folders[3]], [0.5, -0.25, 0.75]
    mixture = mix(folder, pair, weights=weights, modules_to_save="mix", resize_vocab="a0")
    export(mixture, "dense", tmp_path / "out", max_shard_bytes=6000)
    resized, saved = larger(base), load_file(folders[0] / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = next(v for k, v in saved.items() if k.endswith(name.rpartition("model.")[2]))[96:]
        resized.get_parameter(name).data = torch.cat([base.get_parameter(name).data, rows])
    for i in (2,):
        file = folders[i] / "adapter_model.safetensors"
        tensors = load_file(file)
        for key in [k for k in tensors if len(tensors[k]) == 96 and "lora_" not in k]:
            own = resized.get_parameter(key.removeprefix("base_model.model.")).data
            tensors[key] = torch.cat([tensors[key], own[96:]])
        (tmp_path / "padded").mkdir()
        save_file(tensors, tmp_path / "padded" / "adapter_model.safetensors")
        (tmp_path / "padded" / "adapter_config.json").write_bytes((folders[i] / "adapter_config.json").read_bytes())
    expected = peft_sum(resized, [folders[0], tmp_path / "padded", folders[3]], weights)
    got = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert_equal_but_for_rounding(got, expected)
    loaded(tmp_path / "out")
