"""Convolutions of one, two and three dimensions against PEFT's own merge, in a dense export, in the fit and as one LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.models import assert_equal_but_for_rounding, make_adapter, peft_sum
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture

WEIGHTS = [0.5, -0.25, 1.5]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def whisper() -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4, "max_source_positions": 6}
    return WhisperModel(WhisperConfig(**layers, **ids, **sizes, max_target_positions=8))


def resnet() -> Any:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="bottleneck")
    return ResNetModel(config)


MODELS: dict[str, tuple[Any, list[str], dict[str, torch.Tensor]]] = {
    "Conv1d": (
        whisper,
        ["conv1", "conv2"],
        {"input_features": torch.randn(2, 4, 12), "decoder_input_ids": torch.tensor([[1, 5], [1, 9]])},
    ),
    "Conv2d": (lambda: ViTModel(ViTConfig(**SIZES)), ["projection"], {"pixel_values": torch.randn(2, 3, 8, 8)}),
    "Conv2d, 1x1 and 3x3": (resnet, ["convolution"], {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "Conv3d": (
        lambda: VideoMAEModel(VideoMAEConfig(**SIZES, num_frames=4, tubelet_size=2)),
        ["projection"],
        {"pixel_values": torch.randn(2, 4, 3, 8, 8)},
    ),
}


def zoo(kind: str, root: Path) -> tuple[Any, Path, list[Path]]:
    """A base and three adapters: a plain LoRA, a DoRA, and one with a trained lora_B.bias where the layers have a bias."""
    torch.manual_seed(0)
    base = MODELS[kind][0]().eval()
    for name, parameter in base.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    base.save_pretrained(root / "base")
    third: dict[str, Any] = {} if "1x1" in kind else {"lora_bias": True}
    kinds: list[dict[str, Any]] = [{"r": 3}, {"r": 2, "use_dora": True}, {"r": 4, "use_rslora": True, **third}]
    folders = [
        make_adapter(base, root / f"a{i}", i, target_modules=MODELS[kind][1], lora_alpha=5, **config)
        for i, config in enumerate(kinds)
    ]
    return base, root / "base", folders


def output_of(model: Any, kind: str) -> torch.Tensor:
    result = model(**MODELS[kind][2])
    found: torch.Tensor = result.get("encoder_last_hidden_state", result.last_hidden_state)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_dense_export_with_convolutions_is_the_sum_of_pefts_own_merges(kind: str, tmp_path: Path) -> None:
    base, folder, folders = zoo(kind, tmp_path)
    export(mix(folder, folders, weights=WEIGHTS), "dense", tmp_path / "out")
    expected = base.state_dict()
    sums = peft_sum(base, folders, WEIGHTS)
    got = type(base).from_pretrained(tmp_path / "out").state_dict()
    assert_equal_but_for_rounding(got, {name: sums[name] for name in got})
    changed = {name for name in got if not torch.equal(got[name], expected[name])}
    assert any(got[name].ndim > 2 for name in changed)


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_attached_forward_of_convolutions_is_the_dense_exports(kind: str, normalize: str, tmp_path: Path) -> None:
    base, folder, folders = zoo(kind, tmp_path)
    model = attach(copy.deepcopy(base), folders, normalize=normalize, delta_scale=0.7)
    torch.manual_seed(3)
    model.wlora_weights.data.normal_()
    expected = output_of(model.eval(), kind)
    export(Mixture.from_model(model, folder), "dense", tmp_path / "out")
    dense = type(base).from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(output_of(dense, kind), expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(output_of(base, kind), expected, atol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_one_lora_of_convolutions_computes_in_peft_what_the_dense_export_does(kind: str, tmp_path: Path) -> None:
    base, folder, folders = zoo(kind, tmp_path)
    plain = [folders[0], make_adapter(base, tmp_path / "b", 7, r=2, target_modules=MODELS[kind][1])]
    mixture = mix(folder, plain, weights=[0.5, -0.25])
    export(mixture, "dense", tmp_path / "dense")
    export(mixture, "lora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").merge_and_unload().eval()
    dense = type(base).from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(output_of(lora, kind), output_of(dense, kind), rtol=1e-4, atol=2e-5)


def test_gradient_of_the_logits_through_convolutions_equals_finite_differences(tmp_path: Path) -> None:
    base, _, folders = zoo("Conv1d", tmp_path)
    model = attach(base.double(), folders, delta_scale=0.8)
    parameter = model.wlora_weights
    torch.manual_seed(3)
    parameter.data = torch.randn_like(parameter).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in MODELS["Conv1d"][2].items()}

    def loss() -> torch.Tensor:
        return model(**inputs).encoder_last_hidden_state.square().mul(torch.arange(16)).mean()

    loss().backward()
    for g, n in [(0, 0), (0, 1), (1, 2), (1, 1)]:
        with torch.no_grad():
            parameter[g, n] += 1e-5
            high = loss()
            parameter[g, n] -= 2e-5
            low = loss()
            parameter[g, n] += 1e-5
        assert float(parameter.grad[g, n]) == pytest.approx(float((high - low) / 2e-5), rel=1e-4, abs=1e-9)


class Net(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(x)
        return result


@pytest.mark.filterwarnings("ignore:.*groups > 1.*")
def test_a_grouped_convolution_which_peft_cannot_merge_is_refused_by_name(tmp_path: Path) -> None:
    model = Net(nn.Conv2d(4, 6, 3, groups=2))
    folder = make_adapter(model, tmp_path / "a", 0, r=4, target_modules=["conv"])
    with pytest.raises(NotImplementedError, match="groups > 1"):
        PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    with pytest.raises(UnsupportedError, match="'conv' is a convolution in 2 groups"):
        attach(model, [folder, f"b={folder}"])


@pytest.mark.parametrize("options", [{"dilation": 2, "padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
@pytest.mark.filterwarnings("ignore:adapters .* are the same")
def test_a_convolution_that_peft_trains_as_another_than_it_merges_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = Net(nn.Conv2d(4, 6, 3, **options))
    folder = make_adapter(model, tmp_path / "a", 0, r=4, target_modules=["conv"])
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    x = torch.randn(2, 4, 8, 8)
    trained = peft(x)
    assert not torch.allclose(peft.merge_and_unload()(x), trained, atol=1e-3)
    with pytest.raises(UnsupportedError, match=r"'conv' is Conv2d.*cannot be folded"):
        attach(model, [folder, f"b={folder}"])
