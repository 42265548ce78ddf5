"""Learners that give scripted judgements, so that what is kept can be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from wlora_merge.constants import SINGLE
from wlora_merge.data.labels import LabelSet
from wlora_merge.data.metrics import classification_metric
from wlora_merge.data.tasks import get_task
from wlora_merge.distributed import Team
from wlora_merge.fit_options import fit_options
from wlora_merge.training.candidates import LEARNED, Candidate, Contender, Kind, Situation, single
from wlora_merge.training.loop import Trained
from wlora_merge.training.resume import FitState
from wlora_merge.training.run import Clock, Run, Split
from wlora_merge.training.scoring import Judged


class Scripted:
    """A learner whose settings do as they are told: for each granularity, which examples are right."""

    metric = classification_metric(LabelSet(("a", "b"), SINGLE))
    head: ClassVar = ["classifier"]
    situation = Situation(head=True, enough=True)

    def __init__(self, right: dict[str, list[int]]) -> None:
        self.right = right
        self.asked: list[tuple[str, int]] = []
        state = FitState(None, "", resume=False)
        self.run = Run(get_task("text-classification"), None, fit_options({}), Team(), state, Clock(0.0))

    def train(self, candidate: Candidate, split: Split) -> Trained:
        self.asked.append((candidate.contender.label, split.steps))
        right = torch.tensor(self.right[candidate.granularity])
        logits = torch.stack([1.0 - right, right.float()], dim=1)  # the label is always 1
        judged = Judged(logits, torch.ones(len(right), dtype=torch.long), float(1 - right.float().mean()), len(right))
        return Trained(split.steps, 0.0, {(split.steps, 1.0): judged})


class Stopping(Scripted):
    """A learner whose time ends during the training of one candidate."""

    def train(self, candidate: Candidate, split: Split) -> Trained:
        done = super().train(candidate, split)
        stops = candidate.granularity == "layer"
        return replace(done, steps=2, judged={}, complete=False) if stops else done

    def judge(self, rows: Sequence[int]) -> Judged:
        return super().train(Candidate(LEARNED, None), Split(rows, 2, "", "")).judged[2, 1.0]


class Halfway(Scripted):
    """A learner whose new adapter does at each step and interpolation as it is told: which examples are right, and the loss."""

    def __init__(self, points: dict[tuple[int, float], tuple[list[int], float]]) -> None:
        super().__init__({})
        self.points = points

    def train(self, candidate: Candidate, split: Split) -> Trained:
        judged = {}
        for point, (right, loss) in self.points.items():
            logits = torch.tensor([[1.0 - r, float(r)] for r in right])
            judged[point] = Judged(logits, torch.ones(len(right), dtype=torch.long), loss, len(right))
        return Trained(split.steps, 0.0, judged)


def contender(label: str) -> Contender:
    """The kind of candidate of that name, or else an adapter alone."""
    return Contender(Kind(label)) if label in [kind.value for kind in Kind] else single(label)
