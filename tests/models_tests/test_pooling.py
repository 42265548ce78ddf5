"""The pooling layer: the class's own logits of a token that is the layer norm of the mean, for every encoder that reads one."""

from __future__ import annotations

import pytest
import torch
import transformers

from wlora_merge.errors import UnsupportedError
from wlora_merge.models.pooling import add_pooling_layer, pooled

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DISTIL = {"vocab_size": 50, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 4, 5, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def model_of(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(DISTIL if family == "DistilBert" else SIZES), num_labels=3)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Electra", "DistilBert", "MPNet", "DebertaV2"])
def test_an_encoder_s_class_reads_the_layer_norm_of_the_pooled_tokens(family: str, pooling: str) -> None:
    model = model_of(family)
    seen = []
    part = model.base_model if getattr(model.base_model, "pooler", None) is None else model.base_model.encoder
    part.register_forward_hook(lambda module, given, output: seen.append(output[0]))  # before the layer's own hook
    with torch.no_grad():
        plain = model(input_ids=IDS, attention_mask=MASK).logits
        add_pooling_layer(model, pooling)
        tokens = seen[0].double()
        got = model(input_ids=IDS, attention_mask=MASK).logits
        other = model(input_ids=IDS + 7 * (1 - MASK), attention_mask=MASK).logits
    assert not torch.allclose(plain, got)
    assert torch.equal(got, other), "what is padding must not count"
    vectors = [tokens[i, : MASK[i].sum()] for i in range(2)]
    wanted = torch.stack([v.mean(0) if pooling == "mean" else v[-1] for v in vectors])
    wanted = (wanted - wanted.mean(1, keepdim=True)) / wanted.std(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(pooled(seen[0], MASK, pooling).double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_model_whose_body_is_not_apart_from_its_head_is_refused() -> None:
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=SIZES, vision_config={"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
        )
    )
    with pytest.raises(UnsupportedError, match=r"CLIPModel: it has no encoder apart from its head.*--pooling model"):
        add_pooling_layer(model, "mean")
