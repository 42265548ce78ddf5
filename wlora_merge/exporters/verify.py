"""The verify workflow: is this export still what was written, and does it compute its mixture?"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..constants import DTYPES
from ..data.tasks import get_task
from ..errors import UnsupportedError, VerifyError, WloraMergeError
from ..io.digests import path_of
from ..io.records import read_record
from ..mixture.inputs import Inputs, find_inputs
from ..mixture.mixture import Mixture
from ..mixture.record import MixtureRecord
from ..models.base_model import BaseModel, open_base
from ..text import nearest
from .dense import plan
from .head import read_head
from .manifest import FILE, digest, read_manifest
from .probe import difference_of, outputs_of, probe_tensors
from .unmerged import HEAD_KEYS, attach_mixture, export_model, load_model, unused_by
from .verify_files import check_files
from .verify_outputs import Checked, compare, tolerance_of
from .verify_weights import check_folded, check_lora, check_untouched


def verify(
    folder: str | Path,
    *,
    quick: bool = False,
    pinned: str | None = None,
    base: str | Path | None = None,
    adapters: Iterable[str | Path] = (),
) -> Checked:
    """Check an export folder: every digest, its structure, its weights and its outputs against the unmerged mixture.

    Args:
        folder: what `wlora-merge export` wrote.
        quick: digests and headers alone; nothing is loaded.
        pinned: the digest that it must have, `sha256:...`, as `export` printed it.
        base, adapters: the export's inputs, the latter as NAME=PATH. Left out, they are looked for by their sha256 among
            the files that this machine remembers; where they are not found, what needs them is skipped, and the result says so.

    Returns:
        What was checked, what was skipped and why, and the largest difference of an output.

    Raises:
        VerifyError: something is not as it was written, or the export does not compute its mixture.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if pinned is not None and pinned != (found := digest(folder)):
        raise VerifyError(
            f"{folder}: its digest is {found}, expected {pinned}: this is another export, or inputs have changed."
        )
    checked = Checked(files=check_files(folder, manifest), done=["digests", "structure"])
    if quick:
        return checked
    if manifest["format"] == "dense":
        load_model(folder, manifest.get("task"), unused=unused_by(manifest))
        checked.done.append("loads with no missing and no unexpected tensor")
    _check_outputs(folder, manifest, _find_inputs(manifest, base, adapters), checked)
    return checked


def _check_outputs(
    folder: Path, manifest: Mapping[str, Any], inputs: tuple[Path | None, dict[str, Path]], checked: Checked
) -> None:
    base_folder, adapters = inputs
    missing = [*(["the base model"] if base_folder is None else []), *_absent(manifest, adapters)]
    if missing:
        checked.skipped["outputs"] = f"not found here: {', '.join(missing)}; say --base PATH and --adapter NAME=PATH"
        return
    try:
        mixture = _mixture(manifest, open_base(str(base_folder)), adapters, folder)
    except UnsupportedError as error:
        checked.skipped["outputs"] = str(error)
        return
    found = find_inputs(mixture)
    _check_weights(folder, manifest, found, checked)
    if not manifest.get("probe"):
        checked.skipped["outputs"] = "the manifest has no probe inputs for this kind of model"
        return
    try:
        model = _unmerged(folder, manifest, found)
    except UnsupportedError as error:
        checked.skipped["outputs"] = f"the unmerged mixture does not run: {error}"
        return
    if "same_tokens" in (manifest.get("report") or {}):
        _check_genai(folder, manifest, model, checked)
        return
    if manifest["format"] == "onnx":
        _check_onnx(folder, manifest, model, checked)
    _compare_probe(folder, manifest, model, found.base, checked)


def _check_weights(folder: Path, manifest: Mapping[str, Any], found: Inputs, checked: Checked) -> None:
    """A dense export's tensors, folded again, or a LoRA's factors, against the mixture's own."""
    if manifest["format"] == "dense":
        wanted = (manifest.get("options") or {}).get("dtype")
        planned = plan(
            found.base, found.deltas, found.mixture.head, untied=found.untied, dtype=DTYPES[wanted] if wanted else None
        )
        count = check_untouched(folder, planned)
        checked.done.append(f"{count} tensors that no adapter changes are the base's, byte for byte")
        count = check_folded(folder, planned, found.mixture)
        checked.done.append(
            f"{count} tensors that adapters change or --dtype rounds are the mixture's, folded again, but for a last bit"
        )
    if manifest["format"] == "lora":
        lost = check_lora(folder, manifest, found.mixture, found.base, found.deltas)
        checked.done.append(
            f"its factors are the mixture's, but for {lost:.2e} of the delta weights' norm, as its report says"
        )


def _unmerged(folder: Path, manifest: Mapping[str, Any], found: Inputs) -> Any:
    """The base with the adapters attached, the mixture's weights and head in place, and what an ONNX export adds to it.

    Raises:
        UnsupportedError: the adapters cannot be attached, or would do nothing there.
    """
    from ..mixture.live_model import refuse_uncalled

    mixture = found.mixture
    head_options = {k: mixture.config[k] for k in HEAD_KEYS if k in mixture.config}
    model = load_model(found.base.folder, mixture.task, head=mixture.head, unused=unused_by(manifest), **head_options)
    attach_mixture(model, mixture, found.adapters, found.base, found.tensors)
    refuse_uncalled(model, lambda: outputs_of(model, manifest["probe"]))
    if manifest["format"] == "onnx" and get_task(mixture.task).is_body:
        from ..onnx.pooling import add_pooling

        add_pooling(model, folder)
    return model


