"""Fills the generated parts of README.md and of the pages: python docs/fill.py

A part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`. What stands there comes from the tasks, the formats, the
programs that were asked, and the schemas; all else on a page is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from wlora_merge.data.tasks import FIT_TASKS, get_task
from wlora_merge.exporters.dense_format import DenseMeasures
from wlora_merge.exporters.format import Measures
from wlora_merge.exporters.lora_format import LoraMeasures
from wlora_merge.exporters.model_card import SERVING, TGI
from wlora_merge.exporters.onnx_format import GenaiMeasures, RefoldMeasures, TracedMeasures
from wlora_merge.exporters.serving import SERVERS, Server, format_words, vllm_rank

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PART = re.compile(r"(?<=<!-- generated: )(?P<name>[\w.: -]+?) -->\n.*?<!-- end of (?P=name) -->", re.DOTALL)


def filled(page: str) -> str:
    """The page with each of its parts made anew."""
    return PART.sub(lambda part: f"{part['name']} -->\n\n{_part(part['name'])}\n\n<!-- end of {part['name']} -->", page)


def _part(name: str) -> str:
    kind, _, rest = name.partition(": ")
    return PARTS[kind](rest) if rest else PARTS[kind]("")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, as Markdown."""
    cells = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *cells])


# ------------------------------------------------------------------------------------------------ tasks and formats


def _tasks(_: str) -> str:
    rows = [[f"`{name}`", ", or ".join(map(str, task.forms))] for name, task in FIT_TASKS.items()]
    return table(["task", "columns of `--data`"], rows)


GIVES = {
    "dense": "ordinary safetensors, as `save_pretrained` gives them",
    "lora": "one PEFT adapter, exact or of a given rank",
    "onnx": "`onnx/model.onnx`, with the names of Optimum and transformers.js",
    "genai": "a folder of onnxruntime-genai",
}


def _formats(_: str) -> str:
    rows = [
        [f"`{format_words(kind)}`", gives, ", ".join(map(_version, _takers(kind)))] for kind, gives in GIVES.items()
    ]
    dates = sorted({server.date for server in SERVERS.values() if server.date})
    asked = f"The versions are those that were asked on {' and '.join(dates)} (`make test-servers`)."
    rest = ", ".join(server.title for server in SERVERS.values() if not server.version)
    return f"{table(['export', 'gives', 'loaded by'], rows)}\n\n{asked} {rest} runs in its container alone, and was not asked."


def _takers(kind: str) -> list[Server]:
    return [server for server in SERVERS.values() if kind in server.takes]


def _version(server: Server) -> str:
    return f"{server.title} {server.version}".strip()


# ---------------------------------------------------------------------------------------------------------- programs

FOLDERS = {"dense": "served", "lora": "adapter", "onnx": "./graph", "genai": "genai"}
"""What the pages call an export of each kind."""
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What a LoRA on the pages belongs to: a Llama, which each of the programs knows."""
LABELS = {0: "negative", 1: "positive"}
"""Those of a head in the pages' code."""
MORE_TASKS = {
    "vllm": ("text-classification", "feature-extraction"),
    "ctranslate2": ("seq2seq-lm",),
    "onnxruntime": ("seq2seq-lm",),
    "openvino": ("seq2seq-lm",),
}
"""Program -> the tasks of which it has other code than of its first."""


def _program(name: str) -> str:
    """Version and date, which tasks it takes in which format, and the code that the model card shows."""
    server = SERVERS[name]
    asked = (
        f"Asked: {server.version}, on {server.date}."
        if server.version
        else "Not asked: it runs in its container alone."
    )
    rows = [[f"`{format_words(kind)}`", ", ".join(tasks)] for kind, tasks in server.takes.items()]
    shown = [
        f"`{format_words(kind)}`, {task}:\n\n{_code(server, kind, task)}"
        for kind, tasks in server.takes.items()
        for task in dict.fromkeys([tasks[0], *(t for t in MORE_TASKS.get(name, ()) if t in tasks)])
    ]
    return "\n\n".join([asked, table(["takes", "for"], rows), *shown])


def _code(server: Server, kind: str, name: str) -> str:
    """What a card shows of one program for an export of one kind, without the program's title."""
    from jinja2 import StrictUndefined, Template

    task = get_task(name)
    head = (
        {"architecture": "LlamaForSequenceClassification", "labels": LABELS}
        if task.has_labels
        else {"architecture": "", "labels": {}}
    )
    text: str = Template(SERVING.read_text(encoding="utf-8"), undefined=StrictUndefined).render(
        kind=kind, dtype=None, **head, js_dtype="fp32", vllm_rank=vllm_rank(16),
        folder=FOLDERS[kind], base_name=BASE, task=task, servers=[server], **TGI,
    )  # fmt: skip
    return text.removeprefix(f"{server.title}:").strip()


