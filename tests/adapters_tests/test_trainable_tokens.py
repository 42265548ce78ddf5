"""Trained rows of embeddings (`trainable_token_indices`), and vocabularies that grew, against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import assert_equal_but_for_rounding, make_adapter, peft_sum, tiny_llama
from transformers import AutoModelForCausalLM

from wlora_merge.errors import AdapterError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture

IDS = torch.tensor([[5, 17, 3, 40, 41, 2], [9, 9, 60, 1, 7, 33]])
INDICES: list[Any] = [[3, 9], {"embed_tokens": [9, 60, 5]}, {"lm_head": [7]}]
DELTA = "token_adapter.trainable_tokens_delta"

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding).*")


def zoo(root: Path, tie: bool) -> tuple[Any, Path, list[Path]]:
    base = tiny_llama(tie_word_embeddings=tie)
    base.save_pretrained(root / "base")
    folders = []
    for i, indices in enumerate(INDICES[:2] if tie else INDICES):
        config = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": indices}
        folders.append(train_rows(make_adapter(base, root / f"a{i}", i, **config), i))
    return base, root / "base", folders


def train_rows(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    found = load_file(folder / "adapter_model.safetensors")
    rows = {k: v + 0.5 * torch.randn(v.shape) for k, v in found.items() if k.endswith(DELTA)}
    assert rows
    save_file(found | rows, folder / "adapter_model.safetensors")
    return folder


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_a_dense_export_with_token_rows_is_the_sum_of_pefts_own_merges(tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path, tie=False)
    weights = [0.5, -0.25, 1.5]
    export(mix(folder, folders, weights=weights), "dense", tmp_path / "out")
    assert_equal_but_for_rounding(load_file(tmp_path / "out" / "model.safetensors"), peft_sum(base, folders, weights))


@pytest.mark.parametrize("n", range(2))
def test_a_tied_model_changes_its_token_rows_on_both_sides_as_peft_does(n: int, tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path, tie=True)
    export(mix(folder, [folders[n]], weights=[1.0]), "dense", tmp_path / "out")
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folders[n]).eval()(IDS).logits
    assert torch.allclose(load(tmp_path / "out")(IDS).logits, expected, atol=5e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_the_attached_forward_with_token_rows_is_the_dense_exports_and_the_loras(tie: bool, tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path, tie)
    model = attach(copy.deepcopy(base), folders, delta_scale=0.7)
    torch.manual_seed(3)
    model.wlora_weights.data.normal_()
    expected = model.eval()(IDS).logits
    mixture = Mixture.from_model(model, folder)
    export(mixture, "dense", tmp_path / "out")
    assert torch.allclose(load(tmp_path / "out")(IDS).logits, expected, atol=5e-6)
    assert not torch.allclose(base(IDS).logits, expected, atol=1e-3)
    export(mixture, "lora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert torch.allclose(lora(IDS).logits, expected, atol=5e-6)


def test_verify_checks_an_export_with_token_rows(tmp_path: Path) -> None:
    _, folder, folders = zoo(tmp_path, tie=False)
    export(mix(folder, folders, task="causal-lm"), "dense", tmp_path / "out")
    checked = verify(tmp_path / "out", base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


def test_indices_that_do_not_fit_the_rows_are_refused(tmp_path: Path) -> None:
    _, folder, folders = zoo(tmp_path, tie=False)
    found = load_file(folders[0] / "adapter_model.safetensors")
    key = next(k for k in found if k.endswith(DELTA))
    save_file(found | {key: found[key][:1].clone()}, folders[0] / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"'model\.embed_tokens': its token rows are \[1, 32\].*name 2"):
        mix(folder, [folders[0]])


def test_tokens_beyond_the_vocabulary_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    config = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 97]}
    folder = train_rows(make_adapter(tiny_llama(vocab_size=98), tmp_path / "a", 0, **config), 0)
    with pytest.raises(UnsupportedError, match=r"token 97 .*vocabulary has 96.*resize_token_embeddings"):
        mix(tmp_path / "base", [folder])


@pytest.mark.parametrize("choice", ["a", "mix"])
def test_embeddings_saved_whole_with_added_tokens_are_refused_with_what_to_do(choice: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder = make_adapter(tiny_llama(vocab_size=98), tmp_path / "a", 0, **config)
    with pytest.raises(
        UnsupportedError, match=r"98 tokens.*96.*--resize-vocab NAME|\[96, 32\] there and \[98, 32\] here"
    ):
        mix(tmp_path / "base", [folder], modules_to_save=choice, task="causal-lm")
