"""torch's MultiheadAttention, whose weights lie in one tensor: a dense export against PEFT's own merge, the rest refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.models import assert_equal_but_for_rounding, make_adapter, peft_changes, peft_sum
from transformers import SiglipVisionConfig, SiglipVisionModel

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix


def zoo(root: Path) -> tuple[Any, Path, list[Path]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **sizes)).eval()
    base.save_pretrained(root / "base")
    targets = [["attention", "q_proj"], ["attention"]]
    folders = [make_adapter(base, root / f"a{i}", i, r=2 + i, target_modules=t) for i, t in enumerate(targets)]
    return base, root / "base", folders


def test_a_dense_export_with_multihead_attention_is_the_sum_of_pefts_own_merges(tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path)
    changed = {"head.attention.in_proj_weight", "head.attention.out_proj.weight"}
    assert changed == set(peft_changes(base, folders[1]))
    export(mix(folder, folders, weights=[0.5, -0.25]), "dense", tmp_path / "out")
    sums = peft_sum(base, folders, [0.5, -0.25])
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert_equal_but_for_rounding(got, {name: sums[name] for name in got})
    checked = verify(tmp_path / "out", base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert "MultiheadAttention" in checked.skipped["outputs"]


def test_peft_adds_the_product_of_the_out_proj_twice_in_its_forward_pass_too(tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path)
    export(mix(folder, folders[:1], weights=[1.0]), "dense", tmp_path / "out")
    pixels = torch.randn(2, 3, 8, 8)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), folders[0]).eval()
    trained = peft(pixel_values=pixels).pooler_output
    got = SiglipVisionModel.from_pretrained(tmp_path / "out").eval()(pixel_values=pixels).pooler_output
    assert torch.allclose(got, trained, atol=2e-6)


def test_a_fit_and_a_lora_export_of_multihead_attention_are_refused_by_name(tmp_path: Path) -> None:
    base, folder, folders = zoo(tmp_path)
    with pytest.raises(
        UnsupportedError, match=r"'head\.attention\.?\w*' is a .*Linear|'head\.attention' is a Multihead"
    ):
        attach(base, folders)
    with pytest.raises(UnsupportedError, match=r"'head\.attention' is a MultiheadAttention.*--format dense"):
        export(mix(folder, folders), "lora", tmp_path / "lora")