# -------------------------------------------------------------------------------------------------- keys of files


def _schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(resources.files("wlora_merge.cli").joinpath("schemas", name).read_text("utf-8"))
    return found


def _recipe_keys(section: str) -> str:
    """The keys of a section of a recipe; without a name, of the whole."""
    schema = _schema("recipe.schema.json")
    found = schema["properties"]
    if section:
        found = _table_in(found[section])
        schema = found
        found = found["properties"]
    rows = [
        [f"`{key}`", _type(value), "yes" if key in schema.get("required", ()) else "", _said(value, key)]
        for key, value in found.items()
    ]
    return table(["key", "value", "required", "what it does"], rows)


def _table_in(value: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the table that a value is, alone, in a list, or where it may be null too."""
    inner = value.get("items") or next((v for v in value.get("anyOf", ()) if "properties" in v), value)
    return dict(inner)


TOP = {
    "adapters": "The adapters: a table `NAME: PATH_OR_ID`, or a list of paths and hub ids.",
    "fit": "Learn the mixture; or else `mix`.",
    "mix": "Make the mixture without fitting; or else `fit`.",
    "exports": "What to write: a list with an entry for each export.",
}
"""What a recipe's own sections are, which the schema describes by their keys."""


def _said(value: Mapping[str, Any], key: str) -> str:
    return TOP.get(key) or str(value.get("description", "")).split("\n")[0]


NAMES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}


def _type(value: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"] if choice is not None)
    if "const" in value:
        return f"`{value['const']}`"
    if several := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(words for v in several if (words := _type(v)) != "null")
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    if value.get("type") == "object" and "properties" not in value:
        more = value.get("additionalProperties")
        return f"table of {_type(more)}" if isinstance(more, dict) else "table"
    return NAMES.get(str(value.get("type")), "table" if "properties" in value or "$ref" in value else "any value")


def _file_keys(file: str) -> str:
    """Every key of a file, those of its tables behind them, as `adapters[].name`."""
    schema = _schema(file)
    rows = [[f"`{path}`", kind, said] for path, kind, said in _keys(schema, schema, "")]
    return table(["key", "value", "what it is"], rows)


def _keys(schema: Mapping[str, Any], within: Mapping[str, Any], before: str) -> Iterator[tuple[str, str, str]]:
    """Path, type and meaning of each key; the mixture in a manifest is as in `mixture.json`, and stands there."""
    said = described(within)
    for key, value in within["properties"].items():
        inner, marks = _behind(value, "")
        reference = inner.get("$ref", "").rpartition("/")[2]
        words = "table" if reference else _type(value)
        path = f"{before}{key}{marks}"
        yield (
            path,
            f"list of {words}" if reference and marks == "[]" else words,
            said.get(key) or value.get("description", ""),
        )
        if reference not in ("", "MixtureRecord"):
            yield from _keys(schema, schema["$defs"][reference], f"{path}.")


def _behind(value: Mapping[str, Any], marks: str) -> tuple[Mapping[str, Any], str]:
    """What lists and tables hold in the end, and the marks of the way there: `[]` for a list, `{}` for a table."""
    if reference := next((v for v in value.get("anyOf", ()) if "$ref" in v), None):
        return reference, marks
    if value.get("type") == "array" and "$ref" in value["items"]:
        return _behind(value["items"], marks + "[]")
    if isinstance(value.get("additionalProperties"), dict) and "$ref" in value["additionalProperties"]:
        return _behind(value["additionalProperties"], marks + ".*")
    return value, marks


def described(record: Mapping[str, Any]) -> dict[str, str]:
    """Key -> what the record's docstring says of it under `Attributes:`."""
    lines = re.split(r"\n+Attributes:\n", str(record.get("description", "")))[1:]
    rows = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", lines[0], re.MULTILINE) if lines else []
    return {name: " ".join(text.split()) for name, text in rows}


def _report_keys(_: str) -> str:
    """The keys of `report` in a manifest, by the kind of export."""
    rows = []
    for kind, measures in MEASURES.items():
        schema = measures.model_json_schema()
        rows += [[kind, f"`{path}`", words, said] for path, words, said in _keys(schema, schema, "")]
    return table(["export", "key", "value", "what it is"], rows)


MEASURES: dict[str, type[Measures]] = {
    "dense": DenseMeasures,
    "lora": LoraMeasures,
    "onnx, traced": TracedMeasures,
    "onnx, refolded": RefoldMeasures,
    "onnx, genai": GenaiMeasures,
}


PARTS: dict[str, Callable[[str], str]] = {
    "tasks": _tasks,
    "formats": _formats,
    "program": _program,
    "recipe keys": _recipe_keys,
    "file keys": _file_keys,
    "report keys": _report_keys,
}


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
