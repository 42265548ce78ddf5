"""DoRA against PEFT's own merge of it, one adapter at a time (PEFT multiplies two of them, it does not add their deltas)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    EVERY_LINEAR,
    assert_equal_but_for_rounding,
    make_adapter,
    peft_changes,
    peft_sum,
    tiny_bert,
    tiny_llama,
)
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from wlora_merge.errors import AdapterError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.fold import fold_factor, fold_factors
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture

IDS = torch.tensor([[5, 17, 3, 40, 41, 2], [9, 9, 60, 1, 7, 33]])
WEIGHTS = [0.5, -0.25, 1.5]

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding layers.*")


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, n_positions=32, tie_word_embeddings=False)
    ).eval()


MODELS: dict[str, tuple[Any, list[list[str]], dict[str, Any]]] = {
    "Linear": (tiny_llama, [EVERY_LINEAR, ["q_proj"], ["q_proj", "down_proj"]], {}),
    "Linear with a bias": (lambda: biased(tiny_bert()), [["query", "dense"], ["query"], ["value", "dense"]], {}),
    "Conv1D": (tiny_gpt2, [["c_attn", "c_proj"], ["c_attn"], ["c_fc"]], {"fan_in_fan_out": True}),
    "Embedding": (tiny_llama, [["embed_tokens"], ["embed_tokens", "lm_head"], ["lm_head"]], {}),
}


def biased(model: Any) -> Any:
    """Biases start at zero, which would hide a mistake with them."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model


def zoo(kind: str, root: Path) -> tuple[Any, Path, list[Path]]:
    """A base, its folder and three adapters: a DoRA, a plain LoRA, and a DoRA with rsLoRA and another rank."""
    make, targets, config = MODELS[kind]
    base = make()
    base.save_pretrained(root / "base")
    kinds: list[dict[str, Any]] = [
        {"use_dora": True, "r": 3},
        {"r": 2},
        {"use_dora": True, "use_rslora": True, "r": 4, "lora_alpha": 6},
    ]
    folders = [make_adapter(base, root / f"a{i}", i, target_modules=targets[i], **config, **kinds[i]) for i in range(3)]
    return base, root / "base", folders


def auto(kind: str) -> Any:
    return AutoModel if kind == "Linear with a bias" else AutoModelForCausalLM


