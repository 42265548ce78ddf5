"""Trained biases (`bias="all"`, `"lora_only"`, `lora_bias=True`) against PEFT, which takes one adapter of them at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.models import assert_equal_but_for_rounding, make_adapter, peft_changes, peft_sum, tiny_bert, tiny_llama
from transformers import AutoModel, AutoModelForSequenceClassification

from wlora_merge.adapters.adapter import load_adapter
from wlora_merge.errors import AdapterError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture

IDS = torch.tensor([[5, 17, 3, 40, 41, 2], [9, 9, 60, 1, 7, 33]])
WEIGHTS = [0.5, -0.25, 1.5]
KINDS: list[dict[str, Any]] = [
    {"bias": "all", "r": 3, "target_modules": ["query"]},
    {"bias": "lora_only", "lora_bias": True, "r": 2, "target_modules": ["query", "value"]},
    {"lora_bias": True, "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["dense"]},
]


def biased() -> Any:
    """Biases start at zero, which would hide a mistake with them."""
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model


def train_biases(model: Any, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter of `make_adapter` whose biases of the base, where it trains them, are no longer the base's."""
    from safetensors.torch import save_file

    make_adapter(model, folder, seed, **config)
    found = load_file(folder / "adapter_model.safetensors")
    for name, tensor in found.items():
        if name.endswith(".bias") and "lora_B" not in name:
            found[name] = tensor + torch.randn(tensor.shape) * 0.1
    save_file(found, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Path]]:
    root = tmp_path_factory.mktemp("biases")
    base = biased()
    base.save_pretrained(root / "base")
    return base, root / "base", [train_biases(base, root / f"a{i}", i, **KINDS[i]) for i in range(3)]


@pytest.mark.parametrize("n", range(3))
def test_the_bias_of_one_adapter_is_the_one_that_peft_merges(
    zoo: tuple[Any, Path, list[Path]], n: int, tmp_path: Path
) -> None:
    base, folder, folders = zoo
    export(mix(folder, [folders[n]], weights=[1.0]), "dense", tmp_path / "out")
    got, merged = load_file(tmp_path / "out" / "model.safetensors"), peft_sum(base, [folders[n]], [1.0])
    assert_equal_but_for_rounding(got, {name: merged[name] for name in got})
    assert any(name.endswith(".bias") for name in peft_changes(base, folders[n]))


def test_a_mixture_of_biases_is_linear_in_the_adapters(zoo: tuple[Any, Path, list[Path]], tmp_path: Path) -> None:
    base, folder, folders = zoo
    export(mix(folder, folders, weights=WEIGHTS), "dense", tmp_path / "out")
    changes = [peft_changes(base, each) for each in folders]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        exact = base.state_dict()[name].double().numpy()
        for weight, change in zip(WEIGHTS, changes, strict=True):
            exact = exact + np.float64(weight) * (change[name].numpy() if name in change else 0.0)
        assert np.allclose(tensor.double().numpy(), exact, rtol=2**-23, atol=1e-12), name
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out"), type(base))


def test_every_module_with_a_trained_bias_belongs_to_a_group(zoo: tuple[Any, Path, list[Path]]) -> None:
    base, folder, folders = zoo
    inputs = find_inputs(mix(folder, folders, normalize="present"))
    grouped = {module for modules in inputs.mixture.groups.values() for module in modules}
    biases = {name.removesuffix(".bias") for name in base.state_dict() if name.endswith(".bias")}
    assert biases <= grouped
    shares = {d.module: inputs.mixture.weights_of(d).tolist() for d in inputs.deltas}
    assert shares["embeddings.LayerNorm"] == [1, 0, 0]
    assert shares["encoder.layer.0.attention.self.query"] == [0.5, 0.5, 0]
    assert shares["encoder.layer.0.output.dense"] == [0.5, 0, 0.5]


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
def test_the_attached_forward_with_biases_is_the_dense_exports(
    zoo: tuple[Any, Path, list[Path]], normalize: str, tmp_path: Path
) -> None:
    base, folder, folders = zoo
    model = attach(copy.deepcopy(base), folders, normalize=normalize, delta_scale=0.7)
    torch.manual_seed(3)
    model.wlora_weights.data.normal_()
    expected = model.eval()(IDS).last_hidden_state
    export(Mixture.from_model(model, folder), "dense", tmp_path / "out")
    dense = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(dense(IDS).last_hidden_state, expected, atol=5e-6)
    assert not torch.allclose(base(IDS).last_hidden_state, expected, atol=1e-2)


