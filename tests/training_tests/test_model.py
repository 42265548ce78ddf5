"""The model of a fit: a base that is not whole, heads that are kept or new, dropout, positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models import make_adapter, tiny_bert, tiny_llama
from support.shots import WORDS, save_tokenizer

from wlora_merge.data.text_classification import TEXT_CLASSIFICATION
from wlora_merge.errors import BaseModelError, MixtureError, UnsupportedError, WloraMergeWarning
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.fit_options import fit_options
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.training.fit import fit
from wlora_merge.training.model import _own_labels, attached_model, max_tokens

TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 40, 5)]


def placed(model: Any, root: Path, **adapter: Any) -> list[Path]:
    """The model as a base with a tokenizer below `root`, and two adapters."""
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    return [make_adapter(model, root / f"a{i}", i, r=2, **adapter) for i in range(2)]


def classes(root: Path, labels: list[Any]) -> Path:
    lines = [json.dumps({"text": text, "label": labels[i % len(labels)]}) for i, text in enumerate(TEXTS)]
    (root / "shots.jsonl").write_text("\n".join(lines))
    return root / "shots.jsonl"


def classifier(root: Path, folders: list[Path], labels: list[Any], **options: Any) -> Mixture:
    settings = {"max_steps": 2, "folds": 0, "new_adapter": 0}
    return fit(root / "base", folders, classes(root, labels), "text-classification", **(settings | options))


def rewritten(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("shape", [None, (3, 5)])
def test_a_base_that_lacks_a_tensor_is_refused(name: str, shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    folders = placed(tiny_llama(), tmp_path, target_modules=["q_proj"])
    (tmp_path / "shots.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    rewritten(tmp_path / "base", lambda t: t.pop(name) if shape is None else t.update({name: torch.zeros(shape)}))
    got = "has no tensor for it" if shape is None else r"has \[3, 5\]"
    with pytest.raises(BaseModelError, match=rf"base: LlamaForCausalLM needs '{name}' as .*{got}: it is not whole"):
        fit(tmp_path / "base", folders, tmp_path / "shots.jsonl", "causal-lm", max_steps=1, folds=0)


def test_a_base_of_another_task_is_refused_by_its_task(tmp_path: Path) -> None:
    folders = placed(tiny_bert(), tmp_path, target_modules=["query"])
    (tmp_path / "shots.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    with pytest.raises(
        UnsupportedError,
        match=r"it has no causal-lm head \('cls.predictions.bias' of BertLMHeadModel\).*another --task",
    ):
        fit(tmp_path / "base", folders, tmp_path / "shots.jsonl", "causal-lm", max_steps=1, folds=0)


def test_a_pooler_that_the_base_lacks_belongs_to_the_new_head_and_no_other_part_does(tmp_path: Path) -> None:
    folders = placed(tiny_bert(), tmp_path, target_modules=["query"])
    rewritten(tmp_path / "base", lambda t: [t.pop(name) for name in list(t) if "pooler" in name])
    head = classifier(tmp_path, folders, ["x", "y"]).head
    assert set(head) == {
        f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    rewritten(tmp_path / "base", lambda t: t.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(BaseModelError, match=r"needs 'bert.encoder.layer.1.output.dense.weight'"):
        classifier(tmp_path, folders, ["x", "y"])


def bert_classifier(**config: Any) -> Any:
    body = tiny_bert()
    names = {"id2label": {0: "p", 1: "q"}, "label2id": {"p": 0, "q": 1}}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**body.config.to_dict(), **names, **config})
    )
    model.bert.load_state_dict(body.state_dict())
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*its own head, for")
def test_a_head_for_other_labels_is_new(tmp_path: Path) -> None:
    model = bert_classifier()
    folders = placed(model, tmp_path, target_modules=["query"])
    one, other = (
        classifier(tmp_path, folders, ["x", "y"], seed=seed, max_steps=1).head["classifier.weight"] for seed in (5, 6)
    )
    assert float((one - model.classifier.weight.detach()).abs().max()) > 1e-3
    assert torch.equal(one, other), "a head that is solved has no seed"
    assert classifier(tmp_path, folders, ["p", "q"], max_steps=1).head == {}
    with pytest.raises(MixtureError, match=r"no new head is trained .* leave --head-learning-rate out"):
        classifier(tmp_path, folders, ["p", "q"], max_steps=1, head_learning_rate=0.5)
    with pytest.raises(MixtureError, match=r"its new head is solved, .* leave --head-learning-rate out"):
        classifier(tmp_path, folders, ["x", "y"], max_steps=1, head_learning_rate=0.5)


def test_a_head_that_is_kept_has_its_classes_in_the_order_of_its_config(tmp_path: Path) -> None:
    model = bert_classifier(id2label={0: "q", 1: "p"}, label2id={"q": 0, "p": 1})
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([5.0, -5.0]))
    folders = placed(model, tmp_path, target_modules=["query"])
    (tmp_path / "held.csv").write_text("text,label\n" + "".join(f"w{i} w{i + 2},q\n" for i in range(4)))
    mixture = classifier(tmp_path, folders, ["q", "p"], eval_data=tmp_path / "held.csv", max_steps=1)
    assert mixture.head == {}
    assert mixture.metrics["candidates"]["base"]["accuracy"] == 1.0


def test_labels_of_a_config_are_in_the_order_of_their_numbers() -> None:
    table = {str(i): f"c{i}" for i in (10, 2, 0, 1, *range(3, 10))}
    base = SimpleNamespace(config={"id2label": table})
    assert _own_labels(base, TEXT_CLASSIFICATION) == [f"c{i}" for i in range(11)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "labels"),
    [
        (("NEGATIVE", "POSITIVE"), ["positive", "Negative"]),
        (("not spam", "spam"), ["spam", "NOT_SPAM"]),
        (("LABEL_1", "LABEL_0"), [0, 1]),
        (None, [1, 0]),
        (None, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_a_head_for_the_same_classes_under_another_spelling_is_kept(
    own: tuple[str, str] | None, labels: list[Any], tmp_path: Path
) -> None:
    names = {"id2label": dict(enumerate(own)), "label2id": {n: i for i, n in enumerate(own)}} if own else {}
    model = bert_classifier(
        **(names or {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}})
    )
    with torch.no_grad():  # the second class, whatever is read
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([-5.0, 5.0]))
    folders = placed(model, tmp_path, target_modules=["query"])
    assert ("id2label" in json.loads((tmp_path / "base" / "config.json").read_text())) == (own is not None)
    second = next(x for x in labels if str(x).casefold().replace("_", " ") in ("positive", "spam", "label 1", "1"))
    second = 0 if own == ("LABEL_1", "LABEL_0") else second
    (tmp_path / "held.csv").write_text("text,label\n" + "".join(f"w{i} w{i + 2},{second}\n" for i in range(4)))
    mixture = classifier(tmp_path, folders, labels, eval_data=tmp_path / "held.csv", max_steps=1)
    assert mixture.head == {}
    assert mixture.config.get("id2label") is None
    assert mixture.metrics["candidates"]["base"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            [0, 1],
            "for 'p', 'q', is replaced by a new one for the classes '0', '1' .*to keep it, call the classes as it does",
        ),
        ([0.5, 1.25], "for 'p', 'q', is replaced by a new one for a regression"),
    ],
)
def test_a_head_of_the_base_that_is_replaced_is_told(labels: list[Any], words: str, tmp_path: Path) -> None:
    folders = placed(bert_classifier(), tmp_path, target_modules=["query"])
    with pytest.warns(WloraMergeWarning, match=words):
        assert classifier(tmp_path, folders, labels, max_steps=1).head


@pytest.mark.parametrize(
    ("problem_type", "labels"), [("single_label_classification", [["p"], ["p", "q"]]), ("multi_label_classification", ["p", "q"])]
)  # fmt: skip
def test_a_head_of_another_problem_type_is_not_kept(problem_type: str, labels: list[Any], tmp_path: Path) -> None:
    folders = placed(bert_classifier(problem_type=problem_type), tmp_path, target_modules=["query"])
    with pytest.warns(WloraMergeWarning, match="its own head, for 'p', 'q', is replaced"):
        mixture = classifier(tmp_path, folders, labels, pooling="model")
    assert set(mixture.head) == {"classifier.weight", "classifier.bias"}
    assert mixture.config["problem_type"] != problem_type


def test_a_decoder_keeps_its_head_and_gets_the_padding_that_its_config_lacks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=len(WORDS), n_positions=32, bos_token_id=1, eos_token_id=1,
        id2label={0: "high", 1: "low"}, label2id={"high": 0, "low": 1},
    )  # fmt: skip
    model = transformers.GPT2ForSequenceClassification(config).eval()
    folders = placed(model, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    mixture = classifier(tmp_path, folders, ["high", "low"])
    mixture.save(tmp_path / "m")
    assert (mixture.head, mixture.config) == ({}, {"pad_token_id": 0})
    export(tmp_path / "m", "dense", tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["pad_token_id"] == 0
    named = [f"{folder.name}={folder}" for folder in folders]
    checked = verify(tmp_path / "dense", base=tmp_path / "base", adapters=named)
    difference = checked.largest_difference
    assert difference is not None
    assert difference < 1e-5


def clip(root: Path) -> tuple[list[Path], Path]:
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        text_config=tower | {"vocab_size": 64},
        projection_dim=32,
    )
    transformers.CLIPModel(config).save_pretrained(root / "base")
    size = {"height": 8, "width": 8}
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(root / "base")
    model = transformers.CLIPForImageClassification.from_pretrained(root / "base", num_labels=2)
    folders = [make_adapter(model, root / f"a{i}", i, r=2, target_modules=["q_proj", "v_proj"]) for i in range(2)]
    for i, name in enumerate(("dark", "light")):
        (root / "shots" / name).mkdir(parents=True)
        for j in range(4):
            image.new("RGB", (8, 8), (100 * i + 20 * j,) * 3).save(root / "shots" / name / f"{j}.png")
    return folders, root / "shots"


@pytest.mark.filterwarnings("ignore")
def test_a_class_that_does_not_name_its_body_has_what_the_base_lacks_as_its_head(tmp_path: Path) -> None:
    folders, shots = clip(tmp_path)
    options = {"max_steps": 2, "folds": 0}
    mixture = fit(tmp_path / "base", folders, shots, "image-classification", **options)
    assert set(mixture.head) == {"classifier.weight", "classifier.bias"}
    whole = transformers.CLIPForImageClassification.from_pretrained(tmp_path / "base", num_labels=2)
    whole.save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedError, match="use a base without a head"):
        fit(tmp_path / "base", folders, shots, "image-classification", **options)


def test_gradient_checkpointing_leaves_dropout_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=len(WORDS), hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5,
    )  # fmt: skip
    folders = placed(transformers.OPTForCausalLM(config).eval(), tmp_path, target_modules=["q_proj"], scale=0.3)
    (tmp_path / "shots.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    options = {"max_steps": 3, "folds": 2, "settings": 1}
    whole, kept = (
        fit(tmp_path / "base", folders, tmp_path / "shots.jsonl", "causal-lm", gradient_checkpointing=g, **options)
        for g in (False, True)
    )
    assert torch.allclose(kept.wlora_weights, whole.wlora_weights, atol=1e-6)
    for name, row in kept.metrics["candidates"].items():
        assert row == pytest.approx(whole.metrics["candidates"][name], abs=1e-5)


def test_a_table_that_is_computed_need_not_be_in_the_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.PegasusConfig(
        vocab_size=len(WORDS), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    folders = placed(transformers.PegasusForConditionalGeneration(config).eval(), tmp_path, target_modules=["q_proj"])
    rewritten(tmp_path / "base", lambda t: [t.pop(name) for name in list(t) if "embed_positions" in name])
    lines = [json.dumps({"source": text, "target": "w1 w2"}) for text in TEXTS]
    (tmp_path / "shots.jsonl").write_text("\n".join(lines))
    mixture = fit(tmp_path / "base", folders, tmp_path / "shots.jsonl", "seq2seq-lm", max_steps=1, folds=0)
    assert mixture.head == {}


def test_an_encoder_decoder_reads_as_much_as_its_encoder_has_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LEDConfig(
        vocab_size=len(WORDS), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_encoder_position_embeddings=128, max_decoder_position_embeddings=32,
        attention_window=8,
    )  # fmt: skip
    model = transformers.LEDForConditionalGeneration(config)
    assert max_tokens(model, None, 100) == 100
    with pytest.raises(MixtureError, match="has 128 positions"):
        max_tokens(model, None, 129)


def test_texts_are_cut_to_the_positions_that_the_model_has_learned(tmp_path: Path) -> None:
    folders = placed(tiny_bert(), tmp_path, target_modules=["query"])  # 32 positions; the tokenizer knows no limit
    lines = [json.dumps({"text": " ".join(["w1"] * 50), "label": label}) for label in "xyxy"]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    given = tmp_path / "base", folders, tmp_path / "long.jsonl", "text-classification"
    with pytest.warns(UserWarning, match="4 of 4 examples of .* were shortened to 32 tokens"):
        fit(*given, max_steps=1, folds=0)
    with pytest.raises(MixtureError, match="max_length is 33, and BertForSequenceClassification has 32 positions"):
        fit(*given, max_steps=1, folds=0, max_length=33)


def test_bf16_holds_the_base_in_16_bits_and_trains_in_32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = placed(tiny_bert(), tmp_path, target_modules=["query"])
    rewritten(tmp_path / "base", lambda t: [t.pop(name) for name in list(t) if "pooler" in name])
    seen: list[Any] = []
    monkeypatch.setattr(
        "wlora_merge.training.placement.Placement.weights", lambda self: seen.append(self.model) or {"a0": 1.0}
    )
    head = classifier(tmp_path, folders, ["x", "y"], precision="bf16", progress=lambda *_: None).head
    for name, parameter in seen[0].named_parameters():
        trained = parameter.requires_grad or name in head
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    assert {t.dtype for t in head.values()} == {torch.float32}


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_pooler_that_a_quantized_base_lacks_is_trained_in_whole(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    big = {"hidden_size": 64, "intermediate_size": 128}
    config = transformers.BertConfig(**(tiny_bert().config.to_dict() | big))
    folders = placed(transformers.BertModel(config), tmp_path, target_modules=["query"])
    rewritten(tmp_path / "base", lambda t: [t.pop(name) for name in list(t) if "pooler" in name])
    head = classifier(tmp_path, folders, ["x", "y"], quantize=bits).head
    assert head["bert.pooler.dense.weight"].shape == (64, 64)


def mamba(root: Path, targets: list[str]) -> tuple[list[Path], Path]:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0, use_mambapy=False
    )
    folders = placed(transformers.MambaForCausalLM(config), root, target_modules=targets, scale=0.5)
    (root / "shots.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folders, root / "shots.jsonl"


def test_a_module_whose_weight_is_used_without_a_call_is_refused_by_a_fit_and_folded_by_mix(tmp_path: Path) -> None:
    folders, shots = mamba(tmp_path, ["in_proj", "dt_proj"])
    with pytest.raises(UnsupportedError, match=r"dt_proj.*MambaForCausalLM uses its weight without calling it"):
        fit(tmp_path / "base", folders, shots, "causal-lm", max_steps=1, folds=0)
    mix(tmp_path / "base", folders, tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "dense", tmp_path / "dense")
    checked = verify(tmp_path / "dense", base=tmp_path / "base", adapters=[f"{f.name}={f}" for f in folders])
    assert "uses its weight without calling it" in checked.skipped["outputs"]
    assert any("folded again" in line for line in checked.done)


def test_a_model_whose_target_modules_are_all_called_is_fitted(tmp_path: Path) -> None:
    folders, shots = mamba(tmp_path, ["in_proj", "x_proj"])
    mixture = fit(tmp_path / "base", folders, shots, "causal-lm", max_steps=1, folds=0)
    assert bool(mixture.wlora_weights.abs().min(-1).values.gt(0).all())


def test_a_device_that_is_too_small_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = placed(tiny_bert(), tmp_path, target_modules=["query"])

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    monkeypatch.setattr("wlora_merge.training.learner.Learner.left_out", full)
    with pytest.raises(
        MixtureError,
        match=r"does not hold the model, or a step \(CUDA out of memory.*2.00 GiB\): use a smaller --batch",
    ):
        classifier(tmp_path, folders, ["x", "y"])


def distilbert_classifier() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=len(WORDS),
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        id2label={0: "p", 1: "q"},
        label2id={"p": 0, "q": 1},
    )
    return transformers.DistilBertForSequenceClassification(config)


@pytest.mark.parametrize(("make", "target"), [(bert_classifier, "query"), (distilbert_classifier, "q_lin")])
def test_over_a_bf16_body_losses_are_float32_where_the_bases_own_head_is_kept(
    make: Callable[[], Any], target: str, tmp_path: Path
) -> None:
    folders = placed(make(), tmp_path, target_modules=[target])
    mixture = classifier(tmp_path, folders, ["p", "q"], precision="bf16", folds=2)
    assert mixture.head == {}
    losses = [row["loss"] for row in mixture.metrics["candidates"].values()]
    assert not all(torch.tensor(loss).bfloat16().item() == loss for loss in losses)


def test_a_model_that_does_not_run_in_bf16_is_refused_in_one_sentence(tmp_path: Path) -> None:
    config = transformers.FNetConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, intermediate_size=48)
    folders = placed(transformers.FNetModel(config), tmp_path, target_modules=["intermediate.dense"])
    with pytest.raises(
        MixtureError, match=r"FNetForSequenceClassification does not run in bfloat16 \(.*leave --precision bf16 out"
    ):
        classifier(tmp_path, folders, ["x", "y"], precision="bf16")
    assert classifier(tmp_path, folders, ["x", "y"]).head


def test_what_an_architecture_has_not_or_does_not_take_is_one_sentence(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=len(WORDS), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=len(WORDS) - 1,
    )  # fmt: skip
    folders = placed(transformers.BartModel(config), tmp_path, target_modules=["q_proj"])
    rows = [{"tokens": text.split(), "tags": ["A", "B", "A"]} for text in TEXTS]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UnsupportedError, match="transformers loads no token-classification model from it"):
        fit(tmp_path / "base", folders, tmp_path / "tags.jsonl", "token-classification", max_steps=1, folds=0)
    with pytest.raises(MixtureError, match=r"does not take the examples as they are encoded \(.*<eos>"):
        classifier(tmp_path, folders, ["x", "y"])


def test_8bit_weights_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    given: Any = [None] * 5
    with pytest.raises(UnsupportedError, match="use --quantize 4bit, or processes without FSDP"):
        attached_model(*given, fit_options({"quantize": "8bit"}), None, SimpleNamespace(size=2))  # type: ignore[arg-type]
