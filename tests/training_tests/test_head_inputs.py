"""What a head sees: for every encoder and pooling, the class computes the linear head that was put into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.pooled import FAMILIES, IDS, MASK

from wlora_merge.errors import MixtureError
from wlora_merge.training.head_inputs import find_head_inputs, refuse_pooling

INPUTS = {"input_ids": IDS, "attention_mask": MASK}
HEADS = {"DistilBert": ["classifier", "pre_classifier"], "DebertaV2": ["classifier", "pooler.dense"]}
LLAMA = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 1,
}  # fmt: skip


def encoder(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family].settings, num_labels=3)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval().requires_grad_(False)


def check_put(found: Any, pooling: str, inputs: dict[str, Any], mask: torch.Tensor | None) -> None:
    """The class's own logits are those of the linear head on what it is said to see."""
    found.choose(pooling)
    features = found.features(dict(inputs), mask)[pooling].double()
    weight = torch.randn(3, features.shape[-1], generator=torch.Generator().manual_seed(1)).double() / 4
    bias = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64) * (found.layer.bias is not None)
    found.put(weight, bias, float(features.abs().max()))
    with torch.no_grad():
        logits = found.model(**inputs).logits
    wanted = features @ weight.T + bias
    torch.testing.assert_close(logits.double(), wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_encoder_computes_the_head_that_was_put_into_it(family: str, pooling: str) -> None:
    model = encoder(family)
    found = find_head_inputs(model, HEADS.get(family, ["classifier"]), INPUTS, classifies=True)
    assert found is not None
    assert found.reader is not None
    assert found.reader.square == FAMILIES[family].square
    assert found.own == (family == "Bert")  # whose pooler is its base's; the others put a new layer in between
    assert found.poolings == ["mean", "cls", "last", *(["model"] if found.own else [])]
    check_put(found, pooling, INPUTS, MASK)


def test_bert_s_own_pooler_is_what_the_class_reads() -> None:
    found = find_head_inputs(encoder("Bert"), ["classifier"], INPUTS, classifies=True)
    assert found is not None
    check_put(found, "model", INPUTS, MASK)
    assert found.choose("model") == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_decoder_s_head_sees_the_last_token_or_the_mean(pooling: str) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, num_labels=3)).eval()
    model.requires_grad_(False)
    found = find_head_inputs(model, ["score"], INPUTS, classifies=True)
    assert found is not None
    assert found.poolings == ["mean", "model"]
    assert found.layer.bias is None
    check_put(found, pooling, INPUTS, MASK)


@pytest.mark.parametrize("pooling", ["model", "mean", "cls"])
def test_an_image_model_s_head_sees_the_first_token_or_the_mean(pooling: str) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval().requires_grad_(False)
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
    found = find_head_inputs(model, ["classifier"], inputs, classifies=True)
    assert found is not None
    check_put(found, pooling, inputs, None)


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
def test_where_every_token_is_judged_the_head_sees_every_token(kind: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**FAMILIES["Bert"].settings, num_labels=2))
    name = "classifier" if kind == "TokenClassification" else "qa_outputs"
    found = find_head_inputs(model.eval(), [name], INPUTS, classifies=False)
    assert found is not None
    assert found.poolings == ["model"]
    assert found.features(dict(INPUTS), MASK)["model"].shape == (3, 6, 32)


def test_a_pooling_that_the_model_cannot_have_is_refused() -> None:
    model = encoder("Bert")
    found = find_head_inputs(model, ["classifier"], INPUTS, classifies=True)
    refuse_pooling("mean", found, model)
    with pytest.raises(MixtureError, match=r"pooling is mean, and a head of BertForS.* sees model alone: give that"):
        refuse_pooling("mean", None, model)
