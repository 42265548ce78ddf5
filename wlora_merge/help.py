"""`--help` by topic: which commands and options stand under which heading."""

from __future__ import annotations

import click

COMMANDS = {
    "Make a mixture": ("fit", "mix"),
    "Write a model": ("export", "run"),
    "Look and check": ("inspect", "verify"),
}
OPTIONS = {
    "Inputs": (
        "base", "adapters", "data", "eval_data", "columns", "task", "modules_to_save", "base_is_residual", "any_digest",
        "onnx_base",
    ),
    "What is fitted": (
        "method", "select", "weights", "granularity", "normalize", "delta_scale", "initial_logits", "temperature", "pull",
        "prune_below",
    ),
    "How it is judged": ("folds", "settings"),
    "How it is trained": (
        "epochs", "max_steps", "max_minutes", "early_stopping", "learning_rate", "head_learning_rate", "batch_size",
        "gradient_accumulation_steps", "gradient_checkpointing", "max_length", "seed", "device", "precision", "quantize",
        "resume",
    ),
    "Format": (
        "format_", "dtype", "rank", "energy", "server", "max_rank", "max_shard_size", "opset", "onnx_runtime", "ort_fusions",
        "base_name",
    ),
    "What is checked": ("quick", "pinned", "check", "overrides"),
    "Output": ("out", "force", "report", "report_to", "as_json"),
}  # fmt: skip


class Command(click.Command):
    """A command whose options are listed by topic."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each topic that has options here; what no topic names stands under the last."""
        known = {name for names in OPTIONS.values() for name in names}
        for topic, names in OPTIONS.items():
            last = topic == list(OPTIONS)[-1]
            chosen = [p for p in self.get_params(ctx) if p.name in names or (last and p.name not in known)]
            rows = [row for p in chosen if (row := p.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(topic):
                    formatter.write_dl(rows)


class Group(click.Group):
    """A group whose commands are listed by topic."""

    command_class = Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each topic."""
        for topic, names in COMMANDS.items():
            rows = [(name, self.commands[name].get_short_help_str(80)) for name in names]
            with formatter.section(topic):
                formatter.write_dl(rows)