@pytest.mark.parametrize("n", range(3))
def test_the_attached_forward_of_one_adapter_is_pefts(zoo: tuple[Any, Path, list[Path]], n: int) -> None:
    base, _, folders = zoo
    model = attach(copy.deepcopy(base), [folders[n], folders[(n + 1) % 3]], normalize="none").eval()
    model.wlora_weights.data = torch.tensor([[1.0, 0.0]]).repeat(len(model.wlora_weights), 1)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), folders[n]).eval()
    assert torch.allclose(model(IDS).last_hidden_state, peft(IDS).last_hidden_state, atol=5e-6)


def test_gradient_of_the_logits_through_biases_equals_finite_differences(zoo: tuple[Any, Path, list[Path]]) -> None:
    base, _, folders = zoo
    model = attach(copy.deepcopy(base).double(), folders, granularity="layer", delta_scale=0.8)
    parameter = model.wlora_weights
    torch.manual_seed(3)
    parameter.data = torch.randn_like(parameter).double()

    def loss() -> torch.Tensor:
        return model(IDS).last_hidden_state.square().mul(torch.arange(32)).mean()

    loss().backward()
    for g, n in [(0, 0), (0, 1), (1, 2), (len(parameter) - 1, 0)]:
        with torch.no_grad():
            parameter[g, n] += 1e-5
            high = loss()
            parameter[g, n] -= 2e-5
            low = loss()
            parameter[g, n] += 1e-5
        assert float(parameter.grad[g, n]) == pytest.approx(float((high - low) / 2e-5), rel=1e-5, abs=1e-9)


def test_verify_checks_an_export_with_biases_against_the_attached_mixture(
    zoo: tuple[Any, Path, list[Path]], tmp_path: Path
) -> None:
    _, folder, folders = zoo
    export(mix(folder, folders, task="feature-extraction"), "dense", tmp_path / "out")
    checked = verify(tmp_path / "out", base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


def test_a_head_saved_with_all_biases_is_a_head_and_no_trained_bias(tmp_path: Path) -> None:
    """PEFT then saves its bias three times: the trained one twice, and the one that it replaced."""
    biased().save_pretrained(tmp_path / "base")
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config: dict[str, Any] = {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    folders = [make_adapter(start, tmp_path / f"a{i}", i, **config) for i in range(2)]
    adapter = load_adapter(folders[0])
    assert set(adapter.tensors) == {"classifier.weight", "classifier.bias"}
    assert "classifier" not in adapter.biases
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert "classifier" not in attach(model, folders, head=["classifier"]).wlora.row


def test_the_biases_within_a_saved_head_of_several_layers_are_the_heads(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    config = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}
    folder = train_biases(model, tmp_path / "a", 1, **config)
    found = load_adapter(folder)
    assert {"classifier.dense.bias", "classifier.out_proj.bias"} <= set(found.tensors)
    assert not any(name.startswith("classifier") for name in found.biases)
    export(mix(tmp_path / "base", [folder], modules_to_save="drop"), "dense", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["classifier.dense.bias"], model.classifier.dense.bias)


@pytest.mark.parametrize("n", range(3))
def test_a_lora_export_refuses_biases_by_name(zoo: tuple[Any, Path, list[Path]], n: int, tmp_path: Path) -> None:
    _, folder, folders = zoo
    with pytest.raises(UnsupportedError, match=r"tensor '.*\.bias'.*train this bias.*--format dense"):
        export(mix(folder, [folders[n]]), "lora", tmp_path / "out")


def test_a_lora_bias_on_a_layer_without_a_base_bias_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(
        UnsupportedError, match=r"lora_B\.bias on 'model\.layers\.0\.self_attn\.q_proj', which has no bias"
    ):
        mix(tmp_path / "base", [folder])


def test_a_bias_of_another_base_is_refused(zoo: tuple[Any, Path, list[Path]], tmp_path: Path) -> None:
    _, folder, _ = zoo
    wide = train_biases(tiny_bert(intermediate_size=40), tmp_path / "a", 1, r=2, target_modules=["query"], bias="all")
    with pytest.raises(AdapterError, match=r"bias \[40\] of 'encoder\.layer\.0\.intermediate\.dense'.*has \[48\]"):
        mix(folder, [wide])


@pytest.mark.filterwarnings("ignore:.*the delta weight of .* is zero")
def test_an_adapter_whose_biases_are_the_bases_and_whose_products_are_zero_changes_nothing(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = biased()
    base.save_pretrained(tmp_path / "base")
    for i, config in enumerate(({"bias": "all"}, {"use_dora": True})):
        peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["query"], **config))
        peft.save_pretrained(tmp_path / f"a{i}")
        with pytest.raises(AdapterError, match="every delta weight is zero"):
            mix(tmp_path / "base", [tmp_path / f"a{i}"])
