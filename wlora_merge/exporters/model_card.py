"""The model card of an export: README.md with the hub's metadata, the weights, and how to serve it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.tasks import get_task
from ..errors import WloraMergeError
from ..fit_options import FitOptions
from ..io.hub import at_revision
from ..io.untrusted import find_file, parse_yaml, read_bytes
from ..mixture.mixture import TRAINING_LOOP, Mixture
from .report import CAPTIONS, FIGURES
from .report import FILE as REPORT
from .serving import serving

LIBRARIES = {"dense": "transformers", "lora": "peft", "onnx": "transformers.js"}
KNOWN_METRICS = ("accuracy", "f1", "exact_match", "rouge", "bleu", "perplexity", "squad", "seqeval")
"""What the hub calls metrics that a fit may report."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")
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
    fronts = [_front(folder) for folder in folders]
    measured = measured or {}
    parts = [
        f"---\n{_metadata(mixture, kind, base_name, fronts)}\n---",
        _intro(mixture, kind, base_name),
        _weights(mixture),
        _metrics(mixture.metrics),
        _measured(kind, measured),
        note,
        _figures(figures),
        "## How to serve it",
        serving(mixture, kind, base_name, measured.get("r"), (options or {}).get("onnx_runtime")),
        _commands(mixture, kind, base_name, options or {}),
        _license_note([base_name, *mixture.adapter_names], fronts),
    ]
    (folder / "README.md").write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")


def _metadata(mixture: Mixture, kind: str, base_name: str, fronts: Sequence[Mapping[str, Any]]) -> str:
    from huggingface_hub import ModelCardData

    sources = [] if kind == "lora" else [a.source for a in mixture.adapters if not Path(a.source).is_absolute()]
    on_hub = list(dict.fromkeys(name for name in [base_name, *sources] if _HUB_ID.fullmatch(name)))
    licenses = {name for front in fronts for name in _named(front, "license", _LICENSE)}
    datasets = dict.fromkeys(name for front in fronts[1:] for name in _named(front, "datasets", _DATASET))
    metric = mixture.metrics.get("metric")
    data = ModelCardData(
        base_model=on_hub or None,
        library_name=LIBRARIES[kind],
        license=licenses.pop() if len(licenses) == 1 and _named(next(iter(fronts), {}), "license", _LICENSE) else None,
        datasets=list(datasets) or None,
        metrics=[metric] if metric in KNOWN_METRICS else None,
        tags=["merge", "lora", "wlora-merge"],
        pipeline_tag=get_task(mixture.task).pipeline_tag if mixture.task else None,
        base_model_relation=("adapter" if kind == "lora" else "merge") if on_hub else None,
    )
    return str(data.to_yaml()).strip()


def _measured(kind: str, measured: Mapping[str, Any]) -> str:
    if kind == "lora" and "r" in measured:
        return (
            f"One LoRA of r = lora_alpha = {measured['r']}: relative error {measured['relative_error']:.2e} against the mixture, "
            f"{measured['energy_kept']:.4%} of its squared norm kept."
        )
    if kind == "onnx" and "largest_difference" in measured:
        said = f"ONNX Runtime's outputs are within {measured['largest_difference']:.2e} of PyTorch's."
        if q := measured.get("quantized"):
            said += (
                f" `{q['file']}` has quantized weights: its outputs are off by {q['relative']:.2e} of the largest, the choice is the "
                f"same in {q['same_choice']:.1%}; transformers.js loads it with `dtype: '{Path(q['file']).stem.rpartition('_')[2]}'`."
            )
        return said
    return ""


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
        f"({_composition(mixture)}). "
        "`wlora_merge.json` lists every input and output with its sha256; `wlora-merge verify` checks them."
    )


def _composition(mixture: Mixture) -> str:
    """How the mixture weights came about."""
    paper = "[Asadi et al. 2024](https://arxiv.org/abs/2402.15414)"
    method = mixture.data.get("method")
    if method == "given":
        return "with mixture weights that were given"
    if method == "uniform":
        return f"uniform composition, {paper}"
    if method == TRAINING_LOOP:
        return f"with mixture weights learned in a training loop; learned composition, {paper}"
    kept = mixture.metrics.get("kept", "learned")
    if new := mixture.data.get("new_adapter"):
        return (
            f"learned composition, {paper}, with a new adapter of rank {new['r']} (`{new['name']}`) trained beside them"
        )
    return f"learned composition, {paper}" if kept == "learned" else f"what its fit kept: {kept}; {paper}"


def _weights(mixture: Mixture) -> str:
    mean = mixture.mixture_weights.double().mean(0).tolist()
    low, high = mixture.mixture_weights.double().amin(0).tolist(), mixture.mixture_weights.double().amax(0).tolist()
    rows = [
        f"| {name} | {m:.4f} | {a:.4f} | {b:.4f} |"
        for name, m, a, b in zip(mixture.adapter_names, mean, low, high, strict=True)
    ]
    return (
        f"## Mixture weights\n\nGranularity `{mixture.granularity}` ({mixture.group_count}), normalize "
        f"`{mixture.normalize}`, delta_scale {mixture.delta_scale:g}.\n\n"
        "| adapter | mean over groups | lowest | highest |\n|---|---|---|---|\n" + "\n".join(rows)
    )


