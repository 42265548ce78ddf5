"""vLLM: the server that the card's command starts, asked by OpenAI's client and over HTTP."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import requests
from common import answer, request
from openai import OpenAI

asked = request()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
words = f"{Path(sys.executable).parent}/{asked['code'][0]} --host 127.0.0.1 --port {port} --enforce-eager"
words += " --max-model-len 512" if asked["kind"] == "texts" else ""
words += "" if "--dtype" in words else " --dtype float32"  # what is expected is in float32
settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
log = Path("vllm.log").open("w")  # noqa: SIM115
start = time.perf_counter()
server = subprocess.Popen(words, shell=True, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True)
try:
    url = f"http://127.0.0.1:{port}"
    while True:
        if server.poll() is not None or time.perf_counter() - start > 300:
            said = [line for line in Path("vllm.log").read_text().splitlines() if "Error" in line]
            sys.exit(f"vLLM ends: {said[-1] if said else 'without a word'}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    seconds = time.perf_counter() - start
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    name = "mixture" if "--enable-lora" in words else asked["folder"]
    if asked["kind"] == "texts":
        found = [
            client.completions.create(model=name, prompt=p, max_tokens=asked["new_tokens"], temperature=0)
            .choices[0]
            .text
            for p in asked["prompts"]
        ]
    elif asked["kind"] == "embeddings":
        found = [
            row.embedding
            for row in client.embeddings.create(model=name, input=asked["texts"], encoding_format="float").data
        ]
    else:
        rows = requests.post(f"{url}/classify", json={"model": name, "input": asked["texts"]}, timeout=60).json()[
            "data"
        ]
        found = [dict(zip(asked["labels"], row["probs"], strict=True)) for row in rows]
    answer(version("vllm-cpu"), seconds, found)
finally:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)
