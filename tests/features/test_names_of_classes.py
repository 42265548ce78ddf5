"""Adapters over one base, trained on the several classes that transformers loads of it, each with its own names of modules.

The oracles are PEFT's merge and PEFT's forward pass on the class that the adapter was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import assert_equal_but_for_rounding, make_adapter, tiny_llama
from support.multimodal import MAKERS, qwen3_5, save
from support.tokenizers import tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GteConfig,
    NomicBertConfig,
    NomicBertModel,
)

from wlora_merge.adapters.adapter import load_adapter
from wlora_merge.errors import AdapterError, MixtureError, UnsupportedError, WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.attach import attach, attach_loaded
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.models.base_model import open_base
from wlora_merge.training.fit import fit

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT_TARGETS = r".*(?<!vision_model\.model)(?<!transformer)\.layers\.\d+\.(self_attn|mlp)\.(q_proj|o_proj|down_proj)"
"""Layers of the text, and of no image encoder."""
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def text_adapter(cls: Any, base: Path, folder: Path, seed: int = 1, **config: Any) -> Path:
    model = cls.from_pretrained(base, dtype=torch.float32)
    return make_adapter(model, folder, seed, **({"r": 2, "lora_alpha": 6, "target_modules": TEXT_TARGETS} | config))


def merged(cls: Any, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge, in float64."""
    model = PeftModel.from_pretrained(
        cls.from_pretrained(base, dtype=torch.float64), adapter, autocast_adapter_dtype=False
    )
    state: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return state


def difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert set(got) == set(expected)
    return max(float((got[k].double() - v.double()).abs().max()) for k, v in expected.items() if v.is_floating_point())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 11)[None])[0]
    return found


# ---------------------------------------------------------------------------------- the text of a multimodal base


@pytest.mark.parametrize("whole", [False, True], ids=["text", "whole"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_adapter_folds_as_peft_merges_it_on_its_own_class(name: str, whole: bool, tmp_path: Path) -> None:
    base, named = save(name, tmp_path / "base")
    cls = named if whole else AutoModelForCausalLM
    folder = text_adapter(cls, base, tmp_path / "a")
    expected = merged(cls, base, folder)
    mixture = mix(base, [folder], weights=[1.0])
    export(mixture, "dense", tmp_path / "dense")
    assert_equal_but_for_rounding(cls.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict(), expected)
    export(mixture, "lora", tmp_path / "lora")
    assert difference(merged(cls, base, tmp_path / "lora"), expected) < 1e-6
    assert difference(cls.from_pretrained(base).state_dict(), expected) > 1e-3
    for kind in ("dense", "lora"):
        verify(tmp_path / kind, base=base, adapters=[f"a={folder}"])


def test_a_lora_has_the_names_of_the_class_that_its_task_loads(tmp_path: Path) -> None:
    base, whole = save("qwen3_5", tmp_path / "base")
    adapters = [text_adapter(AutoModelForCausalLM, base, tmp_path / "text", 1, target_modules=["q_proj"])]
    adapters.append(text_adapter(whole, base, tmp_path / "whole", 2))
    loras = {}
    for cls, task in ((AutoModelForCausalLM, "causal-lm"), (AutoModel, "feature-extraction"), (whole, None)):
        mixture = mix(base, adapters, task=task)
        export(mixture, "dense", tmp_path / f"dense {task}")
        export(mixture, "lora", tmp_path / f"lora {task}")
        expected = cls.from_pretrained(tmp_path / f"dense {task}", dtype=torch.float64).state_dict()
        assert difference(merged(cls, base, tmp_path / f"lora {task}"), expected) < 1e-6
        loras[task] = min(load_file(tmp_path / f"lora {task}" / "adapter_model.safetensors"))
    starts = {
        "causal-lm": "model.layers.",
        "feature-extraction": "language_model.layers.",
        None: "model.language_model.",
    }
    assert all(loras[task].startswith(f"base_model.model.{start}") for task, start in starts.items())


@pytest.mark.parametrize("name", ["qwen3_5", "llama4"])
def test_adapters_of_either_class_are_attached_to_either(name: str, tmp_path: Path) -> None:
    base, whole = save(name, tmp_path / "base")
    classes = {"text": AutoModelForCausalLM, "whole": whole}
    groups = []
    for trained, cls in classes.items():
        folder = text_adapter(cls, base, tmp_path / trained, 1)
        peft = PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32), folder)
        for live in classes.values():
            model = attach(live.from_pretrained(base, dtype=torch.float32), [folder, ("b", folder)])
            assert torch.allclose(logits(model), logits(peft), atol=1e-5)
            groups.append(Mixture.from_model(model).groups)
    assert all(found == groups[0] for found in groups)
    stored = set(open_base(base).entries)
    assert all(f"{module}.weight" in stored for modules in groups[0].values() for module in modules)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_of_the_text_changes_on_the_side_that_its_adapter_changes(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    qwen3_5(tied=True).save_pretrained(tmp_path / "base")
    folder = text_adapter(AutoModelForCausalLM, tmp_path / "base", tmp_path / "a", target_modules=["q_proj", target])
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    for kind in ("dense", "lora"):
        export(mix(tmp_path / "base", [folder], weights=[1.0]), kind, tmp_path / kind)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    expected = logits(peft)
    assert torch.allclose(logits(dense), expected, atol=1e-5)
    assert torch.allclose(logits(lora), expected, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), expected, atol=1e-3)


