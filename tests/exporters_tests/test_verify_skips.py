"""A check that cannot run is skipped with its reason, the others are made; and an answer does not depend on what was seen before."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.models import inputs_of, make_adapter, tiny_llama

from wlora_merge.cli.main import main
from wlora_merge.errors import MixtureError, VerifyError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix

MY = (
    "from transformers import LlamaConfig, LlamaForCausalLM\nclass MyConfig(LlamaConfig):\n    model_type = 'myllama'\n"
    "class MyLlama(LlamaForCausalLM):\n    config_class = MyConfig\n"
)
AUTO_MAP = {"AutoConfig": "my.MyConfig", "AutoModelForCausalLM": "my.MyLlama"}


def zoo(root: Path, **config: Any) -> Path:
    """The folders `base` and `a`, old enough to be remembered; the base's config has the changes."""
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(root / "base", max_shard_size="20kB")
    make_adapter(model, root / "a", 0, r=2, target_modules=["q_proj"])
    file = root / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if "auto_map" in config:
        (root / "base" / "my.py").write_text(MY)
    for path in (*(root / "base").iterdir(), *(root / "a").iterdir()):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return root


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "myllama", "architectures": ["MyLlama"], "auto_map": AUTO_MAP},
            "needs code of its own (auto_map)",
        ),
        ({"model_type": "llama99"}, "'llama99' is none that transformers"),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_a_model_that_transformers_cannot_build_is_checked_by_its_bytes_and_weights(
    tmp_path: Path, kind: str, config: dict[str, Any], said: str
) -> None:
    root = zoo(tmp_path, **config)
    mix(root / "base", [root / "a"], tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", kind, tmp_path / "out")
    checked = verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))
    assert "digests" in checked.done
    assert any("folded again" in item or "factors are the mixture's" in item for item in checked.done)
    assert said in checked.skipped["outputs"]
    assert "trust_remote_code" not in str(checked.skipped)
    file = next((tmp_path / "out").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(VerifyError, match="changed after the export"):
        verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))


def test_a_recipe_over_a_base_with_code_of_its_own_ends_well(tmp_path: Path) -> None:
    zoo(tmp_path, model_type="myllama", architectures=["MyLlama"], auto_map=AUTO_MAP)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: base\nadapters: {a: a}\nmix: {task: causal-lm, weights: [1]}\n"
        "exports:\n  - {format: dense}\n  - {format: lora}\n"
    )
    done = CliRunner().invoke(main, ["run", str(recipe), "--out", str(tmp_path / "tree")])
    assert done.exit_code == 0, done.output
    assert "never run here" in done.output


def test_a_copy_with_another_config_that_was_seen_since_does_not_take_the_inputs_place(tmp_path: Path) -> None:
    root = zoo(tmp_path)
    mix(root / "base", [root / "a"], tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "dense", tmp_path / "out")
    before = verify(tmp_path / "out")
    copy = tmp_path / "trial"
    shutil.copytree(root / "a", copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}))
    for path in copy.iterdir():
        os.utime(path, (1_600_000_000, 1_600_000_000))
    mix(root / "base", [copy], task="causal-lm")
    assert vars(verify(tmp_path / "out")) == vars(before)
    assert not before.skipped
    shutil.rmtree(root / "a")  # the copy alone is left, which is another adapter
    assert "not found here: adapter 'a'" in verify(tmp_path / "out").skipped["outputs"]


def test_shards_that_were_last_seen_in_two_copies_are_found_in_one(tmp_path: Path) -> None:
    root = zoo(tmp_path)
    mix(root / "base", [root / "a"], tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "dense", tmp_path / "out")
    shards = sorted((root / "base").glob("model-*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "part").mkdir()
    shutil.copy2(shards[0], tmp_path / "part")
    from wlora_merge.io.digests import sha256_file

    sha256_file(tmp_path / "part" / shards[0].name)
    assert not verify(tmp_path / "out").skipped


def test_another_adapter_that_is_given_is_refused_with_options_that_verify_has(tmp_path: Path) -> None:
    root = zoo(tmp_path)
    mix(root / "base", [root / "a"], tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "dense", tmp_path / "out")
    other = make_adapter(tiny_llama(num_hidden_layers=1), tmp_path / "b", 7, r=2, target_modules=["q_proj"])
    with pytest.raises(MixtureError) as error:
        verify(tmp_path / "out", base=root / "base", adapters=[f"a={other}"])
    options = set(re.findall(r"--[a-z-]+", str(error.value)))
    assert options == {"--base", "--adapter"}
    assert options <= set(re.findall(r"--[a-z-]+", CliRunner().invoke(main, ["verify", "--help"]).output))


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_graph_is_checked_by_its_bytes_where_a_package_or_a_provider_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    pytest.importorskip("onnxruntime")
    root = zoo(tmp_path)
    mix(root / "base", [root / "a"], tmp_path / "mixture", task="causal-lm")
    export(tmp_path / "mixture", "onnx", tmp_path / "out")
    find: Callable[..., Any] = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
        checked = verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))
        assert f"needs {package}: pip install" in checked.skipped["outputs"]
        assert "digests" in checked.done
    manifest = tmp_path / "out" / "wlora_merge.json"
    table = json.loads(manifest.read_text())
    table["options"]["ort_fusions"] = "dml"
    manifest.write_text(json.dumps(table))
    checked = verify(tmp_path / "out", **inputs_of(tmp_path / "mixture"))
    assert "no such provider here" in checked.skipped["outputs"]
