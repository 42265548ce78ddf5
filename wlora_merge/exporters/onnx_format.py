"""The onnx format: graphs traced from the folded model, or those of the base with other weights, or a folder of genai."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..constants import DTYPES
from ..data.task import load_auto
from ..data.tasks import get_task
from ..errors import UnsupportedError, VerifyError
from ..export_options import ExportOptions
from ..io.digests import sha256_files
from ..io.records import Record, checked_by
from ..mixture.inputs import Inputs
from ..models.base_model import BaseModel, refuse_quantized
from ..models.loading import read_config
from .carried import carried_bytes, copy_carried
from .dense import changed_config, folder_bytes, with_dtype
from .dense_format import DensePlan, plan_dense, untied_note
from .format import Format, Measures, Plan, Written, refuse_added
from .head import locate_head, read_graph_head
from .pooling_layer import VECTORS
from .probe import probe_tensors
from .stream import write_files
from .verify_outputs import Checked, Tolerance, tolerance_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..onnx.quantize import QuantizedReport
    from .manifest import Manifest
    from .onnx_refold import Refold


def _check_place(place: list[Any]) -> None:
    if len(place) != 2 or not isinstance(place[0], str) or not isinstance(place[1], bool):
        raise ValueError("is not the name of an initializer and whether it is transposed")


Places = dict[str, Annotated[list[Any], checked_by(_check_place)]]
"""Tensor of the head -> [name of its initializer, whether it is transposed there]."""


class Quantized(Record):
    """A quantized graph, and how far its outputs are from the float graph's.

    Attributes:
        file: its path.
        bytes: its size.
        largest_difference: of an output from the float graph's.
        relative: the same, over the largest output.
        same_choice: share of the choices that are the float graph's, 0 to 1; of scores.
        cosine: the smallest between its embeddings and the float graph's.
        scheme: which weights share a scale.
    """

    file: str
    bytes: int
    largest_difference: float
    relative: float
    same_choice: float | None = None
    cosine: float | None = None
    scheme: str | None = None

    @property
    def kept(self) -> str:
        """What it keeps of the float graph, in words."""
        return f"cosine {self.cosine:.4f}" if self.cosine is not None else f"same choice {self.same_choice:.1%}"

    @classmethod
    def of(cls, report: QuantizedReport) -> Quantized:
        """The record of what the quantizer measured."""
        return cls(file=report.file, bytes=report.bytes, scheme=report.scheme, **vars(report.off))


class TracedMeasures(Measures):
    """The interface of a traced graph, and the largest difference of an output from PyTorch's.

    Attributes:
        inputs: names of the graph's inputs.
        outputs: names of its outputs.
        opset: its opset version.
        largest_difference: of an output from PyTorch's.
        head: tensor of the head -> [its initializer, whether it is transposed there].
        quantized: the quantized graph beside it.
    """

    inputs: list[str]
    outputs: list[str]
    opset: int
    largest_difference: float
    head: Places | None = None
    quantized: Quantized | None = None

    def card(self) -> str:
        """How far it is from PyTorch, and the quantized graph from it."""
        said = f"ONNX Runtime's outputs are within {self.largest_difference:.2e} of PyTorch's."
        if q := self.quantized:
            from ..onnx.js_names import DTYPES as JS_DTYPES

            js = JS_DTYPES[Path(q.file).stem.removeprefix("model")]
            said += (
                f" `{q.file}` has quantized weights{f', a scale for each of its {q.scheme}' if q.scheme else ''}: its outputs are "
                f"off by {q.relative:.2e} of the largest, {q.kept}; transformers.js loads it with `dtype: '{js}'`."
            )
        return said

    def line(self, asked: ExportOptions) -> str:
        """How far it is from PyTorch, and the quantized graph from it."""
        said = f"Largest difference from PyTorch {self.largest_difference:.2e}."
        if q := self.quantized:
            said += f" {q.file}: off by {q.relative:.2e} of the largest, {q.kept}."
        return said


class RefoldMeasures(Measures):
    """The files whose weights were rewritten, with their sha256, how many weights, and of which dtypes.

    Attributes:
        head: tensor of the head -> [its initializer, whether it is transposed there].
        onnx_base: sha256 of each file that was rewritten, by its name.
        rewritten: how many weights are others.
        dtypes: of these weights.
    """

    head: Places | None = None
    onnx_base: dict[str, str]
    rewritten: int
    dtypes: list[str]

    def line(self, asked: ExportOptions) -> str:
        """How many weights are others."""
        return f"{self.rewritten} weights of {asked.onnx_base} rewritten."


class GenaiMeasures(Measures):
    """The share (0 to 1) of greedy tokens that are PyTorch's.

    Attributes:
        same_tokens: share of the greedy tokens that are PyTorch's, 0 to 1.
    """

    same_tokens: float

    def line(self, asked: ExportOptions) -> str:
        """The share, as a percentage."""
        return f"{self.same_tokens:.1%} of the greedy tokens are PyTorch's."


KINDS: Mapping[str, type[Measures]] = {
    "same_tokens": GenaiMeasures,
    "rewritten": RefoldMeasures,
    "largest_difference": TracedMeasures,
}
"""The key that only one kind has -> the kind."""


# ------------------------------------------------------------------------------------------------------------ plans


@dataclass
class TracedPlan(Plan):
    """A dense folder, and what is made of it."""

    dense: DensePlan
    asked: ExportOptions

    def __post_init__(self) -> None:
        """A graph is as large as the folder that it is traced from."""
        self.nbytes = self.dense.nbytes + folder_bytes(self.dense.files)
        pooling = self.dense.inputs.mixture.pooling
        pooled = "" if pooling is None else f"The graph gives its head {VECTORS[pooling]}, normalized to one length."
        self.note = " ".join(filter(None, (self.dense.note, pooled, _padding_note(self.dense.inputs))))

    def write(self, out: Path) -> Written:
        """Write the dense folder, trace it or let genai build it, and take it away."""
        mixture, asked, dtype = self.dense.inputs.mixture, self.asked, self.asked.dtype or "float32"
        if mixture.task is None:
            raise UnsupportedError("an ONNX export needs a task: say --task TASK.")
        from ..onnx.convert import refuse_provider, require_extra, write_onnx
        from ..onnx.quantize import refuse_quantize

        require_extra()
        if asked.onnx_runtime is None:
            refuse_quantize(get_task(mixture.task), asked.quantize, dtype)
            refuse_provider(asked.ort_fusions)
        dense = out / ".dense"
        dense.mkdir()
        write_files(self.dense.files, dense, mixture, hashed=False)  # taken away again below
        self.dense.write(dense)
        if asked.onnx_runtime == "genai":
            from ..onnx.genai import write_genai

            share = write_genai(dense, out, task=get_task(mixture.task), dtype=dtype, quantize=asked.quantize)
            shutil.rmtree(dense)
            return Written(GenaiMeasures(same_tokens=share))
        report = write_onnx(
            dense,
            out,
            task=mixture.task,
            dtype=dtype,
            opset=asked.opset,
            ort_fusions=asked.ort_fusions,
            pooling=mixture.pooling,
            cached_as=self.dense.inputs.base.source.name if asked.trace_cache else None,
        )
        quantized = self._quantized(out, dense) if asked.quantize else None
        shutil.rmtree(dense)
        return Written(
            TracedMeasures(
                inputs=list(report.input_names),
                outputs=list(report.output_names),
                opset=report.opset,
                largest_difference=report.largest_difference,
                head=locate_head(out, mixture.head) if mixture.head else None,
                quantized=quantized,
            )
        )

    def _quantized(self, out: Path, dense: Path) -> Quantized:
        """Write the quantized graph beside the float one."""
        from ..onnx.quantize import quantize_onnx

        mixture, asked = self.dense.inputs.mixture, self.asked
        made = quantize_onnx(
            out,
            dense,
            task=get_task(mixture.task),
            kind=str(asked.quantize),
            pooling=mixture.pooling,
            allow_loss=asked.allow_loss,
        )
        return Quantized.of(made)


@dataclass
class RefoldPlan(Plan):
    """The graphs of the base, and which of their weights are rewritten."""

    inputs: Inputs
    refold: Refold

    def __post_init__(self) -> None:
        """Sum up the bytes."""
        self.nbytes = folder_bytes(self.refold.files) + carried_bytes(self.inputs.base)

    def write(self, out: Path) -> Written:
        """Write the graphs, and what the base carries, its config with the graph's dtype."""
        from ..onnx.js_names import name_half
        from .onnx_refold import write_refold

        mixture, base, folder = self.inputs.mixture, self.inputs.base, out / "onnx"
        folder.mkdir()
        written = write_refold(self.refold, folder, mixture)
        name_half(out)
        names = {stored: name for name, stored in DTYPES.items()}
        dtypes = sorted(names.get(dtype, dtype) for dtype in self.refold.dtypes)
        copy_carried(base, out)
        (out / "config.json").write_bytes(changed_config(base, with_dtype(base, mixture.config, dtypes[0])))
        originals = [path for graph in self.refold.graphs for path in (graph.path, *graph.data)]
        measures = RefoldMeasures(
            head=locate_head(out, mixture.head) if mixture.head else None,
            onnx_base={path.name: digest for path, digest in sha256_files(originals).items()},
            rewritten=len(self.refold.weights),
            dtypes=dtypes,
        )
        return Written(measures, {f"onnx/{name}": digest for name, digest in written.items()})


