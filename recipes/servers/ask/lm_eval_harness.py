"""lm-evaluation-harness: its command by the card's arguments on a task of ours, whose samples hold what was generated."""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from common import answer, request

asked = request()
Path("prompts.jsonl").write_text(
    "".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(asked["prompts"]))
)
Path("greedy.yaml").write_text(
    "task: greedy\ndataset_path: json\ndataset_kwargs: {data_files: {test: prompts.jsonl}}\ntest_split: test\n"
    "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: ''\ntarget_delimiter: ''\n"
    f"generation_kwargs: {{until: ['<none>'], max_gen_toks: {asked['new_tokens']}, do_sample: false}}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
)
words = asked["code"][0].replace("hellaswag", "greedy").replace("lm_eval", f"{Path(sys.executable).parent}/lm_eval", 1)
words = words.replace("pretrained=", "dtype=float32,pretrained=")
start = time.perf_counter()
subprocess.run(f"{words} --include_path . --log_samples --output_path out --device cpu --batch_size 1",
               shell=True, check=True, stdout=sys.stderr)  # fmt: skip
seconds = time.perf_counter() - start
samples = [json.loads(line) for line in next(Path("out").rglob("samples_*.jsonl")).read_text().splitlines()]
samples.sort(key=lambda sample: sample["doc"]["id"])
answer(version("lm-eval"), seconds, [sample["resps"][0][0] for sample in samples])
