"""One LoRA that PEFT and vLLM load: `adapter_config.json` and `adapter_model.safetensors`.

The mixture's delta weight is itself a product of two factors, so it is one LoRA: exactly, at the largest R of any module, or
its best rank-k approximation. One uniform r = lora_alpha (scaling 1), modules of smaller rank padded with zeros, and no
optional field that older PEFT would reject. What is not a product of two factors is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import WEIGHTS_FILE
from ..adapters.config import plain_config
from ..adapters.deltas import ModuleDelta, TensorDelta
from ..adapters.keys import PEFT_PREFIX
from ..adapters.layouts import Layout, factors_to_file
from ..adapters.targets import ATTENTION
from ..data.tasks import get_task
from ..errors import UnsupportedError, WloraMergeError
from ..export_options import refuse_without_rank
from ..io.safetensors_file import read_header, write_tensors
from ..io.tensors import all_finite, one_torch_thread, overflow_advice
from ..mixture.fold import lora_product, pad_rank, truncate
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel
from ..models.loading import library_errors, quiet
from ..models.module_tree import ModuleTree, empty_model
from ..models.names import natural_key
from ..progress import Meter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModuleError:
    """What truncation lost in one module: `kept` of `energy` (squared Frobenius norms); 0 lost where it is exact."""

    rank: int
    energy: float
    kept: float

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what was lost over that of the whole delta weight."""
        return float((max(0.0, self.energy - self.kept) / self.energy) ** 0.5) if self.energy else 0.0


@dataclass(frozen=True)
class LoraReport:
    """The exported rank, and for each module the error."""

    r: int
    modules: dict[str, ModuleError]

    @property
    def overall(self) -> ModuleError:
        """All modules together."""
        energy, kept = (sum(getattr(m, key) for m in self.modules.values()) for key in ("energy", "kept"))
        return ModuleError(self.r, energy, kept)


def write_lora(
    mixture: Mixture,
    base: BaseModel,
    deltas: Sequence[ModuleDelta | TensorDelta],
    out: Path,
    *,
    base_name: str,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
) -> LoraReport:
    """Write the mixture as one PEFT adapter into the folder `out`.

    Args:
        mixture: the mixture.
        base: the opened base model.
        deltas: the stacked adapters.
        out: the folder to write into.
        base_name: `base_model_name_or_path` of the config.
        rank: the uniform r; None means the smallest that is exact.
        energy: instead of a rank, the share of the delta weights' squared Frobenius norm, over all modules together, that
            the smallest uniform r must keep.
        dtype: `float32`, `bfloat16` or `float16`, of the tensors.

    Raises:
        UnsupportedError: a change that is no product of two factors, or a combination that is none and no rank to come near it with.
    """
    import torch

    factors, report = as_one_lora(mixture, deltas, rank=rank, energy=energy)
    factors, tensors = _with_other_experts(base, factors), {}
    changed = [delta for delta, _ in factors]
    tree = tree_of_lora(base, mixture.task, [delta.name or delta.module for delta in changed])
    names = _names_in(tree, mixture, base, changed)
    for name, (delta, (lora_A, lora_B)) in zip(names, factors, strict=True):
        for suffix, tensor in factors_to_file(delta.layout, lora_A, lora_B, delta.shape).items():
            key = f"{PEFT_PREFIX}{name}.{suffix}"
            tensors[key] = _finite(tensor.to(getattr(torch, dtype)).contiguous(), key)
    for name, tensor in mixture.head.items():
        tensors[PEFT_PREFIX + name] = tensor.detach().cpu().contiguous()
    write_tensors(tensors, out / "adapter_model.safetensors")
    config = _config(mixture, base, changed, names, report.r, base_name, tree)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return report


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not all_finite(tensor):
        raise WloraMergeError(
            f"tensor {name!r} of the LoRA overflows in {tensor.dtype}: {overflow_advice(tensor.dtype)}."
        )
    return tensor


def _products(deltas: Sequence[ModuleDelta | TensorDelta]) -> list[ModuleDelta]:
    for delta in deltas:
        if isinstance(delta, TensorDelta):
            raise UnsupportedError(
                f"tensor {delta.tensor!r}: the adapters change it as a whole, which no LoRA can express: export with --format dense."
            )
        if delta.module.endswith(ATTENTION):
            raise UnsupportedError(
                f"module {delta.name!r} is a MultiheadAttention, whose LoRA is not written: export with --format dense."
            )
        if delta.has_row_scale:
            raise UnsupportedError(
                f"module {delta.module!r}: an adapter is a DoRA, which scales the rows of the base weight itself, and no LoRA can "
                "express that: export with --format dense."
            )
        if delta.biases:
            raise UnsupportedError(
                f"tensor {delta.bias_name!r}: the adapters train this bias, which no LoRA without a bias can express: export with "
                "--format dense."
            )
        if delta.start is not None and not delta.name:
            raise UnsupportedError(
                f"tensor {delta.module!r}: the adapters change some rows of it, which a plain LoRA cannot express: export with "
                "--format dense."
            )
    return [delta for delta in deltas if isinstance(delta, ModuleDelta)]


