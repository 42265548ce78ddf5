"""A head that is solved, not trained: on features of the frozen model, computed once for each candidate.

It knows one loaded model, its rows and their labels. It knows neither candidates nor files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from ..constants import MULTI, REGRESSION, SINGLE
from ..data.metrics import IGNORED
from .head_inputs import CLS, MEAN, MODEL, HeadInputs
from .run import Run
from .solver import left_out_accuracy, left_out_errors, left_out_losses, left_out_objective, solve

OVERRULES = 2.0
"""Standard errors by which what is judged on few rows must be ahead of a default to take its place: at one, two examples do it, and
they mislead (recipes/bench_fit/README.md)."""
L2 = 0.1
"""Of a head on features of norm 1: scikit-learn's C = 10."""
L2_TRIED = (0.01, 1.0)
"""What the folds may prefer to it."""
NAMES_TELL, NAMES_CHANCE = 0.5, 1e-3
"""Names of classes are examples where so many shots are nearest to the name of their own class, and by chance so rarely
(recipes/bench_fit/README.md)."""
FEATURE_BATCH, TRAINED_BATCH = 32, 8
Features: TypeAlias = "dict[int, torch.Tensor]"
"""{row: what the head sees of it}, [d], or [T, d] where every token is judged; float32."""


@dataclass(frozen=True)
class Solved:
    """A head: weight [K, d] and bias [K], float64."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class SolvedHead:
    """The head's problem on the rows of a fit.

    Attributes:
        seen: what the head may be given.
        rows: encoded examples.
        inputs: row numbers -> the model's inputs, labels among them.
        lengths: of each row, in tokens; rows of one length share a batch.
        autocast: the context of a forward pass.
        shots: how many of the rows are shots; they stand first.
        l2: how strongly the weight is held.
    """

    run: Run
    seen: HeadInputs
    rows: Sequence[Any]
    inputs: Callable[[list[int]], dict[str, Any]]
    lengths: Sequence[int]
    autocast: Callable[[], Any]
    shots: int
    l2: float = L2
    _cache: dict[Hashable, dict[str, Features]] = field(default_factory=dict)
    _targets: dict[int, torch.Tensor] = field(default_factory=dict)

    # --------------------------------------------------------------------------------------------------- features

    def features(self, rows: Sequence[int], state: Hashable = None) -> Features:
        """What the head sees of each row as the model is now.

        Args:
            rows: numbers of the rows.
            state: a name of the model's state under which features of all rows are kept; None: computed for these rows alone.
        """
        if state is None:
            return self._computed(rows)[self.seen.pooling]
        if state not in self._cache:
            if not self.run.task.classifies_examples:  # a vector for each token is much
                self._cache.clear()
            self._cache[state] = self._computed(range(len(self.lengths)))
        return self._cache[state][self.seen.pooling]

    def _computed(self, rows: Sequence[int]) -> dict[str, Features]:
        order = sorted(rows, key=lambda row: self.lengths[row])
        found: dict[str, Features] = {}
        with torch.no_grad():
            for start in range(0, len(order), FEATURE_BATCH):
                part = order[start : start + FEATURE_BATCH]
                for name, value in self._seen(part).items():
                    found.setdefault(name, {}).update(zip(part, self._cut(part, value), strict=True))
        return found

    def differentiable(self, rows: Sequence[int]) -> torch.Tensor:
        """What the head sees of some rows of a classification [n, d], through which gradients flow.

        Rows of like length share a forward pass, so that little is computed for padding.
        """
        order = sorted(range(len(rows)), key=lambda place: self.lengths[rows[place]])
        parts = [
            self._seen([rows[place] for place in order[start : start + TRAINED_BATCH]])[self.seen.pooling]
            for start in range(0, len(order), TRAINED_BATCH)
        ]
        back = torch.tensor(order).argsort().to(parts[0].device)
        return torch.cat(parts)[back]

    def backward_left_out(self, rows: Sequence[int]) -> None:
        """Gradients of the loss by which each row is predicted from all others, summed into what requires them.

        The features are computed twice, so that no graph is larger than a batch's (Gao et al. 2021, arXiv 2101.06983).
        """
        features = self._computed(rows)[self.seen.pooling]
        wide = torch.stack([features[row] for row in rows]).requires_grad_()
        loss = left_out_objective(wide, self.targets(rows), classes=self.kind == SINGLE)
        slopes = dict(zip(rows, torch.autograd.grad(loss, wide)[0], strict=True))
        order = sorted(rows, key=lambda row: self.lengths[row])
        for start in range(0, len(order), TRAINED_BATCH):
            part = order[start : start + TRAINED_BATCH]
            seen = self._seen(part)[self.seen.pooling]
            torch.autograd.backward(seen, torch.stack([slopes[row] for row in part]).to(seen))

    def _seen(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """What the head sees of some rows under each pooling, [B, ...]; gradients flow where they are on."""
        inputs = self.inputs(rows)
        self._remember(rows, inputs)
        with self.autocast():
            return self.seen.features(inputs, inputs.get("attention_mask"))

    def _remember(self, rows: list[int], inputs: dict[str, Any]) -> None:
        """Take the labels out of the inputs, and keep them by row."""
        labels = inputs.pop("labels", None)
        if labels is None:
            labels = torch.stack([inputs.pop("start_positions"), inputs.pop("end_positions")], dim=1)
        for row, label in zip(rows, labels, strict=True):
            self._targets[row] = label

    def _cut(self, rows: list[int], value: torch.Tensor) -> list[torch.Tensor]:
        """Rows apart, without padding."""
        return [part[: self.lengths[row]] if value.ndim > 2 else part for row, part in zip(rows, value, strict=True)]

    def choose_pooling(self, asked: str, own: str | None, rows: Sequence[int], state: Hashable) -> list[str]:
        """Take the pooling that is asked for, or the base's own, or the mean unless the rows prefer another; the head's parameters.

        Args:
            asked: `auto`, or one that the model has.
            own: what the base's files say; None: nothing.
            rows: the shots, where they are enough to choose by; else none.
            state: under which the features of all poolings are kept.
        """
        has = self.seen.poolings
        if asked != "auto":
            chosen = asked
        elif (
            not (self.run.task.classifies_examples and self.seen.reader and self.seen.reader.first)
            or self.run.task.takes_images
        ):
            chosen = MODEL if MODEL in has else has[0]
        elif own in has:
            chosen = str(own)
        else:
            self._cache[state] = self._computed(range(len(self.lengths)))
            chosen = self._preferred([name for name in (MEAN, CLS, MODEL) if name in has], self._cache[state], rows)
        if state in self._cache:
            self._cache[state] = {chosen: self._cache[state][chosen]}
        return self.seen.choose(chosen)

    def _preferred(self, among: list[str], features: dict[str, Features], rows: Sequence[int]) -> str:
        """The first pooling, or what leaving each row out prefers to it by more than `OVERRULES` standard errors."""
        first, *others = among
        if not rows:
            return first
        losses = {name: self.left_out(features[name], rows) for name in among}
        leads = {name: losses[first] - losses[name] for name in others}
        sure = {name: float(lead.mean() - OVERRULES * lead.std() / len(rows) ** 0.5) for name, lead in leads.items()}
        best = max(sure, key=lambda name: sure[name], default=first)
        return best if best != first and sure[best] > 0 else first

    # -------------------------------------------------------------------------------------------------- leave one out

    def left_out(self, features: Features, rows: Sequence[int]) -> torch.Tensor:
        """The loss of the prediction for each row by all others [n]."""
        wide = torch.stack([features[row] for row in rows])
        wide = wide / _norm(wide)
        if self.kind == SINGLE:
            return left_out_losses(wide, self.classes(rows), self.outputs)
        return left_out_errors(wide, self.classes(rows).reshape(len(rows), -1))

    def told_apart(self, features: Features, rows: Sequence[int]) -> float:
        """How well classes are told apart: the mean accuracy of the classes, each row given to the nearest mean of the others."""
        return left_out_accuracy(torch.stack([features[row] for row in rows]), self.classes(rows))

    def told_by(self, features: Features, rows: Sequence[int], names: Sequence[int]) -> bool:
        """Whether the names of the classes say what they mean: most rows are nearest to their own, and more of them than by chance.

        Args:
            features: of all rows.
            rows: the shots, of one class each.
            names: the rows that are a class's name, one of each class.
        """
        shots, words = (
            nn.functional.normalize(torch.stack([features[row] for row in part]), dim=-1) for part in (rows, names)
        )
        right = int((self.classes(names)[(shots @ words.T).argmax(1)] == self.classes(rows)).sum())
        n, chance = len(rows), 1 / len(names)
        at_random = sum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(right, n + 1))
        return right >= NAMES_TELL * n and at_random < NAMES_CHANCE

    # ---------------------------------------------------------------------------------------------------------- solved

    @property
    def kind(self) -> str:
        """The problem type, of classifications."""
        return self.run.labels.problem_type if self.run.labels else SINGLE

    @property
    def outputs(self) -> int:
        """How many logits the head gives."""
        return self.seen.layer.out_features

    def _target(self, row: int) -> torch.Tensor:
        """The label of a row, as its batch has it."""
        if row not in self._targets:
            self._remember([row], self.inputs([row]))
        return self._targets[row]

    def classes(self, rows: Sequence[int]) -> torch.Tensor:
        """[n] int64 of a classification into one class; else [n] or [n, k] of what is to be predicted."""
        return torch.stack([self._target(row) for row in rows])

    def targets(self, rows: Sequence[int]) -> torch.Tensor:
        """[n, k] float32: one-hot rows of classes, or what is to be predicted, with mean 0."""
        given = self.classes(rows)
        if self.kind == SINGLE:
            return nn.functional.one_hot(given, self.outputs).float()
        every = torch.stack([self._target(row) for row in range(self.shots)]).reshape(self.shots, -1).float()
        return given.reshape(len(rows), -1).float() - every.mean(0)

    def solve(self, features: Features, rows: Sequence[int], l2: float | None = None) -> Solved:
        """The head of these rows at its optimum, for features as the model gives them."""
        flat, loss = self._problem([features[row] for row in rows], rows)
        scale = _norm(flat)
        held = (self.l2 if l2 is None else l2) * (
            2 if self._is_binary() else 1
        )  # as scikit-learn holds one vector of two classes
        weight, bias = solve(flat / scale, loss, self.outputs, held, bias=self.seen.layer.bias is not None)
        return Solved(weight / scale, bias)

    def put(self, features: Features, rows: Sequence[int]) -> Solved:
        """Solve the head on these rows and put it into the model; the head."""
        found = self.solve(features, rows)
        self.seen.put(found.weight, found.bias, max(float(features[row].abs().max()) for row in rows))
        return found

    def _is_binary(self) -> bool:
        return self.kind == SINGLE and self.run.task.has_labels and self.outputs == 2

    def _problem(
        self, features: list[torch.Tensor], rows: Sequence[int]
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The features [n, d] of all that is judged, and the sum of its losses by logits [n, K]."""
        targets = [self._target(row) for row in rows]
        if self.run.task.classifies_examples:
            wanted = torch.stack(targets)
            return torch.stack(features), lambda logits: self.loss(logits, wanted)
        if self.run.task.has_labels:
            kept = [t[: len(f)] != IGNORED for f, t in zip(features, targets, strict=True)]
            wanted = torch.cat([t[: len(f)][k] for f, t, k in zip(features, targets, kept, strict=True)])
            flat = torch.cat([f[k] for f, k in zip(features, kept, strict=True)])
            return flat, lambda logits: nn.functional.cross_entropy(logits, wanted, reduction="sum")
        sizes, spans = [len(f) for f in features], torch.stack(targets)

        def of_spans(logits: torch.Tensor) -> torch.Tensor:
            padded = nn.utils.rnn.pad_sequence(list(torch.split(logits, sizes)), True, float("-inf"))  # [E, T, 2]
            ends = [nn.functional.cross_entropy(padded[..., i], spans[:, i], reduction="sum") for i in range(2)]
            return (ends[0] + ends[1]) / 2

        return torch.cat(features), of_spans

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of a classification or regression, as the head is solved with it."""
        if self.kind == REGRESSION:
            spread = targets.double().var(correction=0).clamp(min=1e-12)
            return (logits.squeeze(-1) - targets).square().sum() / (2 * spread)
        if self.kind == MULTI:
            return nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def judged(
        self, found: Solved, features: Features, rows: Sequence[int]
    ) -> Iterator[tuple[list[int], Any, Any, float]]:
        """(rows, their logits and labels as the model has them, their mean loss) in batches, by a head that is not in the model."""
        for start in range(0, len(rows), FEATURE_BATCH):
            part = list(rows[start : start + FEATURE_BATCH])
            given = [features[row].double() @ found.weight.T + found.bias for row in part]
            targets = [self._target(row) for row in part]
            if self.run.task.classifies_examples:
                logits, wanted = torch.stack(given), torch.stack(targets)
                yield part, logits, wanted, self._mean_loss(logits, wanted)
                continue
            padded = nn.utils.rnn.pad_sequence(given, True, 0.0)
            flat, loss = self._problem([features[row] for row in part], part)
            items = sum(self.run.task.items(self.rows[row]) for row in part)
            mean = float(loss(flat.double() @ found.weight.T + found.bias)) / items
            if self.run.task.has_labels:
                tags = [tag[: len(logits)] for tag, logits in zip(targets, given, strict=True)]
                yield part, padded, nn.utils.rnn.pad_sequence(tags, True, IGNORED), mean
            else:
                yield part, padded.unbind(-1), torch.stack(targets).unbind(-1), mean

    def _mean_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """As the model's class computes it."""
        if self.kind == REGRESSION:
            return float((logits.squeeze(-1) - targets).square().mean())
        return float(self.loss(logits, targets)) / (targets.numel() if self.kind == MULTI else len(targets))


def _norm(features: torch.Tensor) -> torch.Tensor:
    """The root of the mean squared norm of the rows."""
    size = features.double().square().sum(-1).mean().sqrt()
    return size.clamp(min=1e-30)
