"""What servers take, and how each kind of export is loaded and served: text for a card, and checks before an export.

vLLM's rules: https://docs.vllm.ai/en/latest/features/lora.html and `vllm/config/lora.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.deltas import ModuleDelta, TensorDelta
from ..adapters.layouts import Layout
from ..data.task import Task
from ..data.tasks import get_task
from ..errors import UnsupportedError
from ..mixture.mixture import Mixture

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` accepts; an adapter's r may be anything up to it."""
FOLDER = "path/to/this/folder"
TGI = "docker run --gpus all --shm-size 1g -p 8080:80"
TGI_IMAGE = "ghcr.io/huggingface/text-generation-inference"


# ---------------------------------------------------------------------------------------------- what servers take


def check_server(server: str, mixture: Mixture, deltas: Sequence[ModuleDelta | TensorDelta]) -> None:
    """Refuse what a server would not load as one LoRA.

    Raises:
        UnsupportedError: a trained head, or a target module that the server has no LoRA for.
    """
    if mixture.head:
        raise UnsupportedError(
            f"--for {server}: the mixture has a trained head ({min(mixture.head)}), and vLLM loads no modules_to_save: "
            "export with --format dense."
        )
    for delta in deltas:
        layout = delta.layout if isinstance(delta, ModuleDelta) and delta.R else None
        if layout is not Layout.LINEAR or len(delta.shape) != 2:
            kind = layout.value if layout is not None else "whole tensor"
            raise UnsupportedError(
                f"--for {server}: {delta.module!r} is a {kind} {list(delta.shape)}, and vLLM has LoRA for linear layers alone: "
                "leave out the adapters that change it, or export with --format dense."
            )


def check_rank(r: int, *, server: str | None, max_rank: int | None, exact: bool) -> None:
    """Refuse a rank that a server would not take.

    Args:
        r: the uniform rank of the LoRA.
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


# ------------------------------------------------------------------------------------------------ how to serve it


def serving(mixture: Mixture, kind: str, base_name: str, r: int | None = None, runtime: str | None = None) -> str:
    """The lines that load and serve an export of this kind, as Markdown.

    Args:
        r: of a LoRA: its rank.
        runtime: of an ONNX export: `genai` for a folder of onnxruntime-genai.
    """
    task = get_task(mixture.task)
    if kind == "dense":
        return _dense(task)
    if kind == "lora":
        return _lora(mixture, task, base_name, r)
    return _genai() if runtime == "genai" else _onnx(task)


def _genai() -> str:
    lines = (
        "import onnxruntime_genai as og",
        f'model = og.Model("{FOLDER}")',
        "tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)",
        "generator = og.Generator(model, parameters)",
        'generator.append_tokens(tokenizer.encode("..."))',
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
    )
    return "onnxruntime-genai:\n\n" + _code("python", *lines)


def _dense(task: Task) -> str:
    auto = task.auto_class_name
    parts = [
        "transformers:",
        _code("python", f"from transformers import {auto}", f'model = {auto}.from_pretrained("{FOLDER}")'),
    ]
    if "vllm" in task.servers:
        parts += ["vLLM:", _code("sh", f"vllm serve {FOLDER}")]
    if "tgi" in task.servers:
        parts += ["TGI:", _code("sh", f"{TGI} -v $PWD/{FOLDER}:/model {TGI_IMAGE} --model-id /model")]
    return "\n\n".join(parts)


def _lora(mixture: Mixture, task: Task, base_name: str, r: int | None) -> str:
    auto, peft_auto = task.auto_class_name, task.peft_auto_class_name
    table = {int(key): name for key, name in mixture.config.get("id2label", {}).items()} if mixture.head else {}
    named = [f"id2label = {table}"] if table else []
    labels = ", id2label=id2label, label2id={v: k for k, v in id2label.items()}" if table else ""
    lines = (
        "from peft import PeftModel",
        f"from transformers import {auto}",
        *(
            []
            if "/" in base_name
            else ["# a local base: its name works where its folder lies beside you, else say its path"]
        ),
        *named,
        f'base = {auto}.from_pretrained("{base_name}"{labels})',
        f'model = PeftModel.from_pretrained(base, "{FOLDER}")',
    )
    parts = ["PEFT:", _code("python", *lines)]
    if peft_auto is not None:
        parts += [
            f"or, where `{base_name}` (`base_model_name_or_path` of the config) can be found under that name,",
            _code(
                "python",
                f"from peft import {peft_auto}",
                *named,
                f'model = {peft_auto}.from_pretrained("{FOLDER}"{labels})',
            ),
        ]
    fit = vllm_rank(r) if r is not None else None
    if "vllm" in task.servers and not mixture.head and fit is not None:
        lora = f"--enable-lora --max-lora-rank {fit} --lora-modules mixture={FOLDER}"
        parts += ["vLLM:", _code("sh", f"vllm serve {base_name} {lora}")]
        mount = f"-v $PWD/{FOLDER}:/mixture -e LORA_ADAPTERS=mixture=/mixture"
        parts += ["TGI:", _code("sh", f"{TGI} {mount} {TGI_IMAGE} --model-id {base_name}")]
    return "\n\n".join(parts)


def _onnx(task: Task) -> str:
    graphs = (
        {"encoder": "encoder_model", "decoder": "decoder_model_merged"}
        if task.is_encoder_decoder
        else {"session": "model"}
    )
    sessions = [f'{name} = onnxruntime.InferenceSession("{FOLDER}/onnx/{file}.onnx")' for name, file in graphs.items()]
    run = _code("python", "import onnxruntime", *sessions)
    js = (
        "import { pipeline } from '@huggingface/transformers';",
        f"const run = await pipeline('{task.pipeline_tag}', '{FOLDER}', {{ dtype: 'fp32' }});",
    )
    return "\n\n".join(["ONNX Runtime:", run, "transformers.js:", _code("js", *js)])


def _code(language: str, *lines: str) -> str:
    return f"```{language}\n" + "\n".join(lines) + "\n```"
