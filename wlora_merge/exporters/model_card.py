"""The model card of an export: README.md with the hub's metadata, the weights, and how to serve it.

Its words and its layout are in model_card.md.j2; this file gathers what it says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tasks import get_task
from ..errors import WloraMergeError
from ..export_options import ExportOptions
from ..fit_options import FitOptions, FitRequest
from ..io.hub import at_revision
from ..io.untrusted import find_file, parse_yaml, read_bytes
from ..mixture.combination import SOURCES
from ..mixture.mixture import TRAINING_LOOP, Mixture
from ..onnx.js_names import dtype_for_js
from ..option_fields import flag_of
from .format import Format, Measures
from .report import CAPTIONS, FIGURES
from .report import FILE as REPORT
from .report_answer import answer
from .serving import Exported, servers_of, vllm_rank

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE, SERVING = (Path(__file__).with_name(f"{name}.md.j2") for name in ("model_card", "serving"))
FOLDER = "path/to/this/folder"
"""What a card's code calls the folder that it stands in."""
TGI = {
    "tgi": "docker run --gpus all --shm-size 1g -p 8080:80",
    "tgi_image": "ghcr.io/huggingface/text-generation-inference",
}
"""How Text Generation Inference is started."""
KNOWN_METRICS = ("accuracy", "f1", "exact_match", "rouge", "bleu", "perplexity", "squad", "seqeval")
"""What the hub calls metrics that a fit may report."""

