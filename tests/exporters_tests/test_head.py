"""Exports with a trained head: tensors called as `save_pretrained` of the model with the head calls them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.architectures import BOTH_SIDES, ENCODER, GATED, GPT, SHORT, TEXT, VISION
from support.models import inputs_of

from wlora_merge import export, mix
from wlora_merge.exporters.verify import verify

EXPERTS = {"num_local_experts": 4}
VIT = VISION | {"patch_size": 4}


@dataclass(frozen=True)
class Case:
    """A base as one class saves it, the auto class of the task whose head is trained on it, and modules with a LoRA."""

    base: str
    config: Any
    auto: str
    targets: tuple[str, ...]
    task_type: str | None = None
    head: tuple[str, ...] = ("classifier",)

    def stored(self, folder: Path) -> Path:
        torch.manual_seed(0)
        getattr(transformers, self.base)(self.config).save_pretrained(folder)
        return folder

    def headed(self, folder: Path) -> Any:
        return (
            getattr(transformers, self.auto).from_pretrained(folder, num_labels=2 if self.auto == ANSWERS else 3).eval()
        )


SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
IMAGE, ANSWERS = "AutoModelForImageClassification", "AutoModelForQuestionAnswering"


def config(name: str, **settings: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**settings)


CASES = {
    "a bare encoder": Case("BertModel", config("Bert", **ENCODER), SEQUENCE, ("query",), "SEQ_CLS"),
    "masked-language heads": Case(
        "RobertaForMaskedLM", config("Roberta", **ENCODER), SEQUENCE, ("query",), "SEQ_CLS"
    ),
    "tags": Case("BertForMaskedLM", config("Bert", **ENCODER), TOKEN, ("query",), "TOKEN_CLS"),
    "answers": Case(
        "RobertaForMaskedLM", config("Roberta", **ENCODER), ANSWERS, ("query",), "QUESTION_ANS", ("qa_outputs",)
    ),
    "pre_classifier": Case(
        "DistilBertForMaskedLM",
        config("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40, pad_token_id=0),
        SEQUENCE, ("q_lin",), "SEQ_CLS", ("pre_classifier", "classifier"),
    ),
    "images": Case("ViTModel", config("ViT", **VIT), IMAGE, ("q_proj",)),
    "a language model": Case(
        "LlamaForCausalLM", config("Llama", **TEXT, **GATED), SEQUENCE, ("q_proj",), "SEQ_CLS", ("score",)
    ),
    "experts": Case(
        "MixtralForCausalLM", config("Mixtral", **TEXT, **GATED, **EXPERTS), SEQUENCE, ("q_proj",), "SEQ_CLS", ("score",)
    ),
    "gpt2 without its prefix": Case("GPT2Model", config("GPT2", **GPT, pad_token_id=0), SEQUENCE, ("c_attn",), "SEQ_CLS", ("score",)),
    "an encoder-decoder": Case(
        "BartForConditionalGeneration", config("Bart", **BOTH_SIDES | SHORT), SEQUENCE, ("q_proj",), "SEQ_CLS",
        ("classification_head",),
    ),
}  # fmt: skip


def classified(case: Case, root: Path) -> tuple[Path, Any]:
    """A dense export of one adapter with a head of its own, and PEFT's merge of it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = case.stored(root / "base")
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 2, "target_modules": [*case.targets], "modules_to_save": [*case.head]}
    peft = get_peft_model(case.headed(base), LoraConfig(**settings, task_type=case.task_type))
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    peft.save_pretrained(root / "adapter")
    task = {SEQUENCE: "text-classification", TOKEN: "token-classification", IMAGE: "image-classification"}.get(
        case.auto, "question-answering"
    )
    mix(base, [root / "adapter"], out=root / "mixture", weights=[1.0], task=task, modules_to_save="adapter")
    export(root / "mixture", "dense", root / "out")
    merged = PeftModel.from_pretrained(case.headed(base), root / "adapter").merge_and_unload().eval()
    return root / "out", merged


def inputs(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    if hasattr(model.config, "patch_size"):
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    return {"input_ids": torch.tensor([[3, 4, 5, 6, 2], [7, 8, 9, 10, 2]])}


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    out, merged = classified(case, tmp_path)
    written = load_file(out / "model.safetensors")
    reloaded = getattr(transformers, case.auto).from_pretrained(out).eval()
    reloaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")

    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in again.items()}
    assert all(torch.equal(tensor, again[n]) for n, tensor in written.items())
    given = inputs(reloaded)
    with torch.no_grad():
        for got, expected in zip(reloaded(**given)[:1], merged(**given)[:1], strict=True):
            assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["a bare encoder", "masked-language heads", "images"])
def test_such_exports_verify(name: str, tmp_path: Path) -> None:
    out, _ = classified(CASES[name], tmp_path)
    checked = verify(out, **inputs_of(tmp_path / "mixture"))
    assert not checked.skipped
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-4


def test_the_card_says_what_the_model_does_not_have(tmp_path: Path) -> None:
    out, _ = classified(CASES["masked-language heads"], tmp_path)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert re.search(r"as a RobertaForSequenceClassification has no such tensor: `lm_head\.bias` and \d+ more", card)
