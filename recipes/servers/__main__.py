"""Real programs load exports, and are compared with transformers: python recipes/servers [PROGRAM ...]

Each program has an environment of its own (`.servers/NAME`), runs the code of the export's own model card there, and gives greedy
texts, the probabilities of labels, or embeddings. A table says how far they are from what transformers gives on the same export.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exports
from environments import HERE, NODE, PLACE, environment, python_of
from rich.console import Console
from rich.table import Table

FOLDER = "path/to/this/folder"
"""What a card calls the folder that it stands in."""
QUICK = ("onnxruntime", "openvino")
"""What installs in under a minute."""


SCRIPTS = {
    "transformers-4": "hf.py", "peft-0.13": "hf.py", "peft": "hf.py", "vllm": "vllm_server.py", "llama.cpp": "gguf_model.py",
    "ctranslate2": "ct2.py", "lm-eval": "lm_eval_harness.py", "sentence-transformers": "st.py",
    "sentence-transformers-onnx": "st.py", "onnxruntime": "ort.py", "optimum": "optimum_onnx.py", "openvino": "ov.py",
    "onnxruntime-genai": "genai.py", NODE: "node.mjs",
}  # fmt: skip
"""The script in `ask` that asks each program."""


@dataclass(frozen=True)
class Ask:
    """One export that one program is asked to load.

    Attributes:
        program: in `.servers`, and the script in `ask` without its ending.
        title: of the program's part in the card.
        export: the folder.
        expected: the key of expected.json.
        most: how far scores and embeddings may be; of texts, how many of the four may differ.
        script: another script in `ask` than SCRIPTS has.
        options: for it.
    """

    program: str
    title: str
    export: str
    expected: str
    most: float = 1e-4
    script: str = ""
    options: tuple[str, ...] = ()


def _asks() -> list[Ask]:
    vllm, js, chromium = "vLLM", "transformers.js", "transformers.js in Chromium"
    return [
        Ask("transformers-4", "transformers", "lm", "texts", 0),
        Ask("transformers-4", "transformers", "classes", "classes"),
        Ask("peft-0.13", "PEFT", "lm-lora", "texts", 0),
        Ask("peft-0.13", "PEFT", "classes-lora", "first-token"),
        Ask("peft", "PEFT", "lm-lora", "texts", 0),
        Ask("peft", "PEFT", "classes-lora", "first-token"),
        Ask("vllm", vllm, "lm", "texts", 0),
        Ask("vllm", vllm, "lm-lora", "texts", 1),
        Ask("vllm", vllm, "lm-lora-12", "texts-12", 1),
        Ask("vllm", vllm, "classes", "classes"),
        Ask("vllm", vllm, "first-token", "first-token"),
        Ask("vllm", vllm, "lm-classes-lora", "lm-classes", 1e-3),
        Ask("vllm", vllm, "embeddings", "embeddings"),
        Ask("llama.cpp", "llama.cpp", "lm", "texts", 1),
        Ask("llama.cpp", "llama.cpp", "lm-lora", "texts", 1),
        Ask("ctranslate2", "CTranslate2", "lm", "texts", 0),
        Ask("lm-eval", "lm-evaluation-harness", "lm", "texts", 0),
        Ask("lm-eval", "lm-evaluation-harness", "lm-lora", "texts", 0),
        Ask("sentence-transformers", "sentence-transformers", "embeddings", "embeddings"),
        Ask("sentence-transformers-onnx", "sentence-transformers", "embeddings-onnx", "embeddings"),
        Ask("onnxruntime", "ONNX Runtime", "lm-onnx", "texts", 0),
        Ask("onnxruntime", "ONNX Runtime", "classes-onnx", "classes"),
        Ask("onnxruntime", "ONNX Runtime", "embeddings-onnx", "embeddings"),
        Ask("optimum", "Optimum", "lm-onnx", "texts", 0),
        Ask("optimum", "Optimum", "classes-onnx", "classes"),
        Ask("optimum", "Optimum", "embeddings-onnx", "embeddings"),
        Ask("openvino", "OpenVINO", "lm-onnx", "texts", 1),
        Ask("openvino", "OpenVINO", "classes-onnx", "classes"),
        Ask("openvino", "OpenVINO", "embeddings-onnx", "embeddings"),
        Ask("onnxruntime-genai", "onnxruntime-genai", "lm-genai", "texts", 1),
        Ask(NODE, js, "lm-onnx", "texts", 0),
        Ask(NODE, js, "classes-onnx", "classes"),
        Ask(NODE, js, "embeddings-onnx", "embeddings"),
        Ask(NODE, js, "lm-onnx-fp16", "texts", 1),
        Ask(NODE, js, "classes-onnx", "classes", 0.1, options=("q8",)),
        Ask(NODE, js, "lm-onnx", "texts", 2, options=("q8",)),
        Ask(NODE, chromium, "lm-onnx", "texts", 0, "chromium.mjs"),
        Ask(NODE, chromium, "classes-onnx", "classes", script="chromium.mjs"),
        Ask(NODE, chromium, "classes-onnx", "classes", 0.1, "chromium.mjs", ("q8",)),
        Ask(NODE, chromium, "lm-onnx-fp16", "texts", 1, "chromium.mjs"),
    ]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a program gave: the largest difference, whether it is small enough, and how long loading took."""

    ask: Ask
    version: str
    seconds: float
    off: str
    agrees: bool


