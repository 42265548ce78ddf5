"""What programs take an export: data, with the version that it was checked against, and the checks before an export.

`recipes/servers` asks each of these programs; serving.md.j2 has the code that it runs, which the model card shows. The
architectures in servers.json are those of the programs' own tables; `recipes/servers/known_models.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..adapters.layouts import Layout
from ..data.tasks import TASKS
from ..errors import UnsupportedError
from ..models.names import OUTPUT_EMBEDDINGS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..export_options import ExportOptions
    from ..mixture.inputs import Inputs

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` accepts; an adapter's r may be anything up to it."""
SEQ_CLS, CAUSAL_LM = "ForSequenceClassification", "ForCausalLM"


@dataclass(frozen=True)
class Exported:
    """What a program is asked to take.

    Attributes:
        kind: `dense`, `lora`, `onnx` (graphs), or `genai` (a folder of onnxruntime-genai).
        task: what the model is for; None where nobody says.
        architecture: the class that the config names; an empty text where it names none.
        dtype: of the weights, as `--dtype` names it; None: the base's own.
        rank: that one LoRA has, where it is known.
        changes: what the adapters change.
        pools: whether the base is a sentence-transformers folder, whose `modules.json` says how its tokens are pooled.
        tied: whether the base ties its embeddings.
    """

    kind: str = "dense"
    task: str | None = None
    architecture: str = ""
    dtype: str | None = None
    rank: int | None = None
    changes: Sequence[ModuleDelta | TensorDelta] = ()
    pools: bool = False
    tied: bool = False


Check = Callable[[Exported], str]
"""Why a program does not take an export of a kind that it knows, and what to do; empty where it does."""


@dataclass(frozen=True)
class Server:
    """A program that loads exports.

    Attributes:
        name: as `--for` has it.
        title: as its makers write it.
        version: that was asked; empty where it cannot be run on a machine without its container.
        date: of that.
        takes: kind of export -> tasks.
        checks: kind of export -> what else it asks of them.
    """

    name: str
    title: str
    version: str
    date: str
    takes: Mapping[str, Sequence[str]]
    checks: Mapping[str, Check] = field(default_factory=dict)

    def refusal(self, exported: Exported) -> str:
        """Why it does not take an export, in one sentence; empty where it does."""
        if exported.kind not in self.takes:
            return (
                f"{self.title} takes {' or '.join(map(format_words, self.takes))}, not {format_words(exported.kind)}."
            )
        tasks = self.takes[exported.kind]
        if exported.task is None and len(tasks) < len(TASKS):
            return f"{self.title} takes {', '.join(tasks)}, and what the model is for cannot be told: say --task TASK."
        if exported.task is not None and exported.task not in tasks:
            return f"{self.title} takes {', '.join(tasks)} as {format_words(exported.kind)}, not {exported.task}."
        check = self.checks.get(exported.kind)
        return check(exported) if check else ""


def format_words(kind: str) -> str:
    """The options that make an export of a kind."""
    return "--format onnx --onnx-runtime genai" if kind == "genai" else f"--format {kind}"


def exported_of(inputs: Inputs, asked: ExportOptions) -> Exported:
    """What programs are asked to take, from the inputs of an export and its options."""
    mixture, base = inputs.mixture, inputs.base
    ranks = [delta.R for delta in inputs.deltas if isinstance(delta, ModuleDelta)]
    rank = asked.rank or (max(ranks, default=0) if asked.energy is None else None)
    return Exported(
        "genai" if asked.onnx_runtime == "genai" else asked.format,
        mixture.task or (_told(inputs) if asked.server is not None else None),
        str(((base.config | mixture.config).get("architectures") or [""])[0]),
        asked.dtype,
        rank=rank,
        changes=inputs.deltas,
        pools=(base.folder / "modules.json").is_file(),
        tied=base.config.get("tie_word_embeddings", True) is not False,
    )


def _told(inputs: Inputs) -> str | None:
    """The task that the inputs tell; None where they do not agree on one. It asks transformers, whose import takes seconds."""
    from ..mixture.told_task import told_task

    try:
        return told_task(inputs.base, inputs.adapters, inputs.mixture.config)
    except UnsupportedError:
        return None


def check_server(server: str, exported: Exported) -> None:
    """Refuse what a program would not load.

    Raises:
        UnsupportedError: with the reason, and what to do.
    """
    if said := SERVERS[server].refusal(exported):
        raise UnsupportedError(f"--for {server}: {said}")


def servers_of(exported: Exported) -> Iterator[Server]:
    """The programs that take an export, in the order of a card."""
    return (server for server in SERVERS.values() if not server.refusal(exported))


def check_rank(r: int, *, server: str | None, max_rank: int | None, exact: bool) -> None:
    """Refuse a rank that a server would not take.

    Args:
        r: the uniform rank of the LoRA.
        server: the server's name; None checks none.
        max_rank: what the server was started with (vLLM: `--max-lora-rank`); None: the highest that it can be.
        exact: whether r came from the adapters and not from the user.

    Raises:
        UnsupportedError: with the rank to ask for, or the value to start the server with.
    """
    if server == "vllm" and max_rank is not None and max_rank not in VLLM_RANKS:
        raise UnsupportedError(
            f"--max-rank {max_rank}: vLLM's --max-lora-rank is one of {', '.join(map(str, VLLM_RANKS))}."
        )
    limit = max_rank if max_rank is not None else VLLM_RANKS[-1] if server == "vllm" else r
    if r > limit:
        why = "the adapters' ranks add up to it" if exact else "as asked for"
        start = f", or start the server with --max-lora-rank {fit}" if (fit := vllm_rank(r)) else ""
        raise UnsupportedError(
            f"the LoRA would have r = {r} ({why}), and the server takes at most {limit}: give --rank {limit} for the best "
            f"approximation{start}."
        )


