"""SetFit rows for the text classification jobs of bench_fit, in an environment of its own.

    python -m venv setfit-env
    setfit-env/bin/pip install torch==2.13.0 setfit==1.2.0
    setfit-env/bin/python recipes/bench_fit/setfit_rows.py --shots 2,8 --seeds 2 --out FILE.jsonl

SetFit's own defaults (one epoch over the pairs, oversampling, batches of 16 pairs, the body's learning rate 2e-5, logistic regression
as the head), except the seed, which is the shots', and `--max-steps`. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from jobs import get_job  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer  # noqa: E402
from setfit import SetFitModel, Trainer, TrainingArguments  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

BATCH, MAX_LENGTH = 16, 256


def method(options: argparse.Namespace) -> str:
    return f"SetFit, {options.num_iterations} iterations" if options.num_iterations else "SetFit"


def row(job_name: str, per_class: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    job = get_job(job_name, options.models)
    assert job.task == "text-classification", job_name
    shots = job.shots(per_class, seed)
    begin = time.perf_counter()
    torch.manual_seed(seed)
    body = Transformer(str(job.base), max_seq_length=MAX_LENGTH)
    pool = Pooling(384, pooling_mode="mean")
    model = SetFitModel(SentenceTransformer(modules=[body, pool, Normalize()], device="cpu"), LogisticRegression())
    same = len(shots) + len(job.labels) * per_class * (per_class - 1) // 2  # SetFit pairs each example with itself too
    other = len(job.labels) * (len(job.labels) - 1) // 2 * per_class**2
    pairs = 2 * (options.num_iterations * len(shots) or max(same, other))  # by default the smaller kind is repeated
    epoch = -(-pairs // BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            seed=seed,
            num_iterations=options.num_iterations or None,
            max_steps=options.max_steps if epoch > options.max_steps else -1,
            save_strategy="no",
            report_to="none",
            show_progress_bar=False,
        )
        data = Dataset.from_dict({"text": [t for t, _ in shots], "label": [job.labels.index(lab) for _, lab in shots]})
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    seconds = time.perf_counter() - begin
    steps = trainer.st_trainer.state.global_step
    assert steps == min(epoch, options.max_steps), (steps, epoch)
    begin = time.perf_counter()
    chosen = model.predict([text for text, _ in job.judged], as_numpy=True, show_progress_bar=False).tolist()
    right = sum(job.labels[int(i)] == label for i, (_, label) in zip(chosen, job.judged, strict=True))
    trained = sum(p.numel() for p in model.model_body.parameters() if p.requires_grad)
    head = model.model_head.coef_.size + model.model_head.intercept_.size
    return {
        "job": job_name,
        "method": method(options),
        "shots": per_class,
        "seed": seed,
        "accuracy": 100 * right / len(job.judged),
        "seconds": round(seconds, 2),
        "parameters": trained + head,
        "steps": steps,
        "epoch_steps": epoch,
        "judge_seconds": round(time.perf_counter() - begin, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="minilm:mr,minilm:sst2,minilm:subj", help="with commas between them")
    parser.add_argument("--shots", default="2,8", help="per class, with commas between them")
    parser.add_argument("--seeds", type=int, default=2, help="draws of the shots")
    parser.add_argument("--max-steps", type=int, default=600, help="of the training on pairs; a row has what it took")
    parser.add_argument(
        "--num-iterations",
        type=int,
        default=0,
        help="pairs of each kind for each example (20 in the paper); 0: SetFit's default",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--models", type=Path, default=Path("~/.cache/wlora_merge/real-models").expanduser(), help="has minilm"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    known = {(r["job"], r["shots"], r["seed"]) for r in done if r["method"] == method(options)}
    numbers = [int(n) for n in options.shots.split(",")]
    with open(options.out, "a") as log:
        for n, seed, job in itertools.product(numbers, range(options.seeds), options.jobs.split(",")):
            if (job, n, seed) not in known:
                made = row(job, n, seed, options)
                log.write(json.dumps(made) + "\n")
                log.flush()
                print(made, file=sys.stderr)
    print(f"CPU seconds {time.process_time():.0f}", file=sys.stderr)


if __name__ == "__main__":
    main()
