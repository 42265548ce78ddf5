"""CTranslate2: its converter and its generator, by the code of the card."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from common import answer, request, run
from transformers import AutoTokenizer

asked = request()
convert, load = asked["code"]
subprocess.run(f"{Path(sys.executable).parent}/{convert}", shell=True, check=True, stdout=sys.stderr)
names, seconds = run(load)
tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
texts = []
for prompt in asked["prompts"]:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    found = names["model"].generate_batch([tokens], max_length=asked["new_tokens"], include_prompt_in_result=False)
    texts.append(tokenizer.decode(found[0].sequences_ids[0]))
answer(version("ctranslate2"), seconds, texts)