def _check_onnx(folder: Path, manifest: Mapping[str, Any], model: Any, checked: Checked) -> None:
    from ..onnx.validate import compare_with

    task = get_task(manifest.get("task"))
    compare_with(folder, model, task=task, halved=lambda: copy.deepcopy(model).half())
    generated = ", and in a greedy generation" if task.generates else ""
    checked.done.append(f"ONNX Runtime agrees with the unmerged mixture at several shapes{generated}")


def _compare_probe(folder: Path, manifest: Mapping[str, Any], model: Any, base: BaseModel, checked: Checked) -> None:
    """The export's outputs on the probe against the unmerged mixture's."""
    from ..mixture.attach import set_delta_scale

    expected = outputs_of(model, manifest["probe"])
    set_delta_scale(model, 0.0)
    without = outputs_of(model, manifest["probe"])
    effect = max(difference_of(without[name], tensor) for name, tensor in expected.items())
    if manifest["format"] == "onnx":
        from ..onnx.convert import run_probe

        got = run_probe(folder, probe_tensors(manifest["probe"]))
        expected = {name: tensor for name, tensor in expected.items() if name in got}  # its graph has no pooler
    else:
        got = outputs_of(export_model(folder, manifest, base), manifest["probe"])
    tolerance = tolerance_of(folder, manifest, effect)
    checked.tolerance = tolerance.value
    checked.largest_difference = compare(got, expected, tolerance.value, str(folder))
    checked.done.append(
        f"outputs {'equal' if tolerance.exact else 'agree with'} the unmerged mixture's: off by {checked.largest_difference:.1e} "
        f"of the largest, at most {tolerance.value:.1e} expected ({tolerance.why})"
    )


def _check_genai(folder: Path, manifest: Mapping[str, Any], model: Any, checked: Checked) -> None:
    from ..onnx.genai import compare_genai

    share, expected = compare_genai(folder, model), manifest["report"]["same_tokens"]
    if share < expected:
        raise VerifyError(
            f"{folder}: {share:.0%} of the greedy tokens are the unmerged mixture's, {expected:.0%} were when it was exported: "
            "export again."
        )
    checked.done.append(f"{share:.1%} of the greedy tokens are the unmerged mixture's")


def _find_inputs(
    manifest: Mapping[str, Any], base: str | Path | None, adapters: Iterable[str | Path]
) -> tuple[Path | None, dict[str, Path]]:
    from ..adapters.adapter import split_adapter_spec

    given: dict[str, Path] = {}
    names = [row["name"] for row in manifest["adapters"]]
    for spec in adapters:
        name, path = split_adapter_spec(spec)
        if name not in names:
            raise WloraMergeError(
                f"--adapter {spec}: the export has no adapter of that name{nearest(str(name), names)}."
            )
        given[str(name)] = Path(path)
    for row in manifest["adapters"]:
        file = path_of(row["sha256"].get("adapter_model.safetensors", ""))
        if row["name"] not in given and file is not None:
            given[row["name"]] = file.parent
    if base is not None:
        return Path(base), given
    files = [path_of(digest) for digest in manifest["base_model"]["sha256"].values()]
    folders = {file.parent for file in files if file is not None}
    return (folders.pop() if len(folders) == 1 and all(files) else None), given


def _absent(manifest: Mapping[str, Any], adapters: Mapping[str, Path]) -> list[str]:
    return [f"adapter {row['name']!r}" for row in manifest["adapters"] if row["name"] not in adapters]


def _mixture(manifest: Mapping[str, Any], base: BaseModel, adapters: Mapping[str, Path], folder: Path) -> Mixture:
    """The mixture that the manifest records, with its inputs where they were found; its head is the export's own."""
    import torch

    names = [row["name"] for row in manifest["adapters"]]
    try:
        rows = [[float(weights[name]) for name in names] for weights in manifest["weights"].values()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerifyError(
            f"{folder / FILE}: its weights are not one number for each group and adapter: export again."
        ) from error
    weights = torch.tensor(rows, dtype=torch.float64).float().reshape(len(rows), len(names))
    same = ("granularity", "normalize", "delta_scale", "groups", "task", "config", "modules_to_save", "resize_vocab")
    table = {key: manifest[key] for key in same if key in manifest} | {
        "base_model": {"source": str(base.folder.resolve()), "sha256": manifest["base_model"]["sha256"]},
        "adapters": [
            {"name": r["name"], "source": str(adapters[r["name"]].resolve()), "sha256": r["sha256"]}
            for r in manifest["adapters"]
        ],
        "prefixes": dict(zip(("in_file", "in_model"), manifest["prefixes"], strict=True)),
    }
    tensors = {"mixture_weights": weights, "wlora_weights": weights}
    tensors |= {f"head.{name}": tensor for name, tensor in read_head(folder, manifest, base).items()}
    record = read_record(MixtureRecord, table, folder / FILE, VerifyError, "export again")
    return Mixture.from_record(record, tensors, folder, FILE)
