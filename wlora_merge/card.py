"""The model card of an export: README.md with the hub's metadata, the weights, and how to serve it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import WloraMergeError
from .input_files import find_file, parse_yaml, read_bytes
from .mixture import Mixture
from .report import CAPTIONS, FIGURES
from .report import FILE as REPORT

PIPELINE_TAGS = {
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "image-classification": "image-classification",
    "feature-extraction": "feature-extraction",
}
AUTO_CLASSES = {
    "causal-lm": "CausalLM",
    "seq2seq-lm": "Seq2SeqLM",
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "image-classification": "ImageClassification",
    "feature-extraction": "",
}
PEFT_AUTO = (
    "causal-lm",
    "seq2seq-lm",
    "text-classification",
    "token-classification",
    "question-answering",
    "feature-extraction",
)
LIBRARIES = {"dense": "transformers", "lora": "peft", "onnx": "transformers.js"}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"[\w .,()+/-]{1,100}")
_FRONT_CHARACTERS = 1 << 20
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


def write_card(
    folder: Path,
    mixture: Mixture,
    *,
    kind: str,
    base_name: str,
    folders: Sequence[Path],
    options: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    note: str = "",
    figures: Sequence[str] = (),
) -> None:
    """Write README.md into an export folder.

    Args:
        kind: `dense`, `lora` or `onnx`.
        base_name: what the card calls the base model.
        folders: the base's and the adapters' folders, whose cards may name a license.
        options: how the export was asked for.
        measured: what the writer measured.
        note: a paragraph on what is special about this export.
        figures: names of the report's figures, as in `report.CAPTIONS`.
    """
    task = mixture.task
    names = [
        base_name,
        *([] if kind == "lora" else [a.source for a in mixture.adapters if not Path(a.source).is_absolute()]),
    ]
    data = _metadata(kind, task, names, _licenses(folders))
    parts = [
        f"---\n{data}\n---",
        _intro(mixture, kind, base_name),
        _weights(mixture),
        _metrics(mixture.metrics),
        note,
        _figures(figures),
    ]
    parts += ["## How to serve it", _serving(mixture, kind, base_name), _licence_note(folders)]
    (folder / "README.md").write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")


def _metadata(kind: str, task: str | None, base_models: list[str], licenses: list[str]) -> str:
    from huggingface_hub import ModelCardData

    on_hub = [name for name in base_models if _HUB_ID.fullmatch(name)]
    data = ModelCardData(
        base_model=on_hub or None,
        library_name=LIBRARIES[kind],
        license=licenses[0] if len(set(licenses)) == 1 else None,
        tags=["merge", "lora", "wlora-merge"],
        pipeline_tag=PIPELINE_TAGS.get(task or ""),
        base_model_relation=("adapter" if kind == "lora" else "merge") if on_hub else None,
    )
    return str(data.to_yaml()).strip()


def _intro(mixture: Mixture, kind: str, base_name: str) -> str:
    what = {
        "dense": "folded into the base model's weights",
        "lora": "as one LoRA adapter",
        "onnx": "folded into the base model and exported to ONNX",
    }[kind]
    adapters = ", ".join(f"`{name}`" for name in mixture.adapter_names)
    return (
        f"# A mixture of {len(mixture.adapters)} LoRA adapters on {base_name}\n\n"
        f"The adapters {adapters}, {what} by [wlora-merge](https://pypi.org/project/wlora-merge/) "
        f"(learned and uniform composition, [Asadi et al. 2024](https://arxiv.org/abs/2402.15414)). "
        "`wlora_merge.json` lists every input and output with its sha256; `wlora-merge verify` checks them."
    )


def _weights(mixture: Mixture) -> str:
    mean = mixture.mixture_weights.double().mean(0).tolist()
    low, high = mixture.mixture_weights.double().amin(0).tolist(), mixture.mixture_weights.double().amax(0).tolist()
    rows = [
        f"| {name} | {m:.4f} | {a:.4f} | {b:.4f} |"
        for name, m, a, b in zip(mixture.adapter_names, mean, low, high, strict=True)
    ]
    return (
        f"## Mixture weights\n\nGranularity `{mixture.granularity}` ({len(mixture.groups)} groups), normalize "
        f"`{mixture.normalize}`, delta_scale {mixture.delta_scale:g}.\n\n"
        "| adapter | mean over groups | lowest | highest |\n|---|---|---|---|\n" + "\n".join(rows)
    )


def _metrics(metrics: Mapping[str, Any]) -> str:
    table = metrics.get("candidates")
    if not table:
        return ""
    names = sorted({key for row in table.values() for key in row})
    head = "| | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|\n"
    rows = [
        "| " + " | ".join([name, *(f"{row[k]:.4f}" if k in row else "" for k in names)]) + " |"
        for name, row in table.items()
    ]
    return f"## Held-out metrics\n\n{metrics.get('note', '')}\n\n" + head + "\n".join(rows)


def _figures(names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = [f"![{CAPTIONS[name]}]({FIGURES}/{name}.png)" for name in names]
    return f"## Report\n\n[{REPORT}]({REPORT}) has these and the provenance.\n\n" + "\n\n".join(shown)


def _serving(mixture: Mixture, kind: str, base_name: str) -> str:
    task = mixture.task or "feature-extraction"
    auto = f"AutoModel{'For' if AUTO_CLASSES[task] else ''}{AUTO_CLASSES[task]}"
    if kind == "dense":
        text = _python(f"from transformers import {auto}", f'model = {auto}.from_pretrained("path/to/this/folder")')
        if task == "causal-lm":
            text += "\n\n```sh\nvllm serve path/to/this/folder\n```"
        return text
    if kind == "lora":
        return _serving_lora(mixture, task, auto, base_name)
    file = "onnx/model.onnx"
    text = _python("import onnxruntime", f'session = onnxruntime.InferenceSession("path/to/this/folder/{file}")')
    pipeline = PIPELINE_TAGS[task]
    return text + (
        f"\n\n```js\nimport {{ pipeline }} from '@huggingface/transformers';\n"
        f"const run = await pipeline('{pipeline}', 'path/to/this/folder', {{ dtype: 'fp32' }});\n```"
    )


def _serving_lora(mixture: Mixture, task: str, auto: str, base_name: str) -> str:
    labels = f", num_labels={len(mixture.config['id2label'])}" if mixture.head and "id2label" in mixture.config else ""
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        f'base = {auto}.from_pretrained("{base_name}"{labels})',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]
    text = _python(*lines)
    if task in PEFT_AUTO:
        peft_auto = f"AutoPeftModel{'For' if AUTO_CLASSES[task] else ''}{AUTO_CLASSES[task] or 'ForFeatureExtraction'}"
        text += (
            f"\n\nor, where `{base_name}` (`base_model_name_or_path` of the config) can be found under that name,\n\n"
        )
        text += _python(
            f"from peft import {peft_auto}", f'model = {peft_auto}.from_pretrained("path/to/this/folder"{labels})'
        )
    if task == "causal-lm" and not mixture.head:
        text += f"\n\n```sh\nvllm serve {base_name} --enable-lora --lora-modules mixture=path/to/this/folder\n```"
    return text


def _python(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _licenses(folders: Sequence[Path]) -> list[str]:
    """The license that each input's own card names, where it has one."""
    found = []
    for folder in folders:
        try:
            card = find_file(folder, "README.md", WloraMergeError)
            text = read_bytes(card, WloraMergeError).decode("utf-8", errors="replace") if card else ""
            match = _FRONT_MATTER.match(text[:_FRONT_CHARACTERS])
            data = parse_yaml(match[1]) if match else None
        except (WloraMergeError, ValueError):
            data = None  # a card of another's that is broken says nothing
        names = data.get("license") if isinstance(data, dict) else None
        found += [
            n for n in (names if isinstance(names, list) else [names]) if isinstance(n, str) and _LICENSE.fullmatch(n)
        ]
    return found


def _licence_note(folders: Sequence[Path]) -> str:
    licenses = sorted(set(_licenses(folders)))
    if len(licenses) < 2:
        return ""
    return f"**Licenses disagree**: the inputs name {', '.join(licenses)}. Which of them holds for this model is for you to decide."
