"""Hostile and broken input: every case ends in one clean sentence or a correct result.

Never a traceback, a hang, a crash, more memory than `hostile.MEMORY_BYTES` beyond the imports, or a partial output. The default
run keeps a few seeded cases of each kind; `make test-trust` (WLORA_MERGE_FUZZ_CASES) runs thousands and prints counts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from support.hostile import SECONDS, Outcome, jailed, mutated_bytes, mutated_safetensors, mutated_table, spoil
from support.models import make_adapter, tiny_bert, tiny_llama
from support.shots import save_tokenizer

from wlora_merge.adapters.adapter import load_adapter
from wlora_merge.adapters.config import FOLDED, INERT, REFUSED
from wlora_merge.cli.recipe import read_recipe
from wlora_merge.errors import WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.io.safetensors_file import read_header
from wlora_merge.mixture.mix import mix
from wlora_merge.mixture.mixture import Mixture

CASES = int(os.environ.get("WLORA_MERGE_FUZZ_CASES", "3"))
FIRST = int(os.environ.get("WLORA_MERGE_FUZZ_SEED", "0"))
LORA_FIELDS = tuple(FOLDED | INERT | REFUSED)
CONFIG_KEYS = (
    "architectures", "vocab_size", "tie_word_embeddings", "quantization_config", "text_config", "is_encoder_decoder", "torch_dtype",
    "dtype", "auto_map", "num_hidden_layers", "hidden_size", "id2label", "image_size", "num_channels",
)  # fmt: skip

HUGE = {
    "vocab_size": 10**8, "hidden_size": 10**5, "intermediate_size": 10**7, "num_hidden_layers": 3000, "num_labels": 10**8,
    "max_position_embeddings": 10**8, "type_vocab_size": 10**8, "num_attention_heads": 10**6, "head_dim": 10**7,
    "num_key_value_heads": 10**6,
}  # fmt: skip
"""Keys of a config that say how large a model is, and what is far too much."""
MIXTURE_KEYS = (
    "format_version", "base_model", "adapters", "granularity", "normalize", "delta_scale", "groups", "weights", "task", "config",
    "metrics", "modules_to_save", "prefixes", "data",
)  # fmt: skip


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of sound inputs: a base of one file and one of shards, two adapters, a mixture, exports, data, a recipe."""
    root = tmp_path_factory.mktemp("seeds")
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(root / "base")
    for i in range(2):
        folder = make_adapter(model, root / f"a{i}", i, r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"][: 1 + i])
        (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (root / "base" / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (root / "base" / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    model.save_pretrained(root / "shards", max_shard_size="12kB")
    mix(root / "base", [root / "a0", root / "a1"], root / "mixture", weights=[0.25, 0.5], task="causal-lm")
    export(root / "mixture", "dense", root / "dense")
    export(root / "mixture", "lora", root / "lora")
    recipe = {
        "base": "base", "adapters": {"a0": "a0", "a1": "a1"}, "mix": {"task": "causal-lm", "weights": [0.5, 0.5]},
        "exports": [{"format": "dense"}, {"format": "lora", "rank": 2, "name": "small"}], "verify": False,
    }  # fmt: skip
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    for name, body, targets in (("bert", tiny_bert(), ["query", "value"]), ("llama", model, ["q_proj", "v_proj"])):
        (root / name).mkdir()
        body.save_pretrained(root / name / "base")
        save_tokenizer(root / name / "base")
        for i in range(2):
            make_adapter(body, root / name / f"a{i}", i, r=2, target_modules=targets)
    (root / "bert/shots.csv").write_text("text,label\nw1 w2,low\nw3 w4,high\nw5 w6,low\nw7 w8,high\n")
    (root / "llama/shots.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3 w4"}\n' * 2)
    return root


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
QUICK = settings(
    max_examples=10 * CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@QUICK
@given(table=st.fixed_dictionaries({"peft_type": st.just("LORA")}, optional=dict.fromkeys(LORA_FIELDS[1:], JSON)))
def test_any_value_of_any_lora_field_is_read_or_refused(seeds: Path, tmp_path: Path, table: dict[str, Any]) -> None:
    shutil.copytree(seeds / "a0", tmp_path / "a", dirs_exist_ok=True)
    (tmp_path / "a/adapter_config.json").write_bytes(json.dumps(table).encode("utf-8", "surrogatepass"))
    with suppress(WloraMergeError):
        assert load_adapter(tmp_path / "a").modules


@QUICK
@given(value=JSON, key=st.sampled_from(sorted(MIXTURE_KEYS)))
def test_any_value_of_any_mixture_key_is_read_or_refused(seeds: Path, tmp_path: Path, value: Any, key: str) -> None:
    shutil.copytree(seeds / "mixture", tmp_path / "m", dirs_exist_ok=True)
    table = json.loads((seeds / "mixture/mixture.json").read_text()) | {key: value}
    (tmp_path / "m/mixture.json").write_bytes(json.dumps(table).encode("utf-8", "surrogatepass"))
    with suppress(WloraMergeError):
        assert Mixture.load(tmp_path / "m").adapters


@QUICK
@given(
    data=st.binary(max_size=200)
    | st.builds(lambda b, n: struct.pack("<Q", n) + b, st.binary(), st.integers(0, 2**64 - 1))
)
def test_any_bytes_are_a_safetensors_file_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with suppress(WloraMergeError):
        assert read_header(tmp_path / "x.safetensors").raw


def test_a_safetensors_file_that_is_read_is_one_for_its_library_too(seeds: Path, tmp_path: Path) -> None:
    data, file, read = (seeds / "a1/adapter_model.safetensors").read_bytes(), tmp_path / "x.safetensors", 0
    for number in range(FIRST, FIRST + 100 * CASES):
        file.write_bytes(mutated_safetensors(data, random.Random(number)))
        with suppress(WloraMergeError):
            entries = read_header(file).entries
            with safe_open(file, framework="np") as theirs:
                assert set(theirs.keys()) == set(entries), number
            read += 1
    assert read > 5 * CASES
    print(f"headers: {100 * CASES} cases, {read} read by this package and by safetensors, {100 * CASES - read} refused")


@QUICK
@given(
    table=st.dictionaries(st.sampled_from(["base", "adapters", "fit", "mix", "exports", "verify", "x"]), JSON),
    text=st.text(),
)
def test_any_recipe_is_read_or_refused(tmp_path: Path, table: dict[str, Any], text: str) -> None:
    for data in (json.dumps(table).encode("utf-8", "surrogatepass"), text.encode("utf-8", "surrogatepass")):
        (tmp_path / "r.yaml").write_bytes(data)
        with suppress(WloraMergeError):
            assert read_recipe(tmp_path / "r.yaml").base is not None


class Count:
    """Runs cases, keeps what ended badly, and counts the rest."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp, self.kinds, self.bad = tmp_path, Counter[str](), list[str]()

    def case(self, number: int, outcome: Outcome, why: str = "") -> None:
        """Record one case; `why` says what is wrong with a result or with what was left behind."""
        if outcome.clean and not why:
            self.kinds["done" if outcome.code == 0 else "refused"] += 1
            return
        how = "hung" if outcome.code is None else f"exit {outcome.code}"
        self.bad.append(f"case {number}: {how} {why} {outcome.said[-900:]}")

    def close(self, name: str) -> None:
        """Print the counts, and fail where anything was bad."""
        print(f"{name}: {sum(self.kinds.values())} cases, {dict(self.kinds)}, {len(self.bad)} bad")
        if self.bad:
            pytest.fail("\n\n".join(self.bad[:8]), pytrace=False)


def tree(seeds: Path, at: Path, *names: str) -> Path:
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir()
    for name in names:
        source = seeds / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, at / name)
    return at


def left(at: Path, before: set[str], outcome: Outcome) -> str:
    """What is wrong beside the inputs: anything new after a refusal, or a staging folder after either."""
    new = {p.name for p in at.iterdir()} - before
    allowed = {"out"} if outcome.code == 0 else set()
    return f"left {sorted(new - allowed)}" if new - allowed else ""


def wrong_export(at: Path, base: Path) -> str:
    """What is wrong with a dense export, by numpy and the library of the format; nothing if it is right."""
    config = [json.loads((at / f"a{i}" / "adapter_config.json").read_text()) for i in range(2)]
    out = {k: v for f in (at / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    told = json.loads((at / "out" / "wlora_merge.json").read_text())
    for name, row in told["files"].items():
        if hashlib.sha256((at / "out" / name).read_bytes()).hexdigest() != row["sha256"]:
            return f"{name} has another digest"
    if any(not np.isfinite(tensor).all() for tensor in out.values() if tensor.dtype.kind == "f"):
        return "a tensor that is not finite"
    plain = all(not c.get("rank_pattern") and not c.get("alpha_pattern") and not c.get("use_dora") for c in config)
    mixture = told["mixture"]
    if not plain or mixture["normalize"] != "none":
        return ""
    source = {k: v for f in base.glob("*.safetensors") for k, v in load_file(f).items()}
    tensors = [load_file(at / f"a{i}" / "adapter_model.safetensors") for i in range(2)]
    names = [row["name"] for row in mixture["adapters"]]
    for group, module in ((group, module) for group, modules in mixture["groups"].items() for module in modules):
        expected = source[f"{module}.weight"].astype(np.float64)
        for i in range(2):
            key = f"base_model.model.{module}.lora_A.weight"
            if key not in tensors[i]:
                continue
            A, B = (tensors[i][key.replace("lora_A", part)].astype(np.float64) for part in ("lora_A", "lora_B"))
            scaling = config[i].get("lora_alpha", 8) / (len(A) ** 0.5 if config[i].get("use_rslora") else len(A))
            expected = expected + mixture["delta_scale"] * mixture["weights"][group][names[i]] * scaling * (B @ A)
        if not np.allclose(out[f"{module}.weight"], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()):
            return f"{module} is not the sum"
    return ""


def mixed(count: Count, seeds: Path, change: Callable[[Path, random.Random], None], base: str = "base") -> None:
    """Mix and export after a change of the inputs."""
    for number in range(FIRST, FIRST + CASES):
        at, seed = tree(seeds, count.tmp / "case", base, "a0", "a1"), random.Random(number)
        change(at, seed)
        before = {p.name for p in at.iterdir()}
        inputs = ["--base", at / base, "--adapter", at / "a0", "--adapter", at / "a1"]
        outcome = jailed("mix", *inputs, "--weights", "0.25,0.5", "--out", at / "mixture", "--modules-to-save", "drop")
        if outcome.code == 0:
            before.add("mixture")
            outcome = jailed("export", at / "mixture", "--format", "dense", "--out", at / "out")
        why = left(at, before, outcome)
        if not why and outcome.code == 0:
            why = wrong_export(at, at / base)
        count.case(number, outcome, why)


def rewrite(file: Path, change: Callable[[bytes, random.Random], bytes], seed: random.Random) -> None:
    file.write_bytes(change(file.read_bytes(), seed))


def as_table(*keys: str) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, seed: mutated_table(json.loads(data), seed, keys)


def test_fuzzed_adapter_configs(seeds: Path, tmp_path: Path) -> None:
    count = Count(tmp_path)
    mixed(count, seeds, lambda at, seed: rewrite(at / "a1/adapter_config.json", as_table(*LORA_FIELDS), seed))
    count.close("adapter_config.json")


def test_fuzzed_adapter_weights(seeds: Path, tmp_path: Path) -> None:
    count = Count(tmp_path)
    mixed(count, seeds, lambda at, seed: rewrite(at / "a1/adapter_model.safetensors", mutated_safetensors, seed))
    count.close("adapter_model.safetensors")


def test_fuzzed_base_configs(seeds: Path, tmp_path: Path) -> None:
    count = Count(tmp_path)
    mixed(count, seeds, lambda at, seed: rewrite(at / "base/config.json", as_table(*CONFIG_KEYS), seed))
    count.close("config.json")


def test_fits_on_fuzzed_base_configs(seeds: Path, tmp_path: Path) -> None:
    """Also configs of far larger models than the files hold: those are refused before memory is taken."""
    count = Count(tmp_path)
    kinds = {"bert": ("shots.csv", "text-classification"), "llama": ("shots.jsonl", "causal-lm")}
    for number in range(FIRST, FIRST + CASES):
        seed = random.Random(number)
        at = tree(seeds, tmp_path / "case", *kinds) / seed.choice(sorted(kinds))
        data, task = kinds[at.name]
        if seed.random() < 0.3:
            huge, config = seed.choice(sorted(HUGE)), json.loads((at / "base/config.json").read_text())
            config[huge] = HUGE[huge] * seed.choice((1, 100, 10_000))
            (at / "base/config.json").write_text(json.dumps(config))
        else:
            rewrite(at / "base/config.json", as_table(*CONFIG_KEYS, *HUGE), seed)
        before = {p.name for p in at.iterdir()}
        inputs = ["--base", at / "base", "--adapter", at / "a0", "--adapter", at / "a1", "--data", at / data]
        short = ["--max-steps", 1, "--folds", 0, "--new-adapter", 0]
        outcome = jailed("fit", *inputs, "--task", task, "--out", at / "out", *short, seconds=2 * SECONDS)
        count.case(number, outcome, left(at, before, outcome))
    count.close("config.json, in a fit")


def test_fuzzed_base_weights(seeds: Path, tmp_path: Path) -> None:
    count = Count(tmp_path)
    mixed(count, seeds, lambda at, seed: rewrite(at / "base/model.safetensors", mutated_safetensors, seed))
    count.close("model.safetensors")


def test_fuzzed_indexes_and_shards(seeds: Path, tmp_path: Path) -> None:
    def change(at: Path, seed: random.Random) -> None:
        if seed.random() < 0.7:
            rewrite(at / "shards/model.safetensors.index.json", as_table("metadata", "weight_map"), seed)
        else:
            rewrite(seed.choice(sorted((at / "shards").glob("*.safetensors"))), mutated_safetensors, seed)

    count = Count(tmp_path)
    mixed(count, seeds, change, "shards")
    count.close("model.safetensors.index.json")


def test_files_that_are_something_else(seeds: Path, tmp_path: Path) -> None:
    def change(at: Path, seed: random.Random) -> None:
        files = sorted(p for p in at.rglob("*") if p.is_file())
        spoil(seed.choice(files), seeds / "dense" / "model.safetensors", seed)

    count = Count(tmp_path)
    mixed(count, seeds, change)
    count.close("links, pipes, devices, folders")


def test_fuzzed_cards(seeds: Path, tmp_path: Path) -> None:
    def change(at: Path, seed: random.Random) -> None:
        rewrite(at / seed.choice(("base", "a0")) / "README.md", mutated_bytes, seed)

    count = Count(tmp_path)
    mixed(count, seeds, change)
    count.close("README.md of inputs")


def test_fuzzed_mixtures(seeds: Path, tmp_path: Path) -> None:
    count = Count(tmp_path)
    for number in range(FIRST, FIRST + CASES):
        at, seed = tree(seeds, tmp_path / "case", "base", "a0", "a1", "mixture"), random.Random(number)
        if seed.random() < 0.7:
            rewrite(at / "mixture/mixture.json", as_table("head", "sha256", "source"), seed)
        else:
            rewrite(at / "mixture/mixture.safetensors", mutated_safetensors, seed)
        before = {p.name for p in at.iterdir()}
        kind = seed.choice(("dense", "dense", "lora"))
        outcome = jailed("export", at / "mixture", "--format", kind, "--out", at / "out")
        why = left(at, before, outcome) or (
            wrong_export(at, at / "base") if outcome.code == 0 and kind == "dense" else ""
        )
        count.case(number, outcome, why)
        outcome = jailed("inspect", at / "mixture")
        count.case(number, outcome, left(at, before | {"out"}, outcome))
    count.close("mixture.json, mixture.safetensors")


def test_fuzzed_exports(seeds: Path, tmp_path: Path) -> None:
    """Also with a manifest that agrees with what was changed: an attacker writes both."""
    count = Count(tmp_path)
    for number in range(FIRST, FIRST + CASES):
        seed = random.Random(number)
        kind = seed.choice(("dense", "lora"))
        at = tree(seeds, tmp_path / "case", "base", "a0", "a1", kind)
        folder = at / kind
        file = seed.choice(sorted(p for p in folder.iterdir() if p.name != "README.md"))
        rewrite(file, mutated_safetensors if file.suffix == ".safetensors" else as_table(*CONFIG_KEYS), seed)
        if file.name != "wlora_merge.json" and seed.random() < 0.9:
            forge(folder, file)
        before = {p.name for p in at.iterdir()}
        inputs = ["--base", at / "base", "--adapter", f"a0={at / 'a0'}", "--adapter", f"a1={at / 'a1'}"]
        outcome = jailed("verify", folder, *(["--quick"] if seed.random() < 0.3 else inputs), "--json")
        count.case(number, outcome, left(at, before, outcome))
        count.case(number, jailed("inspect", folder))
    count.close("exports and wlora_merge.json")


def forge(folder: Path, file: Path) -> None:
    manifest = json.loads((folder / "wlora_merge.json").read_text())
    data = file.read_bytes()
    manifest["files"][file.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "wlora_merge.json").write_text(json.dumps(manifest))


def test_fuzzed_recipes(seeds: Path, tmp_path: Path) -> None:
    count = Count(tmp_path)
    recipe = json.loads((seeds / "recipe.yaml").read_text())
    keys = (
        "fit",
        "mix",
        "exports",
        "weights",
        "rank",
        "energy",
        "dtype",
        "opset",
        "verify",
        "normalize",
        "name",
        "base_name",
    )
    for number in range(FIRST, FIRST + CASES):
        at, seed = tree(seeds, tmp_path / "case", "base", "a0", "a1"), random.Random(number)
        text = (
            mutated_table(recipe, seed, keys)
            if seed.random() < 0.8
            else mutated_bytes(json.dumps(recipe).encode(), seed)
        )
        (at / "recipe.yaml").write_bytes(text)
        before = {p.name for p in at.iterdir()}
        outcome = jailed("run", at / "recipe.yaml", "--out", at / "out")
        count.case(number, outcome, left(at, before, outcome))
    count.close("recipes")


def data_files() -> dict[str, tuple[str, bytes]]:
    """File name -> task, content."""
    rows = [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(4)]
    labelled = [{"text": f"w{i} x", "label": ["low", "high"][i % 2]} for i in range(6)]
    answers = [{"question": "q?", "context": "a b c", "answers": {"text": ["b"], "answer_start": [2]}}]
    chat = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]
    tokens = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["text", "label"])
    writer.writeheader()
    writer.writerows(labelled)
    parquet = io.BytesIO()
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(labelled), parquet)
    return {
        "a.jsonl": ("causal-lm", "\n".join(map(json.dumps, rows)).encode()),
        "chat.jsonl": ("causal-lm", "\n".join(map(json.dumps, chat)).encode()),
        "b.json": ("question-answering", json.dumps(answers).encode()),
        "t.json": ("token-classification", json.dumps({"data": tokens}).encode()),
        "c.csv": ("text-classification", table.getvalue().encode()),
        "d.tsv": ("text-classification", table.getvalue().replace(",", "\t").encode()),
        "e.txt": ("causal-lm", b"one line\nand another\n"),
        "f.parquet": ("text-classification", parquet.getvalue()),
    }


def test_fuzzed_data_files(seeds: Path, tmp_path: Path) -> None:
    count, files = Count(tmp_path), data_files()
    at = tree(seeds, tmp_path / "case", "base", "a0", "a1")
    for number in range(FIRST, FIRST + 2 * CASES):
        seed = random.Random(number)
        name = seed.choice(sorted(files))
        task, data = files[name]
        if name.endswith(".json") and seed.random() < 0.7:
            data = mutated_table(json.loads(data), seed, ("tokens", "tags", "context", "answers", "text"))
        elif name.endswith(".jsonl") and seed.random() < 0.7:
            lines = [json.loads(line) for line in data.splitlines()]
            data = b"\n".join(mutated_table(row, seed, ("text", "prompt", "messages")) for row in lines)
        else:
            data = mutated_bytes(data, seed)
        (at / name).write_bytes(data)
        recipe = {"base": "base", "adapters": {"a0": "a0", "a1": "a1"}, "fit": {"data": name, "task": task}}
        (at / "recipe.yaml").write_text(json.dumps(recipe))
        before = {p.name for p in at.iterdir()}
        outcome = jailed("run", at / "recipe.yaml", "--check")
        count.case(number, outcome, left(at, before, outcome))
    count.close("data files")


def test_fuzzed_onnx_files(seeds: Path, tmp_path: Path) -> None:
    """As the base of a refold, parsed by this package; what the sound one gives, ONNX's own checker takes."""
    if CASES < 10:
        pytest.skip("tracing the seed takes longer than a few cases are worth: make test-trust")
    import onnx
    from support.refold import onnx_of

    file = onnx_of(seeds / "base", tmp_path / "traced")
    count = Count(tmp_path)
    for number in range(FIRST, FIRST + CASES):
        at, seed = tree(seeds, tmp_path / "case", "base", "a0", "a1", "mixture"), random.Random(number)
        data = file.read_bytes()
        (at / "base.onnx").write_bytes(data if number == FIRST else mutated_bytes(data, seed))
        before = {p.name for p in at.iterdir()}
        line = ["export", at / "mixture", "--format", "onnx", "--onnx-base", at / "base.onnx", "--out", at / "out"]
        outcome = jailed(*line)
        why = left(at, before, outcome)
        if outcome.code == 0 and number == FIRST:
            onnx.checker.check_model(str(at / "out/onnx/model.onnx"))
        count.case(number, outcome, why)
    count.close("ONNX files")
    assert count.kinds["done"]
