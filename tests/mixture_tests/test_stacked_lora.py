"""StackedLora: its output, its gradients, and what it keeps for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attached import IDS, attached, attached_llama, randomized
from support.models import make_adapter, tiny_bert, tiny_llama

from wlora_merge.mixture.attach import attach, detach
from wlora_merge.mixture.model_gains import FACTORS


@pytest.mark.parametrize(
    ("granularity", "normalize"), list(itertools.product(["module", "layer", "global"], ["all", "present", "none"]))
)
def test_gradient_of_the_logits_equals_finite_differences(tmp_path: Path, granularity: str, normalize: str) -> None:
    base = tiny_bert()
    folders = [
        make_adapter(base, tmp_path / f"a{i}", i, r=2 + i, target_modules=t, use_rslora=i == 1)
        for i, t in enumerate([["query", "value"], ["query", "dense"], ["key"]])
    ]
    model = base.double()  # a Llama would take its norms and softmaxes to float32
    randomized(attach(model, folders, granularity=granularity, normalize=normalize, delta_scale=0.8))
    parameter = model.wlora_weights
    parameter.data = (parameter.data.double() + 1.5) if normalize == "none" else parameter.data.double()

    def loss() -> torch.Tensor:
        return model(IDS % 64).last_hidden_state.square().mul(torch.arange(32)).mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        g = int(torch.randint(parameter.shape[0], (1,), generator=generator))
        n = int(torch.randint(parameter.shape[1], (1,), generator=generator))
        step = 1e-6
        with torch.no_grad():
            parameter[g, n] += step
            high = loss()
            parameter[g, n] -= 2 * step
            low = loss()
            parameter[g, n] += step
        assert float(parameter.grad[g, n]) == pytest.approx(float((high - low) / (2 * step)), rel=1e-5, abs=1e-9)


def test_the_softmax_gradient_sums_to_zero_over_the_adapters(llama_zoo: Callable[..., Any]) -> None:
    """The term that the public WLoRA code loses by taking `.data` in the denominator."""
    model, _ = attached(llama_zoo)
    model(IDS, labels=IDS).loss.backward()
    assert float(model.wlora_weights.grad.abs().sum()) > 0
    assert torch.allclose(model.wlora_weights.grad.sum(-1), torch.zeros(len(model.wlora_weights)), atol=1e-8)


def test_gradient_checkpointing_gives_the_same_gradient(llama_zoo: Callable[..., Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomized(attached(llama_zoo)[0]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.wlora_weights.grad.clone())
    assert torch.allclose(*gradients, atol=1e-8)


@pytest.mark.filterwarnings("ignore:adapters .* are the same")
def test_nothing_but_the_low_rank_product_is_kept_for_the_backward_pass(llama_zoo: Callable[..., Any]) -> None:
    _, folders = llama_zoo()
    model = attach(tiny_llama(), [*folders, *[(f"b{i}", f) for i, f in enumerate(folders)]])
    layer = model.model.layers[0].mlp.up_proj
    kept: list[tuple[int, ...]] = []
    x = torch.randn(11, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        output = layer(x)
    R = layer.wlora.lora_A.shape[0]
    assert R == 6
    activations = [shape for shape in kept if shape and shape[0] == 11]
    assert activations == [(11, R)]
    assert not [value for value in vars(output.grad_fn).values() if isinstance(value, torch.Tensor)]


def test_a_layer_that_is_trained_itself_keeps_its_own_gradient(tmp_path: Path) -> None:
    layer = attached_llama(tmp_path).model.layers[0].self_attn.q_proj
    layer.weight.requires_grad_(True)
    x = torch.randn(3, 32)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(32, 32), atol=1e-5)


def test_a_learned_delta_scale_and_a_temperature_have_the_gradients_of_finite_differences(tmp_path: Path) -> None:
    base = tiny_bert().double()
    folders = [
        make_adapter(tiny_bert(), tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"]) for i in range(3)
    ]
    model = randomized(attach(base, folders, delta_scale="learned", temperature=0.5))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"wlora_weights", "wlora_delta_scale"}
    for name in ("wlora_weights", "wlora_delta_scale"):
        model.get_parameter(name).data = model.get_parameter(name).data.double()

    def loss() -> torch.Tensor:
        return model(IDS % 64).last_hidden_state.square().mul(torch.arange(32)).mean()

    loss().backward()
    for name, place in {"wlora_weights": (1, 2), "wlora_delta_scale": ()}.items():
        parameter, step = model.get_parameter(name), 1e-6
        with torch.no_grad():
            parameter[place] += step
            high = loss()
            parameter[place] -= 2 * step
            low = loss()
            parameter[place] += step
        assert float(parameter.grad[place]) == pytest.approx(float((high - low) / (2 * step)), rel=1e-5)


def test_inputs_of_no_tokens_have_a_backward_pass(tmp_path: Path) -> None:
    layer = attached_llama(tmp_path).model.layers[0].self_attn.q_proj
    for shape in ((0, 32), (2, 0, 32)):
        x = torch.zeros(shape, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


def test_a_model_made_narrower_keeps_its_scalings(tmp_path: Path) -> None:
    base = tiny_llama()
    folder = make_adapter(base, tmp_path / "a", 0, r=3, lora_alpha=1, target_modules=["q_proj"], use_dora=True)
    model = attach(base, [folder]).bfloat16()
    lora, gains = model.model.layers[0].self_attn.q_proj.wlora, model.wlora.gains
    assert lora.lora_A.dtype == torch.bfloat16
    assert lora.row_scale.dtype == torch.float32
    assert torch.equal(gains.of((lora.module, FACTORS)), torch.full((3,), 1 / 3))  # not what bfloat16 makes of a third


def test_factors_on_weights_of_8_bits_keep_their_numbers(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    detach(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = torch.nn.Parameter(
            layer.self_attn.q_proj.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
        )
    attach(model, [tmp_path / "a0"])
    assert model.model.layers[0].self_attn.q_proj.wlora.lora_A.dtype == torch.float32
