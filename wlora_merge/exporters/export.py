"""The export workflow: a mixture folder in, an ordinary model folder out, all or nothing.

adapters -> mixture -> fold -> writer, in one straight line; this file checks the digests, asks the format for its plan, and adds
the card and the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..distributed import Team, team
from ..errors import UnsupportedError
from ..export_options import ExportOptions, export_options
from ..io.staging import Staging, refuse_out, staged
from ..mixture.inputs import Inputs, find_inputs
from ..mixture.mixture import Mixture
from ..mixture.told_task import told_task
from ..progress import LOG
from .beside import left_out, take_tokenizer
from .format import Format, Measures, Written
from .formats import FORMATS
from .manifest import build_manifest, versions, write_manifest
from .model_card import CardFacts, write_card
from .probe import make_probe
from .report import write_report
from .serving import Exported, check_server, exported_of


@dataclass(frozen=True)
class ExportResult:
    """Where an export stands, how it got there, and what was measured on the way."""

    folder: Path
    format: str
    swap: str | None
    bytes: int
    report: dict[str, Any]
    detail: str = ""
    """`report` in a sentence or two, as the command line says it."""


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
        base: the base model, if it has moved; its digests must match.
        adapters: adapters that have moved, as NAME=PATH; their digests must match.
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
    kind = FORMATS[format]
    refuse_out(Path(out), force=force)
    inputs = find_inputs(mixture, base=base, adapters=adapters, any_digest=any_digest, check_base=kind.check_base)
    if (task := _task_of(inputs, kind, asked)) != inputs.mixture.task:
        inputs = replace(inputs, mixture=replace(inputs.mixture, task=task))
    take_tokenizer(inputs, asked.tokenizer_from)
    inputs = kind.prepared(inputs, asked)
    exported = exported_of(inputs, asked)
    if asked.server is not None:
        check_server(asked.server, exported)
    planned = kind.plan(inputs, asked)
    note = " ".join(filter(None, (planned.note, left_out(inputs))))
    if note:
        LOG.info(note)
    folders = [*inputs.folders, *(Path(p) for p in (mixture, asked.onnx_base) if isinstance(p, str | Path))]
    with (
        team() as ranks,
        _shared_staging(ranks, Path(out), force=force, inputs=folders, needed_bytes=planned.nbytes) as staging,
    ):
        known = planned.write_shared(staging.path, ranks)
        if not ranks.leads:
            return ExportResult(staging.out, format, None, 0, {})
        written = planned.write(staging.path)
        how = asdict(asked) | {"any_digest": any_digest, "report": report}
        del how["trace_cache"]  # of which no file tells
        written = replace(written, digests={**known, **written.digests})
        _describe(inputs, kind, how, note, planned.names, exported, written, staging.path)
        total = sum(p.stat().st_size for p in staging.path.rglob("*") if p.is_file())
    measures = written.measures
    return ExportResult(staging.out, format, staging.swap, total, measures.table(), measures.line(asked))


def _task_of(inputs: Inputs, kind: Format, asked: ExportOptions) -> str | None:
    """The task as `--task` says, as the mixture says, or, for a format that needs one, as its inputs say.

    Raises:
        UnsupportedError: the mixture's head was trained for another task, or the inputs do not agree on one.
    """
    mixture = inputs.mixture
    if asked.task is None:
        wanted = kind.needs_task and mixture.task is None and asked.onnx_base is None
        return told_task(inputs.base, inputs.adapters, mixture.config) if wanted else mixture.task
    if mixture.head and mixture.task not in (None, asked.task):
        raise UnsupportedError(f"--task {asked.task}: the mixture has a head for {mixture.task}: leave --task out.")
    return asked.task


def _describe(
    inputs: Inputs,
    kind: Format,
    how: dict[str, Any],
    note: str,
    names: Mapping[str, str | None],
    exported: Exported,
    written: Written,
    out: Path,
) -> None:
    """Write the report, the model card and the manifest."""
    measures = written.measures
    base_name = how.pop("base_name") or inputs.base.source.name
    if how["onnx_base"] is not None:
        how["onnx_base"] = Path(os.path.abspath(how["onnx_base"])).name
    drawn = _report(inputs, out, kind, base_name, how, names, measures) if how["report"] else []
    facts = CardFacts(
        inputs.mixture,
        kind,
        base_name,
        folders=inputs.folders,
        options=how,
        measures=measures,
        exported=replace(exported, rank=measures.rank),
        note=note,
        figures=drawn,
    )
    write_card(out, facts)
    manifest = build_manifest(
        inputs.mixture,
        inputs.base,
        inputs.adapters,
        kind=kind.name,
        base_name=base_name,
        options=how,
        report=measures,
        probe=make_probe(inputs.base.config | inputs.mixture.config, inputs.mixture.task),
    )
    write_manifest(manifest, out, written.digests)


def _report(
    inputs: Inputs,
    folder: Path,
    kind: Format,
    base_name: str,
    options: Mapping[str, Any],
    names: Mapping[str, str | None],
    measures: Measures,
) -> list[str]:
    facts = {
        f"export: {key}": value for key, value in options.items() if key != "report" and value not in (None, False)
    }
    facts |= {f"measured: {key}": value for key, value in measures.table().items() if isinstance(value, int | float)}
    facts |= {f"version: {name}": version for name, version in versions(kind.packages).items()}
    title = f"A mixture of {len(inputs.adapters)} adapters on {base_name}, {kind.name} export"
    return write_report(
        folder,
        inputs.mixture,
        inputs.deltas,
        title=title,
        rank=measures.rank,
        base=inputs.base if kind.keeps_tensors else None,
        names=names,
        facts=facts,
    )


@contextmanager
def _shared_staging(ranks: Team, out: Path, **options: Any) -> Iterator[Staging]:
    """Rank 0's staging folder, on every rank; rank 0 alone makes it and puts it in place."""
    if not ranks.leads:
        yield Staging(out, Path(ranks.share("")))
        return
    with staged(out, **options) as staging:
        ranks.share(str(staging.path))
        yield staging
