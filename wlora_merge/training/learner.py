"""The learner of a fit: one loaded model on which one candidate after another is placed, trained and judged.

Its loop is our own, because it trains a few numbers through a frozen model. It takes quantized bases as they are, and keeps no
state but those numbers. It gives the same result on several processes as on one: each weighs its share of a batch by what the
loss counts. A new head that ends in one linear layer is solved (`solved_head`), any other is trained. Dropout is off: the frozen
model is a fixed function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..constants import SINGLE
from ..data.metrics import choice_metric
from ..errors import MixtureError
from ..mixture.attachment import attachment_of
from ..mixture.live_model import refuse_uncalled
from ..mixture.weights import uniform_start
from ..text import first_line
from .candidates import BATCH, SCREENED_SCALES, START_SCALES, UNIFORM, Candidate, Situation, batch_size
from .completions import Completions, find_completions, next_token_loss
from .head_inputs import MODEL, find_head_inputs, pool_by_config, refuse_pooling
from .initial_logits import Start
from .loop import Loop, Trained, restore
from .model import quiet
from .packing import refuse_packing
from .placement import Placement
from .run import Rows, Run, Split, halfway
from .scoring import Judged, join_batches
from .solved_head import Features, Solved, SolvedHead
from .solver import left_out_objective

TOLD_APART = 0.2
"""Leave-one-out loss of a batch below which features are learned: what is trained after it fits the shots alone
(recipes/bench_fit/README.md)."""
CHOSEN = 0.1
"""The same of the loss by which a language model chooses among completions, the mean of a pass over the shots."""


class Learner:
    """A model with its adapters attached, the encoded rows, and how to train on them.

    Args:
        given: the encoded examples.
        head: names of the head's modules; its parameters start from what they are now.
        start: where the logits (free weights) and a learned delta_scale start.
        own_pooling: what the base's files say of the pooling, if they do.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        processor: Any,
        given: Rows,
        head: list[str],
        start: Start,
        own_pooling: str | None = None,
    ) -> None:
        self.run, self.model, self.head = run, model, head
        self.rows, self.shots, self.enough = given.encoded, given.shots, given.enough
        self.placement = Placement(model, run.options, start)
        self.names = self.placement.given
        self.processor, self.metric = processor, run.task.metric(run.labels)
        self.collate = run.task.collator(processor)
        self.device = attachment_of(model).weights.device
        self.log: Callable[[dict[str, float], int], None] | None = None
        quiet(model, run.options.gradient_checkpointing)
        self._try_out()
        self.solved = self._find_solved(own_pooling)
        self.completions = self._find_completions(given.classes)
        self.placement.remember_head()
        self.placement.scale_of = self._best_scale
        self.pack = self.collate
        if run.options.packing:
            from transformers import DataCollatorWithFlattening

            self.pack = DataCollatorWithFlattening()  # type: ignore[no-untyped-call]
            few = [self.rows[row] for row in range(min(2, len(self.rows)))]
            refuse_packing(model, few, self.collate, self.pack, run.options)

    def _try_out(self) -> None:
        """Run the model once, to refuse what would not train."""
        try:
            with torch.no_grad(), self._autocast():
                refuse_uncalled(self.model, attachment_of(self.model).layers, lambda: self.model(**self._inputs([0])))
        except ValueError as error:
            raise MixtureError(
                f"{type(self.model).__name__} does not take the examples as they are encoded ({first_line(error)}): look at the "
                "base's tokenizer or processor, and at --task."
            ) from error
        except RuntimeError as error:
            if self.run.options.precision != "bf16" or isinstance(error, torch.OutOfMemoryError):
                raise
            raise MixtureError(
                f"{type(self.model).__name__} does not run in bfloat16 ({first_line(error)}): leave --precision bf16 out."
            ) from error

    def _find_solved(self, own_pooling: str | None) -> SolvedHead | None:
        """The new head's problem, where it ends in one linear layer on what no other new layer has made."""
        asked, found = self.run.options.pooling, None
        if self.head and pool_by_config(self.model, own_pooling if asked == "auto" else asked):
            asked = MODEL
        if self.head:
            inputs = self._unlabelled([0, len(self.rows) - 1])
            found = find_head_inputs(self.model, self.head, inputs, classifies=self.run.task.classifies_examples)
        refuse_pooling(asked, found, self.model)
        if found is None or (asked == MODEL and MODEL not in found.poolings):
            return None
        every: Any = self.rows
        images = self.run.task.takes_images
        lengths = [0 if images else len(every[number]["input_ids"]) for number in range(len(every))]
        solved = SolvedHead(self.run, found, every, self._inputs, lengths, self._autocast, self.shots)
        chosen_by = range(self.shots) if self.enough else ()
        names = solved.choose_pooling(asked, own_pooling, chosen_by, self.placement.place_uniform())
        attachment_of(self.model).head = names
        for name in names:
            self.model.get_parameter(name).requires_grad_(True)
        return solved

    def _find_completions(self, classes: Sequence[Sequence[str]]) -> Completions | None:
        """The completions of the shots, where they repeat and the model chooses among them."""
        if self.head or not self.run.task.is_decoder or self.run.options.packing:
            return None
        every: Any = self.rows
        options = self.run.options
        tokens = find_completions(classes, [every[number] for number in range(len(every))])
        if tokens is None:
            return None
        self.metric = choice_metric()
        found = Completions(self.model, every, tokens, self.device)
        with self._autocast():
            found.try_sharing(1e-3 if (options.quantize, options.precision) == (None, "float32") else 0.2)
        return found

    def _unlabelled(self, rows: list[int]) -> dict[str, Any]:
        """The model's inputs for some rows, without labels."""
        labels = ("labels", "start_positions", "end_positions")
        return {name: value for name, value in self._inputs(rows).items() if name not in labels}

    # ------------------------------------------------------------------------------------------------ candidates

    @property
    def situation(self) -> Situation:
        """What decides the defaults of this fit, but for how near the shots are to what the adapters know."""
        left_out = self.solved is not None and self.run.task.classifies_examples
        return Situation(
            bool(self.head),
            self.enough,
            solved=self.solved is not None,
            left_out=left_out,
            generates=self.run.task.generates,
            choice=self.completions is not None,
        )

    def uniform_features(self) -> Features:
        """What the head sees of every row under uniform composition."""
        return self.solved.features(range(len(self.rows)), self.placement.place_uniform())  # type: ignore[union-attr]

    def nearness(self) -> float | None:
        """How well uniform composition tells the classes of the shots apart; None where it cannot be said."""
        if self.solved is None or not (self.situation.left_out and self.enough and self.solved.kind == SINGLE):
            return None
        return self.solved.told_apart(self.uniform_features(), range(self.shots))

    def takes_names(self, names: Sequence[int]) -> bool:
        """Whether rows that are the names of classes are examples too: as asked, else where they tell the shots apart."""
        asked, solved = self.run.options.label_names, self.solved
        if asked is not None or not names or solved is None or solved.kind != SINGLE:
            return bool(asked)
        return solved.told_by(self.uniform_features(), range(self.shots), names)

    def _best_scale(self, rows: Sequence[int]) -> float:
        """How many times uniform composition lets a solved head predict each row best from the others."""
        solved = self.solved
        if solved is None or not (self.situation.left_out and self.enough) or self.run.options.delta_scale is not None:
            return 1.0
        even = self.placement.even_row()

        def loss(scale: float) -> float:
            state = self.placement.place_row([scale * weight for weight in even], "none")
            return float(solved.left_out(solved.features(rows, state), rows).mean())

        return min(SCREENED_SCALES if self.run.screened else START_SCALES, key=loss)

    # -------------------------------------------------------------------------------------------------- training

    def train(self, candidate: Candidate, split: Split) -> Trained:
        """Train a candidate from its start, in place; its head is solved, or trained along.

        A head that is trained moves towards the one of uniform composition as far as the candidate says.
        """
        if self.solved is not None and not candidate.trained:
            return self._solve_alone(candidate, split, self.solved)
        head = self._uniform_head(candidate, split) if candidate.interpolation != 1 and self.solved is None else []
        parameters = self.placement.place(candidate, split.rows)
        if not parameters:
            points = [(step, candidate.new_interpolation) for step in split.judge_at]
            return Trained(judged=dict.fromkeys(points, self.judge(split.held)) if split.held and points else {})
        loop = Loop(self, candidate, split, self._moving(parameters), head)
        result = self._steps(candidate, split, loop)
        self._check(split, loop, result)
        if split.patience is not None and loop.best.step:
            restore(loop.parameters, loop.best.tensors)
            result.steps = loop.best.step
        loop.interpolate(candidate.new_interpolation)
        if self.solved is not None:
            self.solved.put(self.solved.features(split.rows), split.rows)
        result.tensors = [p.detach().clone() for p in parameters]
        return result

    def _moving(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of a candidate's parameters that gradients train: of a solved head none, but where the loss goes through it."""
        if self.solved is None:
            return parameters
        head = {id(self.model.get_parameter(name)) for name in self.placement.head_start}
        own = [] if self.situation.left_out else list(self.solved.seen.layer.parameters())
        return [p for p in parameters if p.requires_grad and id(p) not in head] + own

    def _solve_alone(self, candidate: Candidate, split: Split, solved: SolvedHead) -> Trained:
        """A candidate whose head alone is to be found: solved on features that are computed once."""
        parameters = self.placement.place(candidate, split.rows)
        features = solved.features([*split.rows, *split.held], self.placement.state())
        found = solved.put(features, split.rows)
        result = Trained(tensors=[p.detach().clone() for p in parameters])
        if self.run.progress:
            self.run.progress(
                split.title, 1, 1, self.judge(split.rows, (found, features)).loss, self.placement.weights()
            )
        if split.held and split.judge_at:
            result.judged[split.judge_at[-1], candidate.new_interpolation] = self.judge(split.held, (found, features))
        return result

    def _steps(self, candidate: Candidate, split: Split, loop: Loop) -> Trained:
        """The optimizer steps of a training, with what is judged, logged and saved between them."""
        state = self.run.state
        saved = state.current(split.key)
        result = loop.restore(saved) if saved else Trained()
        for step in range(result.steps + 1, split.steps + 1):
            if self.run.is_over(split.deadline):
                result.complete = False
                break
            result.loss, result.steps = loop.step(step), step
            result.history.append((step, float(f"{result.loss:.5g}")))
            self._tell(candidate, split, result)
            learned = self._has_learned(split, result)
            if step in split.judge_at or (learned and split.judge_at):
                self._judge_at(split.judge_at[-1] if learned else step, candidate, split, loop, result)
                if split.patience is not None and loop.is_past_its_best(result, split.patience):
                    break
            if learned:
                result.learned = True
                break
            state.save_current(split.key, lambda result=result: loop.saved(result))  # type: ignore[misc]
        return result

    def _has_learned(self, split: Split, result: Trained) -> bool:
        """Whether a training tells the shots apart, and stops before its last step, as none was asked for."""
        now, options = self.situation, self.run.options
        if not now.stops or options.max_steps is not None or options.epochs is not None:
            return False
        if now.left_out:
            return result.loss < TOLD_APART
        each = batch_size(options, now) * options.gradient_accumulation_steps
        passed = -(-len(split.rows) // each)
        return len(result.history) >= passed and fmean(loss for _, loss in result.history[-passed:]) < CHOSEN

    def _tell(self, candidate: Candidate, split: Split, result: Trained) -> None:
        """Progress and log of a step."""
        if self.run.progress:
            shown = f"{split.title}, new adapter" if candidate.new_adapter else split.title
            self.run.progress(shown, result.steps, split.steps, result.loss, self.placement.weights())
        if self.log:
            self.log(
                {"loss": result.loss, **{f"weight/{n}": w for n, w in self.placement.weights().items()}}, result.steps
            )

    def _judge_at(self, step: int, candidate: Candidate, split: Split, loop: Loop, result: Trained) -> None:
        """Judge on the held-out rows with the new adapter as far as it may go; what is trained stays as it is."""
        learned = loop.tensors()
        for share in candidate.new_interpolations:
            loop.interpolate(share)
            if self.solved is not None:
                features = self.solved.features([*split.rows, *split.held])
                result.judged[step, share] = self.judge(split.held, (self.solved.solve(features, split.rows), features))
            else:
                result.judged[step, share] = self.judge(split.held)
            restore(loop.parameters, learned)

    def _uniform_head(self, candidate: Candidate, split: Split) -> list[torch.Tensor]:
        """The head's parameters, trained on uniform composition in at most half of the time that is left."""
        key = f"{split.key} head"
        saved = self.run.state.done(key)
        if saved is None:
            row = tuple(uniform_start(len(self.names), candidate.normalize))
            even = Candidate(UNIFORM, row, candidate.normalize)
            log, self.log = self.log, None  # of the training that is kept alone
            title = f"{split.title}, head on uniform"
            trained = self.train(even, Split(split.rows, split.steps, key, title, deadline=halfway(split.deadline)))
            self.log, saved = log, trained.tensors
            if trained.complete:
                self.run.state.finish(key, saved)
        return list(saved)

    def _check(self, split: Split, loop: Loop, result: Trained) -> None:
        if result.steps and not loop.optimizer.state:
            raise MixtureError(
                f"training {split.title!r}: none of its steps had finite gradients in {self.run.options.precision}: use --precision "
                "bf16 or float32, or more steps, as each that overflows halves the loss's scale."
            )
        finite = math.isfinite(result.loss) or not result.steps
        if not (finite and all(bool(torch.isfinite(p).all()) for p in loop.parameters)):
            rates = ", ".join(f"{group['lr']:g}" for group in loop.optimizer.param_groups)
            raise MixtureError(
                f"training {split.title!r} diverged: its loss or its parameters are not finite after it; use smaller learning "
                f"rates than {rates}."
            )

    def batches(self, rows: Sequence[int], steps: int) -> Iterator[list[list[int]]]:
        """For each optimizer step its batches: the rows in a new random order, again and again; only the seed decides.

        Where examples are predicted from each other the classes take turns, so that a batch has as many as it can of each.
        """
        generator = torch.Generator().manual_seed(self.run.options.seed)
        size, queue = batch_size(self.run.options, self.situation), list[list[int]]()
        for _ in range(steps):
            step: list[list[int]] = []
            while len(step) < self.run.options.gradient_accumulation_steps:
                if not queue:
                    order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
                    order = (
                        self._in_turns(order)
                        if self.situation.left_out and self.solved and self.solved.kind == SINGLE
                        else order
                    )
                    queue = [order[i : i + size] for i in range(0, len(order), size)]
                step.append(queue.pop(0))
            yield step

    def _in_turns(self, rows: list[int]) -> list[int]:
        """The same rows, one of each class after another."""
        seen: dict[int, int] = {}
        turns = []
        for label in self.solved.classes(rows).tolist():  # type: ignore[union-attr]
            seen[label] = turn = seen.get(label, 0) + 1
            turns.append(turn)
        return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]

    # ---------------------------------------------------------------------------------------------- forward passes

    def loss(self, rows: list[int]) -> torch.Tensor:
        """The mean loss of some rows."""
        if self.completions is not None:
            with self._autocast():
                scores = self.completions.scores(rows)
            return nn.functional.cross_entropy(scores, self.completions.classes(rows))
        inputs = self._inputs(rows, self.pack)
        with self._autocast():
            loss: torch.Tensor = (
                next_token_loss(self.model, inputs) if self.run.task.is_decoder else self.model(**inputs).loss
            )
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def backward(self, rows: Sequence[int]) -> None:
        """Gradients of the mean loss of some rows, by which mixtures are judged, summed into what requires them."""
        if self.situation.left_out:
            self.solved.backward_left_out(rows)  # type: ignore[union-attr]
            return
        size, total = self.run.options.batch_size or BATCH, self.items(rows)
        for start in range(0, len(rows), size):
            part = list(rows[start : start + size])
            (self.loss(part) * (self.items(part) / total)).backward()  # type: ignore[no-untyped-call]

    def left_out(self, rows: list[int]) -> torch.Tensor:
        """The loss of a batch by how each row is predicted from the others, of what the head would see of them."""
        solved: SolvedHead = self.solved  # type: ignore[assignment]
        features = solved.differentiable(rows)
        return left_out_objective(features, solved.targets(rows), classes=solved.kind == SINGLE)

    def judge(self, rows: Sequence[int], head: tuple[Solved, Features] | None = None) -> Judged:
        """What the model gives on some rows, in batches, kept as small as the metric allows.

        Args:
            rows: numbers of the rows.
            head: a solved head and the features that it sees, in the model's place.
        """
        outputs, labels, losses, items = [], [], [], []
        for part, logits, found, loss in self._given(rows) if head is None else self.solved.judged(*head, rows):  # type: ignore[union-attr]
            logits = self.run.task.allowed(logits, [self.rows[r] for r in part])
            if self.metric.preprocess:
                logits = self.metric.preprocess(logits, found)
            outputs.append(_on_cpu(logits))
            labels.append(_on_cpu(found))
            losses.append(loss)
            items.append(self.items(part))
        loss = sum(a * n for a, n in zip(losses, items, strict=True)) / max(sum(items), 1)
        if not math.isfinite(loss):
            raise MixtureError(f"the loss on held-out examples is {loss}; use smaller learning rates.")
        return Judged(join_batches(outputs), join_batches(labels), loss, sum(items))

    def items(self, rows: Sequence[int]) -> int:
        """How many predictions the loss of some rows counts."""
        return len(rows) if self.completions else sum(self.run.task.items(self.rows[row]) for row in rows)

    def _given(self, rows: Sequence[int]) -> Iterator[tuple[list[int], Any, Any, float]]:
        """(rows, the model's logits and labels, its mean loss) in batches."""
        size = self.run.options.batch_size or BATCH
        for i in range(0, len(rows), size):
            part = list(rows[i : i + size])
            with torch.no_grad(), self._autocast():
                if self.completions is not None:
                    scores, classes = self.completions.scores(part), self.completions.classes(part)
                    yield part, scores, classes, float(nn.functional.cross_entropy(scores, classes))
                    continue
                inputs = self._inputs(part)
                result = self.model(**inputs)
            if "logits" in result:
                yield part, result.logits, inputs["labels"], float(result.loss)
            else:
                ends = inputs["start_positions"], inputs["end_positions"]
                yield part, (result.start_logits, result.end_logits), ends, float(result.loss)

    def _inputs(self, rows: list[int], collate: Callable[[list[dict[str, Any]]], Any] | None = None) -> dict[str, Any]:
        batch = (collate or self.collate)([self.rows[r] for r in rows])
        pixels = torch.bfloat16 if self.run.options.precision == "bf16" else None
        return {
            name: value.to(self.device, pixels if name == "pixel_values" else None) for name, value in batch.items()
        }

    def _autocast(self) -> Any:
        return (
            torch.autocast(self.device.type, torch.float16) if self.run.options.precision == "fp16" else nullcontext()
        )


def _on_cpu(value: Any) -> Any:
    return (
        tuple(map(_on_cpu, value))
        if isinstance(value, tuple)
        else value.detach().float().cpu()
        if value.is_floating_point()
        else value.cpu()
    )
