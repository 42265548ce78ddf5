"""`--help` by topic: which commands and options stand under which heading."""

from __future__ import annotations

import click

from .data.columns import FORMS

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
    f"  {task:<22}{', or '.join(map(str, forms))}" for task, forms in FORMS.items()
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
