"""A run that is killed, stopped, starved of disk or fed by a dying one: what stood at --out, or the whole new folder, nothing else.

The default run keeps a few seeded moments of each; `make test-trust` (WLORA_MERGE_TRUST_ROUNDS) runs hundreds and prints counts.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hostile import jailed
from support.models import make_adapter, tiny_llama
from support.processes import free_port, launch
from support.shots import save_tokenizer

from wlora_merge.errors import WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.mixture.mix import mix

ROUNDS = int(os.environ.get("WLORA_MERGE_TRUST_ROUNDS", "2"))
COMMANDS = ("export dense", "export lora", "mix", "run", "fit")
SOME = COMMANDS if ROUNDS > 10 else ("export dense", "export lora", "mix")  # in the default run
STEPS = {"fit": 3}  # a fit is slower than the others, so it gets a third of the rounds


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with shards, two adapters, two mixtures, two recipes, shots."""
    root = tmp_path_factory.mktemp("inputs")
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(root / "base", max_shard_size="12kB")
    save_tokenizer(root / "base")
    for i in range(2):
        make_adapter(model, root / f"a{i}", i, r=2, target_modules=["q_proj", "v_proj"][: 1 + i])
    (root / "shots.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"w{i}", "completion": f" w{i + 1}"}) for i in range(6))
    )
    for variant, weights in enumerate(([0.25, 0.5], [1.0, -0.5])):
        mix(root / "base", [root / "a0", root / "a1"], root / f"m{variant}", weights=weights, task="causal-lm")
        recipe = {
            "base": "base",
            "adapters": ["a0", "a1"],
            "mix": {"weights": weights, "task": "causal-lm"},
            "verify": False,
        }
        exports = [{"format": "dense"}, {"format": "lora"}]
        (root / f"r{variant}.yaml").write_text(json.dumps(recipe | {"exports": exports}))
    return root


def command(inputs: Path, name: str, variant: int, out: Path) -> list[object]:
    """A command line that replaces `out`; the two variants give different bytes, each always the same."""
    both = ["--base", inputs / "base", "--adapter", inputs / "a0", "--adapter", inputs / "a1"]
    weights = ["0.25,0.5", "1.0,-0.5"][variant]
    data = [
        "--data",
        inputs / "shots.jsonl",
        "--task",
        "causal-lm",
        "--max-steps",
        "1",
        "--device",
        "cpu",
        "--seed",
        variant,
    ]
    lines: dict[str, list[object]] = {
        "export dense": ["export", inputs / f"m{variant}", "--format", "dense"],
        "export lora": ["export", inputs / f"m{variant}", "--format", "lora"],
        "mix": ["mix", *both, "--weights", weights],
        "run": ["run", inputs / f"r{variant}.yaml"],
        "fit": ["fit", *both, *data],
    }
    return [*lines[name], "--out", out, "--force"]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(out: Path) -> list[str]:
    """What a fit keeps to be resumed is no leftover."""
    return sorted(p.name for p in out.parent.iterdir() if p != out and not p.name.startswith(f"{out.name}.fit-state"))


