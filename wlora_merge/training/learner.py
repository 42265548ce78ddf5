"""The learner of a fit: one loaded model on which one candidate after another is placed, trained and judged.

Its loop is our own, because it trains a few numbers through a frozen model: it takes quantized bases as they are, keeps no
state but those numbers, gives the same result on several processes as on one (each weighs its share of a batch by what the
loss counts), and trains a head alone on activations computed once. Dropout is off: the frozen model is a fixed function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MixtureError
from ..mixture.attach import regroup
from ..mixture.attachment import SCALE_PARAMETER, attachment_of
from ..mixture.live_model import refuse_uncalled
from ..mixture.new_lora import place_new
from ..mixture.weights import mixture_weights, uniform_start
from ..text import first_line
from .candidates import UNIFORM, Candidate
from .initial_logits import Start
from .loop import Loop, Trained, restore
from .run import Run, Split, halfway
from .scoring import Judged, join_batches

if TYPE_CHECKING:
    from torch.utils.data import ConcatDataset


PACKED_TOLERANCE = {None: 1e-4, "bf16": 2e-2, "4bit": 2e-2, "8bit": 1e-1}
"""By how much, relative to it, the loss of packed examples may differ: by rounding alone. 8bit chooses its outliers in the batch, and
its loss is off by 4e-2 on SmolLM2."""
PACKED_INFLUENCE = {"8bit": 1e-1}
"""The same of what the example before it may change in an example's logits: nothing, else 1e-4."""


