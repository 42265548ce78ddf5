"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .. import constants, fit_options
from ..constants import PROBLEM_TYPES
from ..data.tasks import FIT_TASKS

COMMANDS = {
    "Make a mixture": ("fit", "mix"),
    "Write a model": ("export", "run"),
    "Look and check": ("inspect", "verify"),
}
OPTIONS = {
    "Inputs": (
        "mixture", "folder", "recipe", "paths", "base", "adapters", "data", "split", "eval_data", "eval_split", "columns", "task",
        "problem_type", "label_names", "modules_to_save", "resize_vocab", "base_is_residual", "any_digest",
        "onnx_base",
    ),
    "How they are mixed": (
        "method", "select", "weights", "granularity", "normalize", "new_adapter", "new_adapter_interpolation", "delta_scale",
        "initial_logits", "temperature", "pull", "interpolation", "prune_below",
    ),
    "How it is judged": ("folds", "settings"),
    "How it is trained": (
        "epochs", "max_steps", "max_minutes", "early_stopping", "learning_rate", "head_learning_rate",
        "new_adapter_learning_rate", "batch_size", "gradient_accumulation_steps", "packing", "gradient_checkpointing", "max_length",
        "seed", "device", "precision", "quantize", "resume",
    ),
    "Format": (
        "format_", "dtype", "rank", "energy", "server", "max_rank", "max_shard_size", "opset", "onnx_runtime", "ort_fusions",
        "base_name",
    ),
    "What is checked": ("quick", "pinned", "check", "overrides"),
    "Output": ("out", "force", "report", "report_to", "as_json"),
}  # fmt: skip
COLUMNS = "\b\nColumns of --data by task; --column NAME=COLUMN where the file calls one otherwise:\n" + "\n".join(
    f"  {name:<22}{', or '.join(map(str, task.forms))}" for name, task in FIT_TASKS.items()
)
"""What stands under the help of `fit`."""
OF_EXPORT = {"quantize": "Format"}
"""Options that mean another thing in `export`."""
ARGUMENTS = {
    "mixture": "What fit or mix wrote.",
    "folder": "What export wrote, or one export below what run wrote.",
    "recipe": "YAML: base, adapters, fit or mix, exports; its paths are relative to it, or else to the working directory.",
    "paths": "Folders (or a base's hub id); with a base among them, adapters are tried on the first.",
}