def output_of(model: Any) -> torch.Tensor:
    result = model(IDS)
    found: torch.Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_dense_export_with_doras_is_the_sum_of_pefts_own_merges(kind: str, tmp_path: Path) -> None:
    base, folder, folders = zoo(kind, tmp_path)
    export(mix(folder, folders, weights=WEIGHTS), "dense", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    expected = peft_sum(base, folders, WEIGHTS)
    assert_equal_but_for_rounding(got, {name: expected[name] for name in got})
    _, info = auto(kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_fold_of_one_dora_equals_pefts_merge_in_float64(tmp_path: Path) -> None:
    base, folder, folders = zoo("Linear", tmp_path)
    inputs = find_inputs(mix(folder, folders[:1], weights=[1.0]))
    changes = peft_changes(base, folders[0])
    assert {f"{d.module}.weight" for d in inputs.deltas} == set(changes)
    for delta in inputs.deltas:
        weight = base.get_parameter(f"{delta.module}.weight").double()
        left, right = fold_factors(delta, inputs.mixture.gains_of(delta))  # type: ignore[arg-type]
        factor = fold_factor(delta, inputs.mixture.whole_gains_of(delta))  # type: ignore[arg-type]
        merged = factor * weight + left @ right
        assert float((merged - weight - changes[f"{delta.module}.weight"]).detach().abs().max()) < 1e-15


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_attached_forward_with_doras_is_the_dense_exports(kind: str, normalize: str, tmp_path: Path) -> None:
    base, folder, folders = zoo(kind, tmp_path)
    model = attach(copy.deepcopy(base), folders, normalize=normalize, delta_scale=0.7)
    torch.manual_seed(3)
    model.wlora_weights.data.normal_()
    expected = output_of(model.eval())
    export(Mixture.from_model(model, folder), "dense", tmp_path / "out")
    dense = auto(kind).from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(output_of(dense), expected, atol=5e-6)
    assert not torch.allclose(output_of(base), expected, atol=1e-3)


def test_gradient_of_the_logits_through_doras_and_biases_equals_finite_differences(tmp_path: Path) -> None:
    base, _, folders = zoo("Linear with a bias", tmp_path)
    model = attach(base.double(), folders, delta_scale=0.8)
    parameter = model.wlora_weights
    torch.manual_seed(3)
    parameter.data = torch.randn_like(parameter).double()

    def loss() -> torch.Tensor:
        return model(IDS).last_hidden_state.square().mul(torch.arange(32)).mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        g = int(torch.randint(parameter.shape[0], (1,), generator=generator))
        n = int(torch.randint(parameter.shape[1], (1,), generator=generator))
        with torch.no_grad():
            parameter[g, n] += 1e-5
            high = loss()
            parameter[g, n] -= 2e-5
            low = loss()
            parameter[g, n] += 1e-5
        assert float(parameter.grad[g, n]) == pytest.approx(float((high - low) / 2e-5), rel=1e-5, abs=1e-9)


def test_a_half_precision_base_is_folded_with_a_dora_and_rounded_once(tmp_path: Path) -> None:
    base = tiny_llama(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base.float(), tmp_path / "a", 1, r=2, target_modules=["q_proj"], use_dora=True)
    export(mix(tmp_path / "base", [folder], weights=[1.0]), "dense", tmp_path / "out")
    expected = peft_sum(base, [folder], [1.0])
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_verify_checks_an_export_with_doras_against_the_attached_mixture(tmp_path: Path) -> None:
    _, folder, folders = zoo("Linear", tmp_path)
    export(mix(folder, folders, weights=WEIGHTS, task="causal-lm"), "dense", tmp_path / "out")
    checked = verify(tmp_path / "out", base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


@pytest.mark.parametrize("rank", [None, 2])
def test_a_lora_export_of_a_dora_is_refused_with_the_reason(rank: int | None, tmp_path: Path) -> None:
    _, folder, folders = zoo("Linear", tmp_path)
    with pytest.raises(UnsupportedError, match=r"down_proj.*DoRA.*no LoRA can express.*--format dense"):
        export(mix(folder, folders), "lora", tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def changed(folder: Path, **tensors: torch.Tensor | None) -> Path:
    found = load_file(folder / "adapter_model.safetensors")
    for part, tensor in tensors.items():
        key = next(k for k in sorted(found) if k.endswith(part))
        found.pop(key)
        if tensor is not None:
            found[key] = tensor
    save_file(found, folder / "adapter_model.safetensors")
    return folder


def test_a_magnitude_that_is_missing_or_of_another_length_is_refused(tmp_path: Path) -> None:
    _, folder, folders = zoo("Linear", tmp_path)
    with pytest.raises(AdapterError, match=r"down_proj' lacks lora_magnitude_vector"):
        mix(folder, [changed(folders[0], lora_magnitude_vector=None)])
    with pytest.raises(AdapterError, match=r"down_proj': lora_magnitude_vector has 5 numbers, expected 32"):
        mix(folder, [changed(folders[2], lora_magnitude_vector=torch.ones(5))])


def test_a_row_of_zeros_that_a_dora_would_divide_by_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    base.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"], use_dora=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    found = load_file(folder / "adapter_model.safetensors")
    found[key][3] = 0
    save_file(found, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj.*norm of a row that is zero"):
        export(mix(tmp_path / "base", [folder]), "dense", tmp_path / "out")


def test_nothing_but_the_product_and_the_base_output_is_kept_for_the_backward_pass_of_a_dora(tmp_path: Path) -> None:
    _, _, folders = zoo("Linear with a bias", tmp_path)
    model = attach(biased(tiny_bert()), folders)
    layer = model.encoder.layer[0].intermediate.dense
    kept: list[tuple[int, ...]] = []
    x, output = torch.randn(11, 32, requires_grad=True), torch.randn(11, 48)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer.wlora(x, output, layer)
    activations = sorted(shape for shape in kept if shape and shape[0] == 11)
    assert activations == [(11, layer.wlora.lora_A.shape[0]), (11, 48)]


def test_a_refold_of_doras_computes_what_the_dense_export_does(tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime as ort

    base, folder, folders = zoo("Linear", tmp_path)
    mixture = mix(folder, folders, weights=WEIGHTS, task="causal-lm")
    plain = mix(folder, [folders[1]], weights=[0.0], task="causal-lm")
    export(plain, "onnx", tmp_path / "graph")  # with weight 0, the base itself
    export(mixture, "dense", tmp_path / "dense")
    export(mixture, "onnx", tmp_path / "out", onnx_base=tmp_path / "graph" / "onnx" / "model.onnx")
    session = ort.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": IDS.numpy(), "attention_mask": np.ones((2, 6), np.int64)}
    feed["position_ids"] = np.tile(np.arange(6), (2, 1))
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feed[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    got = session.run(["logits"], {value.name: feed[value.name] for value in session.get_inputs()})[0]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert np.allclose(got, dense(IDS).logits.detach().numpy(), atol=2e-5)
    assert not np.allclose(got, base(IDS).logits.detach().numpy(), atol=1e-3)
