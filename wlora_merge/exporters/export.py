"""The export workflow: a mixture folder in, an ordinary model folder out, all or nothing.

adapters -> mixture -> fold -> writer, in one straight line; this room checks the digests, picks the writer, and adds the
card and the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.deltas import ModuleDelta
from ..constants import DTYPES
from ..data.tasks import get_task
from ..distributed import Team, team
from ..errors import BaseModelError, UnsupportedError
from ..export_options import ExportOptions, export_options
from ..io.digests import sha256_files
from ..io.safetensors_file import Entry
from ..io.staging import Staging, staged
from ..io.tensors import matrix_shape
from ..mixture.inputs import Inputs, find_inputs
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel, refuse_quantized
from ..models.files import INDEX
from ..models.tied_embeddings import untied_config
from ..progress import LOG
from .dense import OutputFile, changed_config, folder_bytes, index_bytes, plan, with_dtype
from .head import locate_head
from .manifest import PACKAGES, build_manifest, versions, write_manifest
from .model_card import CardFacts, write_card
from .probe import make_probe
from .report import write_report
from .serving import check_rank, check_server
from .stream import write_files

if TYPE_CHECKING:
    from .onnx_refold import Refold


@dataclass(frozen=True)
class ExportResult:
    """Where an export stands, how it got there, and what was measured on the way."""

    folder: Path
    format: str
    swap: str | None
    bytes: int
    report: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What will be written: the dense files, which tied tensors they have apart, the graphs to rewrite, and bytes on disk."""

    files: list[OutputFile]
    untied: Mapping[str, Entry]
    refold: Refold | None
    nbytes: int


def export(
    mixture: str | Path | Mixture,
    format: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Iterable[str | Path] = (),
    any_digest: bool = False,
    force: bool = False,
    report: bool = False,
    **options: Any,
) -> ExportResult:
    """Fold a mixture and write it: `W_base + delta_scale · Σ v̂_n · (α_n/r_n) · B_n A_n`.

    Args:
        mixture: a mixture folder, or a Mixture.
        format: `dense` (safetensors), `lora` (one PEFT adapter) or `onnx`.
        out: the folder to write; it must not exist or be empty unless `force`.
        base, adapters: inputs that have moved, the latter as NAME=PATH; their digests must match.
        any_digest: accept inputs whose bytes differ from those that the mixture was made from.
        force: replace what is in `out`.
        report: also write report.html, and its figures into the model card.
        options: the other fields of `ExportOptions`.

    Returns:
        The folder, its bytes, and what was measured: of a lora its r and errors, of a graph its interface and largest difference.

    Raises:
        WloraMergeError: with one sentence; nothing is left in `out`.
    """
    asked = export_options({"format": format, **options})
    inputs = find_inputs(mixture, base=base, adapters=adapters, any_digest=any_digest)
    planned = _plan(inputs, asked)
    folders = [*inputs.folders, *(Path(p) for p in (mixture, asked.onnx_base) if isinstance(p, str | Path))]
    with (
        team() as ranks,
        _shared_staging(ranks, Path(out), force=force, inputs=folders, needed_bytes=planned.nbytes) as staging,
    ):
        known = write_shards(inputs, planned.files, staging.path, ranks) if format == "dense" else {}
        if not ranks.leads:
            return ExportResult(staging.out, format, None, 0, {})
        written, measured = _write(inputs, planned, asked, staging.path)
        how = asdict(asked) | {"any_digest": any_digest, "report": report}
        _describe(inputs, planned, how, measured, staging.path, known | written)
        total = sum(p.stat().st_size for p in staging.path.rglob("*") if p.is_file())
    return ExportResult(staging.out, format, staging.swap, total, measured)


def _plan(inputs: Inputs, asked: ExportOptions) -> _Plan:
    """What to write, from headers alone; refuses what these inputs do not allow."""
    lora, onnx_base = asked.format == "lora", asked.onnx_base
    if not lora:
        refuse_quantized(inputs.base)
    elif asked.server is not None:
        check_server(asked.server, inputs.mixture, inputs.deltas)
    if inputs.base.added and (lora or onnx_base is not None):
        raise UnsupportedError(
            f"--resize-vocab {inputs.mixture.resize_vocab}: the model has tokens that its base lacks, which "
            f"{'no LoRA over that base can express' if lora else 'the graph of the base has no room for'}: export with "
            f"--format {'dense' if lora else 'onnx and without --onnx-base'}."
        )
    untied = {} if lora else inputs.untied
    if untied:
        LOG.info(_untied_note(untied))
    if untied and onnx_base is not None:
        raise UnsupportedError(
            f"{onnx_base}: {_untied_note(untied)} A refold keeps the graph of the base: export without it."
        )
    traced = asked.format == "onnx" and onnx_base is None
    files = plan(
        inputs.base,
        [] if lora else inputs.deltas,
        inputs.mixture.head,
        untied=untied,
        dtype=DTYPES.get(asked.dtype or ("float32" if traced else "")),
        max_shard_bytes=asked.max_shard_bytes,
    )
    refold = _plan_refold(Path(onnx_base), inputs, files) if onnx_base is not None else None
    weights = lora_bytes(inputs, asked.rank) if lora else folder_bytes(refold.files if refold else files)
    carried = sum(path.stat().st_size for path in inputs.base.carried_files().values())
    return _Plan(
        files, untied, refold, weights * (2 if traced else 1) + carried
    )  # a graph is traced from a dense folder


