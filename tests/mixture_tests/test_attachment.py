"""The attachment owns its layers and hooks: copies and replicas have theirs, and nothing outlives the model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attached import IDS, attached, attached_llama, randomized

from wlora_merge.errors import MixtureError
from wlora_merge.mixture.attach import detach
from wlora_merge.mixture.attachment import attachment_of
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.mixture.new_lora import new_targets, place_new


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_every_hook_and_layer_is_the_attachments(llama_zoo: Callable[..., Any]) -> None:
    model, _ = attached(llama_zoo)
    attachment = attachment_of(model)
    placed = {n.removesuffix(".wlora") for n, _ in model.named_modules() if n.endswith(".wlora")}
    assert set(attachment.layers) == placed == {m for modules in attachment.groups.values() for m in modules}
    assert all(layer is model.get_submodule(name) for name, layer in attachment.layers.items())
    assert hooks(model) == len(placed) + 1  # and the model's own, which forgets the gains of a pass
    place_new(model, 2, seed=0)
    assert set(attachment.new) == set(new_targets(model))
    assert hooks(model) == len(placed) + len(attachment.new) + 1
    place_new(model, 3, seed=0)  # in the place of the other
    assert hooks(model) == len(placed) + len(attachment.new) + 1
    detach(model)
    assert hooks(model) == 0
    assert not attachment.layers
    assert not [name for name, _ in model.named_modules() if "wlora" in name]


def test_a_copy_owns_its_hooks_and_layers(llama_zoo: Callable[..., Any]) -> None:
    model, _ = attached(llama_zoo)
    place_new(model, 2, seed=0)
    before, other = randomized(model)(IDS).logits, copy.deepcopy(model)
    assert not set(map(id, other.wlora.layers.values())) & set(map(id, model.wlora.layers.values()))
    assert other.wlora.weights is other.wlora_weights
    detach(other)
    assert hooks(other) == 0
    assert torch.equal(model(IDS).logits, before)
    detach(model)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_replica_that_shares_the_hooks_of_its_model_finds_its_own_factors(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    layer = model.model.layers[0].self_attn.q_proj
    replica = layer._replicate_for_data_parallel()  # what nn.DataParallel runs on another device
    replica._parameters = dict(layer._parameters)
    replica.wlora = copy.deepcopy(layer.wlora)
    x = torch.randn(3, 32)
    assert torch.equal(replica(x), layer(x))
    replica.wlora.lora_B.zero_()
    assert torch.equal(replica(x), torch.nn.functional.linear(x, layer.weight))
    assert not torch.equal(layer(x), replica(x))


def test_a_model_is_freed_when_its_last_user_lets_it_go(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    place_new(model, 2, seed=0)
    freed = weakref.ref(model.model.layers[0].mlp)
    gc.collect()
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_a_mixture_is_read_off_an_attached_model_alone(tmp_path: Path) -> None:
    model = attached_llama(tmp_path)
    assert Mixture.from_model(model, tmp_path / "base").adapter_names == ["a0", "a1"]
    for other in (detach(model), model.model, torch.nn.Linear(2, 2)):
        with pytest.raises(MixtureError, match=r"no adapters attached: call wlora_merge\.attach"):
            Mixture.from_model(other)