def judged_on(metrics: Mapping[str, Any]) -> str:
    """What a fit's scores were measured on, as a title."""
    return "Held out" if (metrics.get("held_out") or {}).get("examples") else "On the shots themselves"


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
    return f"## Metrics: {judged_on(metrics).lower()}\n\n{metrics.get('note', '')}\n\n" + head + "\n".join(rows)


def _figures(names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = [f"![{CAPTIONS[name]}]({FIGURES}/{name}.png)" for name in names]
    return f"## Report\n\n[{REPORT}]({REPORT}) has these and the provenance.\n\n" + "\n\n".join(shown)


def _commands(mixture: Mixture, kind: str, base_name: str, options: Mapping[str, Any]) -> str:
    """The commands that make this folder again; local inputs stand under their own names."""
    data, fitted, looped = mixture.data, "fit" in mixture.data, mixture.data.get("method") == TRAINING_LOOP
    words = ["wlora-merge", "fit" if fitted else "mix", "--base", at_revision(base_name, mixture.base.revision)]
    trained = data.get("new_adapter") or {}
    given = {ref.name: ref.spec for ref in mixture.adapters}
    given.pop(str(trained.get("name")), None)  # the fit makes it
    for name, source in (data.get("adapters") or given).items():  # those too that the fit did not keep
        words += ["--adapter", f"{name}={source}"]
    if mixture.task:
        words += ["--task", mixture.task]
    if fitted:
        defaults = asdict(FitOptions())
        changed = {key: value for key, value in data["fit"].items() if key in defaults and value != defaults[key]}
        words += ["--data", str(data["data"]["name"]), *_flags({"split": data["data"].get("split")}), *_flags(changed)]
        for name, column in (data.get("columns") or {}).items():
            words += ["--column", f"{name}={column}"]
        if judged := (mixture.metrics.get("held_out") or {}).get("from"):
            words += _flags({"eval_data": str(judged["name"]), "eval_split": judged.get("split")})
    else:
        rows = mixture.mixture_weights.double()
        if mixture.normalize == "none":
            words += ["--weights", ",".join(f"{w:.9g}" for w in rows[0].tolist())]
        words += _flags({"normalize": mixture.normalize} if mixture.normalize == "present" else {})
        words += _flags({"delta_scale": mixture.delta_scale} if mixture.delta_scale != 1 else {})
    words += _flags({"modules_to_save": mixture.modules_to_save, "resize_vocab": mixture.resize_vocab})
    words += _flags({"base_is_residual": data.get("residual")})
    export = ["wlora-merge", "export", "mixture", "--format", kind]
    renamed = {"max_shard_bytes": "max_shard_size", "server": "for"}
    export += _flags({renamed.get(key, key): value for key, value in options.items() if key != "format"})
    lines = [[*export, "--out", "served"], ["wlora-merge", "verify", "served"]]
    lines = lines if looped else [[*words, "--out", "mixture"], *lines]
    loop = "Its mixture weights were learned in a training loop of its maker's own (`wlora_merge.attach`); no command makes "
    loop += (
        "the mixture folder again, which that loop saved with `Mixture.from_model(model).save`. From that folder:\n\n"
    )
    text = "\n".join(" ".join(map(shlex.quote, line)) for line in lines)
    return (
        f"## How it was made\n\n{loop if looped else ''}```sh\n"
        + text
        + "\n```\n\nwith the inputs that `wlora_merge.json` lists and their sha256; "
        "the versions stand there too."
    )


def _flags(table: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in table.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, ",".join(f"{x:.12g}" for x in value)]
        elif value is not None and value is not False:
            words += [flag, f"{value:.12g}" if isinstance(value, float) else str(value)]
    return words


def _front(folder: Path) -> dict[str, Any]:
    """The metadata of an input's own card; empty where it has none or where it is broken."""
    try:
        card = find_file(folder, "README.md", WloraMergeError)
        text = read_bytes(card, WloraMergeError).decode("utf-8", errors="replace") if card else ""
        match = _FRONT_MATTER.match(text[:_FRONT_CHARACTERS])
        data = parse_yaml(match[1]) if match else None
    except (WloraMergeError, ValueError):
        return {}  # a card of another's that is broken says nothing
    return data if isinstance(data, dict) else {}


def _named(front: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> list[str]:
    """The value or values of one key of an input's metadata."""
    value = front.get(key)
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and pattern.fullmatch(v)]


def _license_note(owners: Sequence[str], fronts: Sequence[Mapping[str, Any]]) -> str:
    """The license of every input that names one, and a warning where they are not one."""
    found = {
        owner: names
        for owner, front in zip(owners, fronts, strict=False)
        if (names := _named(front, "license", _LICENSE))
    }
    licenses = sorted({name for names in found.values() for name in names})
    if not licenses:
        return ""
    rows = "\n".join(f"- {owner}: {', '.join(names)}" for owner, names in found.items())
    silent = len(fronts) - len(found)
    text = f"## Licenses\n\n{rows}" + (f"\n- {silent} of {len(fronts)} inputs name none" if silent else "")
    if len(licenses) > 1:
        text += (
            f"\n\n**Licenses disagree**: the inputs name {', '.join(licenses)}. Which of them holds for this model is for you "
            "to decide."
        )
    return text
