"""llama.cpp: its own converters, by the commands of the card, and its Python binding."""

import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from common import answer, request

asked = request()
converters = Path(asked["environment"]) / "llama.cpp"
for line in asked["code"][0].splitlines():
    if line.startswith("python "):
        words = line.removeprefix("python ").replace("convert_", f"{converters}/convert_", 1)
        subprocess.run(f"{sys.executable} {words} --outtype f32", shell=True, check=True, stdout=sys.stderr)
from llama_cpp import Llama  # noqa: E402

start = time.perf_counter()
lora = "mixture.gguf" if Path("mixture.gguf").exists() else None
model = Llama("base.gguf" if lora else "model.gguf", lora_path=lora, verbose=False, n_ctx=256, logits_all=False)
seconds = time.perf_counter() - start
texts = [
    model(prompt, max_tokens=asked["new_tokens"], temperature=0.0, top_k=1)["choices"][0]["text"]
    for prompt in asked["prompts"]
]
answer(version("llama-cpp-python"), seconds, texts)
