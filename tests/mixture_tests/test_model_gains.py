"""The gains of a whole model: made once a forward pass, and the same as a module makes for itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attached import IDS, attached, attached_llama, randomized
from support.models import EVERY_LINEAR, make_adapter, tiny_bert, tiny_llama
from torch.profiler import ProfilerActivity, profile

from wlora_merge.mixture.attach import attach, detach, regroup
from wlora_merge.mixture.model_gains import FACTORS

COUNTED = ("aten::softmax", "aten::index", "aten::mm", "aten::addmm_")


def of_a_pass(model: Any, forward: Callable[[], Any]) -> dict[str, int]:
    """How often some operations are in a pass."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        forward()
    return {name: sum(event.name == name for event in found.events()) for name in COUNTED}


def gradient(model: Any, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    forward().backward()
    found: torch.Tensor = model.wlora_weights.grad.clone()
    return found


def module_by_module(model: Any) -> Any:
    """A copy of a model without the two hooks of the whole: each module makes its own gains."""
    other = copy.deepcopy(model)
    other._forward_pre_hooks.clear()
    other._forward_hooks.clear()
    return other


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
@pytest.mark.parametrize("granularity", ["module", "layer", "global"])
def test_a_pass_has_the_results_of_modules_that_are_alone(tmp_path: Path, granularity: str, normalize: str) -> None:
    base = tiny_bert()
    folders = [
        make_adapter(base, tmp_path / f"a{i}", i, r=2 + i, target_modules=t, use_dora=i == 1, bias=b)
        for i, (t, b) in enumerate([(["query", "value"], "none"), (["query", "dense"], "none"), (["key"], "lora_only")])
    ]
    model = attach(base, folders, granularity=granularity, normalize=normalize, delta_scale="learned")
    model.wlora_weights.data += torch.randn(model.wlora_weights.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    alone = module_by_module(model)
    outputs, gradients = [], []
    for one in (model, alone):
        output = one(IDS % 64).last_hidden_state
        output.square().mul(torch.arange(32)).mean().backward()
        outputs.append(output)
        gradients.append((one.wlora_weights.grad, one.wlora_delta_scale.grad))
    assert torch.allclose(*outputs, atol=1e-6)
    for got, expected in zip(*gradients, strict=True):
        assert float(expected.abs().max()) > 1e-4
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_the_gains_of_all_modules_are_made_once_a_pass(llama_zoo: Callable[..., Any]) -> None:
    model = randomized(attached(llama_zoo)[0])
    found = of_a_pass(model, lambda: model(IDS))
    assert found["aten::softmax"] == 1
    assert found["aten::index"] == 2
    assert model.wlora.gains.running is None
    modules = len(model.wlora.layers)
    assert of_a_pass(model, lambda: module_by_module(model)(IDS))["aten::softmax"] == modules


def test_new_weights_are_used_by_the_next_pass(llama_zoo: Callable[..., Any]) -> None:
    model = randomized(attached(llama_zoo)[0])
    before = model(IDS).logits
    for write in (
        lambda w: w.data.normal_(),
        lambda w: torch.nn.init.zeros_(w),
        lambda w: w.data.copy_(torch.arange(3)),
    ):
        write(model.wlora_weights)
        after = model(IDS).logits
        assert not torch.equal(after, before)
        assert torch.allclose(after, module_by_module(model)(IDS).logits, atol=1e-6)
        before = after


def test_passes_may_share_a_backward_pass_or_have_their_own(llama_zoo: Callable[..., Any]) -> None:
    model = randomized(attached(llama_zoo)[0])
    other = IDS.flip(0, 1)
    each = [gradient(model, lambda ids=ids: model(ids, labels=ids).loss) for ids in (IDS, other)]

    def both() -> torch.Tensor:
        return model(IDS, labels=IDS).loss + model(other, labels=other).loss

    assert torch.allclose(gradient(model, both), each[0] + each[1], atol=1e-7)
    model.zero_grad()
    losses = [model(ids, labels=ids).loss for ids in (IDS, other)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(model.wlora_weights.grad, each[0] + each[1], atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_have_the_same_gradient(llama_zoo: Callable[..., Any], reentrant: bool) -> None:
    model = randomized(attached(llama_zoo)[0]).train()
    expected = gradient(model, lambda: model(IDS, labels=IDS).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert float(expected.abs().max()) > 0
    assert torch.allclose(gradient(model, lambda: model(IDS, labels=IDS).loss), expected, atol=1e-8)


def test_a_module_that_is_called_alone_or_without_gradients_makes_its_own(tmp_path: Path) -> None:
    model = randomized(attached_llama(tmp_path))
    layer = model.model.layers[1].self_attn.q_proj
    x = torch.randn(3, 32)
    with torch.inference_mode():
        model(IDS)
    expected = layer(x)
    assert expected.requires_grad
    found: list[torch.Tensor] = []

    def within(*_: Any) -> None:
        with torch.enable_grad():
            found.append(layer(x))

    handle = model.model.layers[0].register_forward_hook(within)
    with torch.no_grad():
        model(IDS)
    handle.remove()
    assert torch.allclose(found[0], expected, atol=1e-7)
    assert torch.allclose(gradient(model, found[0].sum), gradient(model, expected.sum), atol=1e-6)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_no_gains_that_are_used(tmp_path: Path, error: type[BaseException]) -> None:
    model = randomized(attached_llama(tmp_path))

    def stop(*_: Any) -> None:
        raise error

    handle = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(error):
        model(IDS)
    handle.remove()
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(3, 32)
    with torch.no_grad():
        model.wlora_weights.normal_()
    assert torch.equal(layer(x), module_by_module(model).model.layers[0].self_attn.q_proj(x))
    regroup(model, "layer", "all")
    assert model.wlora.gains.running is None


def test_a_module_that_is_called_twice_or_never_in_a_pass_has_its_gradient(tmp_path: Path) -> None:
    base = tiny_llama()
    folders = [make_adapter(base, tmp_path / f"a{i}", i, r=2, target_modules=EVERY_LINEAR) for i in range(2)]
    model = randomized(attach(base, folders))
    model.model.layers[1] = model.model.layers[0]  # as a model that shares a layer, whose second one is never called
    expected = gradient(alone := module_by_module(model), lambda: alone(IDS, labels=IDS).loss)
    got = gradient(model, lambda: model(IDS, labels=IDS).loss)
    assert torch.allclose(got, expected, atol=1e-7)
    called = [model.wlora.row[name] for name in model.wlora.layers if ".layers.0." in name]
    assert bool(got[called].any())
    assert not bool(got[[row for row in range(len(got)) if row not in called]].any())


def test_a_model_whose_layers_lie_in_several_dtypes_has_the_results_of_modules_that_are_alone(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    model.model.layers[1].double()
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0].double(),), {k: _doubled(v) for k, v in kwargs.items()}), with_kwargs=True
    )
    model.model.layers[1].register_forward_hook(lambda *given: given[-1].float())
    randomized(model)
    gradients = [gradient(one, lambda one=one: one(IDS, labels=IDS).loss) for one in (model, module_by_module(model))]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)
    assert {model.wlora.stacked(name).place(FACTORS)[1] for name in model.wlora.layers} == {
        torch.float32,
        torch.float64,
    }


def _doubled(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_doubled, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("part", ["model", "layers"])
def test_a_compiled_model_has_one_graph_and_the_same_gradients(llama_zoo: Callable[..., Any], part: str) -> None:
    model = randomized(attached(llama_zoo)[0])
    rows = [gradient(model, lambda: model(IDS, labels=IDS).loss)]
    torch._dynamo.reset()
    try:
        if part == "layers":
            for layer in model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True) if part == "model" else model
        for _ in range(2):
            rows.append(gradient(model, lambda: compiled(IDS, labels=IDS).loss))
            assert torch.allclose(rows[-1], rows[-2], atol=1e-7)
            randomized(model, seed=len(rows))
            rows.append(gradient(model, lambda: model(IDS, labels=IDS).loss))
            assert not torch.allclose(rows[-1], rows[-2], atol=1e-7)
    finally:
        torch._dynamo.reset()


def test_detaching_takes_the_hooks_of_the_model_too(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    assert model._forward_pre_hooks
    assert model._forward_hooks
    detach(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