def vllm_rank(r: int) -> int | None:
    """The smallest `--max-lora-rank` of vLLM that holds r; None where none does."""
    return next((rank for rank in VLLM_RANKS if rank >= r), None)


# ------------------------------------------------------------------------------------------------------- what each asks


@cache
def known_models() -> dict[str, dict[str, list[str]]]:
    """Program -> kind -> the architectures that it knows, as its own tables have them."""
    table: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("servers.json").read_text("utf-8"))
    return table


def _knows(server: str, kind: str, exported: Exported, like: Callable[[str], str] = lambda name: name) -> bool:
    names = known_models()[server][kind]
    return not exported.architecture or exported.architecture in names or like(exported.architecture) in names


def _as_causal(architecture: str) -> str:
    """The class that vLLM makes a classifier of, where it has none of that name."""
    return architecture.replace(SEQ_CLS, CAUSAL_LM)


def _vllm(exported: Exported) -> str:
    return "" if _knows("vllm", "dense", exported, _as_causal) else f"vLLM has no {exported.architecture}."


def _vllm_lora(exported: Exported) -> str:
    if unknown := _vllm(exported):
        return unknown
    if not _knows("vllm", "lora", exported, _as_causal):
        return f"vLLM has no LoRA for {exported.architecture}: export with --format dense."
    for delta in exported.changes:
        layout = delta.layout if isinstance(delta, ModuleDelta) and delta.R else None
        linear = layout is Layout.LINEAR and len(delta.shape) == 2
        if not linear and layout is not Layout.EMBEDDING:
            kind = layout.value if layout is not None else "whole tensor"
            return (
                f"{delta.module!r} is a {kind} {list(delta.shape)}, and vLLM has LoRA for linear layers and embeddings alone: leave "
                "out the adapters that change it, or export with --format dense."
            )
    if exported.rank is not None and vllm_rank(exported.rank) is None:
        return f"r = {exported.rank}, and vLLM takes at most {VLLM_RANKS[-1]}: give --rank {VLLM_RANKS[-1]}."
    return ""


def _llama_cpp(exported: Exported) -> str:
    known = _knows("llama.cpp", "dense", exported)
    return "" if known else f"llama.cpp's converter has no {exported.architecture}."


def _llama_cpp_lora(exported: Exported) -> str:
    for delta in exported.changes:
        last = delta.module.rpartition(".")[2]
        embeds = (isinstance(delta, ModuleDelta) and delta.layout is Layout.EMBEDDING) or last in OUTPUT_EMBEDDINGS
        if embeds and exported.tied:
            return f"{delta.module!r} is tied, and llama.cpp has no LoRA for it: export with --format dense."
    return _llama_cpp(exported)


def _ctranslate2(exported: Exported) -> str:
    known = _knows("ctranslate2", "dense", exported)
    return "" if known else f"CTranslate2's converter has no {exported.architecture}."


def _sentence_transformers(exported: Exported) -> str:
    return (
        ""
        if exported.pools
        else "the base has no modules.json, so sentence-transformers would not know how its tokens are pooled."
    )


ALL = tuple(TASKS)
LM = tuple(name for name, task in TASKS.items() if task.is_decoder)
SEQ2SEQ = tuple(name for name, task in TASKS.items() if task.is_encoder_decoder)
CLASSES = tuple(name for name, task in TASKS.items() if task.classifies_examples and not task.takes_images)
TAGS = tuple(name for name, task in TASKS.items() if task.has_labels and not task.classifies_examples)
BODY = tuple(name for name, task in TASKS.items() if task.is_body)
DATE = "2026-12-01"
SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Server("transformers", "transformers", "4.57.6 and 5.23.0", DATE, {"dense": ALL}),
        Server("peft", "PEFT", "0.13.2 and 0.21.2", DATE, {"lora": ALL}),
        Server(
            "sentence-transformers",
            "sentence-transformers",
            "6.2.0",
            DATE,
            {"dense": BODY, "onnx": BODY},
            dict.fromkeys(("dense", "onnx"), _sentence_transformers),
        ),
        Server(
            "vllm",
            "vLLM",
            "0.32.0",
            DATE,
            {
                "dense": (*LM, *CLASSES, *TAGS, *BODY),
                "lora": (*LM, *CLASSES),
            },
            {"dense": _vllm, "lora": _vllm_lora},
        ),
        Server("tgi", "TGI", "", "", {"dense": (*LM, *SEQ2SEQ), "lora": LM}),
        Server(
            "llama.cpp",
            "llama.cpp",
            "0.3.36",
            DATE,
            {"dense": LM, "lora": LM},
            {"dense": _llama_cpp, "lora": _llama_cpp_lora},
        ),
        Server(
            "ctranslate2",
            "CTranslate2",
            "4.8.5",
            DATE,
            {"dense": (*LM, *SEQ2SEQ)},
            {"dense": _ctranslate2},
        ),
        Server("lm-eval", "lm-evaluation-harness", "0.4.13", DATE, {"dense": LM, "lora": LM}),
        Server("onnxruntime", "ONNX Runtime", "1.32.0", DATE, {"onnx": ALL}),
        Server("optimum", "Optimum", "0.1.0", DATE, {"onnx": ALL}),
        Server("openvino", "OpenVINO", "2026.4.1", DATE, {"onnx": ALL}),
        Server("transformers.js", "transformers.js", "4.3.1", DATE, {"onnx": ALL}),
        Server("onnxruntime-genai", "onnxruntime-genai", "0.18.0", DATE, {"genai": LM}),
    )
}
