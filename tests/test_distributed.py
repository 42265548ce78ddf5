"""Several processes on one export: the same bytes as one, and nothing left when one of them dies."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from support.models import make_adapter, tiny_llama
from support.processes import IMPORTED, free_port, launch, start

from wlora_merge.distributed import is_leader
from wlora_merge.errors import WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    model = tiny_llama()
    model.to(torch.bfloat16).save_pretrained(root / "base", max_shard_size="10kB")
    folders = [
        make_adapter(model.float(), root / f"a{i}", i, r=2, target_modules=["q_proj", "up_proj"]) for i in range(2)
    ]
    mix(root / "base", folders, root / "mixture")
    return root / "mixture"


def test_an_environment_that_starts_no_processes_is_one_sentence(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert is_leader()  # of one
    for size in ("x", "2"):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        with pytest.raises(WloraMergeError, match=f"WORLD_SIZE is {size}, and the processes cannot be joined"):
            export(mixture, "dense", tmp_path / "out")


def test_a_fork_has_the_libraries_and_ends_as_a_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of processes stand on."""
    monkeypatch.setenv("GIVEN", "theirs")
    asked = start(
        "import os, sys, torch\n"
        f"assert set({IMPORTED!r}) <= set(sys.modules), set({IMPORTED!r}) - set(sys.modules)\n"
        "assert torch.get_num_threads() == 1\n"
        "print(os.environ['GIVEN'], os.environ['MORE'], __name__)\n"
        "raise SystemExit(3)",
        MORE="x",
    )
    assert asked.communicate(timeout=120) == ("theirs x __main__\n", "")
    assert asked.returncode == 3
    fails = start("1 / 0")
    assert fails.communicate(timeout=120)[1].endswith("ZeroDivisionError: division by zero\n")
    assert fails.returncode == 1
    waits = start("import time; time.sleep(60)")
    waits.kill(signal.SIGTERM)
    waits.communicate(timeout=120)
    assert waits.returncode == -signal.SIGTERM
    with pytest.raises(TimeoutError, match="still running"):
        start("import time; time.sleep(60)").communicate(timeout=0.1)


def test_two_ranks_write_the_bytes_of_one(mixture: Path, tmp_path: Path) -> None:
    export(mixture, "dense", tmp_path / "one")
    code = "from wlora_merge.cli.main import main; main()"
    command = ["export", str(mixture), "--format", "dense", "--out", str(tmp_path / "two")]
    ranks = launch(f"import sys; sys.argv[1:] = {command!r}\n{code}", free_port())
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert ["Wrote" in out for out, _ in said] == [True, False]
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()} == files
    assert len([name for name in files if name.endswith(".safetensors")]) > 2


DIES = """
import os, signal, sys
import wlora_merge.io.direct_write as direct
from wlora_merge.cli.main import main
if os.environ["RANK"] == "{rank}":
    real, count = direct._write_all, [0]
    def write(fd, block):
        count[0] += 1
        if count[0] == 2: os.kill(os.getpid(), signal.{signal})
        real(fd, block)
    direct._write_all = write
sys.argv[1:] = {command!r}
main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_leaves_no_output(mixture: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "out"
    command = ["export", str(mixture), "--format", "dense", "--out", str(out)]
    ranks = launch(DIES.format(rank=rank, signal="SIGKILL", command=command), free_port())
    said = [process.communicate(timeout=120) for process in ranks]
    assert ranks[rank].returncode == -signal.SIGKILL
    assert ranks[1 - rank].returncode == 1, said
    assert "another rank" in said[1 - rank][1]
    assert not out.exists()
    time.sleep(0.1)
    export(mixture, "dense", out)  # and the next run clears what the killed one left
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_rank_that_fails_says_why_on_every_rank(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"""
import os, sys
import wlora_merge.exporters.stream as stream
from wlora_merge.cli.main import main
from wlora_merge.errors import WloraMergeError
if os.environ["RANK"] == "1":
    def fail(*args): raise WloraMergeError("the shard is unreadable")
    stream._read = fail
sys.argv[1:] = ["export", {str(mixture)!r}, "--format", "dense", "--out", {str(out)!r}]
main()
"""
    ranks = launch(code, free_port())
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert all("the shard is unreadable" in text for text in said)
    assert not any(tmp_path.iterdir())