def _with_padding(inputs: Inputs) -> Inputs:
    """The inputs with the tokenizer's padding token, where the model reads the last token that is not padding and its config does
    not say which that is.

    Raises:
        UnsupportedError: the tokenizer has no padding token either, or one that the model has no embedding for.
    """
    base, mixture = inputs.base, inputs.mixture
    if not get_task(mixture.task).needs_pad_token or mixture.config.get("pad_token_id") is not None:
        return inputs
    text = read_config(base.folder).get_text_config()
    if text.pad_token_id is not None:
        return inputs
    folder = next((path.parent for path in base.tokenizer.values()), base.folder)
    pad = load_auto("AutoTokenizer", folder, "tokenizer").pad_token_id
    if pad is None or pad >= text.vocab_size:
        has = "none" if pad is None else f"{pad}, and no embedding"
        raise UnsupportedError(
            f"{base.folder}: its config has no pad_token_id, and its tokenizer {has}: "
            "a graph for rows of several lengths must know where the text of each ends: set pad_token_id in config.json."
        )
    return replace(inputs, mixture=replace(mixture, config={**mixture.config, "pad_token_id": pad}))


def _padding_note(inputs: Inputs) -> str:
    pad = inputs.mixture.config.get("pad_token_id")
    if pad is None or inputs.mixture.head or inputs.base.config.get("pad_token_id") is not None:
        return ""
    return f"Its `pad_token_id` is {pad}, the tokenizer's: the base's config has none."


