"""Models as transformers loads them: in safety, in silence, no larger than their files, and every failure as one sentence.

A folder from elsewhere runs no code here, is no pickle, and fetches nothing. It knows classes of transformers, and no task.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BaseModelError, UnsupportedError, WloraMergeError
from ..io.safetensors_file import read_header
from ..io.untrusted import read_json
from ..text import first_line, short

if TYPE_CHECKING:
    import torch

PROJECTED = "ModelWithProjection"
"""How transformers calls the class of one CLIP tower that ends in the shared space."""
SPARE_ELEMENTS = 10_000_000
"""That a model may have beyond `ELEMENTS_PER_BYTE` of its files: a new head, masks, tables of positions."""
ELEMENTS_PER_BYTE, PACKED_ELEMENTS_PER_BYTE = 2, 16
"""Of the files, that a model may have at most. Packed weights have up to eight numbers in a byte, and are built twice."""
OF_OTHER_TASKS = ("contact_head.", "mask_token")
"""Parts of bodies that only other tasks use, and that some bases lack."""
OWN_CODE = "needs code of its own (auto_map), which is never run here"
TALKATIVE = ("transformers", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class LoadingReport:
    """Which tensors a model and its files do not share, by the names that the model, or of unexpected ones the files, give them.

    What the model computes, and what other tasks alone use, is neither missing nor mismatched.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: dict[str, list[int]]
    """With the shape that the files have."""


def read_config(folder: Path, **changes: Any) -> Any:
    """A folder's config as transformers reads it, with some of its keys changed."""
    import transformers

    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changes)


def class_for(
    folder: Path, auto: Any, error: type[WloraMergeError] = BaseModelError, *, or_named: bool = False
) -> tuple[Any, str]:
    """The class that loads a folder's model, and the model's type.

    That is `auto`. A tower with a projection has no auto class that keeps the projection, so instead of AutoModel it is the
    class that the config names.

    Args:
        folder: a model folder.
        auto: one of transformers' auto classes; None takes the class that the config names, else AutoModel.
        error: to raise.
        or_named: take the class that the config names where `auto` does not know the model; otherwise it is None then.

    Raises:
        error: transformers cannot read the config.
        UnsupportedError: the model needs code of its own, or a type that this transformers does not know.
    """
    import transformers

    refuse_unknown_type(folder, error)
    with quiet(), library_errors(f"{folder}: transformers cannot load it", error):
        config = read_config(folder)
    name = (getattr(config, "architectures", None) or [""])[0]
    named = getattr(transformers, name, None)
    if named is not None and (auto is None or (auto is transformers.AutoModel and name.endswith(PROJECTED))):
        return named, config.model_type
    auto = auto or transformers.AutoModel
    if type(config) in auto._model_mapping:
        return auto, config.model_type
    if named is None and auto.__name__ in (getattr(config, "auto_map", None) or {}):
        raise UnsupportedError(f"{folder / 'config.json'}: its {auto.__name__} {OWN_CODE}.")
    return (named or auto) if or_named else None, config.model_type


def refuse_unknown_type(folder: Path, error: type[WloraMergeError] = BaseModelError) -> None:
    """Refuse a model whose type this transformers does not know: it cannot be loaded, whatever its weights are.

    Raises:
        error: the config cannot be read.
        UnsupportedError: with the type, and whether the model comes with code of its own, which is never run.
    """
    import transformers

    config = read_json(folder / "config.json", error)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in transformers.CONFIG_MAPPING:
        return
    why = OWN_CODE if config.get("auto_map") else f"is none that transformers {transformers.__version__} knows"
    raise UnsupportedError(f"{folder / 'config.json'}: its model_type {short(kind)} {why}.")


def load(
    cls: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    error: type[WloraMergeError] = BaseModelError,
    complete: bool = True,
    replaced: Collection[str] = (),
    unused: Callable[[str], bool] = lambda _: False,
    **options: Any,
) -> tuple[Any, LoadingReport]:
    """Load a folder's model, in evaluation mode.

    Args:
        cls: the class, from `class_for`.
        folder: a model folder.
        dtype: of its weights.
        error: raised where the folder is at fault.
        complete: refuse a folder whose tensors are not just the model's; a pooler that a bare model lacks is left out. Otherwise
            what the folder lacks is drawn anew, and the caller judges it by the report.
        replaced: names of tensors that the caller puts into the model, so that the folder may lack them.
        unused: whether a tensor may be one that the model has no place for, by its name in the files.
        options: handed to `from_pretrained`: attn_implementation, quantization_config, device_map, and keys of the config.

    Raises:
        error: transformers cannot load it; it describes a far larger model than its files hold; with `complete`, a tensor is
            missing, is unexpected, or has another shape.
    """
    with (
        quiet(),
        library_errors(f"{folder}: transformers cannot load it as {cls.__name__}", error),
        bounded(folder, error),
    ):
        model, info = cls.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    report = LoadingReport(
        frozenset(str(name) for name in info["missing_keys"] if not is_made(model, str(name))),
        frozenset(map(str, info["unexpected_keys"])),
        {str(name): list(shape) for name, shape, _ in info["mismatched_keys"] if not is_made(model, str(name))},
    )
    if complete:
        left = {
            "missing": report.missing - set(replaced) - _drop_pooler(model, report.missing),
            "unexpected": {name for name in report.unexpected if not unused(name)},
            "mismatched": set(report.mismatched) - set(replaced),
        }
        for kind, names in left.items():
            if names:
                raise error(
                    f"{folder}: loading it as {type(model).__name__} leaves {kind} keys: {len(names)} tensors are {kind}, "
                    f"first {min(names)!r}; give a folder that was made for this task."
                )
    return model.eval(), report


