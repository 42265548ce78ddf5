"""TIES, DARE and pruning on delta weights: PEFT's own functions on the dense matrices are the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.combinations import METHODS, by_peft
from support.models import EVERY_LINEAR, make_adapter, tiny_llama

from wlora_merge.adapters.deltas import ModuleDelta
from wlora_merge.errors import MixtureError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture import combination
from wlora_merge.mixture.combination import CombinedFold
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture

WEIGHTS = [0.75, -0.25, 1.125]  # which float32 holds


def same_but_for_rounding(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=2**-23, atol=1e-9), name


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("how", METHODS, ids=str)
def test_an_export_is_what_pefts_function_makes_of_the_dense_delta_weights(
    llama_zoo: Callable[..., Any], tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", weights=WEIGHTS, task="causal-lm", **how)
    export(tmp_path / "m", "dense", tmp_path / "d")
    same_but_for_rounding(
        load_file(tmp_path / "d" / "model.safetensors"), by_peft(tiny_llama(), folders, WEIGHTS, monkeypatch, **how)
    )
    checked = verify(tmp_path / "d", base=base, adapters=[f"{f.name}={f}" for f in folders])
    assert not checked.skipped
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-5


def test_without_weights_what_agrees_is_averaged_and_sums_are_uniform(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    for method, weight in (("ties", 1), ("dare_ties", 1), ("dare_linear", 1 / 3), ("magnitude_prune", 1 / 3)):
        made = mix(base, folders, method=method, density=0.5)
        assert torch.equal(made.mixture_weights, torch.full((1, 3), weight)), method


@pytest.mark.parametrize("elements", [1, 64, 1000, 1 << 20])
@pytest.mark.parametrize("how", [METHODS[0], METHODS[5]], ids=str)
def test_the_numbers_do_not_depend_on_which_rows_are_asked_for(
    llama_zoo: Callable[..., Any], how: dict[str, Any], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = llama_zoo()
    found = find_inputs(mix(base, folders, **how))
    delta = next(d for d in found.deltas if isinstance(d, ModuleDelta) and len(d.factors) == 3)
    whole = found.mixture.fold_of(delta)
    assert isinstance(whole, CombinedFold)
    dense = whole.dense()
    monkeypatch.setattr(combination, "BLOCK_ELEMENTS", elements)
    fold = found.mixture.fold_of(delta)
    weight = torch.randn(dense.shape)
    for rows in (slice(0, 5), slice(5, 32), [0, 1, 7, 8, 30]):
        total = fold.rows(weight[rows], rows, torch.empty_like(weight[rows], dtype=torch.float64))
        assert torch.allclose(total, weight[rows].double() + dense[rows], rtol=1e-12, atol=1e-14)


def test_of_equal_magnitudes_the_first_of_the_matrix_are_kept_and_no_more(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 0, r=1, lora_alpha=1, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({key: torch.ones_like(tensor) for key, tensor in load_file(file).items()}, file)
    found = find_inputs(mix(tmp_path / "base", [folder], weights=[1], method="magnitude_prune", density=0.3))
    for delta in found.deltas:
        fold = found.mixture.fold_of(delta)
        assert isinstance(fold, CombinedFold)
        kept = fold.dense().flatten()
        assert kept.sum() == int(0.3 * kept.numel())
        assert kept[: int(0.3 * kept.numel())].all()


def test_what_is_dropped_depends_on_seed_adapter_and_tensor_alone(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()

    def dense(names: list[int], seed: int) -> dict[str, torch.Tensor]:
        weights = [float(n == names.index(0)) for n in range(len(names))]
        how = {"method": "dare_linear", "density": 0.5, "seed": seed}
        found = find_inputs(mix(base, [folders[n] for n in names], weights=weights, **how))
        return {
            d.module: found.mixture.fold_of(d).dense() for d in found.deltas if 0 in d.adapter_index.tolist() or True
        }  # type: ignore[union-attr]

    one, other, seeded = dense([0], 1), dense([2, 0, 1], 1), dense([0], 2)
    for module, matrix in one.items():
        assert torch.allclose(matrix, other[module], rtol=1e-12, atol=0)
        assert not torch.equal(matrix, seeded[module])
        assert 0.35 < float((matrix != 0).double().mean()) < 0.65
    masks = [matrix != 0 for matrix in one.values() if matrix.shape == (32, 32)]
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("how", [METHODS[0], METHODS[5]], ids=str)
def test_a_lora_of_a_rank_is_the_nearest_and_its_error_is_told(
    llama_zoo: Callable[..., Any], tmp_path: Path, how: dict[str, Any]
) -> None:
    base, folders = llama_zoo()
    made = mix(base, folders, tmp_path / "m", task="causal-lm", **how)
    for options in ({}, {"energy": 0.9}):
        with pytest.raises(UnsupportedError, match="no products of two factors, so no LoRA has them: say --rank K"):
            export(tmp_path / "m", "lora", tmp_path / "l", **options)
    assert not (tmp_path / "l").exists()
    found = find_inputs(made)
    done = export(tmp_path / "m", "lora", tmp_path / "l", rank=6)
    singular = {d.label: torch.linalg.svdvals(made.fold_of(d).dense()) for d in found.deltas}  # type: ignore[arg-type, union-attr]
    for module, row in done.report["modules"].items():
        s = singular[module]
        assert row["relative_error"] == pytest.approx(float(s[6:].norm() / s.norm()), rel=1e-6)
    checked = verify(tmp_path / "l", base=base, adapters=[f"{f.name}={f}" for f in folders])
    assert not checked.skipped
    export(tmp_path / "m", "lora", tmp_path / "whole", rank=32)
    assert verify(tmp_path / "whole", base=base, adapters=[f"{f.name}={f}" for f in folders]).largest_difference < 1e-5  # type: ignore[operator]


def test_a_file_keeps_how_and_the_same_mix_gives_the_same_bytes(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    for name in "ab":
        mix(base, folders, tmp_path / name, task="causal-lm", method="dare_ties", density=0.25, seed=7)
        export(tmp_path / name, "dense", tmp_path / f"d{name}", report=False)
    assert Mixture.load(tmp_path / "a").combination == combination.Combination("dare_ties", 0.25, "total", 7)
    table = json.loads((tmp_path / "a" / "mixture.json").read_text())
    assert table["combination"] == {"method": "dare_ties", "density": 0.25, "majority_sign": "total", "seed": 7}
    one, other = ((tmp_path / f"d{name}" / "model.safetensors").read_bytes() for name in "ab")
    assert one == other
    card = (tmp_path / "da" / "README.md").read_text()
    assert "combined by method dare_ties, density 0.25, majority_sign total, seed 7, [Yu et al. 2023]" in card
    assert "--weights 1,1,1 --method dare_ties --density 0.25 --majority-sign total --seed 7" in card
    mix(base, folders, tmp_path / "linear", weights=[1, 2, 3])
    assert "combination" not in json.loads((tmp_path / "linear" / "mixture.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0}, "combination.density is 0.*above 0 and at most 1"),
        ({"density": 1.5}, "combination.density is 1.5"),
        ({"method": "linear"}, "combination.method is 'linear', expected one of ties"),
        ({"majority_sign": "most"}, "combination.majority_sign is 'most'"),
        ({"seed": -1}, "combination.seed is -1"),
    ],
)
def test_a_combination_of_a_file_is_checked(
    llama_zoo: Callable[..., Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", method="dare_ties", density=0.25)
    table = json.loads((tmp_path / "m" / "mixture.json").read_text())
    table["combination"] |= change
    (tmp_path / "m" / "mixture.json").write_text(json.dumps(table))
    with pytest.raises(MixtureError, match=message):
        Mixture.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "method is 'tie', expected one of linear, ties.*did you mean 'ties'"),
        ({"method": "ties"}, "method ties prunes the delta weights: say --density"),
        ({"method": "ties", "density": 0}, "density is 0, expected a number above 0"),
        ({"method": "ties", "density": 1.1}, "density is 1.1, expected a share above 0 and at most 1"),
        ({"density": 0.5}, "density is of a method that prunes"),
        ({"majority_sign": "total"}, "majority_sign is of ties and dare_ties"),
        ({"method": "dare_linear", "density": 0.5, "majority_sign": "total"}, "majority_sign is of ties and dare_ties"),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign is 'most'"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "seed is of dare_linear and dare_ties"),
        ({"method": "ties", "density": 0.5, "normalize": "present"}, "normalize is of uniform composition"),
        ({"method": "dare_ties", "density": 0.5, "seed": -1}, "seed is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    llama_zoo: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    base, folders = llama_zoo()
    with pytest.raises(MixtureError, match=message):
        mix(base, folders, **options)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"use_dora": True}, {}, "is a DoRA, which scales the base's rows, which ties does not combine"),
        ({"trainable_token_indices": [1, 2]}, {}, "trains rows of an embedding"),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": "mix"}, "adapters change it as a whole"),
    ],
)
def test_what_is_no_product_of_two_factors_is_refused_by_name_or_left_out(
    llama_zoo: Callable[..., Any], tmp_path: Path, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    from wlora_merge import mixable
    from wlora_merge.errors import WloraMergeWarning

    base, folders = llama_zoo()
    config = {"r": 2, "target_modules": ["q_proj"]} | config
    other = make_adapter(tiny_llama(), tmp_path / "other", 1, **config)
    tensors = load_file(other / "adapter_model.safetensors")
    moved = {k: v + ("lm_head" in k or "trainable_tokens" in k) for k, v in tensors.items()}
    save_file(moved, other / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=message):
        mix(base, [*folders, other], method="ties", density=0.5, **options)
    mix(base, [*folders, other], **options)
    with pytest.warns(WloraMergeWarning, match="'other' is left out"):
        assert len(mixable(base, [*folders, other], method="ties", **options)) == 3


def test_biases_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    model.save_pretrained(tmp_path / "base")
    folders = [
        make_adapter(model, tmp_path / n, i, r=2, target_modules=["q_proj"], bias="all") for i, n in enumerate("ab")
    ]
    with pytest.raises(UnsupportedError, match=r"adapter 'a' .*: it trains biases, which dare_linear does not combine"):
        mix(tmp_path / "base", folders, method="dare_linear", density=0.5)


def test_a_folded_file_that_changed_is_found(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    from wlora_merge.errors import VerifyError

    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", method="ties", density=0.2, task="causal-lm")
    export(tmp_path / "m", "dense", tmp_path / "d")
    mix(base, folders, tmp_path / "n", method="ties", density=0.3, task="causal-lm")
    export(tmp_path / "n", "dense", tmp_path / "e")
    shutil.copy(tmp_path / "e" / "model.safetensors", tmp_path / "d" / "model.safetensors")
    manifest, other = (json.loads((tmp_path / f / "wlora_merge.json").read_text()) for f in "de")
    manifest["files"]["model.safetensors"] = other["files"]["model.safetensors"]
    (tmp_path / "d" / "wlora_merge.json").write_text(json.dumps(manifest))
    with pytest.raises(VerifyError, match="is not the mixture's in"):
        verify(tmp_path / "d", base=base, adapters=[f"{f.name}={f}" for f in folders])


@pytest.mark.parametrize("kind", ["gpt2", "embedding", "bf16"])
def test_every_layout_and_dtype_is_combined_as_pefts_matrices_are(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"method": "ties", "density": 0.3}
    targets = {"gpt2": ["c_attn", "c_fc"], "embedding": ["embed_tokens", "v_proj"], "bf16": EVERY_LINEAR}[kind]
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    else:
        model = tiny_llama(torch.bfloat16 if kind == "bf16" else torch.float32)
    model.save_pretrained(tmp_path / "base")
    plain = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    folders = [
        make_adapter(model.float(), tmp_path / name, i, r=2, target_modules=targets, **plain)
        for i, name in enumerate("abc")
    ]
    if kind == "bf16":
        model = tiny_llama(torch.bfloat16)
    mix(tmp_path / "base", folders, tmp_path / "m", task="causal-lm", weights=[1, 1, 1], **how)
    export(tmp_path / "m", "dense", tmp_path / "d")
    got = load_file(tmp_path / "d" / "model.safetensors")
    expected = by_peft(model, folders, [1, 1, 1], monkeypatch, **how)
    if kind == "bf16":
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name].float().bfloat16()), name
    else:
        names = {name: name.removeprefix("transformer.") if name not in got else name for name in expected}
        same_but_for_rounding(got, {names[n]: t for n, t in expected.items() if names[n] in got})
    checked = verify(tmp_path / "d", base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders])
    assert not checked.skipped


def test_the_bytes_do_not_depend_on_threads_and_files(
    llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    base, folders = llama_zoo(torch.bfloat16)
    mix(base, folders, tmp_path / "m", method="dare_ties", density=0.4, task="causal-lm")
    found = []
    for workers, size in ((1, None), (8, 8_000)):
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        export(tmp_path / "m", "dense", tmp_path / str(workers), max_shard_bytes=size)
        files = sorted((tmp_path / str(workers)).glob("*.safetensors"))
        found.append({name: t for file in files for name, t in load_file(file).items()})
    assert len(files) > 3
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(t.view(torch.int16), found[1][name].view(torch.int16)) for name, t in found[0].items())


def test_a_fit_does_not_start_from_what_no_fit_trains(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    from wlora_merge.fit_options import FitOptions
    from wlora_merge.training.initial_logits import like_start

    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", method="ties", density=0.4)
    with pytest.raises(MixtureError, match="combined by ties, which no fit trains"):
        like_start(FitOptions(initial_logits=str(tmp_path / "m")))
