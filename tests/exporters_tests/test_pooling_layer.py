"""A head on the mean of the tokens as one more layer: transformers' own classes against PEFT's merge and float64."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.exports import change_json, change_tensors
from support.models import make_adapter, peft_sum
from support.pooled import FAMILIES, FOUR, IDS, MASK, Pooled, model_of, pooled, served_head

from wlora_merge.errors import BaseModelError, UnsupportedError, VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.pooling_layer import LARGE, factor_of
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.models.base_model import open_base

SENTENCES = ["The committee will meet again on Thursday.", "no", "A quiet, funny film about three brothers and a boat."]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By transformers alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return found.double()


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def bert(tmp_path: Path) -> Pooled:
    return pooled("Bert", tmp_path)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("family", FOUR)
def test_a_plain_transformers_model_computes_the_head_on_the_mean(family: str, prefix: bool, tmp_path: Path) -> None:
    made = pooled(family, tmp_path, prefix=prefix)
    export(made.mixture, "dense", tmp_path / "out")
    for dtype in (torch.float32, torch.float64):
        assert off(logits_of(tmp_path / "out", dtype), made.logits()) < 1e-5
    checked = verify(tmp_path / "out", **made.inputs)
    assert "16 tensors are those of a layer that averages the tokens, number for number" in checked.done
    assert not checked.skipped
    assert checked.largest_difference is not None
    assert checked.largest_difference < 1e-5


@pytest.mark.parametrize("family", FOUR)
def test_the_model_has_one_more_layer_of_the_head_s_class_s_names_and_the_base_s_shapes(
    family: str, tmp_path: Path
) -> None:
    made = pooled(family, tmp_path)
    export(made.mixture, "dense", tmp_path / "out", max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "base", tmp_path / "out")
    )
    key = "n_layers" if family == "DistilBert" else "num_hidden_layers"
    assert (before[key], after[key]) == (2, 3)
    found = tensors_of(tmp_path / "out")
    prefix = model_of(family).base_model_prefix
    own = {f"{prefix}.{name}": tensor for name, tensor in tensors_of(tmp_path / "base").items()}
    shapes = {name.replace("layer.1.", "layer.2."): tensor.shape for name, tensor in own.items() if "layer.1." in name}
    assert shapes == {name: tensor.shape for name, tensor in found.items() if "layer.2." in name}
    assert set(found) == set(own) | set(shapes) | set(made.mixture.head)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert off(logits_of(tmp_path / "out"), made.logits()) < 1e-5


@pytest.mark.parametrize(("dtype", "most"), [("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("cast", [True, False])
def test_in_16_bits_the_logits_are_off_by_rounding(
    family: str, dtype: str, most: float, cast: bool, tmp_path: Path
) -> None:
    made = pooled(family, tmp_path, dtype=torch.float32 if cast else DTYPES[dtype])
    export(made.mixture, "dense", tmp_path / "out", dtype=dtype if cast else None)
    layer = {tensor.dtype for name, tensor in tensors_of(tmp_path / "out").items() if "layer.2." in name}
    assert layer == {DTYPES[dtype]}
    assert off(logits_of(tmp_path / "out", DTYPES[dtype]), made.logits()) < most
    verify(tmp_path / "out", **made.inputs)


@pytest.mark.parametrize("family", ["Electra", "DistilBert"])
def test_a_head_that_shifts_is_stored_in_float16_and_not_in_bfloat16(family: str, tmp_path: Path) -> None:
    made = pooled(family, tmp_path)
    export(made.mixture, "dense", tmp_path / "out", dtype="float16")
    assert off(logits_of(tmp_path / "out", torch.float16), made.logits()) < 2e-2
    name = FAMILIES[family].square
    with pytest.raises(
        UnsupportedError, match=rf"base: '{name}\.bias' of the head shifts by 16, .*--dtype float32 or float16"
    ):
        export(made.mixture, "dense", tmp_path / "coarse", dtype="bfloat16")
    stored = pooled(family, tmp_path / "16", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="bfloat16 is too coarse"):
        export(stored.mixture, "dense", tmp_path / "coarse")
    export(stored.mixture, "dense", tmp_path / "fine", dtype="float32")
    assert not (tmp_path / "coarse").exists()


def test_the_factor_is_the_largest_with_which_float16_does_not_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    for hidden in (32, 384, 1024):
        weight, bias = torch.rand(hidden, generator=generator) + 0.5, torch.randn(hidden, generator=generator) / 9
        c = factor_of("F16", weight, bias)
        extreme = (
            torch.nn.functional.layer_norm(torch.eye(hidden), (hidden,)) * weight + bias
        )  # all length in one number
        assert bool((c * extreme + extreme).half().isfinite().all())
        assert not bool((4 * c * extreme).half().isfinite().all())
    assert factor_of("F16", torch.zeros(4), torch.zeros(4)) <= 2**15
    assert factor_of("F16", torch.full((4,), 1e9), torch.zeros(4)) == 1
    assert factor_of("BF16", torch.ones(4), torch.zeros(4)) == factor_of("F32", torch.ones(4), torch.zeros(4)) == LARGE


def test_what_an_older_file_calls_gamma_and_beta_is_so_in_the_new_layer(bert: Pooled, tmp_path: Path) -> None:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    base = tmp_path / "base"
    for file in base.glob("*.safetensors"):
        save_file({old(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = {old(name): file for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    export(bert.mixture, "dense", tmp_path / "out", any_digest=True)
    assert "bert.encoder.layer.2.output.LayerNorm.gamma" in tensors_of(tmp_path / "out")
    assert off(logits_of(tmp_path / "out"), bert.logits()) < 1e-5


# ------------------------------------------------------------------------------------------------------------ refused


def test_what_no_layer_gives_is_refused_and_onnx_is_named(tmp_path: Path) -> None:
    for family, pooling, said in (
        ("MPNet", "mean", "the mean of its tokens, .* model type 'mpnet'"),
        ("DebertaV2", "mean", "the mean of its tokens, .* model type 'deberta-v2'"),
        ("Bert", "last", "the last of its tokens, .* model type 'bert'"),
    ):
        made = pooled(family, tmp_path / family, pooling)
        with pytest.raises(UnsupportedError, match=rf"base: the head sees {said} .*--format onnx") as error:
            export(made.mixture, "dense", tmp_path / "out")
        assert "\n" not in str(error.value)


def test_a_lora_is_refused_and_dense_and_onnx_are_named(bert: Pooled, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no LoRA adds to a base: .*--format dense or --format onnx"):
        export(bert.mixture, "lora", tmp_path / "out")


def test_a_graph_of_the_base_is_refused(bert: Pooled, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"--onnx-base .*graph of the base does not give: leave --onnx-base out"):
        export(bert.mixture, "onnx", tmp_path / "out", onnx_base=str(tmp_path / "graph"))


def test_a_config_that_counts_other_layers_is_refused(bert: Pooled, tmp_path: Path) -> None:
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(BaseModelError, match=r"num_hidden_layers is 1, and the files hold 2 layers"):
        export(bert.mixture, "dense", tmp_path / "out", any_digest=True)


def test_a_layer_with_other_parts_is_refused(bert: Pooled, tmp_path: Path) -> None:
    index_file = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    name = "encoder.layer.1.attention.self.distance_embedding.weight"
    save_file({name: torch.ones(3, 8)}, tmp_path / "base" / "more.safetensors", {"format": "pt"})
    index["weight_map"][name] = "more.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match=rf"its last layer has '{re.escape(name)}', unlike a plain bert's"):
        export(bert.mixture, "dense", tmp_path / "out", any_digest=True)


# ----------------------------------------------------------------------------------------------------------- verified


def double(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors[name].mul_(2)


@pytest.mark.parametrize(
    "part",
    ["attention.output.dense.weight", "attention.self.value.weight", "output.LayerNorm.weight"],
)
def test_a_layer_with_other_numbers_is_found(bert: Pooled, part: str, tmp_path: Path) -> None:
    export(bert.mixture, "dense", tmp_path / "out", max_shard_bytes=1 << 30)
    change_tensors(tmp_path / "out", double(f"bert.encoder.layer.2.{part}"))
    with pytest.raises(
        VerifyError, match=rf"'bert\.encoder\.layer\.2\.{re.escape(part)}' is not that of the layer that pools"
    ):
        verify(tmp_path / "out", **bert.inputs)


def test_a_layer_that_the_config_does_not_count_is_found_without_inputs(bert: Pooled, tmp_path: Path) -> None:
    export(bert.mixture, "dense", tmp_path / "out")
    verify(tmp_path / "out", quick=True)
    for changes, said in (
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, and the files hold 3 layers"),
        ({"num_hidden_layers": 3, "model_type": "mpnet"}, "model type 'mpnet' is not one of bert, "),
    ):
        change_json(tmp_path / "out", "config.json", **changes)
        with pytest.raises(VerifyError, match=said):
            verify(tmp_path / "out", quick=True)


def test_a_layer_that_is_missing_is_found(bert: Pooled, tmp_path: Path) -> None:
    export(bert.mixture, "dense", tmp_path / "out", max_shard_bytes=1 << 30)
    change_tensors(tmp_path / "out", lambda t: [t.pop(name) for name in [*t] if "layer.2." in name])
    change_json(tmp_path / "out", "config.json", num_hidden_layers=2)
    with pytest.raises(VerifyError, match=r"tensor 'bert\.encoder\.layer\.2\.[\w.]+' is missing"):
        verify(tmp_path / "out", **bert.inputs)


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_mixture_whose_adapters_do_nothing_is_verified_to_rounding(family: str, tmp_path: Path) -> None:
    made = pooled(family, tmp_path, weights=(0.0, 0.0))
    export(made.mixture, "dense", tmp_path / "out")
    checked = verify(tmp_path / "out", **made.inputs)
    assert checked.tolerance == 1e-5


# ---------------------------------------------------------------------------------------------------------- described


def test_the_card_says_what_the_layer_is_and_which_dtypes_hold_it(bert: Pooled, tmp_path: Path) -> None:
    export(bert.mixture, "dense", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "one more layer than its base. `encoder.layer.2` averages the tokens" in card
    assert "Its numbers are too large for float16." in card
    export(bert.mixture, "dense", tmp_path / "half", dtype="float16")
    card = (tmp_path / "half" / "README.md").read_text()
    assert "`encoder.layer.2` averages the tokens" in card
    assert "too large" not in card


def test_a_saved_mixture_is_exported_with_a_report_to_the_same_bytes(bert: Pooled, tmp_path: Path) -> None:
    bert.mixture.save(tmp_path / "mixture")
    assert Mixture.load(tmp_path / "mixture").pooling == "mean"
    export(bert.mixture, "dense", tmp_path / "out")
    export(tmp_path / "mixture", "dense", tmp_path / "again", report=True)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_without_pooling_the_base_s_layers_are_all_that_there_are(bert: Pooled, tmp_path: Path) -> None:
    bert.mixture.pooling = None
    export(bert.mixture, "dense", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    body = {f"bert.{name}" for name in tensors_of(tmp_path / "base")}
    assert set(tensors_of(tmp_path / "out")) == body | {"classifier.weight", "classifier.bias"}
    assert (
        "layer" not in (tmp_path / "out" / "README.md").read_text().split("## Metrics")[0].split("Mixture weights")[0]
    )


@pytest.mark.real
@pytest.mark.parametrize("dtype", DTYPES)
def test_minilm_with_the_layer_rounds_as_its_encoder_alone(real_models: Path, tmp_path: Path, dtype: str) -> None:
    base = real_models / "minilm"
    torch.manual_seed(0)
    body = transformers.AutoModel.from_pretrained(base).eval()
    adapter = make_adapter(body, tmp_path / "a", 0, r=4, scale=0.02, target_modules=["query", "value"])
    made = mix(base, [adapter], task="text-classification")
    body.load_state_dict(peft_sum(body, [adapter], [1.0]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    given = tokenizer([*SENTENCES, " ".join(SENTENCES)], padding=True, return_tensors="pt")

    def vectors(encoder: Any) -> torch.Tensor:
        with torch.no_grad():
            tokens = encoder(**given).last_hidden_state.double()
        rows = [row[: kept.sum()].mean(0) for row, kept in zip(tokens, given["attention_mask"], strict=True)]
        return torch.nn.functional.layer_norm(torch.stack(rows), (384,), eps=0)

    exact = vectors(copy.deepcopy(body).double())
    weight = torch.randn(3, 384)
    weight *= 4 / (exact.float() @ weight.T).abs().max()
    made.head, made.pooling = served_head("Bert", weight, torch.zeros(3)), "mean"
    made.head_tensors = open_base(base).stored_names(made.head)
    made.config = {"id2label": {"0": "x", "1": "y", "2": "z"}}
    export(made, "dense", tmp_path / "out", dtype=dtype)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=DTYPES[dtype]
    ).eval()
    with torch.no_grad():
        got = model(**given).logits.double()
    wanted = exact @ weight.double().T
    alone = vectors(copy.deepcopy(body).to(DTYPES[dtype])) @ weight.double().T
    difference, rounding = float((got - wanted).abs().max()), float((alone - wanted).abs().max())
    assert difference < 2 * rounding + 1e-5
    assert difference < {"float32": 2e-5, "bfloat16": 0.2, "float16": 0.02}[dtype]
    verify(tmp_path / "out", base=base, adapters=[f"a={adapter}"])
