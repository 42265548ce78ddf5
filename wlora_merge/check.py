"""An export against its manifest, and against the unmerged mixture.

Three questions, from cheap to dear: are the bytes those that were written; is the folder a model that its library loads with
no missing and no unexpected tensor; does it compute what the base with its adapters attached computes, on probe inputs that
the manifest records.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import TORCH_NAMES, read_header
from .digests import sha256_files
from .errors import UnsupportedError, VerifyError, WloraMergeError
from .input_files import find_file
from .layouts import matrix_shape
from .manifest import FILE, is_probe
from .module_tree import bounded
from .names import DTYPES, PEFT_PREFIX
from .progress import Meter
from .structure import check_structure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .adapters import Adapter
    from .base_model import BaseModel
    from .deltas import TensorDelta
    from .mixture import Mixture

HEAD_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Keys of a mixture's config that make its head."""
SAFE = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
"""For `from_pretrained`: nothing is fetched, no code of the folder is run, no pickle is loaded."""
TOLERANCE = {"F32": 1e-4, "F16": 5e-2, "BF16": 1e-1, "F64": 1e-4}
"""Largest difference of an output allowed, relative to the largest output: rounding of the weights, amplified by the layers."""
OF_THE_HUB = (".gitattributes", ".git", ".cache")
"""What a repository, or a download of one, has beside what was uploaded."""
TRUNCATION = 4.0
"""Share of the adapters' effect on the outputs that a truncated LoRA may lose, per share of the delta weights' norm that it lost:
to first order 1 on average; up to 2.6 was seen on tiny models, where little averages out."""


@dataclass
class Checked:
    """What was checked and what was found; `skipped` names each check that could not be made, with the reason.

    `largest_difference` of the outputs and the `tolerance` that it was held to are relative to the largest output.
    """

    files: int = 0
    done: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    largest_difference: float | None = None
    tolerance: float | None = None


