"""Adapters whose initialisation changed the base too (PiSSA and its kind), converted or not, and those that left it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_llama

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix

TARGETS = ["q_proj", "down_proj"]
IDS = torch.tensor([[5, 17, 3, 80, 41, 2]])
MUTATING = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]


def initialised(init: str) -> Any:
    """A PEFT model with the initialisation that its method computes."""
    from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    model = tiny_llama()
    extra: dict[str, Any] = {}
    if init == "corda":
        extra["corda_config"] = CordaConfig(corda_method="kpm")
    if init == "lora_ga":
        extra["lora_ga_config"] = LoraGAConfig()
    if init == "eva":
        extra["eva_config"] = EvaConfig()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init, **extra)
    if init == "corda":
        preprocess_corda(model, config, run_model=lambda: model(torch.randint(0, 90, (1, 96))))
    if init == "lora_ga":
        preprocess_loraga(model, config, lambda: model(IDS, labels=IDS).loss.backward())
    peft = get_peft_model(model, config)
    if init == "eva":
        rows = [{"input_ids": torch.randint(0, 90, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}] * 4
        initialize_lora_eva_weights(peft, rows, show_progress_bar=False)
    return peft


def train(peft: Any) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)


def merged(peft: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = copy.deepcopy(peft).merge_and_unload().state_dict()
    return state


def check(base: Path, adapter: Path, expected: dict[str, torch.Tensor], out: Path, residual: str | None = None) -> None:
    export(mix(base, [adapter], weights=[1.0], residual=residual), "dense", out)
    got, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert sum(not torch.equal(got[k], before[k]) for k in got) == 4
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", MUTATING)
def test_an_adapter_converted_to_plain_lora_folds_over_the_original_base(init: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    peft = initialised(init)
    peft.peft_config["default"].init_lora_weights = True  # as PEFT's guides have it: the initial adapter is a plain one
    peft.save_pretrained(tmp_path / "initial")
    peft.peft_config["default"].init_lora_weights = init
    train(peft)
    expected = merged(peft)
    peft.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    check(tmp_path / "base", tmp_path / "adapter", expected, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "init", MUTATING
)  # PEFT computes LoftQ on a GPU alone; its name is refused in test_lora_config.py
def test_an_adapter_that_was_not_converted_is_refused_unless_the_base_is_its_residual(
    init: str, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    peft = initialised(init)
    residual = copy.deepcopy(peft).unload()  # the base weights as the initialisation left them
    residual.save_pretrained(tmp_path / "residual")
    train(peft)
    peft.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=f"init_lora_weights is '{init}'.*--base-is-residual NAME"):
        mix(tmp_path / "base", [tmp_path / "adapter"])
    check(tmp_path / "residual", tmp_path / "adapter", merged(peft), tmp_path / "out", residual="adapter")
    naive = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert not torch.allclose(naive, tiny_llama().state_dict()["model.layers.0.mlp.down_proj.weight"], atol=0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["eva", "gaussian", "orthogonal"])
def test_an_adapter_whose_initialisation_left_the_base_alone_folds(init: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    peft = initialised(init)
    train(peft)
    peft.save_pretrained(tmp_path / "adapter")
    check(tmp_path / "base", tmp_path / "adapter", merged(peft), tmp_path / "out")
