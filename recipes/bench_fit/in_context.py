"""In-context learning rows for the language models' jobs of bench_fit: the base alone, nothing trained.

    python recipes/bench_fit/in_context.py --jobs smollm2:mr,bbh:navigate --shots 4 --seeds 2 --out icl.jsonl

The prompt is the shots in the order that the job drew them, each `prompt + completion`, joined by an empty line, then the prompt to
answer; the answer is the label of the highest summed log-probability. "Bias removed" first subtracts from each label's
log-probability its mean given inputs without content (Zhao et al. 2021).
The keys and values of the shots are computed once; nothing is truncated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jobs import Job, get_job

PLAIN, UNBIASED = "in-context learning", "in-context learning, bias removed"
EMPTY = ["N/A", "[MASK]", ""]
BATCH = 25
JOBS = "smollm2:mr,smollm2:subj,smollm2:trec,bbh:navigate,bbh:boolean_expressions,bbh:web_of_lies"


def _common(sequences: Sequence[Any]) -> int:
    """How many items all sequences start with alike."""
    first = min(sequences, key=len)
    return next((i for i, item in enumerate(first) if any(other[i] != item for other in sequences)), len(first))


def template(job: Job) -> tuple[str, str]:
    """What all prompts of the job start and end with."""
    prompts = [prompt for prompt, _ in job.pool + job.judged]
    start = prompts[0][: _common(prompts)]
    rests = [prompt[len(start) :][::-1] for prompt in prompts]
    end = rests[0][: _common(rests)][::-1]
    if not end:
        raise SystemExit(f"{job.name}: the prompts have no common end")
    return start, end


class Scorer:
    """Log-probability of each label after shots and a prompt."""

    def __init__(self, job: Job, model: Any, tokenizer: Any, shots: str, prompts: list[str]) -> None:
        """`prompts`: all that will be asked, to know which tokens they share with the shots before them."""
        self.model, self.tokenizer, self.shots = model, tokenizer, shots
        self.labels = [tokenizer(label).input_ids for label in job.labels]
        tokens = [self.tokens(prompt) for prompt in prompts]
        shared = tokens[0][: _common([t[:-1] for t in tokens])]  # a last token remains to compute
        self.shared = len(shared)
        with torch.no_grad():
            self.cache = model(torch.tensor([shared]), use_cache=True, logits_to_keep=1).past_key_values

    def tokens(self, prompt: str) -> list[int]:
        """The whole text's, as the end of the shots and the start of the prompt may share a token."""
        return self.tokenizer(self.shots + prompt).input_ids

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """[prompts, labels]"""
        asked: dict[tuple[int, ...], int] = {}  # token sequences after the shared ones -> their row
        places = []  # (row, position, label's tokens), one of each prompt and label
        for prompt in prompts:
            rest = self.tokens(prompt)[self.shared :]
            for label in self.labels:
                row = asked.setdefault((*rest, *label[:-1]), len(asked))
                places.append((row, len(rest) - 1, label))
        order = sorted(asked, key=len)
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            width = len(part[-1])
            ids = torch.tensor(
                [[*seq, *[0] * (width - len(seq))] for seq in part]
            )  # causal: what follows has no effect
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(part))
            hidden = self.model.model(ids, past_key_values=cache).last_hidden_state
            found |= {asked[seq]: states for seq, states in zip(part, hidden, strict=True)}
        scores = []
        for row, position, label in places:
            states = found[row][position : position + len(label)]
            scores.append(self.model.lm_head(states).log_softmax(-1)[range(len(label)), label].sum())
        return torch.stack(scores).view(len(prompts), -1)

    @torch.no_grad()
    def uncached(self, prompt: str) -> torch.Tensor:
        """[labels], one whole sequence at a time."""
        scores = []
        for label in self.labels:
            ids = self.tokens(prompt) + label
            logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(ids) - len(label) + i - 1, token] for i, token in enumerate(label)))
        return torch.stack(scores)


def rows(job_name: str, per_class: int, seed: int, models: Path, check: int) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = get_job(job_name, models)
    assert job.task == "causal-lm", job_name
    start, end = template(job)
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32).eval()
    shots = "".join(f"{prompt}{completion}\n\n" for prompt, completion in job.shots(per_class, seed))
    empty = [start + text + end for text in EMPTY]
    asked = [prompt for prompt, _ in job.judged]
    scorer = Scorer(job, model, tokenizer, shots, asked + empty)
    seconds = time.perf_counter() - begin
    bias = scorer(empty).mean(0)
    seconds_bias = time.perf_counter() - begin
    begin = time.perf_counter()
    scores = scorer(asked)
    judged = time.perf_counter() - begin
    if check:
        far = max((scorer.uncached(p) - scores[i]).abs().max().item() for i, p in enumerate(asked[:check]))
        print(f"{job_name} seed {seed}: cached and uncached differ by {far:.1e} on {check} rows", file=sys.stderr)
        assert far < 1e-3
    truth = torch.tensor([job.labels.index(label) for _, label in job.judged])
    made = []
    for method, values, spent in ((PLAIN, scores, seconds), (UNBIASED, scores - bias, seconds_bias)):
        chosen = values.argmax(-1)
        print(f"   {method}: chosen {torch.bincount(chosen, minlength=len(job.labels)).tolist()}", file=sys.stderr)
        row = {"job": job_name, "method": method, "shots": per_class, "seed": seed}
        row["accuracy"] = 100 * int((chosen == truth).sum()) / len(truth)
        made.append(row | {"seconds": round(spent, 2), "parameters": 0, "judge_seconds": round(judged, 2)})
    print(f"   shared tokens {scorer.shared}; in the judged rows {torch.bincount(truth).tolist()}", file=sys.stderr)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=JOBS)
    parser.add_argument("--shots", default="4")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--check", type=int, default=0, help="judged rows to compute again without the cache")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--models", type=Path, default=Path("~/.cache/wlora_merge/real-models").expanduser(), help="has smollm2"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    known = {(r["job"], r["shots"], r["seed"]) for r in done}
    numbers = [int(n) for n in options.shots.split(",")]
    with open(options.out, "a") as log:
        for seed, n, job in itertools.product(range(options.seeds), numbers, options.jobs.split(",")):
            if (job, n, seed) not in known:
                made = rows(job, n, seed, options.models, options.check)
                log.write("".join(json.dumps(row) + "\n" for row in made))
                log.flush()
                print(*made, sep="\n", file=sys.stderr)
    print(f"CPU seconds {time.process_time():.0f}", file=sys.stderr)


if __name__ == "__main__":
    main()
