"""The model of a fit: the base with the task's head, in whole or quantized, on its device, with the adapters attached."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..constants import REGRESSION
from ..data.labels import spelling
from ..data.task import Task, token_limit
from ..distributed import Team
from ..errors import BaseModelError, MixtureError, UnsupportedError, WloraMergeWarning
from ..fit_options import FitOptions
from ..models.base_model import BaseModel
from ..models.loading import LoadingReport, class_for, load
from ..models.module_tree import empty_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.labels import LabelSet
    from ..mixture.mixture import Mixture

SHOWN = 4
"""How many names of classes a message shows."""
POSITIONS = ("position_embeddings", "position_embedding", "wpe", "embed_positions", "positions_embed")
"""How models call their table of learned positions."""


def attached_model(
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
    from ..mixture.attach import attach_loaded
    from ..mixture.attachment import attachment_of

    sharded = team.size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if sharded and options.quantize == "8bit":
        raise UnsupportedError(
            "--quantize 8bit and FSDP: bitsandbytes keeps a weight's scales beside it, where FSDP does not find them; use --quantize "
            "4bit, or processes without FSDP."
        )
    if sharded:  # otherwise transformers loads nothing on ranks above 0
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    model, new, labels = _load(base, task, labels, processor, options)
    head = sorted({name.rpartition(".")[0] for name in new})
    if options.precision == "bf16":
        _widen(model, head)
    combined = None
    if options.combination:
        combined, alone = _combined(base, adapters, task, new, options, modules_to_save)
        adapters = [*adapters, alone]
    attach_loaded(
        model,
        adapters,
        base,
        granularity=options.granularity or "module",
        normalize=options.normalize or "all",
        delta_scale=1.0 if options.delta_scale is None else options.delta_scale,
        temperature=options.temperature,
        head=head,
        modules_to_save=modules_to_save,
    )
    attachment_of(model).combined = combined
    if sharded:
        _shard(model, device_of(options), team.size)
    elif not options.quantize:
        model.to(device_of(options))
    return model, head, labels


def _combined(
    base: BaseModel,
    adapters: list[Adapter],
    task: Task,
    new: Collection[str],
    options: FitOptions,
    modules_to_save: str | None,
) -> tuple[Mixture, Adapter]:
    """The adapters combined as `mix` does it, and that as one adapter more; the tensors of a new head replace theirs."""
    from ..mixture.combined_adapter import combined_adapter
    from ..mixture.inputs import stacked_inputs
    from ..mixture.mix import mix

    left = [replace(a, tensors={name: t for name, t in a.tensors.items() if name not in new}) for a in adapters]
    mixture = mix(base.folder, left, task=task.name, modules_to_save=modules_to_save, **options.combination)
    return mixture, combined_adapter(stacked_inputs(mixture, base, left))


def quiet(model: nn.Module, gradient_checkpointing: bool) -> None:
    """Dropout off, caches off; layers that are checkpointed must think that they train."""
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = (
                True  # else, on some CPUs, a pass without gradients packs its weight, and no gradient comes after it
            )
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False
    if gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise MixtureError(
                f"{type(model).__name__} has no gradient checkpointing: leave --gradient-checkpointing out."
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # of this module alone: dropout modules inside it stay off
                for name, value in vars(module).items():
                    if "drop" in name and isinstance(value, float):
                        setattr(module, name, 0.0)  # what it hands to functional.dropout, and a layerdrop


def _widen(model: Any, head: list[str]) -> None:
    """Keep what stands beside the body, and what is new, in float32 over a body of 16 bits: it is trained in it, and so are losses.

    An output embedding, whose weight may be the input embedding's, is left alone, and its logits are widened.
    """
    if (embedding := model.get_output_embeddings()) is not None:
        embedding.register_forward_hook(lambda module, args, output: _wide(output))
        return
    beside = [] if model.base_model is model else [part for part in model.children() if part is not model.base_model]
    for part in (*beside, *map(model.get_submodule, head)):
        for module in part.float().modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, args: tuple(map(_wide, args)))


def _wide(value: Any) -> Any:
    import torch

    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def device_of(options: FitOptions) -> str:
    """The device of this process."""
    import torch

    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise MixtureError(f"device is {name}, which torch does not find here: use --device auto.")
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}" if name == "cuda" else name


def device_name(options: FitOptions) -> str:
    """The kind of device of this process, of a GPU its name: another computes other bytes."""
    import torch

    device = device_of(options)
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def max_tokens(model: Any, processor: Any, asked: int | None) -> int | None:
    """The most tokens of an example: as asked, else what the tokenizer says, within the positions that the model has learned.

    None where nothing limits it.

    Raises:
        MixtureError: more were asked for than it has.
    """
    positions = _positions(model)
    if asked is not None and positions is not None and asked > positions:
        raise MixtureError(
            f"max_length is {asked}, and {type(model).__name__} has {positions} positions: give no more."
        )
    if asked is not None or positions is None or not hasattr(processor, "model_max_length"):
        return asked
    return min(positions, token_limit(processor, None) or positions)


def _positions(model: Any) -> int | None:
    """How many positions a model has learned; None where it computes them."""
    from torch import nn

    encodes = getattr(model.config, "is_encoder_decoder", False)
    learned = [
        layer.num_embeddings - (0 if layer.padding_idx is None else layer.padding_idx + 1)
        for name, layer in (model.get_encoder() if encodes else model).named_modules()
        if isinstance(layer, nn.Embedding) and name.rpartition(".")[2] in POSITIONS
    ]
    if not learned:
        return None
    told = getattr(model.config, "max_encoder_position_embeddings", None)  # LED's, whose decoder has fewer
    told = told or getattr(model.config, "max_position_embeddings", None)
    return min([*learned, int(told)] if told else learned)


def _shard(model: Any, device: str, size: int) -> None:
    """FSDP: every process keeps a part of each block of the base; the few trained parameters, and a head, stay whole on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    whole = {p for p in model.parameters() if p.requires_grad or p.dtype != dtype}  # and a head of another dtype
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.partition(":")[0], (size,))
    blocks = set(getattr(model, "_no_split_modules", None) or [])
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def _quantization(base: BaseModel, task: Task, options: FitOptions) -> dict[str, Any]:
    """What `from_pretrained` needs to load the base quantized; what is not part of its body stays whole."""
    import torch
    import transformers

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("--quantize needs bitsandbytes: pip install 'wlora-merge[quantize]'.") from error
    model: Any = empty_model(base.folder, task.auto_class().from_config)
    kept = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    kept += [name for name, _ in model.named_modules() if name.endswith(".pooler")]  # which a base may lack
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

    A head that the base has for these labels is kept, frozen; otherwise a new one is trained, and it is said where it replaces one.
    """
    import torch

    kept = None if labels is None else _kept_labels(base, task, labels)
    labels = kept or labels
    auto = task.auto_class()
    cls, model_type = class_for(base.folder, auto)
    if cls is None:
        raise UnsupportedError(
            f"{base.folder}: transformers loads no {task.name} model from it (a model of type {model_type!r} has no "
            f"{auto.__name__}): use another base or task."
        )
    model, report = load(
        cls,
        base.folder,
        torch.bfloat16 if options.precision == "bf16" else torch.float32,
        complete=False,
        **(_quantization(base, task, options) if options.quantize else {}),
        **task.config_changes(labels, processor),
    )
    absent, head = _absent(base, task, model, report)
    new = set(absent) if kept or labels is None else head
    if labels is not None and not (kept or new):
        raise UnsupportedError(
            f"{base.folder}: which part of {type(model).__name__} is its head cannot be told, so no new one can be trained for these "
            "labels: use a base without a head."
        )
    if labels is not None and not kept and _is_of(base, task) and not new <= report.missing:
        _tell_replaced(base, task, labels)
    _draw_again(model, new - set(absent))
    return model, sorted(new), _with_unit(labels, model, new)


def last_layer(model: nn.Module, head: Iterable[str]) -> str | None:
    """The name of the linear layer that gives a regression's one number; None where it cannot be told.

    Args:
        model: with the head.
        head: names of the head's parameters.
    """
    from torch import nn

    names = {name.rpartition(".")[0] for name in head}
    layers = ((name, model.get_submodule(name)) for name in sorted(names))
    found = [name for name, layer in layers if isinstance(layer, nn.Linear) and layer.out_features == 1]
    return found[0] if len(found) == 1 else None


def in_own_unit(head: dict[str, torch.Tensor], layer: str, labels: LabelSet) -> None:
    """Give a head that predicts standardized numbers the unit of the labels, in place: spread · (weight · x + bias) + mean.

    Args:
        head: the head's tensors by name.
        layer: its last layer's name.
        labels: of a regression; their mean is 0 where the layer has no bias.
    """
    for name, shift in ((f"{layer}.weight", 0.0), (f"{layer}.bias", labels.mean)):
        if name in head:
            head[name] = (head[name].double() * labels.spread + shift).to(head[name].dtype)


def _with_unit(labels: LabelSet | None, model: nn.Module, new: Iterable[str]) -> LabelSet | None:
    """The labels with the mean and spread that `in_own_unit` can give the head in the end."""
    if labels is None or labels.problem_type != REGRESSION:
        return labels
    layer = last_layer(model, new)
    if layer is None:
        return replace(labels, mean=0.0, spread=1.0)
    if f"{layer}.bias" in dict(model.named_parameters()):
        return labels
    if abs(labels.mean) > labels.spread:
        warnings.warn(
            f"the head of {type(model).__name__} has no bias, and the labels lie around {labels.mean:.6g} with a deviation of "
            f"{labels.spread:.6g}: it predicts them better if you subtract {labels.mean:.6g} from each.",
            WloraMergeWarning,
            stacklevel=2,
        )
    return replace(labels, mean=0.0)


def _absent(base: BaseModel, task: Task, model: Any, report: LoadingReport) -> tuple[set[str], set[str]]:
    """The parameters that the base lacks, or has in another shape; those of the task's head, which alone it may lack.

    Raises:
        UnsupportedError: it lacks the whole body, or a head that no fit trains.
        BaseModelError: it lacks a part of the body.
    """
    known = {name: list(p.shape) for name, p in model.named_parameters()}
    absent = [name for name in known if name in report.missing or name in report.mismatched]
    head = _head_of(model, absent, known) if task.has_head else set()
    body = [name for name in known if name.startswith(f"{model.base_model_prefix}.")]
    if body and set(body) <= set(absent):
        raise UnsupportedError(
            f"{base.folder}: {type(model).__name__} reads none of this base's tensors: transformers has no way from this base to "
            f"{task.name}; use another base or task."
        )
    _refuse_without_head(base, task, model, absent, body)
    if lost := [name for name in absent if name not in head]:
        shape = report.mismatched.get(lost[0])
        got = "has no tensor for it" if shape is None else f"has {shape}"
        raise BaseModelError(
            f"{base.folder}: {type(model).__name__} needs {lost[0]!r} as {known[lost[0]]}, and the base {got}: it is not whole, "
            "or its config.json is that of another; fetch it again."
        )
    return set(absent), head


def _refuse_without_head(base: BaseModel, task: Task, model: Any, absent: list[str], body: list[str]) -> None:
    """Refuse a base that lacks just the part beside its body, where the task has no head that a fit would train."""
    beside = [name for name in absent if body and name not in body]
    whole = type(model).__name__ in (base.config.get("architectures") or [])
    if beside and len(beside) == len(absent) and not (whole or task.has_head):
        raise UnsupportedError(
            f"{base.folder}: it has no {task.name} head ({beside[0]!r} of {type(model).__name__}), and a fit trains none for this "
            "task: use a base of this task, or another --task."
        )


def _head_of(model: Any, absent: list[str], names: Iterable[str]) -> set[str]:
    """The parameters beside the model's body, and a pooler that the base lacks.

    A class that does not name its body (CLIP's) has as its head what the base lacks altogether.
    """
    if model.base_model is model:
        parts: dict[str, set[str]] = {}
        for name in names:
            parts.setdefault(name.partition(".")[0], set()).add(name)
        return {name for part in parts.values() if part <= set(absent) for name in part}
    prefix = f"{model.base_model_prefix}."
    return {name for name in names if not name.startswith(prefix)} | {name for name in absent if "pooler" in name}


def _draw_again(model: Any, names: Collection[str]) -> None:
    """Give parameters that were loaded the initial values of new ones; transformers leaves alone what it has loaded."""
    for name in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False
        model._init_weights(module)


def _kept_labels(base: BaseModel, task: Task, labels: LabelSet) -> LabelSet | None:
    """The labels in the order of the base's own head, where it has one for them, of this problem type as far as it says.

    The names are the head's, or are all of them under another spelling.
    """
    own = _own_labels(base, task)
    problem = base.config.get("problem_type") in (None, labels.problem_type)
    if not own or not problem or not labels.names:
        return None
    if set(labels.names) <= set(own):
        return replace(labels, names=tuple(own))
    spelled = {spelling(name): name for name in labels.names}
    names = tuple(spelled.get(spelling(name), name) for name in own)
    return replace(labels, names=names) if sorted(names) == sorted(labels.names) else None


def _own_labels(base: BaseModel, task: Task) -> list[str]:
    """The label names of the base's own head, in its order; empty where its config speaks of none."""
    table = base.config.get("id2label")
    if isinstance(table, dict) and table:
        return [str(table[key]) for key in sorted(table, key=int)]
    return ["LABEL_0", "LABEL_1"] if _is_of(base, task) else []  # the names that transformers does not store


def _is_of(base: BaseModel, task: Task) -> bool:
    """Whether a base's config names a class of this task, so that its files have a head for it."""
    kind = task.auto_class_name.removeprefix("AutoModel")
    return any(name.endswith(kind) for name in base.config.get("architectures") or [])


def _tell_replaced(base: BaseModel, task: Task, labels: LabelSet) -> None:
    """Say that the base's own head gives way to a new one."""
    own, names = (
        ", ".join(map(repr, part[:SHOWN])) + (", ..." if len(part) > SHOWN else "")
        for part in (_own_labels(base, task), labels.names)
    )
    wanted = f"the classes {names} ({labels.problem_type})" if names else "a regression"
    advice = ": to keep it, call the classes as it does" if names else ""
    warnings.warn(
        f"{base.folder}: its own head, for {own}, is replaced by a new one for {wanted}{advice}.",
        WloraMergeWarning,
        stacklevel=2,
    )
