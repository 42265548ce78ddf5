"""The model of a fit: the base with the task's head, in whole or quantized, on its device, with the adapters attached."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .adapters import Adapter
from .base_model import BaseModel
from .check import quiet_libraries
from .errors import MixtureError, UnsupportedError
from .fit_options import FitOptions
from .ranks import Team
from .tasks import Task

if TYPE_CHECKING:
    from torch import nn

    from .labels import LabelSet


def load_model(
    base: BaseModel,
    adapters: list[Adapter],
    task: Task,
    labels: LabelSet | None,
    processor: Any,
    options: FitOptions,
    modules_to_save: str | None,
    team: Team,
) -> tuple[nn.Module, list[str], LabelSet | None]:
    """The model with its adapters attached; the names of the head's modules, where it is new; the labels in the head's order."""
    import transformers

    from .attachment import attach

    sharded = team.size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if sharded:  # otherwise transformers loads nothing on ranks above 0
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    transformers.set_seed(options.seed)
    model, new, labels = _load(base, task, labels, processor, options)
    head = sorted({name.rpartition(".")[0] for name in new})
    attach(
        model,
        adapters,
        granularity=options.granularity or "module",
        normalize=options.normalize or "all",
        delta_scale=options.delta_scale,
        temperature=options.temperature,
        head=head,
        modules_to_save=modules_to_save,
    )
    if sharded:
        _shard(model, device_of(options), team.size)
    elif not options.quantize:
        model.to(device_of(options))
    return model, head, labels


def device_of(options: FitOptions) -> str:
    """The device of this process."""
    import torch

    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise MixtureError(f"device is {name}, which torch does not find here: use --device auto.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def _shard(model: Any, device: str, size: int) -> None:
    """FSDP: every process keeps a part of each block of the base; the few trained parameters stay whole on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trained = {p for p in model.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.partition(":")[0], (size,))
    blocks = set(getattr(model, "_no_split_modules", None) or [])
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=trained)


def _quantization(base: BaseModel, task: Task, options: FitOptions) -> dict[str, Any]:
    """What `from_pretrained` needs to load the base quantized; what is not part of its body stays whole."""
    import torch
    import transformers

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("--quantize needs bitsandbytes: pip install 'wlora-merge[quantize]'.") from error
    config = transformers.AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = task.auto_class().from_config(config)
    kept = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    how = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=options.quantize == "4bit",
        load_in_8bit=options.quantize == "8bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": how, "device_map": {"": device_of(options)}}


def _load(
    base: BaseModel, task: Task, labels: LabelSet | None, processor: Any, options: FitOptions
) -> tuple[Any, list[str], LabelSet | None]:
    """The base with the task's head; the names of the parameters that are new; the labels in the head's order.

    A head that the base has for these very labels is kept, frozen; otherwise a new one is trained.
    """
    import torch

    from .labels import LabelSet

    own = _own_labels(base)
    keep = labels is not None and own is not None and set(labels.names) <= set(own) and bool(labels.names)
    if keep and labels is not None and own is not None:
        labels = LabelSet(tuple(own), labels.problem_type)
    changes = {} if keep else task.config_changes(labels, processor)
    with quiet_libraries():
        model, info = task.auto_class().from_pretrained(
            base.folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **(_quantization(base, task, options) if options.quantize else {}),
            **changes,
        )
    new = {str(key) for key in info["missing_keys"]} | {str(row[0]) for row in info["mismatched_keys"]}
    if labels is not None and not keep:
        prefix = f"{model.base_model_prefix}."
        new |= {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
        for name, module in model.named_modules():
            if name and not name.startswith(prefix) and name != model.base_model_prefix:
                model._init_weights(module)
    known = {name for name, _ in model.named_parameters()}
    return model, sorted(new & known), labels


def _own_labels(base: BaseModel) -> list[str] | None:
    """The label names of the base's own config, in the head's order; None where it has none of its own."""
    table = base.config.get("id2label")
    if not isinstance(table, dict) or not table:
        return None
    return [str(table[key]) for key in sorted(table, key=int)]