# ----------------------------------------------------------------------------------------------------------- the format


class OnnxFormat(Format):
    """Graphs for ONNX Runtime, Optimum and transformers.js."""

    name = "onnx"
    packages = ("torch", "transformers", "onnx", "onnxscript")
    library = "transformers.js"
    summary = "folded into the base model and exported to ONNX"
    needs_task = True
    gives_all_outputs = False  # a graph has no pooler

    def check_base(self, base: BaseModel) -> None:
        """A fold into quantized weights would not be exact."""
        refuse_quantized(base)

    def prepared(self, inputs: Inputs, asked: ExportOptions) -> Inputs:
        """With a padding token, where a graph that is traced needs one."""
        return inputs if inputs.mixture.task is None or asked.onnx_base is not None else _with_padding(inputs)

    def plan(self, inputs: Inputs, asked: ExportOptions) -> Plan:
        """A dense folder to trace, or with `--onnx-base` the graphs of the base."""
        if asked.onnx_base is None:
            return TracedPlan(plan_dense(inputs, asked.dtype or "float32"), asked)
        from .onnx_refold import plan_refold

        if inputs.mixture.pooling is not None:
            raise UnsupportedError(
                f"--onnx-base {asked.onnx_base}: the mixture's head sees {VECTORS[inputs.mixture.pooling]}, which a graph of the "
                "base does not give: leave --onnx-base out."
            )
        refuse_added(inputs, "the graph of the base has no room for", "onnx and without --onnx-base")
        if inputs.untied:
            raise UnsupportedError(
                f"{asked.onnx_base}: {untied_note(inputs.untied)} A refold keeps the graph of the base: export without it."
            )
        pieces = [piece for file in plan_dense(inputs, None).files for piece in file.pieces]
        return RefoldPlan(inputs, plan_refold(Path(asked.onnx_base), inputs.base, pieces, inputs.mixture))

    def measures_of(self, table: Mapping[str, Any]) -> type[Measures]:
        """Of three kinds, told by a key; a table that has none is a traced graph's, which lacks something."""
        return next((kind for key, kind in KINDS.items() if key in table), TracedMeasures)

    def check_structure(self, folder: Path, manifest: Manifest) -> None:
        """Nothing but digests: ONNX Runtime checks a graph when it loads it."""

    def read_head(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """Where the graph has its tensors, as its writer found them."""
        report = manifest.report
        places = report.head if isinstance(report, TracedMeasures | RefoldMeasures) else None
        return read_graph_head(folder / "onnx" / "model.onnx", manifest.mixture.head, places or {})

    def unmerged(self, model: nn.Module, folder: Path, manifest: Manifest) -> nn.Module:
        """With the pooling of a sentence transformer."""
        if get_task(manifest.mixture.task).is_body:
            from ..onnx.pooling import add_pooling

            add_pooling(model, folder)
        return model

    def outputs(self, folder: Path, manifest: Manifest, base: BaseModel) -> dict[str, torch.Tensor]:
        """As ONNX Runtime runs it."""
        from ..onnx.session import run_probe

        return run_probe(folder, probe_tensors(manifest.probe))

    def tolerance(self, folder: Path, manifest: Manifest, effect: float) -> Tolerance:
        """Rounding to the dtype of its weights."""
        report = manifest.report
        names = report.dtypes if isinstance(report, RefoldMeasures) else [manifest.dtype or "float32"]
        dtypes = {DTYPES[name] for name in names if name in DTYPES}
        return tolerance_of(dtypes, effect, pooled=manifest.mixture.pooling is not None)

    def check_outputs(
        self, folder: Path, manifest: Manifest, model: nn.Module, base: BaseModel, checked: Checked
    ) -> None:
        """At several shapes and in a greedy generation, then on the probe; of a genai folder, the tokens."""
        from ..onnx.convert import refuse_provider, require_extra
        from ..onnx.genai import compare_genai
        from ..onnx.validate import compare_with

        require_extra()
        report = manifest.report
        if isinstance(report, GenaiMeasures):
            share = compare_genai(folder, model)
            if share < report.same_tokens:
                raise VerifyError(
                    f"{folder}: {share:.0%} of the greedy tokens are the unmerged mixture's, {report.same_tokens:.0%} were when it "
                    "was exported: export again."
                )
            checked.done.append(f"{share:.1%} of the greedy tokens are the unmerged mixture's")
            return
        refuse_provider(manifest.options.get("ort_fusions"))
        task = get_task(manifest.mixture.task)
        compare_with(folder, model, task=task, halved=lambda: copy.deepcopy(model).half())
        generated = ", and in a greedy generation" if task.generates else ""
        checked.done.append(f"ONNX Runtime agrees with the unmerged mixture at several shapes{generated}")
        super().check_outputs(folder, manifest, model, base, checked)
