"""Tiny models for the tests of the ONNX writer, and what one export of each gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file

from wlora_merge.data.tasks import get_task
from wlora_merge.onnx.convert import OnnxReport, write_onnx

VOCABULARY = 99
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
"""Of one layer, as tracing costs what the layers cost; decoders have two, whose caches must not change places."""
BERT = transformers.BertConfig(**TEXT, vocab_size=VOCABULARY, num_labels=3)
VIT = transformers.ViTConfig(**TEXT, image_size=16, patch_size=8, num_labels=3)
LLAMA = transformers.LlamaConfig(
    **(TEXT | {"num_hidden_layers": 2}),
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
GPT2 = transformers.GPT2Config(
    n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2
)
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": VOCABULARY, "decoder_start_token_id": 0}
T5 = transformers.T5Config(**T5_SIZES, num_layers=2)
BART = transformers.BartConfig(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
    decoder_ffn_dim=64, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
DEBERTA = transformers.DebertaV2Config(
    **TEXT, vocab_size=VOCABULARY, relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=64,
    num_labels=3,
)  # fmt: skip
CLIP_TEXT = transformers.CLIPTextConfig(
    **TEXT, vocab_size=VOCABULARY, max_position_embeddings=32, bos_token_id=0, pad_token_id=1, eos_token_id=2
)
CLIP_VISION = transformers.CLIPVisionConfig(**TEXT, image_size=16, patch_size=8)
MODELS: dict[str, tuple[str, Any, str]] = {
    "bert": ("BertForSequenceClassification", BERT, "text-classification"),
    "answers": (
        "BertForQuestionAnswering",
        transformers.BertConfig(**TEXT, vocab_size=VOCABULARY),
        "question-answering",
    ),
    "features": ("BertModel", BERT, "feature-extraction"),
    "vit": ("ViTForImageClassification", VIT, "image-classification"),
    "llama": ("LlamaForCausalLM", LLAMA, "causal-lm"),
    "deberta": ("DebertaV2ForSequenceClassification", DEBERTA, "text-classification"),
    "clip text": ("CLIPTextModel", CLIP_TEXT, "feature-extraction"),
    "clip vision": ("CLIPVisionModel", CLIP_VISION, "feature-extraction"),
    "t5": ("T5ForConditionalGeneration", T5, "seq2seq-lm"),
    "t5 of one layer": ("T5ForConditionalGeneration", transformers.T5Config(**T5_SIZES, num_layers=1), "seq2seq-lm"),
    "t5 of a deeper decoder": (  # which transformers' own `generate` does not take
        "T5ForConditionalGeneration",
        transformers.T5Config(**T5_SIZES, num_layers=1, num_decoder_layers=2),
        "seq2seq-lm",
    ),
    "bart": ("BartForConditionalGeneration", BART, "seq2seq-lm"),
    "gpt2": ("GPT2LMHeadModel", GPT2, "causal-lm"),
}


class Exported(NamedTuple):
    dense: Path
    out: Path
    task: str
    report: OnnxReport

    @property
    def file(self) -> Path:
        return self.out / "onnx" / "model.onnx"

    def model(self) -> Any:
        return get_task(self.task).auto_class().from_pretrained(self.dense).eval()

    def session(self) -> Any:
        import onnxruntime

        return onnxruntime.InferenceSession(str(self.file), providers=["CPUExecutionProvider"])


def make_dense(folder: Path, class_name: str, config: Any, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # of size one, so that outputs differ visibly where the computation does
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "wlora_merge.json").write_text("{}")
    return folder


def sentence_folder(
    folder: Path, config: dict[str, Any], then: Sequence[str] = (), dense: dict[str, Any] | None = None
) -> Path:
    """A BERT with the files that sentence-transformers writes beside it."""
    make_dense(folder, "BertModel", BERT)
    rows = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, kind in enumerate(["Pooling", *then], 1):
        path = f"{number}_{kind}"
        rows.append({"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir()
        table = config if kind == "Pooling" else dense if kind == "Dense" else None
        if table is not None:
            (folder / path / "config.json").write_text(json.dumps(table))
        if kind == "Dense":
            generator = torch.Generator().manual_seed(0)
            weights = {
                "linear.weight": torch.randn(7, BERT.hidden_size, generator=generator),
                "linear.bias": torch.ones(7),
            }
            save_file(weights, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(rows))
    return folder


def export_once(name: str, root: Path, **options: Any) -> Exported:
    """Make the tiny model and export it, both below `root`; a graph that another process of this run has traced is filled."""
    class_name, config, task = MODELS[name]
    dense, out = make_dense(root / "dense", class_name, config), root / "out"
    out.mkdir()
    return Exported(dense, out, task, write_onnx(dense, out, task=task, cached_as=name, **options))
