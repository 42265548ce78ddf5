"""The completions that repeat: a language model chooses among them, as a classifier does among its classes.

The score of a completion is its log-probability given the prompt, all of its tokens. The loss is that of a softmax over these scores,
as T-Few's (Liu et al. 2022, https://arxiv.org/abs/2205.05638). It knows one loaded model and encoded rows, and no candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.metrics import IGNORED

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Completions:
    """What a causal language model chooses from.

    Attributes:
        model: it.
        rows: encoded examples, each a prompt with one of the completions.
        tokens: of each completion.
        collate: encoded rows -> one padded batch.
        device: where the model takes its inputs.
    """

    model: nn.Module
    rows: Sequence[Mapping[str, Any]]
    tokens: list[Tokens]
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    device: torch.device

    def classes(self, rows: Sequence[int]) -> torch.Tensor:
        """The number of each row's completion [n], int64."""
        return torch.tensor([self.tokens.index(_learned(self.rows[row])) for row in rows], device=self.device)

    def scores(self, rows: Sequence[int]) -> torch.Tensor:
        """The log-probability of each completion behind the prompt of each row [n, K], float32; gradients flow where they are on.

        A prompt runs once where all completions but their last tokens begin one another, as those of one token do; else once for
        each that does not.
        """
        places: dict[tuple[int, Tokens], int] = {}
        batch, at = list[dict[str, list[int]]](), list[tuple[int, int]]()
        for row in rows:
            prompt = self._prompt(row)
            for branch in self._branches():
                ids = [*prompt, *branch]
                for size in range(len(branch) + 1):
                    if (row, branch[:size]) not in places:
                        places[row, branch[:size]] = len(at)
                        at.append((len(batch), len(prompt) - 1 + size))
                batch.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        steps = [
            (number, places[row, word[:size]], token)
            for number, (row, word) in enumerate((row, word) for row in rows for word in self.tokens)
            for size, token in enumerate(word)
        ]
        where, place, token = torch.tensor(steps, device=self.device).unbind(1)
        each = self._logits(batch, at).float().log_softmax(-1)[place, token]
        return each.new_zeros(len(rows) * len(self.tokens)).index_add(0, where, each).view(len(rows), -1)

    def _prompt(self, row: int) -> list[int]:
        ids = self.rows[row]["input_ids"]
        return list(ids[: len(ids) - len(_learned(self.rows[row]))])

    def _branches(self) -> list[Tokens]:
        """The completions but for their last tokens, without those that begin another."""
        starts = {word[:-1] for word in self.tokens}
        return sorted(a for a in starts if not any(a != b and b[: len(a)] == a for b in starts))

    def _logits(self, batch: list[dict[str, Any]], at: list[tuple[int, int]]) -> torch.Tensor:
        """The logits at some (row, token) of a batch [n, V]."""
        inputs = {name: value.to(self.device) for name, value in self.collate(batch).items()}
        return logits_at(self.model, inputs, torch.tensor(at, device=self.device).unbind(1))


def logits_at(model: nn.Module, inputs: Mapping[str, Any], at: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The logits of a language model at some tokens of a batch, computed for these alone where its class allows it.

    Args:
        model: with `get_output_embeddings`, as transformers' have.
        inputs: of the model, without labels.
        at: the batch's rows and the tokens in them, [n] each.

    Returns:
        [n, V], in the model's dtype.
    """
    with _narrowed(model, at):
        logits: torch.Tensor = model(**inputs).logits
    return logits if logits.ndim == 2 else logits[at]


def next_token_loss(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The mean cross-entropy of the tokens that carry a label, as transformers' `ForCausalLMLoss`; logits of these alone.

    Args:
        model: a causal language model.
        inputs: of the model, `labels` [B, T] among them, -100 where nothing is learned.

    Returns:
        the loss, float32.
    """
    labels = inputs["labels"][:, 1:]
    at = (labels != IGNORED).nonzero().unbind(1)
    others = {name: value for name, value in inputs.items() if name != "labels"}
    return nn.functional.cross_entropy(logits_at(model, others, at).float(), labels[at])


@contextmanager
def _narrowed(model: nn.Module, at: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Let the output embeddings see some tokens alone."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if layer is None:
        yield
        return
    hook = layer.register_forward_pre_hook(lambda _, args: (args[0][at], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def find_completions(classes: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[Tokens] | None:
    """The tokens of the completions that repeat, by their text; None where they are no classes.

    Args:
        classes: of the shots, as `Examples.classes` gives them: the text of the completion where it repeats, else "".
        rows: encoded, the shots first; the others must have completions of the shots.
    """
    found: dict[str, Tokens] = {}
    for (text,), row in zip(classes, rows, strict=False):
        if not text or found.setdefault(text, _learned(row)) != _learned(row):
            return None
    tokens = [found[text] for text in sorted(found)]
    alike = all(_learned(row) in tokens and _is_completion(row["labels"]) for row in rows)
    return tokens if alike and len(tokens) == len(set(tokens)) > 1 else None


def _learned(row: Mapping[str, Any]) -> Tokens:
    """The tokens of a row that are learned."""
    return tuple(token for token in row["labels"] if token != IGNORED)


def _is_completion(labels: Sequence[int]) -> bool:
    """Whether the learned tokens are all that stands behind a prompt."""
    first = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
    return first > 0 and IGNORED not in labels[first:]