def check_files(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Read every file again and compare its sha256; compare config, index and headers with each other.

    Returns:
        The number of files.

    Raises:
        VerifyError: a file that is missing, is not in the manifest, or has other bytes.
    """
    expected = manifest["files"]
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()} - {FILE}
    found = {name for name in found if name.split("/")[0] not in OF_THE_HUB or name in expected}
    if missing := sorted(set(expected) - found):
        raise VerifyError(f"{folder / missing[0]}: is missing; the manifest lists it: export again.")
    if foreign := sorted(found - set(expected)):
        raise VerifyError(
            f"{folder / foreign[0]}: is not in the manifest: it was added after the export; take it away."
        )
    for name in expected:
        find_file(folder, name, VerifyError)
    digests = sha256_files([folder / name for name in expected], fresh=True)
    for name, row in expected.items():
        if digests[folder / name] != row.get("sha256"):
            raise VerifyError(
                f"{folder / name}: its sha256 is {digests[folder / name][:12]}…, the manifest says {str(row.get('sha256'))[:12]}…: "
                "the file changed after the export; export again."
            )
        if name.endswith(".safetensors"):
            read_header(folder / name)
    check_structure(folder, manifest)
    return len(expected)


# ------------------------------------------------------------------------------------------------------ the probe


def make_probe(config: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Inputs on which an export is compared with its mixture, small and the same everywhere; empty where none is known.

    Token ids come from a linear congruential generator over the vocabulary; pixels, given by shape, from torch's seed 0.
    """
    probe = _probe(config, task)
    return probe if all(is_probe(name, value) for name, value in probe.items()) else {}


def _probe(config: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    if "image_size" in config and "num_channels" in config:
        size = config["image_size"]
        sizes = size if isinstance(size, list) else [size, size]
        frames = "num_frames" in config  # of a video
        return {} if frames else {"pixel_values": {"shape": [2, config["num_channels"], *sizes], "seed": 0}}
    if "conv_dim" in config or (config.get("num_mel_bins") and config.get("model_type") != "whisper"):
        return {}  # of sounds
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return {}
    state, ids = 1, []
    for _ in range(24):
        state = (1103515245 * state + 12345) % 2**31
        ids.append(state % vocabulary)
    if config.get("model_type") == "whisper":
        sizes = [config.get("num_mel_bins"), 2 * config.get("max_source_positions", 0)]
        return {"input_features": {"shape": [2, *sizes], "seed": 0}, "decoder_input_ids": [ids[4:8], ids[16:20]]}
    rows = [ids[:12], ids[12:]]
    if task == "text-classification" and config.get("pad_token_id") is None:
        # a decoder reads the class off the last token that is not padding, and takes no batch without one
        rows = rows[:1]
    decodes = task == "seq2seq-lm" or (
        config.get("is_encoder_decoder") is True and task in (None, "feature-extraction")
    )
    return {"input_ids": rows} | ({"decoder_input_ids": [ids[4:8], ids[16:20]]} if decodes else {})


def probe_tensors(probe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The probe as the model's keyword arguments."""
    import torch

    tensors = {}
    for name, value in probe.items():
        if isinstance(value, dict):
            tensors[name] = torch.randn(value["shape"], generator=torch.Generator().manual_seed(value["seed"]))
        else:
            tensors[name] = torch.tensor(value)
    return tensors


# ------------------------------------------------------------------------------------------------------ the models


@contextmanager
def quiet_libraries() -> Any:
    """Keep load reports and progress bars of transformers away: what they would say is checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """What a library says of a folder from elsewhere, in one sentence: its loaders let errors of any kind through."""
    try:
        yield
    except (WloraMergeError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise VerifyError(f"{what}: {said[:500]}") from error


def load_model(
    folder: Path,
    task: str | None,
    *,
    complete: bool = True,
    unused: Callable[[str], bool] = lambda _: False,
    **options: Any,
) -> nn.Module:
    """Load a model folder by its task, in float32, in evaluation mode.

    Args:
        complete: refuse a folder whose tensors are not just the model's.
        unused: whether a tensor may be one that the model has no place for.
        options: handed to `from_pretrained` (num_labels, id2label, ...).

    Raises:
        VerifyError: missing, unexpected or mismatched tensors.
    """
    import torch

    Meter("loading the model")
    with (
        quiet_libraries(),
        _library_errors(f"{folder}: transformers cannot load it as {task}"),
        bounded(folder, VerifyError),
    ):
        model, info = _class_for(folder, task).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=complete, **SAFE, **options
        )
    missing = {str(key) for key in info["missing_keys"]}
    if complete and task in (None, "feature-extraction") and any(key.startswith("pooler.") for key in missing):
        model.pooler = None  # of a base that was trained without; one drawn anew would say nothing
        missing = {key for key in missing if not key.startswith("pooler.")}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if complete else ():
        keys = missing if kind == "missing_keys" else set(map(str, info[kind]))
        left = sorted(key for key in keys if kind != "unexpected_keys" or not unused(key))
        if left:
            raise VerifyError(f"{folder}: loading it as {task} leaves {kind.replace('_', ' ')}: {left[:3]}.")
    result: nn.Module = model.eval()
    return result


def _class_for(folder: Path, task: str | None) -> Any:
    """The task's class; without a task, for a tower with a projection, or where that class does not know the model (a
    vision-language one as causal-lm), the one that its config names."""
    import transformers

    from .tasks import get_task
    from .writers.onnx_tasks import PROJECTED

    auto: Any = get_task(task or "feature-extraction").auto_class()
    config = transformers.AutoConfig.from_pretrained(folder, **SAFE)
    named = (getattr(config, "architectures", None) or [""])[0]
    projected = task == "feature-extraction" and named.endswith(PROJECTED)
    known = task and type(config) in auto._model_mapping and not projected
    return auto if known else getattr(transformers, named, auto)


def attach_mixture(
    model: nn.Module, mixture: Mixture, adapters: list[Adapter], base: BaseModel, tensors: Iterable[TensorDelta] = ()
) -> nn.Module:
    """The unmerged mixture: adapters attached with the mixture's own weights, its head and mixed whole tensors put in place."""
    import torch

    from .attachment import PARAMETER, attach, attachment_of
    from .fold import fold_saved
    from .layers import StackedLora
    from .live_model import live_tensors, set_parameter
    from .mixture import rows_of
    from .targets import tensors_of

    with torch.no_grad():
        _resize(model, base)
        attach(
            model, [replace(a, tensors={}) for a in adapters], granularity=mixture.granularity, normalize=mixture.normalize,
            delta_scale=mixture.delta_scale,
        )  # fmt: skip
        weights = mixture.mixture_weights
        logits = weights if mixture.normalize == "none" else weights.log()
        row = rows_of(mixture.groups)
        parameter = model.get_parameter(PARAMETER)
        for g, modules in enumerate(attachment_of(model).groups.values()):
            module = base.find_module(modules[0])
            if module is None:
                raise VerifyError(f"{base.folder}: has no tensor for target module {modules[0]!r}.")
            if module not in row:
                raise VerifyError(f"target module {module!r} belongs to no group of the manifest: export again.")
            parameter[g] = logits[row[module]]
        for name, tensor in mixture.head.items():
            with _library_errors(f"tensor {name!r} of the trained head does not fit the base"):
                set_parameter(model, name, tensor)
        for delta in tensors:
            own, live = tensors_of(base)(delta.tensor), live_tensors(model)(delta.tensor)
            if own is None or own.read is None or live is None:
                raise VerifyError(
                    f"{base.folder}: its model has no tensor {delta.tensor!r}, which the mixture changes."
                )
            weight = own.read()
            block = weight.reshape(*(matrix_shape(own.shape) if own.shape else (1, 1)))
            total = fold_saved(block, delta, mixture.whole_gains_of(delta), block.double())
            set_parameter(model, live.module, total.reshape(own.shape))
            lora = getattr(model.get_submodule(live.module.rpartition(".")[0]), "wlora", None)
            if isinstance(lora, StackedLora):
                lora.present = delta.present  # a LoRA of the same module knows its own adapters alone
    return model


def _resize(model: nn.Module, base: BaseModel) -> None:
    """Give a model the added rows that its base is exported with."""
    from .live_model import live_tensors, set_parameter
    from .targets import tensors_of

    for name in base.added:
        own, live = tensors_of(base)(name), live_tensors(model)
        if own is None or own.read is None:
            continue
        model.resize_token_embeddings(own.shape[0], mean_resizing=False)  # type: ignore[operator]
        target = live(name)
        if target is not None and name in base.entries:
            model.get_parameter(target.module).copy_(own.read())  # and what is tied to it
        elif target is not None:
            set_parameter(model, target.module, own.read())


def outputs_of(model: nn.Module, probe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's floating outputs on the probe (logits, start_logits, last_hidden_state, ...)."""
    import torch

    Meter("comparing outputs")
    with torch.no_grad(), _library_errors("the model does not run on the probe"):
        result = model(**probe_tensors(probe), return_dict=True)
    wanted = (
        "logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output", "token_embeddings",
        "sentence_embedding", "text_embeds", "image_embeds",
    )  # fmt: skip
    found = {name: result[name].float() for name in wanted if name in result and isinstance(result[name], torch.Tensor)}
    if "logits" in found or "start_logits" in found:
        found.pop("last_hidden_state", None)
    return found


def difference_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest value expected."""
    return float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)


def compare(
    got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float, where: str
) -> float:
    """The largest difference relative to the largest output.

    Raises:
        VerifyError: it is above the tolerance, or the outputs differ in kind.
    """
    if set(got) != set(expected) or not got:
        raise VerifyError(f"{where}: its outputs are {sorted(got)}, the mixture's {sorted(expected)}.")
    worst = 0.0
    for name, tensor in expected.items():
        difference = difference_of(got[name], tensor)
        if not difference <= tolerance:
            raise VerifyError(
                f"{where}: its {name} differ from the unmerged mixture's by {difference:.2e} of the largest, allowed "
                f"{tolerance:.0e}: this export does not compute its mixture; export again."
            )
        worst = max(worst, difference)
    return worst


def export_model(folder: Path, manifest: Mapping[str, Any], base: BaseModel | None) -> nn.Module:
    """The model of a dense or lora export, loaded by its own libraries.

    Raises:
        UnsupportedError: a lora export without its base.
    """
    task, config = manifest.get("task"), manifest.get("config") or {}
    if manifest["format"] == "dense":
        return load_model(folder, task, unused=unused_by(manifest))
    if base is None:
        raise UnsupportedError("a lora export can be loaded only with its base: say --base PATH.")
    from peft import PeftModel

    options = {key: config[key] for key in HEAD_KEYS if key in config}
    model = load_model(base.folder, task, complete=not manifest.get("head"), unused=unused_by(manifest), **options)
    with quiet_libraries(), _library_errors(f"{folder}: PEFT cannot load it"):
        loaded: nn.Module = PeftModel.from_pretrained(model, folder).eval()
    return loaded


def unused_by(manifest: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which tensors of an export, or of its base, the task's model may have no place for: those that neither an adapter nor the head
    changes. A ViT has a pooler, for instance, and a classifier made of it has none; a causal-lm has an output embedding, and its
    features have none."""
    head = set(manifest.get("head") or [])
    if manifest.get("task") == "feature-extraction":
        return lambda name: name not in head  # no place for an output embedding, though an adapter changes it
    changed = {module for modules in manifest["groups"].values() for module in modules}
    return lambda name: name not in head and name.rpartition(".")[0] not in changed


@dataclass(frozen=True)
class Tolerance:
    """How much outputs may differ, relative to the largest, and `why`; `exact` where nothing but float32's own rounding may."""

    value: float
    why: str
    exact: bool


def tolerance_of(folder: Path, manifest: Mapping[str, Any], effect: float) -> Tolerance:
    """How much an export's outputs may differ from its mixture's.

    Args:
        effect: how much the adapters change the outputs, relative to the largest. In float32 and of a LoRA, where rounding is small,
            half of it is too much: an export that lost an adapter must not pass because its adapters do little on the probe. A LoRA
            of a low rank may lose of the effect `TRUNCATION` times the share that its report says it lost of the delta weights.
    """
    dtype = max(_dtypes(folder, manifest), key=lambda name: TOLERANCE[name])
    exact = TOLERANCE[dtype] == TOLERANCE["F32"]
    small = exact or manifest["format"] == "lora"  # whose rounding is as small as the effect is
    allowed = min(TOLERANCE[dtype], max(effect / 2, 1e-6)) if small else TOLERANCE[dtype]
    report = manifest.get("report") or {}
    lost = min(float(report.get("relative_error", 0.0)), 1.0)
    if lost > 1e-6:
        why = f"rank {report.get('r')} keeps {1 - lost**2:.2%} of the energy"
        return Tolerance(TOLERANCE[dtype] + TRUNCATION * lost * effect, why, False)
    return Tolerance(allowed, TORCH_NAMES[dtype] if exact else f"rounding to {TORCH_NAMES[dtype]}", exact)


def _dtypes(folder: Path, manifest: Mapping[str, Any]) -> set[str]:
    """The floating dtypes of an export's weights, as safetensors names them."""
    if manifest["format"] == "onnx":
        asked = (manifest.get("options") or {}).get("dtype") or "float32"
        found = {DTYPES.get(str(name)) for name in (manifest.get("report") or {}).get("dtypes") or [asked]}
    else:
        files = folder.glob("*.safetensors")
        found = {entry.dtype for file in files for entry in read_header(file).entries.values()}
    return {name for name in found if name in TOLERANCE} or {"F32"}


def read_head(folder: Path, manifest: Mapping[str, Any], base: BaseModel) -> dict[str, torch.Tensor]:
    """The trained head out of an export's own files, under its parameter names; what replaces a tensor of the base has that one's.

    Raises:
        VerifyError: it is not there.
        UnsupportedError: a graph has it in no form that can be read back.
    """
    from .checkpoint import read_tensor

    wanted = set(manifest.get("head") or [])
    if wanted and manifest["format"] == "onnx":
        places = (manifest.get("report") or {}).get("head")
        return _located(folder / "onnx" / "model.onnx", places if isinstance(places, dict) else {}, wanted)
    found = {}
    names = {stored: name for name, stored in base.stored_names(sorted(wanted)).items()} | {
        name: name for name in wanted
    }
    for file in sorted(folder.glob("*.safetensors")):
        for key, entry in read_header(file).entries.items():
            if (name := names.get(key.removeprefix(PEFT_PREFIX))) is not None:
                found[name] = read_tensor(entry)
    if wanted - set(found):
        raise VerifyError(f"{folder}: the tensor {sorted(wanted - set(found))[0]!r} of its trained head is not there.")
    return found


def locate_head(folder: Path, head: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Where the tensors of a head lie in a traced graph: name -> [name of the initializer, whether it is transposed there].

    A product of three dimensions has its weight transposed under a name of its own, and of two equal tensors a graph keeps one. What
    is not found as a whole, as it went into a product of constants, is left out.
    """
    import numpy as np
    import onnx

    wanted = {name: tensor.detach().float().cpu().numpy() for name, tensor in head.items()}
    shapes = {shape for value in wanted.values() for shape in (value.shape, value.T.shape)}
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for file in sorted((folder / "onnx").glob("*.onnx"))[:1]
        for tensor in (onnx.load(str(file)).graph.initializer if head else ())
        if tuple(tensor.dims) in shapes
    }
    places = {
        name: next(
            (
                [at, transposed]
                for at, array in sorted(stored.items(), key=lambda item: item[0].removeprefix("model.") != name)
                for transposed, form in ((False, value), (True, value.T))
                if np.array_equal(array, form.astype(array.dtype))
            ),
            None,
        )
        for name, value in wanted.items()
    }
    return {name: place for name, place in places.items() if place is not None}


def _located(file: Path, places: Mapping[str, Any], wanted: set[str]) -> dict[str, torch.Tensor]:
    """The head out of a graph, from where `locate_head` found it."""
    import onnx
    import torch

    if missing := sorted(wanted - set(places)):
        raise UnsupportedError(
            f"{file}: the tensor {missing[0]!r} of the trained head does not stand in the graph as a whole."
        )
    stored = {tensor.name: tensor for tensor in onnx.load(str(file)).graph.initializer}
    found = {}
    for name in sorted(wanted):
        at, transposed = places[name] if isinstance(places[name], list) and len(places[name]) == 2 else (None, False)
        if at not in stored:
            raise VerifyError(f"{file}: the tensor {name!r} of its trained head is not there: export again.")
        array = onnx.numpy_helper.to_array(stored[at])
        found[name] = torch.from_numpy((array.T if transposed else array).copy())
    return found
