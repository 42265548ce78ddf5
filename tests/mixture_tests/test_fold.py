"""The fold against PEFT's own deltas, and the dense export against PEFT's merge and a float64 sum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.models import EVERY_LINEAR, make_adapter, tiny_llama
from transformers import AutoModelForCausalLM

from wlora_merge.errors import WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.mixture.fold import fold_factors, low_rank_svd, pad_rank, truncate
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix

WEIGHTS = [0.5, -0.25, 1.5]


def peft_deltas(base: Path, folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Tensor name -> PEFT's delta weight, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, folder).to(dtype)
    found = {}
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[f"{name}.weight"] = module.get_delta_weight("default").detach()
    return found


def reference(base: Path, folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """The float64 sum of the base and PEFT's deltas."""
    sums = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in peft_deltas(base, folder).items():
            sums[name] = sums[name] + weight * delta
    return sums


def test_fold_equals_sum_of_peft_deltas(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    inputs = find_inputs(mix(base, folders, weights=WEIGHTS))
    expected: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, WEIGHTS, strict=True):
        for name, delta in peft_deltas(base, folder).items():
            expected[name] = expected.get(name, 0) + weight * delta
    assert {f"{d.module}.weight" for d in inputs.deltas} == set(expected)
    for delta in inputs.deltas:
        left, right = fold_factors(delta, inputs.mixture.gains_of(delta))
        assert torch.allclose(left @ right, expected[f"{delta.module}.weight"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dense_export_is_the_float64_sum_rounded_once(
    llama_zoo: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    base, folders = llama_zoo(dtype)
    export(mix(base, folders, weights=WEIGHTS), "dense", tmp_path / "out")
    expected = reference(base, folders, WEIGHTS)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_float32_export_of_one_adapter_equals_merge_and_unload_within_one_ulp(tmp_path: Path) -> None:
    """In units of the last place of the sum of the terms' magnitudes. Where terms cancel, the result's own last place is
    finer than what float32 addition, which PEFT uses, can promise; ours is the exact sum rounded once (the test above)."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 1, scale=0.01, r=4, lora_alpha=6, target_modules=EVERY_LINEAR)
    export(mix(tmp_path / "base", [folder], weights=[1.0]), "dense", tmp_path / "out")
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    start, file = load_file(tmp_path / "base" / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    exact = 0
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        ours, theirs, size = tensor.numpy(), merged[name].numpy(), start[name].abs()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in file:
            size = size + 1.5 * file[f"{key}.lora_B.weight"].abs() @ file[f"{key}.lora_A.weight"].abs()
        assert float((np.abs(ours - theirs) / np.spacing(size.numpy())).max()) <= 1, name
        exact += int((np.abs(ours - theirs) <= np.spacing(np.abs(theirs))).sum())
    assert exact >= 0.997 * sum(t.numel() for t in merged.values())


def test_uniform_composition_counts_an_absent_adapter_as_zero(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    inputs = find_inputs(mix(base, folders))
    for delta in inputs.deltas:
        assert torch.allclose(inputs.mixture.weights_of(delta), torch.full((3,), 1 / 3).double())


def test_normalize_present_shares_the_weight_among_the_adapters_of_a_module(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    inputs = find_inputs(mix(base, folders, normalize="present"))
    by_name = {d.module: inputs.mixture.weights_of(d).tolist() for d in inputs.deltas}
    assert by_name["model.layers.0.mlp.up_proj"] == pytest.approx([0, 1, 0])
    assert by_name["model.layers.0.self_attn.v_proj"] == pytest.approx([0.5, 0.5, 0])


def test_low_rank_svd_is_the_dense_svd() -> None:
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(7, 40).double(), torch.randn(30, 7).double()
    u, s, vt = low_rank_svd(lora_A, lora_B)
    expected = np.linalg.svd((lora_B @ lora_A).numpy(), compute_uv=False)[:7]
    assert np.allclose(s.numpy(), expected, rtol=1e-12)
    assert torch.allclose(u @ torch.diag(s) @ vt, lora_B @ lora_A)
    A, B = truncate(u, s, vt, 3)
    best = np.sqrt((expected[3:] ** 2).sum())
    assert float(torch.linalg.norm((B @ A).double() - lora_B @ lora_A)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95, 1.0])
def test_a_lora_has_the_smallest_rank_that_keeps_the_share_of_the_energy_over_all_modules(
    llama_zoo: Callable[..., Any], tmp_path: Path, energy: float
) -> None:
    base, folders = llama_zoo()
    deltas: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, WEIGHTS, strict=True):
        for name, delta in peft_deltas(base, folder).items():
            deltas[name] = deltas.get(name, 0) + weight * delta
    squares = np.zeros(32)
    for delta in deltas.values():
        found = np.linalg.svd(delta.numpy(), compute_uv=False) ** 2
        squares[: len(found)] += found
    kept = np.cumsum(squares) / squares.sum()
    done = export(mix(base, folders, weights=WEIGHTS), "lora", tmp_path / "out", energy=energy)
    r = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]
    assert r == int(np.flatnonzero(kept >= energy - 1e-9)[0]) + 1
    assert done.report["energy_kept"] == pytest.approx(kept[r - 1], rel=1e-6)


def test_svd_of_a_stack_wider_than_the_matrix_has_the_matrix_rank() -> None:
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(20, 8).double(), torch.randn(6, 20).double()
    u, s, vt = low_rank_svd(lora_A, lora_B)
    assert s.shape == (6,)
    assert torch.allclose(u @ torch.diag(s) @ vt, lora_B @ lora_A)


def test_padding_does_not_change_the_product() -> None:
    lora_A, lora_B = torch.randn(3, 5), torch.randn(4, 3)
    A, B = pad_rank(lora_A, lora_B, 8)
    assert A.shape == (8, 5)
    assert B.shape == (4, 8)
    assert torch.allclose(B @ A, lora_B @ lora_A, atol=1e-6)


@pytest.mark.parametrize(
    "how", [{}, {"method": "dare_linear", "density": 0.5}, {"method": "magnitude_prune", "density": 0.5}], ids=str
)
def test_an_adapter_of_weight_zero_costs_nothing_and_leaves_the_bytes_of_the_others(
    llama_zoo: Callable[..., Any], tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wlora_merge.adapters import factors

    base, folders = llama_zoo()
    mix(base, [folders[0], folders[2]], tmp_path / "two", weights=[0.75, -0.5], task="causal-lm", **how)
    mix(base, folders, tmp_path / "three", weights=[0.75, 0, -0.5], task="causal-lm", **how)
    export(tmp_path / "two", "dense", tmp_path / "d2")
    read, read_tensor = set[str](), factors.read_tensor

    def noted(entry: Any) -> torch.Tensor:
        read.add(entry.file.parent.name)
        return read_tensor(entry)

    monkeypatch.setattr(factors, "read_tensor", noted)
    export(tmp_path / "three", "dense", tmp_path / "d3")
    assert read == {"a0", "a2"}
    assert (tmp_path / "d2" / "model.safetensors").read_bytes() == (tmp_path / "d3" / "model.safetensors").read_bytes()
    mix(base, folders, tmp_path / "none", weights=[0, 0, 0], task="causal-lm", **how)
    export(tmp_path / "none", "dense", tmp_path / "d0")
    assert (tmp_path / "d0" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_of_many_adapters_the_dtype_of_a_stack_is_asked_for_once(
    llama_zoo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wlora_merge.adapters.factors import Factors

    base, folders = llama_zoo()
    names = [(f"{folder.name}.{i}", folder) for i in range(8) for folder in folders]
    with pytest.warns(WloraMergeWarning, match="are the same"):
        mixture = mix(base, names)
    asked, dtype = [0], Factors.dtype.fget  # type: ignore[attr-defined]

    def counted(factors: Factors) -> torch.dtype:
        asked[0] += 1
        return dtype(factors)  # type: ignore[no-any-return]

    monkeypatch.setattr(Factors, "dtype", property(counted))
    inputs = find_inputs(mixture)
    for delta in inputs.deltas:
        mixture.fold_of(delta)  # type: ignore[arg-type]
    assert asked[0] == sum(len(delta.factors) for delta in inputs.deltas)  # type: ignore[union-attr]


def test_a_dora_of_weight_zero_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folders = [
        make_adapter(model, tmp_path / name, i, r=2, target_modules=["q_proj", "v_proj"], use_dora=bool(i))
        for i, name in enumerate("ab")
    ]
    for name, weights, given in (("two", [1, 0], folders), ("one", [1], folders[:1])):
        export(mix(tmp_path / "base", given, weights=weights, task="causal-lm"), "dense", tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