def main() -> None:
    """Ask each program, print the table, and end with 1 where one disagrees or cannot be asked."""
    parser = argparse.ArgumentParser(prog="recipes/servers", description=__doc__.partition("\n")[0])
    names = list(dict.fromkeys(ask.program for ask in _asks()))
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"any of {', '.join(names)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help=f"those that install in under a minute: {', '.join(QUICK)}"
    )
    parser.add_argument(
        "--real", type=Path, default=os.environ.get("WLORA_MERGE_REAL_MODELS", ""), help="both base models"
    )
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared", help="the folder with zoo and data")
    given = parser.parse_args()
    if unknown := set(given.programs) - {*names}:
        parser.error(f"{min(unknown)!r} is not one of {', '.join(names)}")
    wanted = given.programs or (list(QUICK) if given.quick else names)
    models = exports.Models(given.real, given.shared)
    if not models.smollm2.is_dir() or not (models.shared / "zoo").is_dir():
        print(f"skipped: the base models are not in {models.real}, or the zoo is not in {models.shared}")
        return
    out = PLACE / "exports"
    asks = [ask for ask in _asks() if ask.program in wanted]
    keys = {ask.expected for ask in asks}
    exports.make(models, out, {ask.export for ask in asks} | {exports.SOURCES[key] for key in keys})
    expected = exports.expectations(models, out, keys)
    answers: list[Answer] = []
    for ask in asks:
        answers.append(_asked(ask, models, out, expected))
        print(f"  {answers[-1].off}, loaded in {answers[-1].seconds:.1f} s", flush=True)
    _print(answers)
    sys.exit(not all(answer.agrees for answer in answers))


def _asked(ask: Ask, models: exports.Models, out: Path, expected: Mapping[str, Any]) -> Answer:
    print(f"{ask.program}: {' '.join((ask.export, *ask.options))}", flush=True)
    try:
        folder = environment(ask.program)
    except subprocess.CalledProcessError as error:
        return Answer(ask, "", 0.0, f"its environment cannot be made: {error}"[:160], False)
    base = models.minilm if ask.export.startswith(("classes", "first", "emb")) else models.smollm2
    if ask.program == "peft-0.13" and base == models.smollm2:
        base = out / exports.OLDER_BASE
    with tempfile.TemporaryDirectory(dir=PLACE, prefix="place-") as place:
        request = {
            "folder": str(out / ask.export), "base": str(base), "code": snippets(out / ask.export, ask.title, str(base)),
            "kind": "texts" if ask.expected.startswith("texts") else ask.expected, "options": ask.options,
            "prompts": exports.PROMPTS, "texts": exports.TEXTS, "new_tokens": exports.NEW_TOKENS, "place": place,
            "environment": str(folder), "labels": list(expected[ask.expected][0]),
        }  # fmt: skip
        file = Path(place) / "request.json"
        file.write_text(json.dumps(request))
        script = HERE / "ask" / (ask.script or SCRIPTS[ask.program])
        command = ["node", str(script)] if ask.program == NODE else [str(python_of(ask.program)), str(script)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [*command, str(file)], cwd=place, env=os.environ | offline, capture_output=True, text=True
        )
    if done.returncode:
        print(done.stdout[-1000:], done.stderr[-3000:], file=sys.stderr)
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Answer(ask, "", 0.0, said[:160], False)
    got = json.loads(done.stdout.strip().splitlines()[-1])
    off, agrees = compared(got["answers"], expected[ask.expected], ask.most)
    return Answer(ask, got["version"], got["seconds"], off, agrees)


def snippets(folder: Path, title: str, base: str) -> list[str]:
    """The code of a program's part of a card, with the folder and the base where they lie."""
    text = (folder / "README.md").read_text(encoding="utf-8").partition("## How to serve it")[2].partition("\n## ")[0]
    blocks = re.split(r"```\w*\n", text)  # prose and code by turns
    found, part = [], ""
    for prose, code in zip(blocks[::2], blocks[1::2], strict=False):
        titles = re.findall(r"^(\S[^\n]*):$", prose, flags=re.MULTILINE)
        part = titles[-1] if titles else part
        if part == title.removesuffix(" in Chromium"):
            found.append(code.rstrip())
    if not found:
        raise SystemExit(f"{folder / 'README.md'}: its card has no part for {title}")
    name = "minilm" if base.endswith("minilm") else "smollm2"
    return [re.sub(rf"(?<![\w/]){name}(?![\w/])", base, code.replace(FOLDER, str(folder))) for code in found]


def compared(got: Sequence[Any], wanted: Sequence[Any], most: float) -> tuple[str, bool]:
    """How far answers are from those expected, in words, and whether that is near enough.

    Args:
        got: texts, {label: probability} or vectors, one for each input.
        wanted: the same.
        most: the number of texts that may differ, or the largest difference of a number.
    """
    if isinstance(wanted[0], str):
        same = sum(a.rstrip() == b.rstrip() for a, b in zip(got, wanted, strict=True))
        return f"{same} of {len(wanted)} texts", len(wanted) - same <= most
    rows = [
        (a.values(), [b[k] for k in a]) if isinstance(b, dict) else (a, b) for a, b in zip(got, wanted, strict=True)
    ]
    off = max(abs(x - y) for a, b in rows for x, y in zip(a, b, strict=True))
    return f"{off:.1e}", off <= most


def _print(answers: Sequence[Answer]) -> None:
    table = Table("program", "version", "export", "seconds to load", "largest difference", "agrees")
    for a in answers:
        export = " ".join((a.ask.export, *a.ask.options))
        table.add_row(a.ask.title, a.version, export, f"{a.seconds:.1f}", a.off, "yes" if a.agrees else "[red]no")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
