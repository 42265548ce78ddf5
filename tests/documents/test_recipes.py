"""The recipes that need a hub, run as they stand on tiny random models of the same architecture in their models' place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from support.models import make_adapter, tiny_llama
from support.paths import ROOT
from support.shots import save_tokenizer

from wlora_merge.cli.main import main

RECIPES = ROOT / "recipes"


def opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def flan_t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return transformers.ViTModel(config)


def lines(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(folder: Path) -> None:
    lines(folder, "shots.jsonl", [{"prompt": f"w{i} w2", "completion": f" w{i + 1}"} for i in range(6)])


def pairs(folder: Path) -> None:
    for name, start in {"shots.jsonl": 0, "judge.jsonl": 20}.items():
        lines(folder, name, [{"source": f"w{i} w2", "target": f"w{i + 1}"} for i in range(start, start + 5)])


def pictures(folder: Path) -> None:
    from PIL import Image

    for i, name in enumerate(("cat", "car", "cup")):
        (folder / "shots" / name).mkdir(parents=True)
        for j in range(4):
            Image.new("RGB", (16, 16), (80 * i, 20 * j, 90)).save(folder / "shots" / name / f"{j}.png")


DENSE = "exports=[{format: dense}]"  # a trace of each architecture stands in test_writers_onnx.py
STAND_INS: dict[str, tuple[Callable[[], Any], list[str], Callable[[Path], None], list[str]]] = {
    "opt-350m": (opt, ["q_proj", "v_proj"], texts, ["fit.max_steps=2", "fit.folds=0", DENSE]),
    "flan-t5-bbh": (flan_t5, ["q", "v"], pairs, ["fit.max_steps=2"]),
    "vit-label-shift": (vit, ["q_proj", "v_proj"], pictures, ["fit.max_steps=2", "fit.folds=2", "fit.settings=1"]),
    "vllm": (tiny_llama, ["q_proj", "v_proj"], texts, []),
    "4bit": (
        lambda: tiny_llama(torch.bfloat16, hidden_size=128, intermediate_size=128, num_key_value_heads=4),
        ["q_proj", "v_proj"],
        texts,
        ["fit.max_steps=2", "fit.folds=0"],
    ),
}


def stand_in(place: Path, name: str) -> None:
    """A base with what it needs to read data, two adapters, data, where the recipe's own paths or `--set` find them."""
    make, targets, data, _ = STAND_INS[name]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(place / "base")
    if name.startswith("vit"):
        size = {"height": 16, "width": 16}
        transformers.ViTImageProcessor(size=size).save_pretrained(place / "base")
    else:
        save_tokenizer(place / "base")
    for i, adapter in enumerate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["adapters"]):
        make_adapter(model.float(), place / "adapters" / adapter, i, r=4, target_modules=targets)
    data(place)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_recipe_runs_as_it_stands(tmp_path: Path, name: str) -> None:
    if name == "4bit":
        pytest.importorskip("bitsandbytes")
    stand_in(tmp_path, name)
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    shutil.copyfile(RECIPES / f"{name}.yaml", tmp_path / "recipe.yaml")
    changed = ["base=base", *(f"adapters.{a}=adapters/{a}" for a in recipe["adapters"]), *STAND_INS[name][3]]
    words = ["run", str(tmp_path / "recipe.yaml"), *(word for change in changed for word in ("--set", change))]
    checked = CliRunner().invoke(main, [*words, "--check"])
    assert checked.exit_code == 0, checked.output
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "build"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (
        list(told["exports"])
        == list(told["verified"])
        == [e["format"] for e in recipe["exports"] if e["format"] == "dense" or DENSE not in changed]
    )
    assert all("outputs" not in row["skipped"] for row in told["verified"].values()), told["verified"]
    assert (tmp_path / "build" / "report.html").is_file()
    if name == "4bit":  # quantized while it was fitted, whole in what is served
        weights = load_file(tmp_path / "build" / "dense" / "model.safetensors")
        base = load_file(tmp_path / "base" / "model.safetensors")
        assert {k: (v.dtype, v.shape) for k, v in weights.items()} == {k: (v.dtype, v.shape) for k, v in base.items()}


@pytest.mark.skipif("WLORA_MERGE_TRUST_ROUNDS" not in os.environ, reason="three launches of torchrun: make test-trust")
def test_the_distributed_recipe_runs_as_it_stands(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    model = tiny_llama()
    model.save_pretrained(place / "base", max_shard_size="12kB")
    save_tokenizer(place / "base")
    for i, name in enumerate(("first", "second")):
        make_adapter(model, place / "adapters" / name, i, r=4, target_modules=["q_proj"])
    texts(place)
    script = (RECIPES / "distributed.sh").read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", "./base")
    script = script.replace("--batch-size 16", "--batch-size 4 --max-steps 2")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(RECIPES.parent)}
    done = subprocess.run(["sh", "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "files as they were written" in done.stdout
