"""What is compared: what a user tries first, and what `wlora-merge fit` gives.

Full fine-tuning and the LoRA train a new head, where the task has one, in the same way: the same initial values, AdamW with the same
learning rate, the same number of steps and batch size.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import Job, Row, get_job

import wlora_merge
from wlora_merge.data.labels import words_of

BATCH, HEAD_RATE, MAX_LENGTH = 8, 0.01, 256


@dataclass(frozen=True)
class Trained:
    """A model to judge, and how many parameters were trained."""

    model: Any
    parameters: int


Method = Callable[[Job, list[Row], int], Trained]


def _fitted(**options: Any) -> Method:
    """The product: fit, export, and load what was exported."""

    def run(job: Job, shots: list[Row], seed: int) -> Trained:
        chosen = {k: v(len(job.adapters)) if callable(v) else v for k, v in options.items()}
        mixture, model = fit_and_load(job, shots, seed, **chosen)
        frozen = chosen.get("method") in ("fixed", "uniform", "best-single", "ties")
        learned = 0 if frozen else len(mixture.groups) * len(job.adapters)
        return Trained(model, learned + _new(mixture) + sum(t.numel() for t in mixture.head.values()))

    return run


def fit_and_load(job: Job, shots: list[Row], seed: int, **options: Any) -> tuple[wlora_merge.Mixture, Any]:
    """What `wlora-merge fit` gives with the job's adapters, and its dense export as transformers loads it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked = {"label_names": job.label_names or None} | options
        adapters, data = list(job.adapters.items()), job.write(shots, folder)
        mixture = wlora_merge.fit(job.base, adapters, data, job.task, seed=seed, device="cpu", **asked)
        wlora_merge.export(mixture, "dense", folder / "dense")
        return mixture, _auto(job).from_pretrained(folder / "dense", dtype=torch.float32).eval()


def _new(mixture: wlora_merge.Mixture) -> int:
    """Parameters of the adapter that the fit trained, if it kept one."""
    from safetensors.torch import load

    return sum(
        t.numel()
        for name, file in mixture.new_files.items()
        if name.endswith(".safetensors")
        for t in load(file).values()
    )


def _finetuned(job: Job, shots: list[Row], seed: int) -> Trained:
    model = _new_model(job, seed)
    return _train(job, model, shots, seed, rate=3e-5)


def _lora(job: Job, shots: list[Row], seed: int) -> Trained:
    """A new LoRA of rank 8 on the attention's query and value, as the adapters of the zoo have."""
    from peft import LoraConfig, get_peft_model

    kind, targets = ("SEQ_CLS", ["query", "value"]) if _has_head(job) else ("CAUSAL_LM", ["q_proj", "v_proj"])
    model = _new_model(job, seed)
    config = LoraConfig(task_type=kind, r=8, lora_alpha=16, target_modules=targets)
    return _train(job, get_peft_model(model, config), shots, seed, rate=1e-3)


def _embedded(scale: float, combined: str = "linear") -> Method:
    """scikit-learn's logistic regression on the model's frozen features: what is tried first.

    Of an encoder the mean of the tokens at unit norm; of a language model the last token two thirds up, standardized.

    Args:
        scale: how much of the adapters' uniform composition is in the model; 0: the base alone.
        combined: how the adapters are combined, as `wlora-merge mix --method`.
    """

    def run(job: Job, shots: list[Row], seed: int) -> Trained:
        embedder = Embedder(job, scale, combined)
        embedder.fit(shots + [(words_of(label), label) for label in job.labels] * job.label_names)
        head = embedder.head[-1]
        return Trained(embedder, head.coef_.size + head.intercept_.size)

    return run


class Embedder:
    """A frozen model and a logistic regression on what it gives."""

    def __init__(self, job: Job, scale: float, combined: str = "linear") -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer, StandardScaler
        from transformers import AutoModel

        self.tokenizer, self.pooled = _tokenizer(job), _has_head(job)
        with tempfile.TemporaryDirectory() as scratch:
            folder = job.base if combined == "linear" else _combined(job, combined, Path(scratch))
            self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        if scale and combined == "linear":
            wlora_merge.attach(
                self.model, list(job.adapters.items()), normalize="none", delta_scale=scale, modules_to_save="drop"
            )
        regression = LogisticRegression(C=10.0 if self.pooled else 1.0, max_iter=5000)
        self.head = make_pipeline(Normalizer() if self.pooled else StandardScaler(), regression)

    def fit(self, rows: Sequence[Row]) -> None:
        """Find the head on some rows."""
        texts = [text for text, _ in rows]
        parts = [self.features(texts[start : start + 32]) for start in range(0, len(texts), 32)]
        self.head.fit(np.concatenate(parts), [label for _, label in rows])

    def choose(self, texts: Sequence[str]) -> list[str]:
        """The label of each text."""
        return list(self.head.predict(self.features(texts)))

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Any:
        """[B, d] float64."""
        inputs = dict(
            self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)
        )
        states, mask = self.model(**inputs, output_hidden_states=True).hidden_states, inputs["attention_mask"]
        if self.pooled:
            return ((states[-1] * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)).double().numpy()
        return states[round(2 * (len(states) - 1) / 3)][torch.arange(len(texts)), mask.sum(1) - 1].double().numpy()


