"""The verify workflow: is this export still what was written, and does it compute its mixture?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..constants import MANIFEST_FILE
from ..errors import UnsupportedError, VerifyError, WloraMergeError
from ..io.digests import path_of, sha256_file
from ..io.hub import ADAPTER_PATTERNS, BASE_PATTERNS, resolve_source
from ..mixture.inputs import Inputs, find_inputs
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel, open_base
from ..text import nearest
from .formats import FORMATS
from .manifest import Manifest, digest, read_manifest
from .probe import outputs_of
from .unmerged import attach_mixture, head_options, load_checked, unused_by
from .verify_files import check_files
from .verify_outputs import Checked

if TYPE_CHECKING:
    from torch import nn


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
        base: the base model. Left out, it is looked for by its sha256 among the files that this machine remembers. Where it is
            not found, what needs it is skipped, and the result says so.
        adapters: the export's adapters, as NAME=PATH; left out, they are looked for in the same way.

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
    kind = FORMATS[manifest.format]
    checked = Checked(files=check_files(folder, manifest.files), done=["digests", "structure"])
    kind.check_structure(folder, manifest)
    if not quick:
        with _skipped_where_unsupported("loading", checked):
            checked.done += kind.check_loads(folder, manifest)
        _check_against_inputs(folder, manifest, _find_inputs(manifest, base, adapters), checked)
    return checked


@contextmanager
def _skipped_where_unsupported(check: str, checked: Checked) -> Iterator[None]:
    """Skip a check that cannot run here, with its reason: a model with code of its own, a package that is not installed."""
    try:
        yield
    except UnsupportedError as error:
        checked.skipped[check] = str(error)


def _check_against_inputs(
    folder: Path, manifest: Manifest, inputs: tuple[Path | None, dict[str, Path]], checked: Checked
) -> None:
    """Compare weights and outputs with the mixture's, made anew from its inputs where they are here."""
    base_folder, adapters = inputs
    missing = [*(["the base model"] if base_folder is None else []), *_absent(manifest, adapters)]
    if missing:
        checked.skipped["outputs"] = f"not found here: {', '.join(missing)}; say --base PATH and --adapter NAME=PATH"
        return
    kind = FORMATS[manifest.format]
    with _skipped_where_unsupported("outputs", checked):
        mixture = _recorded(manifest, open_base(str(base_folder)), adapters, folder)
        found = find_inputs(mixture, instead="as --base PATH or --adapter NAME=PATH")
        with _skipped_where_unsupported("weights", checked):
            checked.done += kind.check_weights(folder, manifest, found)
        if not manifest.probe:
            raise UnsupportedError("the manifest has no probe inputs for this kind of model")
        model = kind.unmerged(_unmerged(manifest, found), folder, manifest)
        kind.check_outputs(folder, manifest, model, found.base, checked)


def _unmerged(manifest: Manifest, found: Inputs) -> nn.Module:
    """The base with the adapters attached, and the mixture's weights and head in place.

    Raises:
        UnsupportedError: the adapters cannot be attached, or would do nothing there.
    """
    from ..mixture.attachment import attachment_of
    from ..mixture.combined_adapter import attachable
    from ..mixture.live_model import refuse_uncalled

    mixture = found.mixture
    model = load_checked(
        found.base.folder,
        mixture.task,
        head=mixture.head,
        unused=unused_by(mixture),
        **head_options(mixture.config),
    )
    mixture, adapters = attachable(found)
    attach_mixture(model, mixture, adapters, found.base, found.tensors)
    refuse_uncalled(model, attachment_of(model).layers, lambda: outputs_of(model, manifest.probe, UnsupportedError))
    return model


def _find_inputs(
    manifest: Manifest, base: str | Path | None, adapters: Iterable[str | Path]
) -> tuple[Path | None, dict[str, Path]]:
    """Where the base and the adapters lie: as given, else among the files that this machine remembers."""
    from ..adapters.adapter import split_adapter_spec

    given: dict[str, Path] = {}
    names = [adapter.name for adapter in manifest.mixture.adapters]
    for spec in adapters:
        name, path = split_adapter_spec(spec)
        if name not in names:
            raise WloraMergeError(
                f"--adapter {spec}: the export has no adapter of that name{nearest(str(name), names)}."
            )
        given[str(name)] = resolve_source(path, ADAPTER_PATTERNS).folder
    for adapter in manifest.mixture.adapters:
        if adapter.name not in given and (folder := _remembered(adapter.sha256)):
            given[adapter.name] = folder
    if base is not None:
        return resolve_source(base, BASE_PATTERNS).folder, given
    return _remembered(manifest.mixture.base_model.sha256), given


def _remembered(digests: Mapping[str, str]) -> Path | None:
    """A folder that this machine remembers with every one of these files; of a copy with another config it says nothing."""

    def has_all(file: Path) -> bool:
        folder = file.parent
        return all((folder / name).is_file() and sha256_file(folder / name) == digests[name] for name in digests)

    weights = [name for name in digests if name.endswith(".safetensors")]
    file = path_of(digests[weights[0]], has_all) if weights else None
    return file.parent if file is not None else None


def _absent(manifest: Manifest, adapters: Mapping[str, Path]) -> list[str]:
    return [f"adapter {a.name!r}" for a in manifest.mixture.adapters if a.name not in adapters]


def _recorded(manifest: Manifest, base: BaseModel, adapters: Mapping[str, Path], folder: Path) -> Mixture:
    """The mixture that the manifest records, with its inputs where they were found; its head is the export's own."""
    import torch

    record = manifest.mixture
    rows = [[record.weights[group][adapter.name] for adapter in record.adapters] for group in record.groups]
    weights = torch.tensor(rows, dtype=torch.float64).float().reshape(len(rows), len(record.adapters))
    head = FORMATS[manifest.format].read_head(folder, manifest, base)
    tensors = {"mixture_weights": weights, "wlora_weights": weights} | {f"head.{name}": head[name] for name in head}
    made = Mixture.from_record(record, tensors, folder, MANIFEST_FILE)
    made.base = replace(made.base, source=str(base.folder.resolve()))
    made.adapters = [replace(a, source=str(adapters[a.name].resolve())) for a in made.adapters]
    made.head_tensors = base.stored_names(made.head)
    return made
