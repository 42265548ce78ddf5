"""Does an export's config describe its tensors? Asked of headers and JSON alone, before any library loads the folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapters
from .adapters.deltas import ModuleDelta, TensorDelta
from .adapters.keys import parse_adapter_key
from .adapters.stacking import stack
from .adapters.targets import modules_of, tensors_of
from .constants import DTYPES
from .errors import VerifyError, WloraMergeError
from .io.safetensors_file import FLOATING, Entry, read_header, read_tensor
from .io.untrusted import find_file, read_json
from .models.base_model import BaseModel, open_base
from .models.files import INDEX
from .models.names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS
from .progress import Meter

if TYPE_CHECKING:
    from .mixture.mixture import Mixture
    from .writers.dense import OutputFile

LORA_ROUNDING = {"F32": 1e-3, "BF16": 3e-2, "F16": 3e-2}
"""What rounding its factors may cost a module of a LoRA, relative to its delta weight; small numbers of F16 have few bits."""
SUBNORMAL = 2.0**-24
"""Twice what rounding may change the smallest numbers of float16 by, however small they are."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def check_structure(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare what an export's config and index say with what its headers say.

    Raises:
        VerifyError: a pickle among the files, an index or a config that does not describe the tensors.
        BaseModelError: a dense export that is no checkpoint.
    """
    for name in manifest["files"]:
        if name.endswith(PICKLES):
            raise VerifyError(f"{folder / name}: is a pickle, which no export holds and which is never loaded.")
    if manifest["format"] == "dense":
        _check_dense(folder, manifest)
    if manifest["format"] == "lora":
        _check_lora(folder)


def _check_dense(folder: Path, manifest: Mapping[str, Any]) -> None:
    opened = open_base(folder)
    for name in manifest["files"]:
        if name.endswith(".safetensors") and "/" not in name and name not in opened.headers:
            raise VerifyError(f"{folder / name}: holds tensors that {INDEX} does not name: export again.")
    for file, header in opened.headers.items():
        for name in header.entries:
            if opened.index is not None and opened.index["weight_map"].get(name) != file:
                raise VerifyError(f"{folder / file}: tensor {name!r} is not where {INDEX} places it: export again.")
    wanted = (manifest.get("options") or {}).get("dtype")
    if wanted:
        _check_dtype(opened, wanted)
    _check_tied(opened)


def _check_dtype(opened: BaseModel, wanted: str) -> None:
    expected = DTYPES[wanted]
    for entry in opened.entries.values():
        if entry.dtype in FLOATING and entry.dtype != expected:
            raise VerifyError(
                f"{entry.file}: tensor {entry.name!r} is {entry.dtype}, expected {expected} (--dtype {wanted})."
            )
    told = {opened.config[key] for key in ("torch_dtype", "dtype") if key in opened.config}
    if told != {wanted}:
        raise VerifyError(
            f"{opened.folder / 'config.json'}: its dtype is {', '.join(map(repr, told)) or 'not said'}, and the tensors' is {wanted}."
        )


def _check_tied(opened: BaseModel) -> None:
    """Where the config ties them, an output embedding that is stored must be the input embedding."""
    if opened.config.get("tie_word_embeddings") is not True:
        return
    tables = {
        e.name.removesuffix(".weight").rpartition(".")[2]: e
        for name, e in opened.entries.items()
        if name in opened.tied
    }
    outputs = [tables[n] for n in OUTPUT_EMBEDDINGS if n in tables]
    inputs = [tables[n] for n in INPUT_EMBEDDINGS if n in tables]
    for output in outputs[:1]:
        for source in inputs[:1]:
            if output.shape != source.shape or not bool((read_tensor(output) == read_tensor(source)).all()):
                raise VerifyError(
                    f"{output.file}: tensor {output.name!r} is not {source.name!r}, though config.json ties them: export again."
                )


def _check_lora(folder: Path) -> None:
    file = find_file(folder, WEIGHTS_FILE, VerifyError)
    config_file = find_file(folder, CONFIG_FILE, VerifyError)
    if file is None or config_file is None:
        raise VerifyError(f"{folder}: lacks {CONFIG_FILE} or {WEIGHTS_FILE}: export again.")
    config, entries = read_json(config_file, VerifyError), read_header(file).entries
    r, targets = config.get("r"), config.get("target_modules")
    if type(r) is not int or config.get("lora_alpha") != r or not isinstance(targets, list):
        raise VerifyError(
            f"{config_file}: r is {r!r} and lora_alpha {config.get('lora_alpha')!r}, expected one number."
        )
    modules: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        parsed = parse_adapter_key(key)
        if parsed.part != "tensor":
            modules.setdefault(parsed.name, {})[parsed.part] = entry
    for module, parts in modules.items():
        for part, entry in parts.items():
            axis = 0 if part.endswith("A") else 1
            if len(entry.shape) <= axis or entry.shape[axis] != r:
                raise VerifyError(
                    f"{file}: tensor {entry.name!r} has shape {list(entry.shape)}, expected rank {r} in axis {axis}."
                )
        if not any(module == t or module.endswith(f".{t}") for t in targets):
            raise VerifyError(f"{config_file}: target_modules lack {module!r}, of which there are tensors.")


def check_untouched(folder: Path, planned: Sequence[OutputFile]) -> int:
    """Compare a dense export with what its writer would write: names, dtypes, shapes, and what no adapter changes byte for byte.

    Args:
        planned: from `writers.dense.plan`.

    Returns:
        The number of tensors compared by their bytes.

    Raises:
        VerifyError: a tensor that is missing, of another shape or dtype, or changed though no adapter changes it.
    """
    found = dict(open_base(folder).entries)
    count = 0
    for piece in (p for file in planned for p in file.pieces):
        got = found.pop(piece.name, None)
        if got is None or (got.dtype, got.shape) != (piece.dtype, piece.shape):
            what = f"is {got.dtype} {list(got.shape)}" if got else "is missing"
            raise VerifyError(
                f"{folder}: tensor {piece.name!r} {what}, expected {piece.dtype} {list(piece.shape)}: export again."
            )
        if piece.untouched and piece.source is not None:
            count += 1
            if not _same_bytes(got, piece.source):
                raise VerifyError(
                    f"{got.file}: tensor {piece.name!r} is not the base's, though no adapter changes it: export again."
                )
    if found:
        raise VerifyError(f"{folder}: tensor {min(found)!r} is neither the base's nor of the head: export again.")
    return count


def check_folded(folder: Path, planned: Sequence[OutputFile], mixture: Mixture) -> int:
    """Fold what adapters change again, tensor by tensor, and compare a dense export with it: rounding to 16 bits hides in a model's
    outputs what an adapter does, but not in its weights.

    Args:
        planned: from `writers.dense.plan`.

    Returns:
        The number of tensors compared.

    Raises:
        VerifyError: a number that is off by more than the last bit, in which another machine's float64 sums may differ.
    """
    from .io.tensors import Workspace
    from .writers.stream import differing

    found, space = open_base(folder).entries, Workspace()
    pieces = [p for file in planned for p in file.pieces]
    pieces = [p for p in pieces if p.source is not None and p.tensor is None and not p.untouched]
    meter = Meter("folding again", sum(p.nbytes for p in pieces), len(pieces), "tensors")
    for piece in pieces:
        off = differing(piece, mixture, space, found[piece.name])
        if off:
            raise VerifyError(
                f"{found[piece.name].file}: tensor {piece.name!r} is not the mixture's in {off} of its {math.prod(piece.shape)} "
                "numbers: export again."
            )
        meter.add(piece.nbytes, 1)
    return len(pieces)


def check_lora(
    folder: Path,
    manifest: Mapping[str, Any],
    mixture: Mixture,
    base: BaseModel,
    deltas: Sequence[ModuleDelta | TensorDelta],
) -> float:
    """Compare the factors of a LoRA export with the mixture's own, module by module: ||Δ - lora_B @ lora_A|| / ||Δ||.

    Returns:
        The same over all modules together: what its rank and its dtype lost.

    Raises:
        VerifyError: a module that lost more than its report and its dtype say.
    """
    import torch

    from .writers.lora import energy_of

    file, wanted = folder / WEIGHTS_FILE, {d.module: d for d in deltas if isinstance(d, ModuleDelta)}
    told = (manifest.get("report") or {}).get("modules") or {}
    ours = {module: delta.lora_B.double() * mixture.gains_of(delta) for module, delta in wanted.items()}
    energy = {module: energy_of(delta.lora_A, ours[module]) for module, delta in wanted.items()}
    rounding = max(LORA_ROUNDING[entry.dtype] for entry in read_header(file).entries.values() if "lora_" in entry.name)
    if not any(energy.values()):
        return 0.0
    try:
        found = stack(
            load_adapters([("export", folder)]), modules_of(base), tensors_of(base), model_type=base.model_type
        )
    except WloraMergeError as error:
        raise VerifyError(f"{error} Export again.") from error
    written = {delta.module: delta for delta in found if isinstance(delta, ModuleDelta)}
    if set(written) != set(wanted):
        raise VerifyError(f"{file}: it changes module {min(set(written) ^ set(wanted))!r}, or lacks it: export again.")
    apart = {}
    for module, delta in wanted.items():
        other, lost = written[module], float((told.get(module) or {}).get("relative_error", 0.0))
        lora_A = torch.cat([delta.lora_A.double(), other.lora_A.double()])
        lora_B = torch.cat([ours[module], -other.lora_B.double() * other.scaling.double()], dim=1)
        apart[module] = max(0.0, energy_of(lora_A, lora_B))
        more = apart[module] - lost**2 * energy[module]  # what truncation drops is orthogonal to what it keeps
        tiny = (
            SUBNORMAL
            * (other.lora_A.numel() + other.lora_B.numel()) ** 0.5
            * max(other.lora_A.norm(), other.lora_B.norm())
        )
        if not more <= (rounding * energy[module] ** 0.5 + float(tiny)) ** 2:
            raise VerifyError(
                f"{file}: module {module!r} is off from its delta weight by {(apart[module] / (energy[module] or 1)) ** 0.5:.2e} "
                f"of it, expected {lost:.2e}: export again."
            )
    return float((sum(apart.values()) / sum(energy.values())) ** 0.5)


def _same_bytes(one: Entry, other: Entry) -> bool:
    if (one.dtype, one.nbytes) != (other.dtype, other.nbytes):
        return False
    with open(one.file, "rb") as a, open(other.file, "rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.nbytes
        while left:
            step = min(left, 1 << 22)
            if a.read(step) != b.read(step):
                return False
            left -= step
    return True