Products = list[tuple[ModuleDelta, tuple["torch.Tensor", "torch.Tensor"]]]


def as_one_lora(
    mixture: Mixture,
    changes: Sequence[ModuleDelta | TensorDelta],
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Products, LoraReport]:
    """The mixture's delta weights as pairs of one uniform rank: (lora_A [r, in], lora_B [out, r]) float32 for each module.

    Args and Raises as for `write_lora`.
    """
    deltas = _products(changes)
    exact = max(delta.R for delta in deltas)
    how = mixture.combination
    refuse_without_rank(how.method, rank)
    if how.is_linear and energy is None and (rank is None or rank >= exact):
        r = rank or exact
        products = [(d, pad_rank(*lora_product(d, mixture.gains_of(d)), r)) for d in deltas]
        return products, LoraReport(
            r, {d.label: ModuleError(r, energy_of(*pair), energy_of(*pair)) for d, pair in products}
        )

    meter = Meter("decomposing deltas", 0, len(deltas), "modules")

    def spectrum(delta: ModuleDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, s, vt = mixture.svd_of(delta)
        meter.add(0, 1)
        return (*truncate(u, s, vt, rank or len(s)), s.square())  # what a given rank drops is not held

    with one_torch_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
        spectra = dict(zip((d.label for d in deltas), pool.map(spectrum, deltas), strict=True))
    values = {module: squares for module, (_, _, squares) in spectra.items()}
    r = rank if rank is not None else _rank_for(list(values.values()), energy or 1.0)
    report = {m: ModuleError(r, float(v.sum()), float(v[:r].sum())) for m, v in values.items()}
    products = []
    for d in deltas:
        lora_A, lora_B, _ = spectra.pop(d.label)
        products.append((d, pad_rank(lora_A[:r], lora_B[:, :r], r)))
    return products, LoraReport(r, report)


def energy_of(lora_A: torch.Tensor, lora_B: torch.Tensor) -> float:
    """Squared Frobenius norm of lora_B @ lora_A, from the R×R Gram matrices."""
    A, B = lora_A.double(), lora_B.double()
    return float(((B.T @ B) * (A @ A.T)).sum())


def _rank_for(values: list[torch.Tensor], energy: float) -> int:
    """The smallest uniform rank whose kept energy, over all modules together, reaches the share `energy`."""
    import torch

    longest = max(len(v) for v in values)
    per_rank = torch.stack([torch.nn.functional.pad(v, (0, longest - len(v))) for v in values]).sum(0)
    kept = per_rank.cumsum(0) / per_rank.sum()
    enough = (kept >= energy - 1e-12).nonzero()
    return int(enough[0]) + 1 if len(enough) else longest


def _config(
    mixture: Mixture,
    base: BaseModel,
    deltas: list[ModuleDelta],
    names: list[str],
    r: int,
    base_name: str,
    tree: ModuleTree | None,
) -> dict[str, Any]:
    task = get_task(mixture.task) if mixture.task else None
    return plain_config(
        r=r,
        lora_alpha=r,
        target_modules=_target_modules(base, [delta.module for delta in deltas], names, tree),
        base_name=base_name,
        fan_in_fan_out=any(delta.layout is Layout.CONV1D for delta in deltas),
        # PEFT's class for the task would put a new head on a base that is given without one
        task_type=task.peft_task_type if task and (mixture.head or not task.has_head) else None,
        modules_to_save=_saved_modules(mixture, base, names) or None,
    )


def _saved_modules(mixture: Mixture, base: BaseModel, targets: Sequence[str]) -> list[str]:
    """The outermost modules that hold nothing but tensors of the head: PEFT replaces them as a whole."""
    stored = base.stored_names(mixture.head)
    others = [name for name in base.entries if name not in stored.values()]
    found = set()
    for name, known in stored.items():
        parts, module = name.split("."), name
        for inner in range(1 - len(parts), 0):  # how many parts of the name lie within the module
            module, inside = ".".join(parts[:inner]), ".".join(known.split(".")[:inner]) if known else None
            shared = inside is not None and any(other.startswith(f"{inside}." if inside else "") for other in others)
            if not shared and not any(target.startswith(f"{module}.") for target in targets):
                break
        found.add(module)
    return sorted(found)


def tree_of_lora(base: BaseModel, task: str | None, modules: Collection[str]) -> ModuleTree | None:
    """The module tree of the model that a LoRA loads on; None where transformers has no class for the base.

    Args:
        base: the opened base.
        task: of the mixture; None: the first class that has all these modules, as the adapters may have been trained on another class
            than the base's own.
        modules: the target modules, as the adapters or the LoRA name them.
    """
    if base.tree is None:
        return None
    with quiet():
        return base.tree_for(get_task(task).auto_class() if task else None, modules)


def _names_in(tree: ModuleTree | None, mixture: Mixture, base: BaseModel, deltas: list[ModuleDelta]) -> list[str]:
    """The modules' names in the model; as the mixture has them where its tree does not tell."""
    prefix = base.body_prefix if mixture.task and get_task(mixture.task).is_body else ""
    return [_name_in(tree, delta) or mixture.live_name(delta, prefix) for delta in deltas]


def _name_in(tree: ModuleTree | None, delta: ModuleDelta) -> str | None:
    if tree is None:
        return None
    if delta.start is not None:
        return tree.find_module(delta.name)
    found = tree.place(f"{delta.module}.weight")
    return found.removesuffix(".weight") if found else None


def _target_modules(base: BaseModel, modules: list[str], names: list[str], tree: ModuleTree | None) -> list[str]:
    """The short names (`q_proj`) where they select just these modules of the base, else the whole names: PEFT takes a container
    that is called so for a target too."""
    short = {module.rpartition(".")[2] for module in modules}
    known = {name.removesuffix(".weight") for name in base.entries if name.endswith(".weight")}
    matched = {name for name in known if name.rpartition(".")[2] in short}
    same = all(name.rpartition(".")[2] == m.rpartition(".")[2] for name, m in zip(names, modules, strict=True))
    beside = [m for m in tree.modules if m.rpartition(".")[2] in short and m not in names] if tree is not None else []
    return names if matched != set(modules) or not same or beside else sorted(short)


def _with_other_experts(base: BaseModel, products: Products) -> Products:
    """The pairs, and pairs of zeros for every other weight of experts of which one changes: PEFT places a LoRA of experts as a
    whole."""
    import torch

    known = {delta.module for delta, _ in products}
    if not any(".experts." in module for module in known) or base.tree is None:
        return products
    found = list(products)
    for entry in base.tree.beside_experts({f"{module}.weight" for module in known}):
        first, (lora_A, _) = products[0]
        zeros = torch.zeros(len(lora_A), entry.shape[1]), torch.zeros(entry.shape[0], len(lora_A))
        delta = replace(
            first, module=entry.name.removesuffix(".weight"), shape=entry.shape, layout=Layout.LINEAR, name=""
        )
        found.append((delta, zeros))
    return sorted(found, key=lambda product: natural_key(product[0].module))


def modules_of_lora(folder: Path) -> set[str]:
    """The target modules of a LoRA, as its file names them."""
    keys = read_header(folder / WEIGHTS_FILE).entries
    return {key.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for key in keys if ".lora_" in key}


def check_loads(folder: Path, base: BaseModel, task: str | None, config: Mapping[str, Any]) -> None:
    """Load a LoRA into the module tree of its base, without memory, and compare every key, if transformers has a class for it.

    Args:
        folder: an adapter's config and tensors.
        base: its base.
        task: what the model is for; None: as `tree_of_lora` tells it.
        config: keys of the base's config that the task changes.

    Raises:
        UnsupportedError: PEFT refuses its config, or has no place for one of its tensors, or no tensor for a place.
    """
    from peft import PeftConfig, PeftModel

    where = f"{base.folder}: PEFT cannot load the LoRA over this base"
    with quiet(), library_errors(where, UnsupportedError):
        tree = tree_of_lora(base, task, modules_of_lora(folder))
        if tree is None:
            return
        model = empty_model(base.folder, tree.make, **config)
        peft = PeftModel(model, PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
        found = peft.load_adapter(str(folder), "default", torch_device="cpu", low_cpu_mem_usage=True)
    for what, keys in (("has no tensor for", found.missing_keys), ("has no place for", found.unexpected_keys)):
        if keys:
            raise UnsupportedError(f"{where}: it {what} {min(keys)!r}: export with --format dense.")
