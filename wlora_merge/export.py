"""The export workflow: a mixture folder in, an ordinary model folder out, all or nothing.

adapters -> mixture -> fold -> writer, in one straight line; this room checks the digests, picks the writer, and adds the
card and the manifest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base_model import INDEX, BaseModel, refuse_quantized
from .card import write_card
from .check import locate_head, make_probe
from .checkpoint import DTYPES, Entry
from .deltas import ModuleDelta
from .digests import sha256_files
from .errors import BaseModelError, UnsupportedError
from .inputs import Inputs, find_inputs
from .layouts import matrix_shape
from .manifest import PACKAGES, build_manifest, versions, write_manifest
from .mixture import Mixture
from .names import ONNX_QUANTIZE, ONNX_RUNTIMES
from .ranks import Team, team
from .report import write_report
from .serving import check_rank, check_server
from .staging import Staging, staged
from .tying import untied_config
from .writers.dense import OutputFile, changed_config, folder_bytes, index_bytes, plan, with_dtype
from .writers.stream import write_files

if TYPE_CHECKING:
    from .writers.onnx_refold import Refold

_LOG = logging.getLogger("wlora_merge")
FORMATS = ("dense", "lora", "onnx")


@dataclass(frozen=True)
class ExportResult:
    """Where an export stands, how it got there, and what was measured on the way."""

    folder: Path
    format: str
    swap: str | None
    bytes: int
    report: dict[str, Any]


def export(
    mixture: str | Path | Mixture,
    format: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    base: str | Path | None = None,
    adapters: Iterable[str | Path] = (),
    base_name: str | None = None,
    opset: int | None = None,
    onnx_base: str | Path | None = None,
    onnx_runtime: str | None = None,
    ort_fusions: str | None = None,
    quantize: str | None = None,
    any_digest: bool = False,
    server: str | None = None,
    max_rank: int | None = None,
    force: bool = False,
    report: bool = False,
) -> ExportResult:
    """Fold a mixture and write it: `W_base + delta_scale · Σ v̂_n · (α_n/r_n) · B_n A_n`.

    Args:
        mixture: a mixture folder, or a Mixture.
        format: `dense` (safetensors), `lora` (one PEFT adapter) or `onnx`.
        out: the folder to write; it must not exist or be empty unless `force`.
        rank: lora only: the uniform r; below the sum of the adapters' ranks the best approximation of that rank.
        energy: lora only: the smallest uniform r that keeps this share (0 to 1) of the delta weights' squared norm.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the base's (lora and onnx: float32).
        max_shard_bytes: dense only: write files of at most this many bytes; None keeps the base's own.
        base, adapters: inputs that have moved, the latter as NAME=PATH; their digests must match.
        base_name: what the card and an adapter's config call the base; None means its hub id or folder name.
        opset: onnx only.
        onnx_base: onnx only: an ONNX export of the base, a file or a folder, whose weights are rewritten; nothing is traced.
        onnx_runtime: onnx only: `genai` writes an onnxruntime-genai folder.
        ort_fusions: onnx only: the provider whose own operators of ONNX Runtime are used; None keeps to ONNX.
        quantize: onnx only: `int8` or `int4`, a quantized graph beside the float one (with genai: instead of it).
        any_digest: accept inputs whose bytes differ from those that the mixture was made from.
        server: lora only: `vllm` refuses what that server would not load, and says what to change.
        max_rank: lora only: refuse a larger r (what the server was started with).
        force: replace what is in `out`.
        report: also write report.html, and its figures into the model card.

    Raises:
        WloraMergeError: with one sentence; nothing is left in `out`.
    """
    if format not in FORMATS:
        raise UnsupportedError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    _check_options(format, rank, energy, dtype, max_shard_bytes)
    if format != "lora" and (server is not None or max_rank is not None):
        raise UnsupportedError(f"--for and --max-rank belong to --format lora, not {format}.")
    extra = {"onnx_runtime": onnx_runtime, "ort_fusions": ort_fusions, "quantize": quantize}
    _check_onnx_options(format, dtype, opset, onnx_base, extra)
    inputs = find_inputs(mixture, base=base, adapters=adapters, any_digest=any_digest)
    if format != "lora":
        refuse_quantized(inputs.base)
    elif server is not None:
        check_server(server, inputs.mixture, inputs.deltas)
    if inputs.base.added and (format == "lora" or onnx_base is not None):
        raise UnsupportedError(
            f"--resize-vocab {inputs.mixture.resize_vocab}: the model has tokens that its base lacks, which "
            f"{'no LoRA over that base can express' if format == 'lora' else 'the graph of the base has no room for'}: export with "
            f"--format {'dense' if format == 'lora' else 'onnx and without --onnx-base'}."
        )
    name = base_name or inputs.base.source.name
    options = {
        "format": format,
        "rank": rank,
        "energy": energy,
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
        "opset": opset,
        "onnx_base": Path(os.path.abspath(onnx_base)).name if onnx_base is not None else None,
        **extra,
        "any_digest": any_digest,
        "server": server,
        "max_rank": max_rank,
        "report": report,
    }
    stored = dtype or ("float32" if format == "onnx" and onnx_base is None else "")
    split = inputs.untied if format != "lora" else {}
    if split:
        _LOG.info(_untied_note(split))
    if split and onnx_base is not None:
        raise UnsupportedError(
            f"{onnx_base}: {_untied_note(split)} A refold keeps the graph of the base: export without it."
        )
    files = plan(
        inputs.base,
        inputs.deltas if format != "lora" else [],
        inputs.mixture.head,
        untied=split,
        dtype=DTYPES.get(stored),
        max_shard_bytes=max_shard_bytes,
    )
    refold = _plan_refold(Path(onnx_base), inputs, files) if onnx_base is not None else None
    carried = sum(path.stat().st_size for path in inputs.base.carried_files().values())
    weights = _weight_bytes(format, inputs, refold.files if refold else files, rank, traced=refold is None)
    folders = [*inputs.folders, *(Path(p) for p in (mixture, onnx_base) if isinstance(p, str | Path))]
    with (
        team() as ranks,
        _shared_staging(ranks, Path(out), force=force, inputs=folders, needed_bytes=weights + carried) as staging,
    ):
        if format == "dense":
            known = write_shards(inputs, files, staging.path, ranks)
        if not ranks.leads:
            return ExportResult(staging.out, format, None, 0, {})
        if format == "dense":
            write_beside(inputs, files, staging.path, dtype, split)
            measured: dict[str, Any] = {"untied": sorted(split)} if split else {}
        elif format == "lora":
            known, measured = {}, _write_lora(inputs, staging.path, name, rank, energy, dtype)
        elif refold is not None:
            known, measured = _write_refold(inputs, refold, staging.path)
        else:
            known, measured = {}, _write_onnx(inputs, files, staging.path, dtype, opset, split, extra)
        if format == "lora":
            check_rank(measured["r"], server=server, max_rank=max_rank, exact=rank is None)
        drawn = _report(inputs, staging.path, format, name, options) if report else []
        write_card(
            staging.path,
            inputs.mixture,
            kind=format,
            base_name=name,
            folders=inputs.folders,
            note=_untied_note(split),
            options=options,
            measured=measured,
            figures=drawn,
        )
        probe = make_probe(inputs.base.config | inputs.mixture.config, inputs.mixture.task)
        manifest = build_manifest(
            inputs.mixture,
            inputs.base,
            inputs.adapters,
            kind=format,
            base_name=name,
            options=options,
            report=measured,
            probe=probe,
        )
        write_manifest(manifest, staging.path, known)
        total = sum(p.stat().st_size for p in staging.path.rglob("*") if p.is_file())
    return ExportResult(staging.out, format, staging.swap, total, measured)


def _report(inputs: Inputs, folder: Path, kind: str, base_name: str, options: Mapping[str, Any]) -> list[str]:
    facts = {
        f"export: {key}": value for key, value in options.items() if key != "report" and value not in (None, False)
    }
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


def _check_options(kind: str, rank: int | None, energy: float | None, dtype: str | None, max_shard: int | None) -> None:
    if kind != "lora" and (rank is not None or energy is not None):
        raise UnsupportedError(f"--rank and --energy belong to --format lora, not {kind}.")
    if rank is not None and energy is not None:
        raise UnsupportedError("--rank and --energy exclude each other: give one.")
    if rank is not None and rank < 1:
        raise UnsupportedError(f"--rank is {rank}, expected 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise UnsupportedError(f"--energy is {energy}, expected a share above 0 and at most 1.")
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    if max_shard is not None and kind != "dense":
        raise UnsupportedError(f"--max-shard-size belongs to --format dense, not {kind}.")


def _check_onnx_options(
    kind: str, dtype: str | None, opset: int | None, onnx_base: str | Path | None, extra: Mapping[str, str | None]
) -> None:
    asked = [f"--{key.replace('_', '-')}" for key, value in extra.items() if value is not None]
    if kind != "onnx" and (opset is not None or onnx_base is not None or asked):
        options = asked or ["--opset and --onnx-base"]
        raise UnsupportedError(f"{', '.join(options)} belong to --format onnx, not {kind}.")
    if kind == "onnx" and dtype == "bfloat16":
        from .writers.onnx import refuse_dtype

        refuse_dtype(dtype)
    if onnx_base is not None and asked:
        raise UnsupportedError(f"{asked[0]} needs a traced export: leave --onnx-base out.")
    if extra["onnx_runtime"] is not None and (opset is not None or extra["ort_fusions"] is not None):
        raise UnsupportedError(
            "onnxruntime-genai's builder chooses opset and operators: leave --opset and --ort-fusions out."
        )
    for key, known in (("onnx_runtime", ONNX_RUNTIMES), ("quantize", ONNX_QUANTIZE)):
        if extra[key] is not None and extra[key] not in known:
            raise UnsupportedError(f"--{key.replace('_', '-')} is {extra[key]!r}, expected one of {', '.join(known)}.")
    if onnx_base is not None and (dtype is not None or opset is not None):
        raise UnsupportedError("--onnx-base keeps the dtype and the opset of that file: leave --dtype and --opset out.")


def _weight_bytes(kind: str, inputs: Inputs, files: Sequence[OutputFile], rank: int | None, *, traced: bool) -> int:
    """Bytes that the weights take on disk while an export is made; tracing needs a dense folder beside the graph."""
    if kind == "lora":
        return lora_bytes(inputs, rank)
    return folder_bytes(files) * (2 if kind == "onnx" and traced else 1)


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


def _write_lora(
    inputs: Inputs, out: Path, base_name: str, rank: int | None, energy: float | None, dtype: str | None
) -> dict[str, Any]:
    from .writers.lora import write_lora

    report = write_lora(
        inputs.mixture,
        inputs.base,
        inputs.deltas,
        out,
        base_name=base_name,
        rank=rank,
        energy=energy,
        dtype=dtype or "float32",
    )
    copy_carried(inputs.base, out, config=False)
    return {
        "r": report.r,
        "relative_error": report.overall.relative_error,
        "energy_kept": report.overall.kept / report.overall.energy if report.overall.energy else 1.0,
        "modules": {name: {"relative_error": m.relative_error} for name, m in report.modules.items()},
    }


def _plan_refold(onnx_base: Path, inputs: Inputs, files: Sequence[OutputFile]) -> Refold:
    from .writers.onnx_refold import plan_refold

    return plan_refold(onnx_base, inputs.base, [piece for file in files for piece in file.pieces], inputs.mixture)


def _write_refold(inputs: Inputs, refold: Refold, out: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from .writers.onnx_refold import write_refold

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


def _write_onnx(
    inputs: Inputs,
    files: Sequence[OutputFile],
    out: Path,
    dtype: str | None,
    opset: int | None,
    split: Mapping[str, Entry],
    extra: Mapping[str, str | None],
) -> dict[str, Any]:
    import shutil

    task = inputs.mixture.task
    if task is None:
        raise UnsupportedError("an ONNX export needs the mixture's task: make the mixture with --task TASK.")
    from .writers.onnx import refuse_provider
    from .writers.onnx_quantize import refuse_quantize

    if extra["onnx_runtime"] is None:
        refuse_quantize(task, extra["quantize"], dtype or "float32")
        refuse_provider(extra["ort_fusions"])
    dense = out / ".dense"
    dense.mkdir()
    write_shards(inputs, files, dense, Team())
    write_beside(inputs, files, dense, dtype or "float32", split)
    if extra["onnx_runtime"] == "genai":
        from .writers.onnx_genai import write_genai

        share = write_genai(dense, out, task=task, dtype=dtype or "float32", quantize=extra["quantize"])
        shutil.rmtree(dense)
        return {"same_tokens": share}
    from .writers.onnx import write_onnx

    report = write_onnx(
        dense, out, task=task, dtype=dtype or "float32", opset=opset, ort_fusions=extra["ort_fusions"],
        quantize=extra["quantize"],
    )  # fmt: skip
    shutil.rmtree(dense)
    return {
        "inputs": list(report.input_names),
        "outputs": list(report.output_names),
        "opset": report.opset,
        "largest_difference": report.largest_difference,
        **({"head": locate_head(out, inputs.mixture.head)} if inputs.mixture.head else {}),
        **({"quantized": report.quantized} if report.quantized else {}),
    }