@pytest.fixture(scope="module")
def both(inputs: Path) -> Callable[[str], tuple[Path, list[dict[str, bytes]], float]]:
    """A function: command -> (out, the content that each variant gives, seconds that it takes); the first stands there."""
    known: dict[str, tuple[Path, list[dict[str, bytes]], float]] = {}

    def make(name: str) -> tuple[Path, list[dict[str, bytes]], float]:
        out = inputs / "places" / name.replace(" ", "-") / "out"
        if name not in known:
            contents, lengths = [], []
            for variant in (0, 1):
                started = time.monotonic()
                done = jailed(*command(inputs, name, variant, out), memory=1 << 34, seconds=120)
                assert done.code == 0, done.said
                contents.append(content(out))
                lengths.append(time.monotonic() - started)
            assert contents[0] != contents[1]
            known[name] = out, contents, min(lengths)
        if content(out) != known[name][1][0]:
            done = jailed(*command(inputs, name, 0, out), memory=1 << 34, seconds=120)
            assert (done.code, content(out)) == (0, known[name][1][0]), done.said
        return known[name]

    return make


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_moment_loses_nothing(inputs: Path, both: Any, name: str) -> None:
    out, contents, length = both(name)
    seed, seen, current = random.Random(f"kill {name}"), Counter[str](), 0
    for _ in range(max(1, ROUNDS // STEPS.get(name, 1))):
        moment = seed.uniform(0, 1.1 * length)
        done = jailed(
            *command(inputs, name, 1 - current, out), memory=1 << 34, seconds=120, stop=(moment, signal.SIGKILL)
        )
        found = content(out)
        assert found in contents, f"killed after {moment:.3f} s: neither the old nor the new: {sorted(found)}"
        seen["ended first" if done.code == 0 else "new" if found == contents[1 - current] else "old"] += 1
        seen["left something to clear"] += bool(beside(out))
        current = contents.index(found)
        assert done.code in (0, -signal.SIGKILL), done
    done = jailed(*command(inputs, name, current, out), memory=1 << 34, seconds=120)
    assert (done.code, beside(out)) == (0, []), done.said
    print(f"{name}: {sum(seen.values()) - seen['left something to clear']} kills, {dict(seen)}, lost: nothing")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", SOME[:1] + COMMANDS[4:] if SOME is not COMMANDS else COMMANDS)
def test_a_signal_cleans_up_and_exits_with_its_number(
    inputs: Path, both: Any, name: str, number: signal.Signals, code: int
) -> None:
    out, contents, length = both(name)
    seed, seen = random.Random(f"{number} {name}"), Counter[str]()
    for _ in range(max(1, ROUNDS // (4 * STEPS.get(name, 1)))):
        moment = seed.uniform(0, length)
        done = jailed(*command(inputs, name, 1, out), memory=1 << 34, seconds=120, stop=(moment, number), ready=True)
        assert done.code in (0, code), done
        assert content(out) in contents
        assert beside(out) == []
        assert "Traceback" not in done.said
        seen["ended first" if done.code == 0 else f"exit {code}"] += 1
    print(f"{name}: {sum(seen.values())} times {number.name}, {dict(seen)}, lost: nothing")


@pytest.mark.parametrize("name", SOME)
def test_a_file_that_may_grow_no_further_loses_nothing(inputs: Path, both: Any, name: str) -> None:
    out, contents, _ = both(name)
    seed, refused = random.Random(f"limit {name}"), 0
    largest = max(len(data) for data in contents[1].values())
    rounds = max(1, ROUNDS // (2 * STEPS.get(name, 1)))
    for _ in range(rounds):
        limit = int(seed.uniform(0, 1.1 * largest))
        done = jailed(*command(inputs, name, 1, out), memory=1 << 34, seconds=120, file_bytes=limit)
        assert done.clean, done
        assert content(out) == contents[0 if done.code else 1]
        assert beside(out) == []
        refused += done.code == 1
        if not done.code:
            assert jailed(*command(inputs, name, 0, out), memory=1 << 34).code == 0
    print(f"{name}: {rounds} times a file size limit, {refused} refused, lost: nothing")


def test_a_full_disk_loses_nothing(inputs: Path, tmp_path: Path) -> None:
    seed, refused, rounds = random.Random("disk"), 0, max(2, ROUNDS // 4)
    disk = tmp_path / "disk"
    disk.mkdir()
    for number in range(rounds):
        name = ("export dense", "export lora", "mix", "run")[number % 4]
        size = f"size={int(seed.uniform(100, 700))}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        try:
            out = disk / "out"
            old = jailed(*command(inputs, "mix", 0, out))
            before = content(out) if old.code == 0 else {}
            fill = os.statvfs(disk).f_bavail * 4096 - int(seed.uniform(0, 200_000))
            (disk / "full").write_bytes(bytes(max(0, fill)))
            ended = jailed(*command(inputs, name, 1, out))
            assert ended.clean, ended
            if ended.code:
                refused += 1
                assert (content(out) if before else {}) == before
                assert not before or sorted(p.name for p in disk.iterdir()) == ["full", "out"]
        finally:
            subprocess.run(["umount", disk], check=True)
    print(f"{rounds} times a full disk, {refused} refused, lost: nothing")


def _wrapped(seed: random.Random, file: Path, fault: str) -> Callable[..., int]:
    """A `preadv` that at one of its calls meets a bad sector, or a file that somebody cuts."""
    real, calls, at = os.preadv, 0, seed.randrange(2)

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        nonlocal calls
        if os.path.realpath(f"/proc/self/fd/{fd}") != str(file):
            return real(fd, buffers, offset)
        calls += 1
        if calls > at:
            if fault == "error":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if os.path.getsize(file) > offset:
                os.truncate(file, offset)
        return real(fd, buffers, offset)

    return preadv


@pytest.mark.parametrize("fault", ["error", "cut"])
def test_a_shard_that_fails_or_is_cut_while_it_is_read_loses_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    seed, refused, rounds = random.Random(fault), 0, max(4, ROUNDS)
    for number in range(rounds):
        root = tmp_path / f"{number}"
        shutil.copytree(inputs, root, ignore=shutil.ignore_patterns("places"))
        export(root / "m0", "dense", root / "out")
        before, names = content(root / "out"), sorted(p.name for p in root.iterdir())
        files = [*(root / "base").glob("*.safetensors"), root / "a0/adapter_model.safetensors"]
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", _wrapped(seed, seed.choice(sorted(files)), fault))
            try:
                export(root / "m1", "dense", root / "out", force=True)
            except WloraMergeError:
                refused += 1
                assert content(root / "out") == before
            else:
                patch.undo()
                assert verify(root / "out", quick=True).files
        assert sorted(p.name for p in root.iterdir()) == names
        shutil.rmtree(root)
    assert refused
    print(f"{rounds} reads that ended in {fault}, {refused} refused, lost: nothing")


JOINING = """
import torch.distributed as dist
join = dist.init_process_group
def joined(*words, **options):
    join(*words, **options)
    open({mark!r}, "w").close()
dist.init_process_group = joined
from wlora_merge.cli.main import main
main({line!r})
"""


def test_a_rank_that_is_lost_at_any_moment_loses_nothing(inputs: Path, tmp_path: Path) -> None:
    """From when the ranks have joined; before that it is the launcher that stops the others."""
    rounds = ROUNDS // 10
    if not rounds:
        pytest.skip("a few ranks are lost in test_ranks.py; hundreds of rounds lose more here")
    seed, out, mark, seen = random.Random("rank"), tmp_path / "out", tmp_path / "joined", Counter[str]()
    line = ["export", str(inputs / "m1"), "--format", "dense", "--out", str(out), "--force"]
    code = JOINING.format(mark=str(mark), line=line)
    export(inputs / "m0", "dense", out)
    export(inputs / "m1", "dense", tmp_path / "new")
    old, new, length = content(out), content(tmp_path / "new"), 0.0
    for number in range(rounds + 1):  # the first is left alone, to know how long it takes
        mark.unlink(missing_ok=True)
        ranks, began = launch(code, free_port()), time.monotonic()
        while not mark.exists() and time.monotonic() < began + 180:
            time.sleep(0.001)
        began, victim = time.monotonic(), seed.randrange(2)
        if number:
            time.sleep(seed.uniform(0, length))
            ranks[victim].kill()
        said = [rank.communicate(timeout=180)[1] for rank in ranks]
        length = length or time.monotonic() - began
        assert content(out) in (old, new), said
        assert "Traceback" not in said[1 - victim], said
        if number:
            seen[f"rank {victim}: exit {ranks[1 - victim].returncode}"] += 1
        export(inputs / "m0", "dense", out, force=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["joined", "new", "out"]
    print(f"{rounds} lost ranks, {dict(seen)}, lost: nothing")