def _combined(job: Job, method: str, folder: Path) -> Path:
    """The base with the adapters folded in, half of each adapter's delta weight kept."""
    adapters = list(job.adapters.items())
    mixture = wlora_merge.mix(job.base, adapters, method=method, density=0.5, modules_to_save="drop")
    wlora_merge.export(mixture, "dense", folder / "dense")
    return folder / "dense"


METHODS: dict[str, Method] = {
    "logistic regression on the base's embedding": _embedded(0.0),
    "the same on uniform composition's": _embedded(1.0),
    "the same on that of ties": _embedded(1.0, "ties"),
    "base with a new head": _fitted(method="fixed", weights=lambda n: [0.0] * n, folds=0),
    "full fine-tuning": _finetuned,
    "LoRA from scratch": _lora,
    "best single adapter on the shots": _fitted(method="best-single"),
    "uniform composition": _fitted(method="uniform", folds=0),
    "wlora-merge fit --method ties": _fitted(method="ties", density=0.5, folds=0),
    "plain learned composition": _fitted(
        normalize="all",
        granularity="module",
        pull=0.0,
        new_adapter=0,
        interpolation=1.0,
        folds=0,
        max_steps=100,
        learning_rate=0.05,
    ),
    "wlora-merge fit": _fitted(),
    "wlora-merge fit --no-label-names": _fitted(label_names=False),
    "wlora-merge fit --method auto": _fitted(method="auto"),
}


def _has_head(job: Job) -> bool:
    return job.task == "text-classification"


def _auto(job: Job) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification if _has_head(job) else transformers.AutoModelForCausalLM


def _new_model(job: Job, seed: int) -> Any:
    torch.manual_seed(seed)
    if not _has_head(job):
        return _auto(job).from_pretrained(job.base, dtype=torch.float32)
    table = dict(enumerate(job.labels))
    return _auto(job).from_pretrained(
        job.base, dtype=torch.float32, id2label=table, label2id={v: k for k, v in table.items()}
    )


def _train(job: Job, model: Any, shots: list[Row], seed: int, *, rate: float) -> Trained:
    tokenizer = _tokenizer(job)
    shots = shots + [(words_of(label), label) for label in job.labels] * job.label_names
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [p for n, p in named if "classifier" in n]
    body = [p for n, p in named if "classifier" not in n]
    groups = [{"params": body, "lr": rate}, {"params": head, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0, fused=True)
    drawn, order = random.Random(seed), []
    model.train()
    for _ in range(_steps(job, len(shots))):
        if not order:
            order = drawn.sample(shots, len(shots))
        rows, order = order[:BATCH], order[BATCH:]
        model(**_batch(job, tokenizer, rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Trained(model, sum(p.numel() for _, p in named))


def _steps(job: Job, shots: int) -> int:
    """100 steps where a head is trained, else 20 epochs, but 40 to 100 steps."""
    return 100 if _has_head(job) else min(100, max(40, round(20 * -(-shots // BATCH))))


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _batch(job: Job, tokenizer: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    if _has_head(job):
        inputs = tokenizer(
            [text for text, _ in rows], return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH
        )
        return {**inputs, "labels": torch.tensor([job.labels.index(label) for _, label in rows])}
    pairs = [(tokenizer(p).input_ids[-MAX_LENGTH:], tokenizer(c).input_ids) for p, c in rows]
    width = max(len(p) + len(c) for p, c in pairs)

    def padded(parts: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([part + [fill] * (width - len(part)) for part in parts])

    return {
        "input_ids": padded([p + c for p, c in pairs], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * (len(p) + len(c)) for p, c in pairs], 0),
        "labels": padded([[-100] * len(p) + c for p, c in pairs], -100),
    }


@torch.no_grad()
def accuracy(job: Job, model: Any) -> float:
    """Percent right; a language model chooses the completion of the highest probability."""
    tokenizer = _tokenizer(job)
    right = 0
    rows = sorted(job.judged, key=lambda row: len(row[0]))
    for start in range(0, len(rows), 32 if _has_head(job) else 4):
        part = rows[start : start + (32 if _has_head(job) else 4)]
        truth = [label for _, label in part]
        if isinstance(model, Embedder):
            chosen = model.choose([text for text, _ in part])
        elif _has_head(job):
            batch = _batch(job, tokenizer, part)
            batch.pop("labels")
            chosen = [model.config.id2label[i] for i in model(**batch).logits.argmax(-1).tolist()]
        else:
            batch = _batch(job, tokenizer, [(prompt, label) for prompt, _ in part for label in job.labels])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].log_softmax(-1)
            picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
            chosen = [job.labels[i] for i in picked.sum(-1).view(len(part), -1).argmax(-1).tolist()]
        right += sum(a == b for a, b in zip(chosen, truth, strict=True))
    return 100 * right / len(rows)


def trial(job_name: str, method: str, shots: int, seed: int, models: Path) -> dict[str, Any]:
    """Train once, judge once."""
    import transformers

    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // int(os.environ["PROCESSES"]))))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    job = get_job(job_name, models)
    start = time.perf_counter()
    trained = METHODS[method](job, job.shots(shots, seed), seed)
    seconds = time.perf_counter() - start
    if not isinstance(trained.model, Embedder):
        trained.model.eval()
    row = {"job": job_name, "method": method, "shots": shots, "seed": seed, "accuracy": accuracy(job, trained.model)}
    return row | {"seconds": round(seconds, 2), "parameters": trained.parameters}