class Learner:
    """A model with its adapters attached, the encoded rows, and how to train on them.

    Args:
        rows: encoded examples, the shots first.
        head: names of the head's modules; its parameters start from what they are now.
        start: where the logits (free weights) and a learned delta_scale start.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        processor: Any,
        rows: ConcatDataset[Any] | Sequence[Any],
        head: list[str],
        start: Start,
    ) -> None:
        self.run, self.model, self.rows, self.head, self.begin = run, model, rows, head, start
        self.names = [a.name for a in attachment_of(model).adapters]
        self.processor, self.metric = processor, run.task.metric(run.labels)
        self.collate = run.task.collator(processor)
        self.start = {name: model.get_parameter(name).detach().clone() for name in attachment_of(model).head}
        self.device = attachment_of(model).weights.device
        self.log: Callable[[dict[str, float], int], None] | None = None
        self._features: tuple[Candidate, torch.Tensor] | None = None
        self._labels = torch.empty(0)
        _quiet(model, run.options.gradient_checkpointing)
        self._try_out()
        self.pack = self.collate
        if run.options.packing:
            from transformers import DataCollatorWithFlattening

            self.pack = DataCollatorWithFlattening()  # type: ignore[no-untyped-call]
            self._check_packing()

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

    def _check_packing(self) -> None:
        """Refuse a model for which an example in a packed row is not what it is alone: its layers mix what stands in one row."""
        rows = [self.rows[r] for r in range(min(2, len(self.rows)))]
        first = rows[0] | {"input_ids": rows[0]["input_ids"][::-1]}
        length = len(rows[-1]["input_ids"])
        with torch.no_grad():
            padded, packed, other = (
                self.model(**{k: v.to(self.device) for k, v in collate(part).items()})
                for collate, part in ((self.collate, rows), (self.pack, rows), (self.pack, [first, *rows[1:]]))
            )
        kind = self.run.options.quantize or ("bf16" if self.run.options.precision == "bf16" else None)
        tolerance, influence = PACKED_TOLERANCE[kind], PACKED_INFLUENCE.get(kind or "", 1e-4)
        same = math.isclose(float(padded.loss), float(packed.loss), rel_tol=tolerance)
        if len(rows) > 1:  # nor may what stands before an example change it
            one, two = (result.logits[0, -length:].float() for result in (packed, other))
            same = same and bool((one - two).abs().max() <= influence * one.abs().max())
        if not same:
            raise MixtureError(
                f"packing: two examples in one row do not give what each gives alone: {type(self.model).__name__} does not keep "
                "packed examples apart, so leave --packing out."
            )

    # ------------------------------------------------------------------------------------------------ candidates

    def place(self, candidate: Candidate) -> list[nn.Parameter]:
        """Put a candidate's weights on the model, and the head back to its start; the parameters that it trains."""
        with torch.no_grad():
            weights = regroup(self.model, candidate.granularity, candidate.normalize)
            groups = attachment_of(self.model).groups
            start = (
                self.begin.logits(groups, candidate.granularity) if candidate.learned else torch.tensor(candidate.row)
            )
            if start is not None:
                weights.copy_(start.to(weights).expand_as(weights))
            for name, value in self.start.items():
                self.model.get_parameter(name).copy_(value)
        trained = [weights] if candidate.learned else []
        weights.requires_grad_(candidate.learned)
        trained += self._place_scale(candidate)
        trained += place_new(self.model, candidate.new_adapter, self.run.options.seed)
        return trained + [self.model.get_parameter(name) for name in self.start]

    def _place_scale(self, candidate: Candidate) -> list[nn.Parameter]:
        if candidate.scale is not None or not isinstance(self.run.options.delta_scale, str):
            fixed = self.run.options.delta_scale if candidate.scale is None else candidate.scale
            attachment_of(self.model).delta_scale = 1.0 if fixed is None else float(fixed)
            return []
        scale = self.model.get_parameter(SCALE_PARAMETER)
        scale.data.fill_(self.begin.scale if candidate.learned else 1.0)
        scale.requires_grad_(candidate.learned)
        attachment_of(self.model).delta_scale = scale
        return [scale] if candidate.learned else []

    def weights(self) -> dict[str, float]:
        """The mean mixture weight of each adapter over the groups, as they are now."""
        return dict(zip(self.names, self._mixture_weights().mean(0).tolist(), strict=True))

    def used(self) -> list[str]:
        """Names of the adapters that have a weight anywhere."""
        return [name for name, used in zip(self.names, self._mixture_weights().any(0).tolist(), strict=True) if used]

    def _mixture_weights(self) -> torch.Tensor:
        """[G, N], as they are now."""
        attachment = attachment_of(self.model)
        return mixture_weights(attachment.weights.detach(), attachment.normalize, attachment.temperature)

    # -------------------------------------------------------------------------------------------------- training

    def train(self, candidate: Candidate, split: Split) -> Trained:
        """Train a candidate from its start, in place, and move it towards uniform composition as far as it says."""
        head = self._uniform_head(candidate, split) if candidate.interpolation != 1 else []
        parameters = self.place(candidate)
        if not parameters:
            points = [(step, candidate.new_interpolation) for step in split.judge_at]
            return Trained(judged=dict.fromkeys(points, self.judge(split.held)) if split.held and points else {})
        loop = Loop(self, candidate, split, parameters, head)
        result = self._steps(candidate, split, loop)
        self._check(split, loop, result)
        if split.patience is not None and loop.best.step:
            restore(loop.parameters, loop.best.tensors)
            result.steps = loop.best.step
        loop.interpolate(candidate.new_interpolation)
        result.tensors = loop.tensors()
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
            if step in split.judge_at:
                self._judge_at(step, candidate, split, loop, result)
                if split.patience is not None and loop.is_past_its_best(result, split.patience):
                    break
            state.save_current(split.key, lambda result=result: loop.saved(result))  # type: ignore[misc]
        return result

    def _tell(self, candidate: Candidate, split: Split, result: Trained) -> None:
        """Progress and log of a step."""
        if self.run.progress:
            shown = f"{split.title}, new adapter" if candidate.new_adapter else split.title
            self.run.progress(shown, result.steps, split.steps, result.loss, self.weights())
        if self.log:
            self.log({"loss": result.loss, **{f"weight/{n}": w for n, w in self.weights().items()}}, result.steps)

    def _judge_at(self, step: int, candidate: Candidate, split: Split, loop: Loop, result: Trained) -> None:
        """Judge on the held-out rows with the new adapter as far as it may go; what is trained stays as it is."""
        learned = loop.tensors()
        for share in candidate.new_interpolations:
            loop.interpolate(share)
            result.judged[step, share] = self.judge(split.held, loop.features)
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
        """For each optimizer step its batches: the rows in a new random order, again and again; only the seed decides."""
        generator = torch.Generator().manual_seed(self.run.options.seed)
        size, queue = self.run.options.batch_size, list[list[int]]()
        for _ in range(steps):
            step: list[list[int]] = []
            while len(step) < self.run.options.gradient_accumulation_steps:
                if not queue:
                    order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
                    queue = [order[i : i + size] for i in range(0, len(order), size)]
                step.append(queue.pop(0))
            yield step

    # ---------------------------------------------------------------------------------------------- forward passes

    def loss(self, rows: list[int], features: torch.Tensor | None = None) -> torch.Tensor:
        """The mean loss of some rows."""
        if features is not None:
            return self._head_loss(features[rows], self._labels[rows])
        inputs = self._inputs(rows, self.pack)
        with self._autocast():
            loss: torch.Tensor = self.model(**inputs).loss
        return loss.float()

    def judge(self, rows: Sequence[int], features: torch.Tensor | None = None) -> Judged:
        """What the model gives on some rows, in batches, kept as small as the metric allows."""
        size = self.run.options.batch_size
        outputs, labels, losses, items = [], [], [], []
        with torch.no_grad():
            for i in range(0, len(rows), size):
                part = list(rows[i : i + size])
                inputs = self._inputs(part)
                found: Any = (
                    inputs["labels"] if "labels" in inputs else (inputs["start_positions"], inputs["end_positions"])
                )
                if features is not None:
                    logits: Any = self._head_logits(features[part])
                    losses.append(float(self._head_loss(features[part], found)))
                else:
                    with self._autocast():
                        result = self.model(**inputs)
                    logits = result.logits if "logits" in result else (result.start_logits, result.end_logits)
                    losses.append(float(result.loss))
                logits = self.run.task.allowed(logits, [self.rows[r] for r in part])
                if self.metric.preprocess:
                    logits = self.metric.preprocess(logits, found)
                outputs.append(_on_cpu(logits))
                labels.append(_on_cpu(found))
                items.append(sum(self.run.task.items(self.rows[r]) for r in part))
        loss = sum(a * n for a, n in zip(losses, items, strict=True)) / max(sum(items), 1)
        if not math.isfinite(loss):
            raise MixtureError(f"the loss on held-out examples is {loss}; use smaller learning rates.")
        return Judged(join_batches(outputs), join_batches(labels), loss, sum(items))

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

    # ------------------------------------------------------------------------------------- the head on cached activations

    def features(self, candidate: Candidate) -> torch.Tensor | None:
        """What the head sees of each row [E, ...], where nothing else is trained and the head is one linear layer.

        The model's logits with the head replaced by the identity are the head's inputs at the positions that count.
        """
        if candidate.learned or len(self.head) != 1 or not self.run.task.classifies_examples:
            return None
        layer = self.model.get_submodule(self.head[0])
        if not isinstance(layer, nn.Linear):
            return None
        if self._features is None or self._features[0] != candidate:
            parent, _, name = self.head[0].rpartition(".")
            owner = self.model.get_submodule(parent)
            setattr(owner, name, nn.Identity())
            try:
                self._features = (candidate, self._pooled())
            finally:
                setattr(owner, name, layer)
        return self._features[1]

    def _pooled(self) -> torch.Tensor:
        size, parts, labels = self.run.options.batch_size, [], []
        with torch.no_grad(), self._autocast():
            for i in range(0, len(self.rows), size):
                inputs = self._inputs(list(range(i, min(i + size, len(self.rows)))))
                labels.append(inputs.pop("labels"))
                parts.append(self.model(**inputs).logits.float())
        self._labels = torch.cat(labels)
        return torch.cat(parts)

    def _head_logits(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.get_submodule(self.head[0])(features)
        return logits

    def _head_loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from ..constants import MULTI, REGRESSION

        logits = self._head_logits(features)
        kind = self.run.labels.problem_type if self.run.labels else ""
        if kind == REGRESSION:
            return nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        if kind == MULTI:
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)


def _quiet(model: nn.Module, gradient_checkpointing: bool) -> None:
    """Dropout off, caches off; layers that are checkpointed must think that they train."""
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = (
                True  # else, on some CPUs, a pass without gradients packs its weight, and no gradient comes after it
            )
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False
    if gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise MixtureError(
                f"{type(model).__name__} has no gradient checkpointing: leave --gradient-checkpointing out."
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # of this module alone: dropout modules inside it stay off
                for name, value in vars(module).items():
                    if "drop" in name and isinstance(value, float):
                        setattr(module, name, 0.0)  # what it hands to functional.dropout, and a layerdrop


def _on_cpu(value: Any) -> Any:
    return (
        tuple(map(_on_cpu, value))
        if isinstance(value, tuple)
        else value.detach().float().cpu()
        if value.is_floating_point()
        else value.cpu()
    )
