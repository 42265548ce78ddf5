"""The completions that repeat: a language model chooses among them, as a classifier does among its classes.

The score of a completion is its log-probability given the prompt, all of its tokens. The loss is that of a softmax over these scores,
as T-Few's (Liu et al. 2022, https://arxiv.org/abs/2205.05638). It knows one loaded model and encoded rows, and no candidates.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.metrics import IGNORED

Tokens = tuple[int, ...]
Places = dict[tuple[int, Tokens], int]
"""{(row, beginning of a completion): which of the logits stand behind it}."""


@dataclass
class Completions:
    """What a causal language model chooses from.

    Attributes:
        model: it.
        rows: encoded examples, each a prompt with one of the completions.
        tokens: of each completion.
        device: where the model takes its inputs.
        shares: whether a prompt runs once for all completions, which `try_sharing` finds out; else once for each branch.
    """

    model: nn.Module
    rows: Sequence[Mapping[str, Any]]
    tokens: list[Tokens]
    device: torch.device
    shares: bool = False

    def classes(self, rows: Sequence[int]) -> torch.Tensor:
        """The number of each row's completion [n], int64."""
        return torch.tensor([self.tokens.index(_learned(self.rows[row])) for row in rows], device=self.device)

    def scores(self, rows: Sequence[int]) -> torch.Tensor:
        """The log-probability of each completion behind the prompt of each row [n, K], float32; gradients flow where they are on."""
        prompts, branches = [self._prompt(row) for row in rows], self._branches()
        found, places = (self._from_cache if self.shares and any(branches) else self._in_full)(prompts, branches)
        steps = [
            (number, places[row, word[:size]], token)
            for number, (row, word) in enumerate((row, word) for row in range(len(rows)) for word in self.tokens)
            for size, token in enumerate(word)
        ]
        where, place, token = torch.tensor(steps, device=self.device).unbind(1)
        each = found.float().log_softmax(-1)[place, token]
        return each.new_zeros(len(rows) * len(self.tokens)).index_add(0, where, each).view(len(rows), -1)

    def try_sharing(self, tolerance: float) -> None:
        """Let prompts run once for all completions, if the model's cache allows it: then some scores are as they are without.

        Args:
            tolerance: by how much a log-probability may differ, through rounding alone.
        """
        if not any(self._branches()):  # nothing runs behind a prompt
            return
        lengths = [len(self._prompt(row)) for row in range(len(self.rows))]
        few = sorted({lengths.index(min(lengths)), lengths.index(max(lengths))})
        with torch.no_grad():
            expected = self.scores(few)
            self.shares = True
            try:
                self.shares = bool((self.scores(few) - expected).abs().max() <= tolerance)
            except (
                AttributeError,
                TypeError,
                ValueError,
                RuntimeError,
                NotImplementedError,
            ):  # it has no cache, or one of its own
                self.shares = False

    def _prompt(self, row: int) -> list[int]:
        ids = self.rows[row]["input_ids"]
        return list(ids[: len(ids) - len(_learned(self.rows[row]))])

    def _branches(self) -> list[Tokens]:
        """The completions but for their last tokens, without those that begin another."""
        starts = {word[:-1] for word in self.tokens}
        return sorted(a for a in starts if not any(a != b and b[: len(a)] == a for b in starts))

    def _in_full(self, prompts: list[list[int]], branches: list[Tokens]) -> tuple[torch.Tensor, Places]:
        """The logits behind each prompt and each beginning of a completion, every branch behind a prompt of its own."""
        places = Places()
        begun = _begun(places, len(prompts), branches)
        at = [(row, len(prompts[row // len(branches)]) - 1 + size) for row, size in begun]
        ids, mask = _padded([[*prompt, *branch] for prompt in prompts for branch in branches], self.device)
        logits, _ = logits_at(self.model, {"input_ids": ids, "attention_mask": mask}, self._columns(at))
        return logits, places

    def _from_cache(self, prompts: list[list[int]], branches: list[Tokens]) -> tuple[torch.Tensor, Places]:
        """The same, each prompt once: the branches go on from its keys and values."""
        ids, mask = _padded(prompts, self.device, left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, **self._positions(positions), "use_cache": True}
        ends = [(row, ids.shape[1] - 1) for row in range(len(prompts))]
        behind, output = logits_at(self.model, inputs, self._columns(ends))
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(branches))
        places = Places({(row, ()): row for row in range(len(prompts))})
        at = [(row, size - 1) for row, size in _begun(places, len(prompts), branches)]
        ids, own = _padded([list(branch) for _ in prompts for branch in branches], self.device)
        positions = (
            positions[:, -1:].repeat_interleave(len(branches), 0) + 1 + torch.arange(ids.shape[1], device=self.device)
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.cat([mask.repeat_interleave(len(branches), 0), own], 1),
            **self._positions(positions),
            "past_key_values": cache,
            "use_cache": True,
        }
        after, _ = logits_at(self.model, inputs, self._columns(at))
        return torch.cat([behind, after]), places

    def _positions(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where the tokens stand, for a model that is told so."""
        told = "position_ids" in inspect.signature(self.model.forward).parameters
        return {"position_ids": positions} if told else {}

    def _columns(self, pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        return torch.tensor(pairs, device=self.device).unbind(1)


def _begun(places: Places, prompts: int, branches: list[Tokens]) -> list[tuple[int, int]]:
    """Number the beginnings of the branches behind each prompt that have no place yet.

    Args:
        places: gets them.
        prompts: how many there are.
        branches: behind each prompt, in a batch of prompts × branches.

    Returns:
        (row of that batch, tokens of the branch) of each that is new, in the order of its number.
    """
    begun = []
    for prompt, (number, branch) in itertools.product(range(prompts), enumerate(branches)):
        for size in range(len(branch) + 1):
            if (prompt, branch[:size]) not in places:
                places[prompt, branch[:size]] = len(places)
                begun.append((prompt * len(branches) + number, size))
    return begun


def _padded(rows: list[list[int]], device: torch.device, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids in one batch [B, T], and which of them count."""
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if left else one + pad for one, pad in zip(ones, pads, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def logits_at(model: nn.Module, inputs: Mapping[str, Any], at: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any]:
    """The logits of a language model at some tokens of a batch, computed for these alone where its class allows it.

    Args:
        model: with `get_output_embeddings`, as transformers' have.
        inputs: of the model, without labels.
        at: the batch's rows and the tokens in them, [n] each.

    Returns:
        [n, V], in the model's dtype; and all that the model gave.
    """
    with _narrowed(model, at):
        output = model(**inputs)
    return (output.logits if output.logits.ndim == 2 else output.logits[at]), output


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
    return nn.functional.cross_entropy(logits_at(model, others, at)[0].float(), labels[at])


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
