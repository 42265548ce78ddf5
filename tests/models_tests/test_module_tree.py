"""Names and rows of the files against those that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.architectures import CASES
from support.models import tiny_llama

from wlora_merge.errors import BaseModelError, UnsupportedError
from wlora_merge.io.safetensors_file import Entry, read_header
from wlora_merge.models.base_model import BaseModel, open_base
from wlora_merge.models.module_tree import ModuleTree, build_tree


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(name: str) -> tuple[Any, BaseModel]:
        model = CASES[name].make().float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.rand_like(parameter))  # no two tensors alike
        model.save_pretrained(tmp_path / name)
        return CASES[name].load(tmp_path / name, torch.float32), open_base(tmp_path / name)

    return save


def read_rows(tree: ModuleTree, name: str, shape: torch.Size) -> torch.Tensor:
    """A tensor of the tree put together from the parts that the tree says."""
    rows = torch.full((shape[:-1].numel(), shape[-1]), torch.nan)
    for part in tree.parts(name):
        tensor = load_file(part.entry.file)[part.entry.name]
        rows[part.rows] = tensor.reshape(-1, tensor.shape[-1])[part.start : part.start + len(part.rows)]
    return rows.reshape(shape)


def test_a_config_of_far_more_layers_than_the_files_have_is_refused_at_once(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_000_000}))
    with pytest.raises(
        BaseModelError, match=r"config.json: describes a model of .* it is not the config of these weights"
    ):
        open_base(tmp_path).find_tensor("model.layers.0.other.weight")


@pytest.mark.parametrize("name", ["vit", "llava", "mixtral", "qwen3_moe", "gpt_neox", "bart"])
def test_every_matrix_of_the_tree_is_found_in_the_files(name: str, saved: Any) -> None:
    model, base = saved(name)
    assert base.tree is not None
    tied = set(model.all_tied_weights_keys)
    checked = 0
    for tensor, value in model.state_dict().items():
        if value.dim() in (2, 3) and tensor.endswith(("weight", "proj")) and tensor not in tied:
            assert torch.equal(read_rows(base.tree, tensor, value.shape), value), tensor
            checked += 1
    assert checked > 8


def test_a_tensor_that_transformers_renames_is_found_under_the_trees_name(saved: Any) -> None:
    _, base = saved("vit")
    entry = base.find_tensor("vit.layers.1.attention.q_proj.weight")
    assert entry is not None
    assert entry.name == "vit.encoder.layer.1.attention.attention.query.weight"
    assert base.find_tensor("layers.1.attention.q_proj.weight") == entry  # as a model without a head calls it
    assert base.find_tensor("vit.layers.1.attention.other.weight") is None


def test_an_output_embedding_that_the_files_call_otherwise_is_found(saved: Any) -> None:
    _, base = saved("gpt_neox")
    entry = base.find_tensor("lm_head.weight")
    assert entry is not None
    assert entry.name == "embed_out.weight"


def test_a_fused_tensor_is_no_tensor_of_the_files(saved: Any) -> None:
    _, base = saved("mixtral")
    assert base.find_tensor("model.layers.0.mlp.experts.gate_up_proj") is None
    parts = base.tree.parts("model.layers.0.mlp.experts.gate_up_proj") if base.tree else []
    assert [p.entry.name.rpartition("experts.")[2] for p in parts][:3] == ["0.w1.weight", "0.w3.weight", "1.w1.weight"]
    assert [(p.start, int(p.rows[0]), len(p.rows)) for p in parts[:3]] == [(0, 0, 24), (0, 24, 24), (0, 48, 24)]


class Joined(torch.nn.Module):
    """Query, key and value as modules of their own, which the files hold as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(4, 6, bias=False) for _ in range(3))
        self.config = transformers.PretrainedConfig()


def tree_with(converter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleTree, torch.Tensor]:
    from transformers import conversion_mapping

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [converter])
    fused = torch.rand(18, 4)
    save_file({"qkv.weight": fused}, tmp_path / "model.safetensors")
    entries: dict[str, Entry] = read_header(tmp_path / "model.safetensors").entries
    return ModuleTree(Joined(), entries), fused


def test_modules_that_the_files_hold_in_one_tensor_are_rows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    names = [f"{x}_proj.weight" for x in "qkv"]
    tree, fused = tree_with(WeightConverter("qkv.weight", names, [Chunk(dim=0)]), tmp_path, monkeypatch)
    for i, name in enumerate(names):
        (part,) = tree.parts(name)
        assert (part.entry.name, part.start, part.rows.tolist()) == ("qkv.weight", 6 * i, list(range(6)))
        assert torch.equal(read_rows(tree, name, torch.Size((6, 4))), fused[6 * i : 6 * i + 6])


def test_vectors_that_the_files_hold_in_one_are_numbers_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    joined = Joined()
    for layer in (joined.q_proj, joined.k_proj, joined.v_proj):
        layer.bias = torch.nn.Parameter(torch.zeros(6))
    converter = WeightConverter("qkv.bias", [f"{x}_proj.bias" for x in "qkv"], [Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [converter])
    save_file({"qkv.bias": torch.rand(18)}, tmp_path / "model.safetensors")
    tree = ModuleTree(joined, read_header(tmp_path / "model.safetensors").entries)
    for i, name in enumerate("qkv"):
        (part,) = tree.parts(f"{name}_proj.bias")
        assert (part.start, part.rows.tolist(), part.width) == (6 * i, list(range(6)), 1)
        assert tree.stored_modules(f"{name}_proj") == ["qkv"]


def test_a_conversion_that_moves_more_than_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    tree, _ = tree_with(WeightConverter("qkv.weight", "q_proj.weight", [Transpose(0, 1)]), tmp_path, monkeypatch)
    with pytest.raises(UnsupportedError, match=r"'qkv.weight' by more than moving rows"):
        tree.parts("q_proj.weight")


def test_a_config_that_transformers_does_not_know_has_no_tree(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of_the_future"}')
    assert build_tree(tmp_path, {}) is None
