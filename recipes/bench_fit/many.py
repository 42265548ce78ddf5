"""Of many adapters, which eight: those that `fit --keep` screens for, and what others choose by.

The adapters are those of recipes/zoo that have not seen the task. Each choice is fitted and judged in the same way.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jobs import Job, Row, get_job
from methods import Embedder, accuracy, fit_and_load

sys.path.append(str(Path(__file__).resolve().parents[1] / "zoo"))  # what each adapter of the zoo has learned

KEPT = 8
SCREENED, ALL = "fit --keep 8", "all of them"


def compare(cell: tuple[str, int, int], *, models: Path, zoo: Path) -> list[dict[str, Any]]:
    """One row for each way to choose on one task, shots per class and draw of them: the accuracy, and the seconds of the fit."""
    job_name, shots, seed = cell
    records = [r for r in json.loads((zoo / "zoo.json").read_text())["adapters"] if job_name not in r["has_seen"]]
    job = replace(get_job(job_name, models), adapters={r["name"]: zoo / r["name"] for r in records})
    drawn, rows = job.shots(shots, seed), []

    def judge(name: str, adapters: Iterable[str], keep: int) -> Any:
        chosen, start = list(adapters), time.process_time()
        own = replace(job, adapters={n: path for n, path in job.adapters.items() if n in chosen})
        mixture, model = fit_and_load(own, drawn, seed, keep=keep)
        seconds = round(time.process_time() - start, 1)
        kept = mixture.metrics.get("screening", {"kept": chosen})["kept"]
        row = {"job": job_name, "shots": shots, "seed": seed, "method": name, "accuracy": accuracy(job, model)}
        rows.append(row | {"cpu_seconds": seconds, "kept": kept if len(kept) <= KEPT else len(kept)})
        return mixture

    judge(SCREENED, job.adapters, KEPT)
    every = judge(ALL, job.adapters, len(job.adapters))
    judge("eight by lot", random.Random(f"{job_name} {shots} {seed}").sample(sorted(job.adapters), KEPT), KEPT)
    scores = {name: score for name, score in every.metrics.get("candidates", {}).items() if name in job.adapters}
    if scores:
        metric = every.metrics["metric"]
        judge("best alone on the folds", sorted(scores, key=lambda n: -scores[n][metric])[:KEPT], KEPT)
    judge("trained on the most similar texts", _most_similar(job, drawn, records), KEPT)
    embedder = Embedder(job, 0.0)
    embedder.fit(drawn)
    plain = accuracy(job, embedder)
    return [*rows, {"job": job_name, "shots": shots, "seed": seed, "method": "the base's embedding", "accuracy": plain}]


@torch.no_grad()
def _most_similar(job: Job, shots: list[Row], records: list[dict[str, Any]]) -> list[str]:
    """The adapters whose training texts have the mean embedding nearest to the shots', by cosine."""
    from dataclasses import fields

    from design import Spec
    from texts import rows_of

    embedder, known = Embedder(job, 0.0), {f.name for f in fields(Spec)}

    def mean(texts: list[str]) -> torch.Tensor:
        parts = [torch.from_numpy(embedder.features(texts[i : i + 32])) for i in range(0, len(texts), 32)]
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1).mean(0)

    target, likeness = mean([text for text, _ in shots]), {}
    for record in records:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k in known}
        texts = [text for text, _ in rows_of(Spec(**values))[0][:64]]
        likeness[record["name"]] = float(torch.nn.functional.cosine_similarity(target, mean(texts), dim=0))
    return sorted(likeness, key=lambda name: -likeness[name])[:KEPT]