_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENSE = re.compile(r"[\w .,()+/-]{1,100}")
_FRONT_CHARACTERS = 1 << 20
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from.

    Attributes:
        mixture: what was exported.
        format: of the export.
        base_name: what the card calls the base model.
        folders: the base's and the adapters' folders, whose cards may name a license.
        options: how the export was asked for.
        measures: what the writer measured.
        exported: what programs are asked to take.
        note: a paragraph on what is special about this export.
        figures: names of the report's figures, as in `report.CAPTIONS`.
    """

    mixture: Mixture
    format: Format
    base_name: str
    folders: Sequence[Path] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    measures: Measures = field(default_factory=Measures)
    exported: Exported = field(default_factory=Exported)
    note: str = ""
    figures: Sequence[str] = ()


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into an export folder."""
    from jinja2 import Template

    mixture, metrics = facts.mixture, facts.mixture.metrics
    fronts = [_front(folder) for folder in facts.folders]
    candidates = metrics.get("candidates") or {}
    # as ModelCard.from_template would, which imports the hub's client: as long as the rest of the card takes
    card = Template(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=_metadata(facts, fronts).to_yaml(),
        **vars(facts) | {"figures": [{"caption": CAPTIONS[n], "file": f"{FIGURES}/{n}.png"} for n in facts.figures]},
        measured=facts.measures.card(),
        serving=_serving(facts, dtype_for_js(folder)),
        **_licenses([facts.base_name, *mixture.adapter_names], fronts),
        report=REPORT,
        method=mixture.data.get("method"),
        looped=_is_looped(mixture),
        new_adapter=mixture.data.get("new_adapter"),
        kept=metrics.get("kept", "learned"),
        combined_by=SOURCES.get(mixture.combination.method, ""),
        weights=_weights(mixture),
        judged_on=mixture.judged_on,
        answer=" ".join(answer(mixture)),
        metrics_note=metrics.get("note", ""),
        candidates=candidates,
        columns=sorted({key for row in candidates.values() for key in row}),
        commands="\n".join(map(shlex.join, _commands(facts))),
    )
    (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")


def _metadata(facts: CardFacts, fronts: Sequence[Mapping[str, Any]]) -> ModelCardData:
    from huggingface_hub import ModelCardData

    mixture, is_adapter = facts.mixture, facts.format.is_adapter
    sources = [] if is_adapter else [a.source for a in mixture.adapters if not Path(a.source).is_absolute()]
    on_hub = list(dict.fromkeys(name for name in [facts.base_name, *sources] if _MODEL_ID.fullmatch(name)))
    licenses = {name for front in fronts for name in _named(front, "license", _LICENSE)}
    datasets = dict.fromkeys(name for front in fronts[1:] for name in _named(front, "datasets", _DATASET))
    metric = mixture.metrics.get("metric")
    return ModelCardData(
        base_model=on_hub or None,
        library_name=facts.format.library,
        license=licenses.pop() if len(licenses) == 1 and _named(next(iter(fronts), {}), "license", _LICENSE) else None,
        datasets=list(datasets) or None,
        metrics=[metric] if metric in KNOWN_METRICS else None,
        tags=["merge", "lora", "wlora-merge"],
        pipeline_tag=get_task(mixture.task).pipeline_tag if mixture.task else None,
        base_model_relation=("adapter" if is_adapter else "merge") if on_hub else None,
    )


def _weights(mixture: Mixture) -> list[dict[str, Any]]:
    """Of each adapter its name and its mean, lowest and highest mixture weight over the groups."""
    table = mixture.mixture_weights.double()
    numbers = zip(mixture.adapter_names, table.mean(0), table.amin(0), table.amax(0), strict=True)
    return [{"name": name, "mean": float(m), "lowest": float(a), "highest": float(b)} for name, m, a, b in numbers]


def _serving(facts: CardFacts, js_dtype: str) -> str:
    """How to load and serve it, with each program that takes it; `js_dtype` is what transformers.js calls its graphs' dtype."""
    from jinja2 import StrictUndefined, Template

    exported = facts.exported
    lines: str = Template(SERVING.read_text(encoding="utf-8"), undefined=StrictUndefined).render(
        vars(exported),
        folder=FOLDER,
        js_dtype=js_dtype,
        base_name=facts.base_name,
        task=get_task(exported.task),
        servers=list(servers_of(exported)),
        labels=_labels(facts.mixture),
        vllm_rank=vllm_rank(exported.rank) if exported.rank else None,
        **TGI,
    )
    return lines


def _labels(mixture: Mixture) -> dict[int, str]:
    """The labels of a trained head: {index: name}."""
    return {int(key): name for key, name in mixture.config.get("id2label", {}).items()} if mixture.head else {}


def _is_looped(mixture: Mixture) -> bool:
    """Whether a training loop of the user's own learned the mixture weights."""
    return mixture.data.get("method") == TRAINING_LOOP


def _commands(facts: CardFacts) -> list[list[str]]:
    """The commands that make this folder again; local inputs stand under their own names."""
    asked = _flags({key: value for key, value in facts.options.items() if key != "format"}, ExportOptions)
    export = ["wlora-merge", "export", "mixture", "--format", facts.format.name, *asked, "--out", "served"]
    made = [] if _is_looped(facts.mixture) else [_mixture_command(facts.mixture, facts.base_name)]
    return [*made, export, ["wlora-merge", "verify", "served"]]


def _mixture_command(mixture: Mixture, base_name: str) -> list[str]:
    """The `fit` or `mix` that makes the mixture."""
    data, fitted = mixture.data, "fit" in mixture.data
    trained = [data["new_adapter"]["name"]] if "new_adapter" in data else []
    given = {ref.name: ref.spec for ref in mixture.adapters if ref.name not in trained}
    words = ["wlora-merge", "fit" if fitted else "mix", "--base", at_revision(base_name, mixture.base.revision)]
    for name, source in (data.get("adapters") or given).items():  # those too that the fit did not keep
        words += ["--adapter", f"{name}={source}"]
    words += _flags({"task": mixture.task})
    words += _fit_words(mixture) if fitted else _mix_words(mixture)
    words += _flags({"modules_to_save": mixture.modules_to_save, "resize_vocab": mixture.resize_vocab})
    return [*words, *_flags({"residual": data.get("residual"), "out": "mixture"})]


def _fit_words(mixture: Mixture) -> list[str]:
    data, defaults = mixture.data, asdict(FitOptions())
    changed = {key: value for key, value in data["fit"].items() if key in defaults and value != defaults[key]}
    read = {"data": data["data"]["name"], "split": data["data"].get("split")}
    judged = mixture.metrics.get("held_out", {}).get("from")
    judges = {"eval_data": judged["name"], "eval_split": judged.get("split")} if judged else {}
    return _flags(read | changed | {"columns": data.get("columns")} | judges)


def _mix_words(mixture: Mixture) -> list[str]:
    words = []
    if mixture.normalize == "none":
        words = ["--weights", ",".join(f"{w:.9g}" for w in mixture.mixture_weights[0].tolist())]
    if mixture.normalize == "present":
        words = ["--normalize", "present"]
    how = mixture.combination
    if not how.is_linear:
        words += _flags(how.table())
    return words + _flags({"delta_scale": mixture.delta_scale if mixture.delta_scale != 1 else None})


def _flags(table: Mapping[str, Any], record: type[Any] = FitRequest) -> list[str]:
    words: list[str] = []
    for key, value in table.items():
        flag = flag_of(record, key)
        if value is True:
            words.append(flag)
        elif isinstance(value, Mapping):
            words += [word for name, part in value.items() for word in (flag, f"{name}={part}")]
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


def _licenses(owners: Sequence[str], fronts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The licenses of each input that names one, the different ones, and how many inputs name none."""
    named = {owner: _named(front, "license", _LICENSE) for owner, front in zip(owners, fronts, strict=False)}
    found = {owner: names for owner, names in named.items() if names}
    different = sorted({name for names in found.values() for name in names})
    return {"licenses": found, "different_licenses": different, "silent": len(fronts) - len(found)}
