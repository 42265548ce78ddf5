"""Nothing executes, nothing is fetched, no token is told, and the same inputs give the same bytes in any process."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.paths import ROOT

from wlora_merge.cli.main import main
from wlora_merge.errors import WloraMergeError
from wlora_merge.io.hub import resolve_source

TOKEN = "hf_" + "S3cret" * 5


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Each call of a method or function in the package: where, the call, the name called."""
    for file in sorted((ROOT / "wlora_merge").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield f"{file.name}:{node.lineno}", node, name


def test_every_loader_of_transformers_is_told_to_run_no_code() -> None:
    seen = set()
    for where, call, name in calls():
        if name != "from_pretrained" or ast.unparse(call.func).startswith("Peft"):  # which reads two files
            continue
        told = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert told.get("trust_remote_code") == "False", where
        assert told.get("local_files_only") == "True", where
        seen.add(where.partition(":")[0])
    assert seen == {"loading.py", "dummy_inputs.py", "task.py"}  # a model and its config, tokenizers and processors


def test_nothing_unpickles_evaluates_or_reads_yaml_unsafely() -> None:
    for where, call, name in calls():
        text = ast.unparse(call.func)
        assert text not in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "yaml.load",
            "yaml.unsafe_load",
            "os.system",
        ), where
        if text == "torch.load":
            assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only") == "True", where
        assert not (name == "run" and any(k.arg == "shell" for k in call.keywords)), where


def test_no_token_is_told_in_a_message_a_manifest_or_a_card(
    llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = llama_zoo()
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(variable, TOKEN)
    url, said = f"https://me:{TOKEN}@huggingface.co/org/model", ""
    adapters = [part for folder in folders for part in ("--adapter", str(folder))]
    lines = [
        ["mix", "--base", url, *adapters, "--out", "never"],
        ["mix", "--base", str(base), "--adapter", f"a={url}", "--out", "never"],
        ["mix", "--base", "org/none", *adapters, "--out", "never"],
        ["fit", "--base", str(base), *adapters, "--data", url, "--task", "causal-lm", "--out", "never"],
        ["mix", "--base", str(base), *adapters, "--out", str(tmp_path / "m"), "--task", "causal-lm"],
        *(
            ["export", str(tmp_path / "m"), "--format", kind, "--out", str(tmp_path / kind)]
            for kind in ("dense", "lora")
        ),
    ]
    codes = []
    for line in lines:
        result = CliRunner().invoke(main, line)
        codes.append(result.exit_code)
        said += result.output
    assert codes == [1, 1, 1, 1, 0, 0, 0], said
    assert "https://***@huggingface.co" in said
    assert TOKEN not in said
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 8
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]


def test_nothing_is_fetched_offline(
    llama_zoo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a))
    with pytest.raises(WloraMergeError, match="the hub did not give it"):
        resolve_source("org/none", ["*.json"])
    base, folders = llama_zoo()
    inputs = ["--base", str(base), *(p for f in folders for p in ("--adapter", f"{f.name}={f}"))]
    lines = [
        ["mix", *inputs, "--out", str(tmp_path / "m"), "--task", "causal-lm"],
        ["export", str(tmp_path / "m"), "--format", "dense", "--out", str(tmp_path / "d")],
        ["verify", str(tmp_path / "d"), *inputs],
    ]
    for line in lines:
        result = CliRunner().invoke(main, line)
        assert result.exit_code == 0, result.output
    assert not asked


def test_a_ctrl_c_when_a_command_has_ended_exits_with_130_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wlora_merge.cli.main.Group.invoke", stop)
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "x"])
    assert caught.value.code == 130


EXPORTS = """
import sys
from pathlib import Path
from wlora_merge import export, mix
root = Path(sys.argv[1])
mix(root / sys.argv[2], [root / f"a{i}" for i in range(3)], root / "m", weights=[0.5, -0.3, 0.2], task="causal-lm")
kinds = {"dense": ("dense", {}), "exact": ("lora", {}), "small": ("lora", {"rank": 3}), "half": ("dense", {"dtype": "float16"})}
for name, (kind, options) in kinds.items():
    export(root / "m", kind, root / name, base_name="org/the-base", **options)
"""


def test_two_processes_with_other_hashes_threads_and_folders_give_the_same_bytes(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    import shutil

    base, folders = llama_zoo()
    found = []
    for place, name, hashes, threads in (("one", "base", "0", "1"), ("two/deep", "another-name", "7", "3")):
        root = tmp_path / place
        shutil.copytree(base, root / name)
        for folder in folders:
            shutil.copytree(folder, root / folder.name)
        environment = os.environ | {"PYTHONHASHSEED": hashes, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-c", EXPORTS, str(root), name]
        subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=True)
        outs = [root / out for out in ("dense", "exact", "small", "half")]
        found.append({p.relative_to(root): p.read_bytes() for out in outs for p in out.rglob("*") if p.is_file()})
    assert set(found[0]) == set(found[1])
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
    exact = tmp_path / "one" / "exact"
    assert json.loads((exact / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/the-base"
    assert "org/the-base" in (exact / "README.md").read_text()
