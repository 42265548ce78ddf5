"""Whole tensors that adapters carry beside their factors: copies of embeddings that differ from the base's."""

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

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix

IDS = torch.tensor([[5, 17, 3, 40, 41, 2], [9, 9, 60, 1, 7, 33]])

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding).*")


def other_base(model: Any, seed: int) -> Any:
    """The model with other embeddings: what an adapter was trained on that carries a copy which is not the base's."""
    torch.manual_seed(seed)
    changed = copy.deepcopy(model)
    for layer in (changed.get_input_embeddings(), changed.get_output_embeddings()):
        layer.weight.data = layer.weight.data + 0.05 * torch.randn_like(layer.weight)
    changed.tie_weights()
    return changed


def zoo(root: Path, *, tie: bool = False) -> tuple[Any, Path, list[Path]]:
    """Two adapters whose copies differ from the base's and from each other's, one whose copy is equal, one without."""
    base = tiny_llama(tie_word_embeddings=tie)
    base.save_pretrained(root / "base")
    trained_on = [other_base(base, 7), other_base(base, 8), base, base]
    trained_on.append(other_base(base, 9))
    targets = [["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"], ["embed_tokens"], ["v_proj"], ["lm_head"]]
    folders = [
        make_adapter(model, root / f"a{i}", i, r=2 + i, target_modules=t)
        for i, (model, t) in enumerate(zip(trained_on, targets, strict=True))
    ]
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(
        folders[0] / "adapter_model.safetensors"
    )
    return base, root / "base", folders


@pytest.mark.parametrize("max_shard_bytes", [None, 4000])
def test_a_copy_of_the_base_embedding_that_differs_is_a_delta_as_peft_loads_it(
    max_shard_bytes: int | None, tmp_path: Path
) -> None:
    base, folder, folders = zoo(tmp_path)
    weights = [0.5, -0.25, 0.75, 0.375, -0.125]
    out = tmp_path / "out"
    export(mix(folder, folders, weights=weights, task="causal-lm"), "dense", out, max_shard_bytes=max_shard_bytes)
    got = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert_equal_but_for_rounding(got, peft_sum(base, folders, weights))
    checked = verify(out, base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


@pytest.mark.parametrize("n", [0, 1, 4])
def test_in_a_tied_model_a_copy_that_differs_changes_both_sides_as_peft_loads_it(n: int, tmp_path: Path) -> None:
    """PEFT's merge would write the LoRA of one side into the other, so it is the unmerged model that is compared."""
    base, folder, folders = zoo(tmp_path, tie=True)
    export(mix(folder, [folders[n]], weights=[1.0], task="causal-lm"), "dense", tmp_path / "out")
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folders[n]).eval()(IDS).logits
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert torch.allclose(got, expected, atol=5e-6)
    assert not torch.allclose(base(IDS).logits, expected, atol=1e-3)
    verify(tmp_path / "out", base=folder, adapters=[f"{folders[n].name}={folders[n]}"])


def test_present_counts_the_adapters_that_change_an_embedding_in_either_way(tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path)
    export(mix(folder, folders, normalize="present"), "dense", tmp_path / "out")
    expected = peft_sum(base, folders, [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0])["model.embed_tokens.weight"]
    got = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(got.double(), expected, rtol=2**-22, atol=1e-12)


def test_a_copy_that_differs_is_refused_by_name_where_it_cannot_be_mixed(tmp_path: Path) -> None:
    _, folder, folders = zoo(tmp_path)
    mixture = mix(folder, folders)
    with pytest.raises(UnsupportedError, match=r"'lm_head\.weight'.* as a whole, which no LoRA"):
        export(mixture, "lora", tmp_path / "lora")
    dora = make_adapter(
        other_base(tiny_llama(), 9), tmp_path / "dora", 5, r=2, target_modules=["embed_tokens"], use_dora=True
    )
    with pytest.raises(UnsupportedError, match=r"adapter 'dora'.*'model\.embed_tokens\.weight'.*DoRA"):
        mix(folder, [dora])


def test_copies_of_tied_embeddings_that_differ_from_each_other_are_refused(tmp_path: Path) -> None:
    _, folder, folders = zoo(tmp_path, tie=True)
    file = folders[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {k: v + 1 for k, v in tensors.items() if k.endswith("lm_head.base_layer.weight")}, file)
    with pytest.raises(UnsupportedError, match="two embeddings that the base model ties differ"):
        mix(folder, [folders[1]])


def test_an_embedding_that_peft_saved_unasked_has_no_effect_where_it_is_equal(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    copies = {f"base_model.model.{name}.weight": base.get_parameter(f"{name}.weight").data for name in ("lm_head",)}
    save_file(load_file(file) | copies, file)
    export(mix(tmp_path / "base", [folder]), "dense", tmp_path / "out")
    assert_equal_but_for_rounding(load_file(tmp_path / "out" / "model.safetensors"), peft_sum(base, [folder], [1.0]))
    save_file(load_file(file) | {k: v + 1 for k, v in copies.items()}, file)
    with pytest.raises(UnsupportedError, match=r"'lm_head\.weight': say --modules-to-save"):
        mix(tmp_path / "base", [folder])