COUNT, ABOVE_0 = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order given."""

    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


FORCE = click.option("--force", is_flag=True, help="Replace what is in --out. Default: it must be empty or not exist.")
OUT = click.option("--out", required=True, type=click.Path(), help="Folder to write; all or nothing.")
REPORT_HELP = "Write report.html and its figures into the folder (needs matplotlib)."
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
MODULES_TO_SAVE = click.option(
    "--modules-to-save",
    metavar="NAME|drop|mix",
    help="What becomes of whole tensors that adapters carry (their heads): take adapter NAME's, drop them, or mix them "
    "against the base's. Default: refuse those that a trained head does not replace.",
)
RESIZE_VOCAB = click.option(
    "--resize-vocab",
    metavar="NAME",
    help="Add the tokens that adapter NAME was trained with: its rows beyond the base's vocabulary, and its tokenizer.",
)
RESIDUAL = click.option(
    "--base-is-residual", metavar="NAME", help="The base given is the residual of adapter NAME (PiSSA and its kind)."
)
INPUTS = together(
    click.option("--base", required=True, metavar="PATH_OR_ID", help="Base model: a folder, or a hub id."),
    click.option(
        "--adapter",
        "adapters",
        required=True,
        multiple=True,
        metavar="[NAME=]PATH_OR_ID",
        help="An adapter: a PEFT folder, or a hub id; its name is the folder's. Give it for each adapter.",
    ),
)
MOVED = together(
    click.option("--base", metavar="PATH", help="The base model, if it has moved; its sha256 must match."),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME=PATH",
        help="An adapter that has moved; its sha256 must match.",
    ),
)
FIT_OPTIONS = together(
    click.option(
        "--method",
        type=click.Choice(fit_options.METHODS),
        default="learned",
        show_default=True,
        help="learned: logits by gradient; uniform; best-single: the adapter best on held-out shots; fixed: --weights; search: "
        "global weights without gradients; auto: the best of all on held-out shots.",
    ),
    click.option(
        "--select",
        type=click.Choice(fit_options.SELECT),
        default="method",
        show_default=True,
        help="best: keep uniform composition or one adapter where it is better, or as good within a standard error.",
    ),
    click.option("--weights", metavar="W,W,...", help="For --method fixed: one mixture weight for each adapter."),
    click.option(
        "--granularity",
        type=click.Choice(constants.GRANULARITIES),
        help="Which modules share mixture weights. Default: module; the folds try global too from --settings 4 on.",
    ),
    click.option(
        "--normalize",
        type=click.Choice(constants.NORMALIZE),
        help="Softmax over all adapters, renormalized over those present in a module, or none: free weights. Default: none if a head "
        "is trained, else all; the folds try the other too from --settings 3 on.",
    ),
    click.option(
        "--new-adapter",
        type=click.IntRange(min=0),
        metavar="R",
        help="Rank of a LoRA that is trained from zero beside the given ones, with weight 1; 0: none. Default: 8 on four "
        "examples or more, if a head is trained two per class too, else 0, unless the folds prefer the other; always 0 with "
        "--normalize present.",
    ),
    click.option(
        "--new-adapter-interpolation",
        type=click.FloatRange(0, 1, min_open=True),
        help="How far the new adapter goes from nothing (0) to what was trained (1). Default: 1 if a head is trained, else 0.5, "
        "unless the folds prefer 0.25 or 1.",
    ),
    click.option(
        "--delta-scale",
        help="Factor of the whole delta weight, or learned. Default: 1, or that of the mixture to start from.",
    ),
    click.option(
        "--initial-logits",
        metavar="V,V,...|PATH",
        help="Start: a logit (free weight) for each adapter, a mixture folder, or a JSON file. Default: uniform composition.",
    ),
    click.option("--temperature", type=ABOVE_0, default=1.0, show_default=True, help="Of the softmax over the logits."),
    click.option(
        "--pull",
        type=click.FloatRange(min=0),
        help="Strength of the pull towards uniform. Default: 0; the folds try 0.3 too from --settings 5 on.",
    ),
    click.option(
        "--interpolation",
        type=click.FloatRange(0, 1, min_open=True),
        help="How far weights, head and new adapter end between uniform composition (0) and what was learned (1). Default: 0.5 if a "
        "head is trained on one shot per class, else 1.",
    ),
    click.option(
        "--prune-below",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Set weights under this to zero after the fit: 0 to 1, of free weights any size.",
    ),
    click.option(
        "--folds",
        type=click.IntRange(min=0),
        default=3,
        show_default=True,
        help="Parts of the shots, each held out once; 0: none.",
    ),
    click.option(
        "--settings",
        type=COUNT,
        default=2,
        show_default=True,
        help="Learned settings that the folds compare at most; each costs --folds trainings.",
    ),
    click.option("--epochs", type=ABOVE_0, help="Passes over the shots, in place of --max-steps."),
    click.option(
        "--max-steps",
        type=COUNT,
        help="Optimizer steps. Default: 100 if a head is trained, else 20 epochs, but 40 to 100 steps, or fewer by the folds.",
    ),
    click.option(
        "--max-minutes",
        type=ABOVE_0,
        help="Wall-clock budget in minutes, seen to between steps; half of it for folds.",
    ),
    click.option(
        "--early-stopping",
        type=COUNT,
        metavar="N",
        help="Stop after N evaluations on --eval-data (one every tenth of the steps) without a lower loss, and keep the best step. "
        "Default: no.",
    ),
    click.option(
        "--learning-rate",
        type=ABOVE_0,
        help="Of the logits, and of a learned --delta-scale (AdamW). Default: 0.05, with free weights 0.02.",
    ),
    click.option("--head-learning-rate", type=ABOVE_0, default=0.01, show_default=True, help="Of a new head (AdamW)."),
    click.option(
        "--new-adapter-learning-rate", type=ABOVE_0, default=1e-3, show_default=True, help="Of a new adapter (AdamW)."
    ),
    click.option(
        "--batch-size", type=COUNT, default=8, show_default=True, help="Examples in a batch, over all processes."
    ),
    click.option(
        "--gradient-accumulation-steps", type=COUNT, default=1, show_default=True, help="Batches in an optimizer step."
    ),
    click.option(
        "--label-names",
        is_flag=True,
        help="text-classification: take each label's name, as words, for one more example of it, which is never held out.",
    ),
    click.option(
        "--packing",
        is_flag=True,
        help="causal-lm: the examples of a batch end to end in one row; the same loss, no padding.",
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time."),
    click.option(
        "--problem-type",
        type=click.Choice(PROBLEM_TYPES),
        help="Of a classification. Default: lists of names are multi-label, numbers with fractions a regression, "
        "all else single-label.",
    ),
    click.option(
        "--max-length",
        type=COUNT,
        help="Tokens kept of an example. Default: what the tokenizer says, within the model's positions.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Of the head, the new adapter, the search, the order and the folds.",
    ),
    click.option(
        "--eval-data",
        metavar="FILE_OR_ID",
        help="Judge the candidates on these, each trained on all shots; the folds still choose among the learned settings. Default: "
        "judge on the folds.",
    ),
    click.option("--split", help="Split of --data, a folder or hub data set. Default: train, or the only one."),
    click.option("--eval-split", help="Split of --eval-data. Default: validation, else test, or the only one."),
    click.option(
        "--column",
        "columns",
        multiple=True,
        metavar="NAME=COLUMN",
        help="Which column of --data is NAME, a name of the table below.",
    ),
    click.option(
        "--device",
        type=click.Choice(fit_options.DEVICES),
        default="auto",
        show_default=True,
        help="Where to run.",
    ),
    click.option(
        "--precision",
        type=click.Choice(fit_options.PRECISIONS),
        default="float32",
        show_default=True,
        help="bf16: the base in bfloat16, what is trained in float32; fp16: mixed.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(fit_options.QUANTIZE),
        help="Load the base quantized (bitsandbytes). Default: no.",
    ),
    click.option(
        "--report-to",
        default="none",
        show_default=True,
        help="Trackers of accelerate (tensorboard, wandb, ...), with commas.",
    ),
    click.option("--resume", is_flag=True, help="Go on where a killed fit to the same --out stopped (OUT.fit-state)."),
)


class Command(click.Command):
    """A command whose options are listed by topic."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each topic that has options here; what no topic names stands under the last."""
        topics = {name: topic for topic, names in OPTIONS.items() for name in names}
        topics |= OF_EXPORT if self.name == "export" else {}
        for topic in OPTIONS:
            chosen = [p for p in self.get_params(ctx) if topics.get(p.name or "", list(OPTIONS)[-1]) == topic]
            rows = [row for p in chosen if (row := _row(p, ctx)) is not None]
            if rows:
                with formatter.section(topic):
                    formatter.write_dl(rows)


def _row(parameter: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    if isinstance(parameter, click.Argument):
        return parameter.metavar or "", ARGUMENTS[parameter.name or ""]
    return parameter.get_help_record(ctx)


class Group(click.Group):
    """A group whose commands are listed by topic."""

    command_class = Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each topic."""
        for topic, names in COMMANDS.items():
            rows = [(name, self.commands[name].get_short_help_str(120)) for name in names]
            with formatter.section(topic):
                formatter.write_dl(rows)
