"""Tiny models of many architectures, mixed PEFT adapters on each: our exports against PEFT's own merges.

The base is saved by `save_pretrained` and every export is loaded by transformers or PEFT again, so that the names on disk and
in the module tree are theirs. The expected weights are W + Σ w_n (PEFT's merge of adapter n - W), in float64.
"""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import BF16, CASES, WEIGHTS, expected_state, first_output, make_adapters, merged
from support.models import make_adapter

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.fit_options import FitOptions
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.models.base_model import open_base
from wlora_merge.training.initial_logits import find_start, like_start


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_exports_of_mixed_adapters_are_the_sum_of_pefts_merges(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    case, base = CASES[name], tmp_path / "base"
    model = case.make()
    model.save_pretrained(base, max_shard_size="20KB" if case.dtype is BF16 else "5GB")
    adapters = make_adapters(case, model.float(), tmp_path)
    expected = expected_state(case, base, adapters)
    mixture = mix(base, adapters, weights=WEIGHTS)

    export(mixture, "dense", tmp_path / "dense")
    got = case.load(tmp_path / "dense", case.dtype).state_dict()
    start = case.load(base, case.dtype).state_dict()
    assert set(got) == set(expected)
    assert all(torch.equal(got[k], expected[k].to(case.dtype)) for k in got)
    assert sum(not torch.equal(got[k], start[k]) for k in got) >= 4

    export(mixture, "lora", tmp_path / "lora")
    single = merged(case, base, tmp_path / "lora")
    for k, tensor in single.items():
        torch.testing.assert_close(tensor, expected[k], rtol=1e-6, atol=1e-6)
    dense, plain = (case.load(folder, torch.float32) for folder in (tmp_path / "dense", base))
    dense.load_state_dict({k: v.float() for k, v in expected.items()})
    outputs = first_output(PeftModel.from_pretrained(plain, tmp_path / "lora").eval(), case)
    torch.testing.assert_close(outputs, first_output(dense, case), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs, first_output(case.load(base, torch.float32), case), rtol=1e-2)


# ------------------------------------------------------------------------------------------------------------- a fit


@pytest.mark.filterwarnings("ignore")
def test_fused_experts_are_refused_by_name_in_a_fit(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    model = case.make().float()
    folder = make_adapter(
        model, tmp_path / "a", 0, r=2, target_parameters=["experts.down_proj"], target_modules=["q_proj"]
    )
    with pytest.raises(UnsupportedError, match=r"adapter 'a' .*target_parameters.*does not train through yet"):
        attach(model, [folder, ("b", folder)])
    model.save_pretrained(tmp_path / "base")
    export(
        mix(tmp_path / "base", [folder, ("b", folder)]), "lora", tmp_path / "old"
    )  # an adapter on each expert's linears
    with pytest.raises(UnsupportedError, match=r"block_sparse_moe.experts.0.w\d.*a fit does not train through"):
        attach(model, [tmp_path / "old", ("b", tmp_path / "old")])


@pytest.mark.filterwarnings("ignore")
def test_adapters_with_the_names_of_before_a_renaming_are_attached(tmp_path: Path) -> None:
    case = CASES["vit"]
    model = case.make()
    folder = make_adapter(model, tmp_path / "new", 0, r=2, target_modules=["q_proj", "fc1"])
    tensors = load_file(folder / "adapter_model.safetensors")
    renames = {
        "vit.layers.": "vit.encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "mlp.fc1": "intermediate.dense",
    }
    old = {functools.reduce(lambda k, pair: k.replace(*pair), renames.items(), key): t for key, t in tensors.items()}
    assert not set(old) & set(tensors)
    shutil.copytree(folder, tmp_path / "old")
    save_file(old, tmp_path / "old" / "adapter_model.safetensors")
    outputs = []
    for name in ("new", "old"):
        attached = attach(copy.deepcopy(model), [tmp_path / name, ("other", tmp_path / name)])
        outputs.append(first_output(attached, case))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], first_output(model, case))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_a_fit_starts_from_a_mixture_whose_files_call_the_modules_otherwise(granularity: str, tmp_path: Path) -> None:
    case = CASES["vit"]
    model = case.make()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 0, r=2, target_modules=["q_proj", "fc1"])
    attach(model, [folder, ("b", folder)], granularity=granularity)
    with torch.no_grad():
        model.wlora_weights.normal_()
    mixture = Mixture.from_model(model, tmp_path / "base")
    mixture.save(tmp_path / "m")
    assert not set(mixture.groups) & set(model.wlora.groups)
    options = like_start(FitOptions(initial_logits=str(tmp_path / "m")))
    start = find_start(options, ["a", "b"], open_base(tmp_path / "base"))
    found = start.logits(model.wlora.groups, granularity).softmax(-1)
    assert torch.allclose(found, model.wlora_weights.softmax(-1), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_spell_the_model_prefix_differently_give_one_lora(tmp_path: Path) -> None:
    case, base = CASES["bert"], tmp_path / "base"
    model = case.make()
    model.save_pretrained(base)
    adapters = [make_adapter(model, tmp_path / "whole", 1, r=2, target_modules=["query"])]
    adapters.append(make_adapter(model.bert, tmp_path / "body", 2, r=2, target_modules=["key"]))
    names = {k for folder in adapters for k in load_file(folder / "adapter_model.safetensors")}
    assert {k.split(".")[2] for k in names} == {"bert", "encoder"}
    mixture = mix(base, adapters)
    export(mixture, "dense", tmp_path / "dense")
    export(mixture, "lora", tmp_path / "lora")
    expected = case.load(tmp_path / "dense", torch.float64).state_dict()
    for k, tensor in merged(case, base, tmp_path / "lora").items():
        torch.testing.assert_close(tensor, expected[k], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "task"), [("whisper", None), ("bert", None), ("vit", "image-classification"), ("llava", "causal-lm")]
)
def test_exports_are_verified_as_the_class_that_they_are(name: str, task: str | None, tmp_path: Path) -> None:
    case, base = CASES[name], tmp_path / "base"
    model = case.make()
    model.save_pretrained(base)
    adapters = make_adapters(case, model.float(), tmp_path)
    for kind in ("dense", "lora"):
        export(mix(base, adapters, task=task), kind, tmp_path / kind)
        done = verify(tmp_path / kind, base=base, adapters=[f"{a.name}={a}" for a in adapters]).done
        assert any(item.startswith("outputs equal the unmerged mixture's") for item in done) is (name != "llava"), (
            done
        )  # no probe for its kind