def test_an_adapter_of_the_images_is_not_taken_for_one_of_the_text(tmp_path: Path) -> None:
    base, whole = save("llama4", tmp_path / "base")
    folder = text_adapter(whole, base, tmp_path / "a", target_modules=r"vision_model\..*q_proj")
    said = "'vision_model.model.layers.0.self_attn.q_proj': the base has it, and the Llama4ForCausalLM .* has not"
    with pytest.raises(UnsupportedError, match=said):
        attach(AutoModelForCausalLM.from_pretrained(base), [folder, ("b", folder)])
    mixture = mix(base, [folder], weights=[1.0])
    export(mixture, "dense", tmp_path / "dense")
    got = whole.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict()
    assert_equal_but_for_rounding(got, merged(whole, base, folder))


def test_a_name_that_two_tensors_fit_is_refused(tmp_path: Path) -> None:
    base, _ = save("qwen3_5", tmp_path / "base")
    folder = text_adapter(AutoModelForCausalLM, base, tmp_path / "a", target_modules=["q_proj"])
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = "layers.1.self_attn.q_proj.weight"
    other = tensors[f"model.language_model.{name}"].clone()
    save_file({k: v for k, v in tensors.items() if k != f"model.language_model.{name}"}
              | {f"text.model.{name}": other, f"vision.model.{name}": other.clone()}, file, {"format": "pt"})  # fmt: skip
    with pytest.raises(WloraMergeError, match=r"fits several names of the base model: text\.model.*, vision\.model"):
        mix(base, [folder])


def test_adapters_of_the_whole_model_are_fitted_on_its_text(tmp_path: Path) -> None:
    base, whole = save("qwen3_5", tmp_path / "base")
    tokenizer().save_pretrained(base)
    adapters = [text_adapter(whole, base, tmp_path / "a", 1), text_adapter(whole, base, tmp_path / "b", 2)]
    shots = [{"prompt": f"{word} :", "completion": " cat" if i % 2 else " sat"} for i, word in enumerate("abcd")]
    mixture = fit(base, adapters, shots, "causal-lm", tmp_path / "m", max_steps=1, folds=0, new_adapter=2)
    export(tmp_path / "m", "dense", tmp_path / "dense")
    export(tmp_path / "m", "lora", tmp_path / "lora")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64).state_dict()
    assert difference(merged(AutoModelForCausalLM, base, tmp_path / "lora"), expected) < 1e-6
    assert all(m.startswith("model.language_model.") for modules in mixture.groups.values() for m in modules)


# ----------------------------------------------------------------------------------- files that fuse what the tree splits


