"""Fused expert weights: PEFT's `target_parameters`, and adapters on each expert's linears, against PEFT's merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import GATED, LM, TEXT, WEIGHTS, Case, expected_state, merged
from support.experts import CASES, EXPERTS, LOCAL, make
from support.models import make_adapter

from wlora_merge.adapters.adapter import load_adapter
from wlora_merge.errors import AdapterError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.report_data import changes, spectra
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix
from wlora_merge.models.base_model import open_base


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_trained_expert_weights_fold_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapters = make(
        case,
        tmp_path,
        {"r": 2, "lora_alpha": 5, "target_modules": [case.targets[0]], "target_parameters": EXPERTS},
        {"r": 3, "target_modules": list(case.targets), "target_parameters": EXPERTS[1:], "use_rslora": True},
        {
            "r": 4, "lora_alpha": 3, "target_modules": [], "target_parameters": EXPERTS,
            "rank_pattern": {"experts.gate_up_proj": 1}, "alpha_pattern": {"experts.down_proj": 2},
        },
    )  # fmt: skip
    expected = expected_state(case, base, adapters)
    mixture = mix(base, adapters, weights=(0.625, 0.5, -0.25))
    export(mixture, "dense", tmp_path / "dense")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "dense"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    got = case.load(tmp_path / "dense", case.dtype).state_dict()
    start = case.load(base, case.dtype).state_dict()
    assert all(torch.equal(got[k], expected[k].to(case.dtype)) for k in expected)
    assert sum("experts" in k and not torch.equal(got[k], start[k]) for k in got) >= 2


def in_old_spelling(folder: Path, out: Path, gate: bool = True) -> Path:
    """An adapter on every expert's linears of a Mixtral, as PEFT wrote it on transformers 4."""
    out.mkdir()
    torch.manual_seed(5)
    tensors = {}
    for layer in range(2):
        at = f"base_model.model.model.layers.{layer}"
        shapes = {f"self_attn.{x}_proj": (16, 16) if x == "q" else (8, 16) for x in "qv"}
        shapes |= {
            f"block_sparse_moe.experts.{e}.{w}": (16, 24) if w == "w2" else (24, 16)
            for e in range(4)
            for w in ("w1", "w2", "w3")
        }
        for name, (rows, cols) in shapes.items():
            tensors[f"{at}.{name}.lora_A.weight"] = torch.randn(2, cols) * 0.3
            tensors[f"{at}.{name}.lora_B.weight"] = torch.randn(rows, 2) * 0.3
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "w1", "w2", "w3"]}
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    return out


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_each_experts_linears_folds_beside_one_on_the_fused_weight(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    base, (fused,) = make(case, tmp_path, {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS})
    adapters = [in_old_spelling(base, tmp_path / "old"), fused]
    expected = expected_state(case, base, adapters)
    mixture = mix(base, adapters, weights=(0.625, 0.5))
    export(mixture, "dense", tmp_path / "dense")
    got = case.load(tmp_path / "dense", case.dtype).state_dict()
    assert all(torch.equal(got[k], expected[k].to(case.dtype)) for k in expected)
    export(mixture, "lora", tmp_path / "lora")
    for k, tensor in merged(case, base, tmp_path / "lora").items():
        torch.testing.assert_close(tensor, expected[k], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_every_expert_is_a_module_of_its_own_with_its_own_factors(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    base, adapters = make(case, tmp_path, {"r": 2, "target_modules": [], "target_parameters": EXPERTS[:1]})
    deltas = find_inputs(mix(base, adapters)).deltas
    names = [
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}" for i in (0, 1) for e in range(4) for w in ("w1", "w3")
    ]
    assert [d.module for d in deltas] == names
    stored = load_adapter(adapters[0]).modules["model.layers.0.mlp.experts"]
    lora_A, lora_B = stored.lora_A.reshape(4, 2, 16), stored.lora_B.reshape(48, 2, 4)
    third = deltas[names.index("model.layers.0.block_sparse_moe.experts.2.w3")]
    assert torch.equal(third.lora_A, lora_A[2])
    assert torch.equal(third.lora_B, lora_B[24:, :, 2])


@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_tensor_that_holds_every_expert_are_no_plain_lora(tmp_path: Path) -> None:
    base, adapters = make(
        CASES["gpt_oss"], tmp_path, {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    )
    with pytest.raises(UnsupportedError, match=r"experts\.\w+_proj'.*a plain LoRA cannot express.*--format dense"):
        export(mix(base, adapters), "lora", tmp_path / "lora")


@pytest.mark.filterwarnings("ignore")
def test_target_parameters_that_do_not_explain_the_file_are_refused(tmp_path: Path) -> None:
    base, (folder,) = make(CASES["mixtral"], tmp_path, {"r": 2, "target_modules": [], "target_parameters": EXPERTS})
    config = json.loads((folder / "adapter_config.json").read_text())
    for targets, what in (
        (EXPERTS[:1], "has 2 pairs of factors, and the config's target_parameters name 1"),
        ([*EXPERTS, "of_another"], None),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": targets}))
        if what is None:
            assert mix(base, [folder]).groups
            continue
        with pytest.raises(AdapterError, match=what):
            mix(base, [folder])
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(AdapterError, match="has rank 2 in the file, and 3 by the config"):
        mix(base, [folder])


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    base, _ = make(CASES["mixtral"], tmp_path)
    wider = Case(LM, "MixtralConfig", TEXT | GATED | LOCAL | {"num_local_experts": 6}, ("q_proj", "v_proj"))
    (tmp_path / "wider").mkdir()
    _, (other,) = make(wider, tmp_path / "wider", {"r": 2, "target_modules": [], "target_parameters": EXPERTS})
    with pytest.raises(
        AdapterError, match=r"adapter 'a0' .*experts\.\w+_proj' has rank 3 in the file, and 2 by the config"
    ):
        mix(base, [other])


@pytest.mark.filterwarnings("ignore")
def test_a_slice_of_factors_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    base, (folder,) = make(CASES["mixtral"], tmp_path, {"r": 2, "target_modules": [], "target_parameters": EXPERTS})
    file = folder / "adapter_model.safetensors"
    first = find_inputs(mix(base, [folder])).deltas[0].lora_A
    save_file({k: 2 * t for k, t in load_file(file).items()}, file)
    assert torch.equal(find_inputs(mix(base, [folder])).deltas[0].lora_A, 2 * first)
    assert open_base(base).tree is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_measured_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    base, adapters = make(CASES[name], tmp_path, {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS})
    inputs = find_inputs(mix(base, adapters))
    export(inputs.mixture, "dense", tmp_path / "dense")
    found = changes(inputs.base, inputs.deltas, inputs.mixture, tmp_path / "dense")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "dense"))
    assert {c.tensor for c in found} == {k for k in before if not torch.equal(before[k], after[k])}
    assert len({c.tensor for c in found}) == len(found)
    values = spectra(inputs.deltas, inputs.mixture)
    assert len(values) == len(inputs.deltas)


def olmoe(folder: Path, intermediate: int) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = OlmoeForCausalLM(OlmoeConfig(intermediate_size=intermediate, **sizes, **heads))  # type: ignore[arg-type]
    model.save_pretrained(folder)
    return model


def old_adapter(folder: Path, intermediate: int, version: str | None) -> tuple[Path, torch.Tensor]:
    """An adapter of the fused gate_up_proj as PEFT 0.18 writes it, and its delta weight by PEFT 0.18.1's own formula."""
    torch.manual_seed(1)
    lora_A, lora_B = torch.randn(4 * 2, 2 * intermediate) * 0.1, torch.randn(32, 4 * 2) * 0.1
    folder.mkdir()
    key = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{key}.lora_A.weight": lora_A, f"{key}.lora_B.weight": lora_B}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [], "peft_version": version}
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder, 2 * torch.einsum("ore,eri->eio", lora_B.reshape(32, 2, 4), lora_A.reshape(4, 2, -1))


def gate_up(folder: Path) -> torch.Tensor:
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: torch.Tensor = model.model.layers[0].mlp.experts.gate_up_proj.detach()
    return found


@pytest.mark.parametrize(
    ("intermediate", "version"),
    [(16, "0.18.1"), (16, "0.17.0"), (24, "0.18.0"), (24, None), (24, "0.18.2.dev0@0123abc")],
)
def test_expert_factors_of_an_older_peft_fold_as_that_version_computes_them(
    intermediate: int, version: str | None, tmp_path: Path
) -> None:
    model = olmoe(tmp_path / "base", intermediate)
    folder, delta = old_adapter(tmp_path / "old", intermediate, version)
    export(mix(tmp_path / "base", [folder], weights=[1.0]), "dense", tmp_path / "out")
    before = gate_up(tmp_path / "base")
    assert torch.allclose(gate_up(tmp_path / "out") - before, delta, atol=1e-6)
    new = make_adapter(
        model, tmp_path / "new", 1, r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
    )
    export(mix(tmp_path / "base", [new], weights=[1.0]), "dense", tmp_path / "one")
    export(mix(tmp_path / "base", [folder, new], weights=[1.0, 0.5]), "dense", tmp_path / "both")
    expected = delta + 0.5 * (gate_up(tmp_path / "one") - before)
    assert torch.allclose(gate_up(tmp_path / "both") - before, expected, atol=1e-6)


@pytest.mark.parametrize("version", [None, "0.18.2.dev0@0123abc"])
def test_square_expert_factors_of_an_unknown_peft_are_refused(version: str | None, tmp_path: Path) -> None:
    olmoe(tmp_path / "base", 16)
    folder, _ = old_adapter(tmp_path / "old", 16, version)
    with pytest.raises(UnsupportedError, match=r"gate_up_proj' \[4, 32, 32\] is square.*set its peft_version"):
        mix(tmp_path / "base", [folder])


def test_expert_factors_that_their_version_would_not_write_are_refused(tmp_path: Path) -> None:
    olmoe(tmp_path / "base", 24)
    folder, _ = old_adapter(tmp_path / "old", 24, "0.21.2")
    with pytest.raises(AdapterError, match=r"expected \[8, 32\] and \[48, 8\] of PEFT '0.21.2'"):
        mix(tmp_path / "base", [folder])


@pytest.mark.filterwarnings("ignore")
def test_the_weight_of_a_module_that_holds_all_experts_folds_as_peft_merges_it(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import JetMoeConfig, JetMoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "vocab_size": 40,
    }
    model = JetMoeForCausalLM(JetMoeConfig(**sizes, kv_channels=8, num_local_experts=4, num_experts_per_tok=2))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "base")
    targets = ["input_linear.weight", "mlp.output_linear.weight"]
    patterns = {"rank_pattern": {"mlp.input_linear.weight": 3}, "alpha_pattern": {"output_linear.weight": 7}}
    folder = make_adapter(
        model, tmp_path / "a", 1, r=2, target_modules=["router.layer"], target_parameters=targets, **patterns
    )
    double = JetMoeForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    expected = PeftModel.from_pretrained(double, folder).merge_and_unload().state_dict()
    export(mix(tmp_path / "base", [folder], weights=[1.0]), "dense", tmp_path / "out")
    got = JetMoeForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    before = model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=1e-6, atol=1e-6)
    assert sum(not torch.equal(got[name], before[name]) for name in got) == 5
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if "mlp.output_linear.lora_B" in key)
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"output_linear'.* do not fit '.*output_linear\.weight' \[4, 16, 24\]"):
        mix(tmp_path / "base", [folder])


@pytest.mark.filterwarnings("ignore")
def test_experts_under_the_names_that_an_earlier_transformers_gave_them_fold_the_same(tmp_path: Path) -> None:
    case = CASES["granitemoe"]
    base, (folder,) = make(case, tmp_path, {"r": 2, "target_modules": [], "target_parameters": EXPERTS})
    expected = expected_state(case, base, [folder])
    old = tmp_path / "old"
    old.mkdir()
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        is_down = 24 in tensor.shape  # of lora_A the columns; lora_B has 16 or 48 rows
        is_down |= "lora_B" in key and tensor.shape[0] == 16
        linear = ".output_linear." if is_down else ".input_linear."
        tensors[key.replace(".experts.base_layer.", linear).replace(".experts.", linear)] = tensor
    save_file(tensors, old / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_parameters"] = ["input_linear.weight", "output_linear.weight"]
    (old / "adapter_config.json").write_text(json.dumps(config))
    export(mix(base, [old], weights=WEIGHTS[:1]), "dense", tmp_path / "dense")
    got = case.load(tmp_path / "dense", case.dtype).state_dict()
    assert all(torch.equal(got[k], expected[k].to(case.dtype)) for k in expected)
