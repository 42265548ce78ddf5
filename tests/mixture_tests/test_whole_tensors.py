"""Whole tensors in a fit: the attached forward pass against the dense export, which mixes the tensors themselves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.models import make_adapter, tiny_bert, tiny_llama
from support.schemas import valid
from support.shots import save_tokenizer
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from wlora_merge.cli.main import main
from wlora_merge.errors import UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach
from wlora_merge.mixture.inputs import find_inputs
from wlora_merge.mixture.mixture import Mixture

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding).*")


def bert() -> Any:
    torch.manual_seed(0)
    config = tiny_bert().config
    config.num_labels = 3
    return BertForSequenceClassification(config).eval()


def roberta() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=96, max_position_embeddings=32, num_labels=3, **sizes)
    ).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=96, n_positions=32)).eval()


def resnet() -> Any:
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [8], "depths": [1]}
    return ResNetForImageClassification(ResNetConfig(num_labels=3, layer_type="basic", **sizes)).eval()  # type: ignore[arg-type]


CASES: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "a classifier": (
        bert,
        [
            {"target_modules": ["query"], "modules_to_save": ["classifier"]},
            {"target_modules": ["query", "classifier"]},
            {"target_modules": ["value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        ],
    ),
    "a head of two layers": (
        roberta,
        [
            {"target_modules": ["query"], "task_type": "SEQ_CLS"},
            {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"},
        ],
    ),
    "embeddings": (
        tiny_llama,
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"target_modules": ["embed_tokens", "lm_head"]},
        ],
    ),
    "tied embeddings": (
        lambda: tiny_llama(tie_word_embeddings=True),
        [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ),
    "a Conv1D": (
        gpt2,
        [{"target_modules": ["c_fc"], "modules_to_save": ["c_attn", "c_proj"]}, {"target_modules": ["c_proj"]}],
    ),
    "a convolution": (
        resnet,
        [
            {"target_modules": ["classifier.1"], "modules_to_save": ["embedder.embedder.convolution"]},
            {"target_modules": ["classifier.1", "convolution"]},
        ],
    ),
}  # fmt: skip


def zoo(name: str, root: Path) -> tuple[Any, Path, list[Path]]:
    make, configs = CASES[name]
    base = make()
    base.save_pretrained(root / "base")
    folders = [make_adapter(base, root / f"a{i}", i, r=2 + i, **config) for i, config in enumerate(configs)]
    for i, folder in enumerate(folders):
        file = folder / "adapter_model.safetensors"
        torch.manual_seed(i)
        tensors = load_file(file)
        save_file(tensors | {k: v + 0.1 * torch.randn_like(v) for k, v in tensors.items() if "lora_" not in k}, file)
    return type(base).from_pretrained(root / "base").eval(), root / "base", folders


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "a convolution":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": torch.tensor([[5, 17, 3, 40, 41, 2], [9, 9, 60, 1, 7, 33]])}


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
@pytest.mark.parametrize("name", CASES)
def test_the_attached_forward_with_whole_tensors_is_the_dense_exports(
    name: str, normalize: str, tmp_path: Path
) -> None:
    base, folder, folders = zoo(name, tmp_path)
    model = attach(copy.deepcopy(base), folders, modules_to_save="mix", normalize=normalize, delta_scale=0.7)
    torch.manual_seed(3)
    model.wlora_weights.data = model.wlora_weights.data + torch.randn(model.wlora_weights.shape)
    expected = model.eval()(**inputs(name)).logits
    mixture = Mixture.from_model(model, folder)
    assert mixture.modules_to_save == "mix"
    mixture.save(tmp_path / "m")
    export(tmp_path / "m", "dense", tmp_path / "out")
    got = type(base).from_pretrained(tmp_path / "out").eval()(**inputs(name)).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(base(**inputs(name)).logits, expected, atol=1e-3)
    expected.square().sum().backward()
    present = {delta.module: int(delta.present.sum()) for delta in find_inputs(tmp_path / "m").deltas}
    learned = [normalize != "present" or max(map(present.get, modules)) > 1 for modules in mixture.groups.values()]
    assert model.wlora_weights.grad.abs().sum(1).gt(1e-8).tolist() == learned  # below that it is rounding


@pytest.mark.parametrize("normalize", ["all", "present", "none"])
def test_an_export_of_mixed_heads_that_a_fit_trained_is_verified(normalize: str, tmp_path: Path) -> None:
    base, folder, folders = zoo("a classifier", tmp_path)
    model = attach(copy.deepcopy(base), folders, modules_to_save="mix", normalize=normalize)
    torch.manual_seed(3)
    model.wlora_weights.data = model.wlora_weights.data + torch.randn(model.wlora_weights.shape)
    Mixture.from_model(model, folder).save(tmp_path / "m")
    assert Mixture.load(tmp_path / "m").task == "text-classification"
    export(tmp_path / "m", "dense", tmp_path / "out")
    checked = verify(tmp_path / "out", base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None
    assert checked.largest_difference < 2e-5


def test_a_fit_at_the_command_line_mixes_heads_and_its_export_is_their_float64_sum(tmp_path: Path) -> None:
    _, folder, folders = zoo("a classifier", tmp_path)
    save_tokenizer(folder)
    rows = [{"text": f"w{i} w{i + 7} w{i + 20}", "label": f"LABEL_{i % 3}"} for i in range(12)]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "fit",
        "--base",
        folder,
        *(w for f in folders for w in ("--adapter", f)),
        "--data",
        tmp_path / "shots.jsonl",
    ]
    words += ["--task", "text-classification", "--modules-to-save", "mix", "--max-steps", "4", "--settings", "2"]
    words += ["--folds", "2", "--new-adapter", "0", "--no-report", "--json", "--out", tmp_path / "m"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    valid("fit", json.loads(done.stdout))
    assert set(json.loads(done.stdout)["metrics"]) >= {"chosen", "kept", "settings", "held_out", "history"}
    mixture = Mixture.load(tmp_path / "m")
    assert (mixture.modules_to_save, mixture.head) == ("mix", {})
    assert "classifier" in {module for group in mixture.groups.values() for module in group}
    export(tmp_path / "m", "dense", tmp_path / "out")
    base, got = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    files = {f.name: load_file(f / "adapter_model.safetensors") for f in folders}
    row = next(g for g, modules in enumerate(mixture.groups.values()) if "classifier" in modules)
    weights = dict(zip(mixture.adapter_names, mixture.mixture_weights[row].double().tolist(), strict=True))
    expected = {name: base[name].double() for name in ("classifier.weight", "classifier.bias")}
    for name, own in list(expected.items()):
        for adapter, tensors in files.items():
            part = name.removeprefix("classifier.")
            if (saved := tensors.get(f"base_model.model.classifier.{part}")) is not None:
                expected[name] = expected[name] + weights[adapter] * (saved.double() - own)
    lora = {key.split(".")[-2]: tensor.double() for key, tensor in files["a1"].items() if "classifier.lora_" in key}
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    expected["classifier.weight"] += weights["a1"] * scaling * lora["lora_B"] @ lora["lora_A"]
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.float()), name
        assert not torch.equal(got[name], base[name])
    checked = verify(tmp_path / "out", base=folder, adapters=[f"{f.name}={f}" for f in folders])
    assert checked.largest_difference is not None


def test_what_a_fit_cannot_mix_as_a_whole_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(UnsupportedError, match=r"layernorm\.weight' is a LlamaRMSNorm's.*wlora-merge mix"):
        attach(copy.deepcopy(base), [folder], modules_to_save="mix")


def test_a_head_that_the_base_lacks_is_not_mixed_against_what_was_drawn(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["query"], modules_to_save=["classifier"])
    with pytest.raises(UnsupportedError, match=r"base: has no tensor 'classifier\.(bias|weight)'.*cannot be mixed"):
        attach(model, [folder], modules_to_save="mix")
