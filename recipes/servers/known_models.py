"""The architectures that programs know, from their own tables, into servers.json of the package.

    .venv/bin/python recipes/servers/known_models.py        # runs itself in each program's environment

A class of vLLM that cannot be imported here (multimodal ones need torchvision) counts as one that may have LoRA.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


def vllm() -> dict[str, list[str]]:
    """Those that vLLM serves, and those among them that may have LoRA."""
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    names, lora = sorted(ModelRegistry.get_supported_archs()), []
    for name in names:
        try:
            known = supports_lora(ModelRegistry.models[name].load_model_cls())
        except ImportError:
            known = True
        if known:
            lora.append(name)
    return {"dense": names, "lora": lora}


def ctranslate2() -> dict[str, list[str]]:
    """Those of CTranslate2's converter; of remote code it knows the config alone."""
    from ctranslate2.converters.transformers import _MODEL_LOADERS

    named = ((config, loader.architecture_name) for config, loader in _MODEL_LOADERS.items())
    return {"dense": sorted({config.replace("Config", "ForCausalLM") if "Auto" in n else n for config, n in named})}


def llama_cpp() -> dict[str, list[str]]:
    """Those that llama.cpp's converter registers."""
    sources = Path(sys.prefix, "llama.cpp").rglob("*.py")
    registered = re.compile(r"@ModelBase\.register\(([^)]*)\)")
    found = {
        n for file in sources for words in registered.findall(file.read_text()) for n in re.findall(r'"(\w+)"', words)
    }
    return {"dense": sorted(found)}


def main() -> None:
    """Ask each program in its own environment, and write the file."""
    from environments import ROOT, python_of

    asked = {"vllm": "vllm", "ctranslate2": "ctranslate2", "llama.cpp": "llama_cpp"}
    table = {}
    for name, function in asked.items():
        done = subprocess.run([python_of(name), __file__, function], check=True, stdout=subprocess.PIPE, text=True)
        table[name] = json.loads(done.stdout.splitlines()[-1])
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    (ROOT / "wlora_merge" / "exporters" / "servers.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps({"vllm": vllm, "ctranslate2": ctranslate2, "llama_cpp": llama_cpp}[sys.argv[1]]()))
    else:
        main()