def _write(inputs: Inputs, planned: _Plan, asked: ExportOptions, out: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Write what the format has (dense: beside its shards); the sha256 that are known by then, and what was measured."""
    if asked.format == "dense":
        write_beside(inputs, planned.files, out, asked.dtype, planned.untied)
        return {}, {"untied": sorted(planned.untied)} if planned.untied else {}
    if asked.format == "lora":
        measured = _write_lora(inputs, out, asked)
        check_rank(measured["r"], server=asked.server, max_rank=asked.max_rank, exact=asked.rank is None)
        return {}, measured
    if planned.refold is not None:
        return _write_refold(inputs, planned.refold, out)
    return {}, _write_onnx(inputs, planned, asked, out)


def _describe(
    inputs: Inputs,
    planned: _Plan,
    how: dict[str, Any],
    measured: Mapping[str, Any],
    out: Path,
    known: Mapping[str, str],
) -> None:
    """Write the report, the model card and the manifest."""
    kind, base_name = how["format"], how.pop("base_name") or inputs.base.source.name
    if how["onnx_base"] is not None:
        how["onnx_base"] = Path(os.path.abspath(how["onnx_base"])).name
    drawn = _report(inputs, out, kind, base_name, how, measured) if how["report"] else []
    facts = CardFacts(
        inputs.mixture,
        kind,
        base_name,
        folders=inputs.folders,
        options=how,
        measured=measured,
        note=_untied_note(planned.untied),
        figures=drawn,
    )
    write_card(out, facts)
    manifest = build_manifest(
        inputs.mixture,
        inputs.base,
        inputs.adapters,
        kind=kind,
        base_name=base_name,
        options=how,
        report=measured,
        probe=make_probe(inputs.base.config | inputs.mixture.config, inputs.mixture.task),
    )
    write_manifest(manifest, out, known)


def _report(
    inputs: Inputs, folder: Path, kind: str, base_name: str, options: Mapping[str, Any], measured: Mapping[str, Any]
) -> list[str]:
    facts = {
        f"export: {key}": value for key, value in options.items() if key != "report" and value not in (None, False)
    }
    facts |= {f"measured: {key}": value for key, value in measured.items() if isinstance(value, int | float)}
    facts |= {f"version: {name}": version for name, version in versions(PACKAGES[kind]).items()}
    title = f"A mixture of {len(inputs.adapters)} adapters on {base_name}, {kind} export"
    return write_report(folder, inputs.mixture, inputs.deltas, title=title, kind=kind, base=inputs.base, facts=facts)


@contextmanager
def _shared_staging(ranks: Team, out: Path, **options: Any) -> Iterator[Staging]:
    """Rank 0's staging folder, on every rank; rank 0 alone makes it and puts it in place."""
    if not ranks.leads:
        yield Staging(out, Path(ranks.share("")))
        return
    with staged(out, **options) as staging:
        ranks.share(str(staging.path))
        yield staging


def _untied_note(split: Mapping[str, Entry]) -> str:
    pairs = ", ".join(f"`{name}` and `{entry.name}`" for name, entry in sorted(split.items()))
    return (
        f"The base model's {pairs} are one tensor; the adapters change one of the two, so here they are two, and "
        "`tie_word_embeddings` is false."
        if split
        else ""
    )


def lora_bytes(inputs: Inputs, rank: int | None) -> int:
    """Bytes of one float32 LoRA of rank `rank`, or of the largest R of any module."""
    stacks = [delta for delta in inputs.deltas if isinstance(delta, ModuleDelta)]
    r = rank or max((delta.R for delta in stacks), default=0)
    return sum(4 * r * sum(matrix_shape(delta.shape)) for delta in stacks)


# ------------------------------------------------------------------------------------------------------- writers


def write_shards(inputs: Inputs, files: Sequence[OutputFile], out: Path, ranks: Team) -> dict[str, str]:
    """Write the weight files; with several ranks each takes every n-th of them.

    Returns:
        File name -> sha256 of all of them.
    """
    mine = files[ranks.rank :: ranks.size]
    parts = ranks.gather(lambda: write_files(mine, out, inputs.mixture))
    return {name: digest for part in parts for name, digest in part.items()}


def write_beside(
    inputs: Inputs, files: Sequence[OutputFile], out: Path, dtype: str | None, split: Mapping[str, Entry]
) -> None:
    """Write what a dense folder has beside its weights: index, config, and every file that the base carries."""
    index = index_bytes(inputs.base, files)
    if index is not None:
        (out / INDEX).write_bytes(index)
    changes = dict(inputs.mixture.config)
    if split:
        changes |= untied_config(inputs.base.config | changes)
    if dtype is not None:
        changes = with_dtype(inputs.base, changes, dtype)
    copy_carried(inputs.base, out)
    (out / "config.json").write_bytes(changed_config(inputs.base, changes))


def copy_carried(base: BaseModel, out: Path, *, config: bool = True) -> None:
    """Copy what a base carries beside its weights: tokenizer, processor, generation config, chat template."""
    for name, path in base.carried_files().items():
        if config or str(name) not in ("config.json", "generation_config.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with open(out / name, "xb") as stream:
                stream.writelines(_chunks(path))


def _chunks(file: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time.

    Raises:
        BaseModelError: it cannot be read.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 20):
                yield chunk
    except OSError as error:
        raise BaseModelError(f"{file}: cannot be read ({error.strerror or error}).") from error


def _write_lora(inputs: Inputs, out: Path, asked: ExportOptions) -> dict[str, Any]:
    from .lora import write_lora

    report = write_lora(
        inputs.mixture,
        inputs.base,
        inputs.deltas,
        out,
        base_name=asked.base_name or inputs.base.source.name,
        rank=asked.rank,
        energy=asked.energy,
        dtype=asked.dtype or "float32",
    )
    copy_carried(inputs.base, out, config=False)
    return {
        "r": report.r,
        "relative_error": report.overall.relative_error,
        "energy_kept": report.overall.kept / report.overall.energy if report.overall.energy else 1.0,
        "modules": {name: {"relative_error": m.relative_error} for name, m in report.modules.items()},
    }


def _plan_refold(onnx_base: Path, inputs: Inputs, files: Sequence[OutputFile]) -> Refold:
    from .onnx_refold import plan_refold

    return plan_refold(onnx_base, inputs.base, [piece for file in files for piece in file.pieces], inputs.mixture)


def _write_refold(inputs: Inputs, refold: Refold, out: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from .onnx_refold import write_refold

    folder = out / "onnx"
    folder.mkdir()
    written = write_refold(refold, folder, inputs.mixture)
    names = {stored: name for name, stored in DTYPES.items()}
    dtypes = sorted(names.get(dtype, dtype) for dtype in refold.dtypes)
    copy_carried(inputs.base, out)
    (out / "config.json").write_bytes(
        changed_config(inputs.base, with_dtype(inputs.base, inputs.mixture.config, dtypes[0]))
    )
    originals = [path for graph in refold.graphs for path in (graph.path, *graph.data)]
    return {f"onnx/{name}": digest for name, digest in written.items()}, {
        **({"head": locate_head(out, inputs.mixture.head)} if inputs.mixture.head else {}),
        "onnx_base": {path.name: digest for path, digest in sha256_files(originals).items()},
        "rewritten": len(refold.weights),
        "dtypes": dtypes,
    }


def _write_onnx(inputs: Inputs, planned: _Plan, asked: ExportOptions, out: Path) -> dict[str, Any]:
    import shutil

    task, dtype = inputs.mixture.task, asked.dtype or "float32"
    if task is None:
        raise UnsupportedError("an ONNX export needs the mixture's task: make the mixture with --task TASK.")
    from ..onnx.convert import refuse_provider, require_extra, write_onnx
    from ..onnx.quantize import refuse_quantize

    require_extra()
    if asked.onnx_runtime is None:
        refuse_quantize(get_task(task), asked.quantize, dtype)
        refuse_provider(asked.ort_fusions)
    dense = out / ".dense"
    dense.mkdir()
    write_shards(inputs, planned.files, dense, Team())
    write_beside(inputs, planned.files, dense, dtype, planned.untied)
    if asked.onnx_runtime == "genai":
        from ..onnx.genai import write_genai

        share = write_genai(dense, out, task=get_task(task), dtype=dtype, quantize=asked.quantize)
        shutil.rmtree(dense)
        return {"same_tokens": share}
    report = write_onnx(
        dense, out, task=task, dtype=dtype, opset=asked.opset, ort_fusions=asked.ort_fusions, quantize=asked.quantize
    )
    shutil.rmtree(dense)
    return {
        "inputs": list(report.input_names),
        "outputs": list(report.output_names),
        "opset": report.opset,
        "largest_difference": report.largest_difference,
        **({"head": locate_head(out, inputs.mixture.head)} if inputs.mixture.head else {}),
        **({"quantized": report.quantized} if report.quantized else {}),
    }