def is_made(model: Any, name: str) -> bool:
    """Whether a parameter that the files lack is computed and no weight (a sinusoidal table), or used by other tasks alone."""
    module = model.get_submodule(name.rpartition(".")[0])
    sinusoidal = getattr(model.config, "sinusoidal_pos_embds", False) and name.endswith("position_embeddings.weight")
    return "Sinusoidal" in type(module).__name__ or sinusoidal or any(part in name for part in OF_OTHER_TASKS)


def _drop_pooler(model: Any, missing: Iterable[str]) -> set[str]:
    """Leave out the pooler of a bare model that was trained without one, as one drawn anew would say nothing; its tensors."""
    pooler = {name for name in missing if name.startswith("pooler.")} if model.base_model is model else set()
    if pooler:
        model.pooler = None
    return pooler


@contextmanager
def bounded(folder: Path, error: type[WloraMergeError] = BaseModelError, *, packed: bool = False) -> Iterator[None]:
    """Let models be built only as large as the folder's tensors allow, on torch's meta device or in memory.

    The bound, for what is registered on each kind of device: elements of parameters and buffers of at most
    `ELEMENTS_PER_BYTE` of the safetensors files, and `SPARE_ELEMENTS`; so loading in float32 needs at most some eight times
    the files' bytes. Tensors: four times those of the files, and 10,000.

    Args:
        folder: a model folder.
        error: to raise.
        packed: the files hold quantized weights, several to a byte.

    Raises:
        error: the config describes a larger model.
    """
    from torch.nn.modules import module as hooks

    files = [file for file in folder.glob("*.safetensors") if file.is_file()]
    rate = PACKED_ELEMENTS_PER_BYTE if packed else ELEMENTS_PER_BYTE
    allowed = rate * sum(file.stat().st_size for file in files) + SPARE_ELEMENTS
    most = 4 * sum(len(read_header(file).entries) for file in files) + 10_000
    elements, tensors = Counter[str](), Counter[str]()

    def count(module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        """Add what a module registers to what the model has so far."""
        if tensor is None:
            return
        kind = tensor.device.type
        elements[kind] += tensor.numel()
        tensors[kind] += 1
        if elements[kind] > allowed or tensors[kind] > most:
            raise error(
                f"{folder / 'config.json'}: describes a model of {elements[kind]} numbers in {tensors[kind]} tensors or more, "
                f"and the files hold fewer: it is not the config of these weights."
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the libraries print about themselves away from the user: load reports, progress bars, notices, warnings.

    torch.onnx and transformers' exporter warn about their own internals (deprecated pytree checks, operators of packages
    that are not installed, "experimental"): nothing there is for the user to act on. What matters of a load is in its report,
    and of a graph is checked by running it. Failures still raise. ONNX Runtime's quantizer warns through the root logger itself.
    """
    import transformers

    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)  # without one, logging.warning() leaves a handler on stderr for good
    loggers = [root, *map(logging.getLogger, TALKATIVE)]
    levels = [logger.level for logger in loggers]
    bars.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # torch.onnx prints its steps on stdout, which belongs to results
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        root.removeHandler(silent)
        if shown:
            bars.enable_progress_bar()


@contextmanager
def library_errors(what: str, error: type[WloraMergeError]) -> Iterator[None]:
    """What a library says of a folder from elsewhere, in one sentence: its loaders let errors of any kind through.

    Too little memory is no fault of the folder's, and passes; neither is a package that is not installed: an UnsupportedError.
    """
    from torch import OutOfMemoryError

    try:
        yield
    except (WloraMergeError, MemoryError, OutOfMemoryError):
        raise
    except ImportError as failure:
        raise UnsupportedError(f"{what}: {first_line(failure)}.") from failure
    except Exception as failure:
        said = " ".join(str(failure).split()) or type(failure).__name__
        raise error(f"{what}: {said[:500].rstrip('.')}.") from failure