@pytest.fixture
def nomic(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = NomicBertModel(NomicBertConfig(vocab_size=320, max_position_embeddings=32, **ENCODER))
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    assert "encoder.layers.0.attn.Wqkv.weight" in open_base(tmp_path / "base").entries
    return tmp_path / "base"


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_rows_of_a_fused_tensor_are_folded_and_written_as_modules_of_their_own(
    cls: Any, nomic: Path, tmp_path: Path
) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    folder = make_adapter(cls.from_pretrained(nomic), tmp_path / "a", 1, r=2, target_modules=targets)
    mixture = mix(nomic, [folder], weights=[1.0])
    export(mixture, "dense", tmp_path / "dense")
    export(mixture, "lora", tmp_path / "lora")
    body = PeftModel.from_pretrained(cls.from_pretrained(nomic, dtype=torch.float64), folder).merge_and_unload()
    expected = {name: tensor for name, tensor in body.base_model.state_dict().items() if "pooler" not in name}
    dense, lora = NomicBertModel.from_pretrained(tmp_path / "dense"), merged(NomicBertModel, nomic, tmp_path / "lora")
    for got in (dense.state_dict(), lora):
        assert difference({name: got[name] for name in expected}, expected) < 1e-6
    for kind in ("dense", "lora"):
        verify(tmp_path / kind, base=nomic, adapters=[f"a={folder}"])


@pytest.mark.parametrize("config", [NomicBertConfig, GteConfig], ids=["weights", "weights and biases"])
def test_a_model_whose_files_fuse_its_modules_is_attached_to(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    model = AutoModel.from_config(config(vocab_size=64, max_position_embeddings=32, **ENCODER))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(base)
    model = AutoModel.from_pretrained(base)
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj", "v_proj", "o_proj"])
    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)
    attach(model, [folder, ("b", folder)])
    assert torch.allclose(logits(model), logits(peft), atol=1e-6)
    assert model.wlora.groups["layers.0.self_attn.q_proj"] == [f"layers.0.self_attn.{x}_proj" for x in "qv"]
    with torch.no_grad():
        model.wlora_weights.normal_()
    export(Mixture.from_model(model), "dense", tmp_path / "dense")
    assert torch.allclose(logits(AutoModel.from_pretrained(tmp_path / "dense")), logits(model), atol=1e-6)
    for changed in ("weight", "bias") if config is GteConfig else ("weight",):
        other = AutoModel.from_pretrained(base)
        with torch.no_grad():
            getattr(other.layers[0].self_attn.v_proj, changed)[3] += 1
        with pytest.raises(MixtureError, match=rf"v_proj.{changed}' of the model is not the file's numbers"):
            attach(other, [folder, ("b", folder)])


def test_a_trained_bias_in_a_part_of_a_tensor_is_refused_and_calls_no_base_another(tmp_path: Path) -> None:
    model = AutoModel.from_config(GteConfig(vocab_size=64, max_position_embeddings=32, **ENCODER))
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(
        AdapterError, match=r"a bias \[16\] of 'layers.0.*as a part of another tensor.* not folded"
    ) as said:
        mix(tmp_path / "base", [folder])
    assert "another base" not in str(said.value)


def test_modules_in_one_tensor_of_the_files_share_their_weights_in_a_fit(nomic: Path, tmp_path: Path) -> None:
    live = AutoModelForSequenceClassification.from_pretrained(nomic)
    adapters = [
        make_adapter(live, tmp_path / name, seed, r=2, target_modules=["q_proj", "v_proj", "down_proj"])
        for seed, name in enumerate("ab")
    ]
    shots = [{"text": f"{word} sat", "label": "xy"[i % 2]} for i, word in enumerate("abcdefg")]
    mixture = fit(nomic, adapters, shots, "text-classification", tmp_path / "m", max_steps=1, folds=0, new_adapter=2)
    assert sorted(mixture.groups)[:2] == ["encoder.layers.0.attn.Wqkv", "encoder.layers.0.mlp.fc2"]
    for kind in ("dense", "lora"):
        export(tmp_path / "m", kind, tmp_path / kind)
        checked = verify(tmp_path / kind, base=nomic, adapters=[*(f"{a.name}={a}" for a in adapters)])
        assert checked.largest_difference is not None


def test_weights_of_their_own_for_modules_in_one_tensor_are_refused(nomic: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(nomic)
    model.config._name_or_path = ""
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj", "v_proj"])
    attach(model, [folder, ("b", folder)])
    with pytest.raises(MixtureError, match=r"v_proj' lies with another in 'encoder.layers.0.attn.Wqkv'"):
        Mixture.from_model(model, nomic)


# ------------------------------------------------------------------------------------------ what is refused, and when


def test_a_target_that_the_files_lack_is_refused_when_adapters_are_attached(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    deeper = tiny_llama(num_hidden_layers=3)
    folder = make_adapter(deeper, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    with pytest.raises(MixtureError, match=r"has no tensor for target module 'model.layers.2.self_attn.q_proj'"):
        attach_loaded(deeper, [load_adapter(folder)], open_base(tmp_path / "base"))
    assert not hasattr(deeper, "wlora")


def test_what_the_end_of_a_fit_would_refuse_is_refused_before_its_first_step(
    nomic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedError("two changes that cannot both be.")

    monkeypatch.setattr(
        "wlora_merge.mixture.inputs.join_changes", refuse
    )  # which opening a mixture asks, and attaching does not
    live = AutoModelForSequenceClassification.from_pretrained(nomic)
    adapters = [make_adapter(live, tmp_path / name, 1, r=2, target_modules=["o_proj"]) for name in "ab"]
    shots = [{"text": f"{word} sat", "label": "xy"[i % 2]} for i, word in enumerate("abcd")]
    steps: list[str] = []
    with pytest.raises(UnsupportedError, match="cannot both be"):
        fit(nomic, adapters, shots, "text-classification", max_steps=1, progress=lambda name, *_: steps.append(name))
    assert not steps


def test_a_name_is_looked_for_among_the_bases_own(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", 1, r=2, target_modules=["o_proj", "q_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({k.replace("0.self_attn.q_proj", "0.self_attn.kproj"): v for k, v in load_file(file).items()}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["o_proj", "q_proj", "kproj"]}))
    with pytest.raises(AdapterError, match=r"did you mean 'model.layers.0.self_attn.k_proj'"):
        mix(tmp_path / "base", [folder])
