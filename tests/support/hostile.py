"""What an attacker, a broken disk or a tired person makes of a file: seeded mutations, and a process that survives them.

`Jail` keeps one process that has imported everything and forks it for each command line, with a bound on memory and on time; so
a case costs what the command costs. Run as a program, this file is that process.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.paths import ROOT

MEMORY_BYTES = 1 << 30  # of address space beyond the imports; the files of these cases have some kilobytes
SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (negative: a signal, None: it hung) and all that it said."""

    code: int | None
    said: str

    @property
    def clean(self) -> bool:
        """Done, one sentence and exit 1, or wrong usage: what a user may meet."""
        if self.code not in (0, 1, 2) or "Traceback" in self.said:
            return False
        return self.code != 1 or (self.said.rstrip().splitlines()[-1:] != [] and "Error: " in self.said)


class Jail:
    """Runs `wlora-merge` command lines in forks of a prepared process."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1", "COLUMNS": "200",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.hostile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def run(
        self,
        *argv: object,
        memory: int = MEMORY_BYTES,
        seconds: float = SECONDS,
        file_bytes: int = -1,
        stop: tuple[float, int] | None = None,
        ready: bool = False,
    ) -> Outcome:
        """Run one command line.

        Args:
            memory: bytes of address space beyond what the imports take; file_bytes: how long a file may become.
            stop: (seconds, signal): when to send it what; counted, if `ready`, from when it has begun to write.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = [[str(a) for a in argv], memory, seconds, file_bytes, stop, ready]
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()


def _serve() -> None:
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, BertForSequenceClassification, LlamaForCausalLM  # noqa: F401

    import wlora_merge.cli.inspect_tables
    import wlora_merge.cli.run
    import wlora_merge.exporters.export
    import wlora_merge.mixture.attach
    import wlora_merge.training.comparison
    import wlora_merge.training.fit
    import wlora_merge.training.model  # noqa: F401
    from wlora_merge.cli.main import main

    for line in sys.stdin:
        print(json.dumps(_forked(main, *json.loads(line))), flush=True)


def _forked(
    main: Callable[..., Any],
    argv: list[str],
    memory: int,
    seconds: float,
    file_bytes: int,
    stop: tuple[float, int] | None,
    ready: bool,
) -> tuple[int | None, str]:
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if file_bytes >= 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
            code = 99
            try:
                main(argv)
            except SystemExit as leave:
                code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        started = time.monotonic()
        place = Path(argv[argv.index("--out") + 1]) if ready else None
        while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < started + seconds:
            if place is not None and _begun(place):
                started, place = time.monotonic(), None
            if stop is not None and place is None and time.monotonic() >= started + stop[0]:
                os.kill(child, stop[1])
                stop = None
            time.sleep(0.001)
        if not done[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        said.seek(0)
        text = said.read(1 << 20).decode("utf-8", "replace")
        return os.waitstatus_to_exitcode(done[1]) if done[0] else None, text


def _begun(out: Path) -> bool:
    """Whether a command has begun to write: its staging folder, or a fit's state, is there."""
    return any(out.parent.glob(f".{out.name}.wlora-staging-*")) or any(out.parent.glob(f"{out.name}.fit-state*"))


# ------------------------------------------------------------------------------------------------------ mutations

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 2**31, 2**53, 2**63, 2**64,
    10**30, "", " ", "0", "x", "q_proj", "LORA", "lora", "eva", "pissa", "..", "../base", "/etc/passwd", "~", "a/b", "org/name",
    "org/name@main", "https://user:secret@hub/x", "C:\\x", "con\0", "é", "²", "\U0001f600", "\ud800", "(", "(a|aa)+=", ".*", "%s",
    "{}", "$HOME", "!!python/name:os.system", [], {}, [[]], [None], [1], ["x"], [["x"]], {"": ""}, {"x": 1}, {"x": {"x": {}}},
    {"a": [1, 2, {"b": None}]}, "x" * 300, [0] * 50, {"shape": [10**9, 10**9], "seed": 0}, "F16", "BF16", "F8_E4M3",
)  # fmt: skip
"""Values that are often forgotten."""


def mutated_table(table: Any, seed: random.Random, keys: Sequence[str] = ()) -> bytes:
    """A JSON text near `table`: one to three values replaced, removed, renamed, moved, or added under one of `keys`."""
    table = json.loads(json.dumps(table))
    for _ in range(seed.choice((1, 1, 1, 2, 3))):
        table = _changed(table, seed, keys)
    text = json.dumps(table)
    kind = seed.random()
    if kind < 0.03:
        return mutated_bytes(text.encode(), seed)
    if kind < 0.05 and text.startswith("{") and len(text) > 2:
        key, value = seed.choice(list(table.items()))
        text = f"{{{json.dumps(key)}: {json.dumps(seed.choice((value, None, 1)))}, {text[1:]}"  # one key twice
    if kind > 0.99:
        text = seed.choice(
            ("", "[]", "null", "[" * 10_000, '"x"', "{" * 10_000, "9" * 10_000, text + text, "\ufeff" + text)
        )
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in _places(part, (*at, key)))]


def _odd(seed: random.Random) -> Any:
    return copy.deepcopy(seed.choice(ODD))


def _changed(table: Any, seed: random.Random, keys: Sequence[str]) -> Any:
    place = seed.choice(_places(table)[1:] or [()])
    if not place:
        return _odd(seed)
    parent = table
    for key in place[:-1]:
        parent = parent[key]
    kind = seed.randrange(6)
    if kind == 0 and isinstance(parent, dict):
        del parent[place[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[seed.choice((*keys, "x", "", place[-1] + "x"))] = parent.pop(place[-1])
    elif kind == 2 and isinstance(parent, dict) and keys:
        parent[seed.choice(tuple(keys))] = _odd(seed)
    elif kind == 3 and isinstance(parent, list):
        parent.insert(seed.randrange(len(parent) + 1), copy.deepcopy(seed.choice((*ODD, *parent))))
    elif kind == 4 and isinstance(parent[place[-1]], int | float) and not isinstance(parent[place[-1]], bool):
        parent[place[-1]] = seed.choice((-1, 0, 2, 0.5, 1e30)) * parent[place[-1]] + seed.choice((0, 0, 1))
    else:
        parent[place[-1]] = _odd(seed)
    return table


def mutated_bytes(data: bytes, seed: random.Random) -> bytes:
    """A file near `data`: bits flipped, parts cut, doubled, moved or overwritten."""
    changed = bytearray(data)
    for _ in range(seed.choice((1, 1, 2, 5))):
        at = seed.randrange(len(changed) + 1)
        end = min(len(changed), at + seed.choice((1, 1, 2, 8, 64, 1000)))
        kind = seed.randrange(7)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            del changed[at:end]
        elif kind == 2:
            changed[at:at] = seed.randbytes(seed.choice((1, 8, 100)))
        elif kind == 3:
            changed[at:at] = changed[at:end]
        elif kind == 4:
            changed[at:end] = seed.choice((b"\0", b"\xff", b"\x7f", b"9", b'"', b"\n")) * (end - at)
        elif at < len(changed):
            changed[at] ^= 1 << seed.randrange(8)
    return bytes(changed)


def mutated_safetensors(data: bytes, seed: random.Random) -> bytes:
    """A safetensors file near `data`: its header changed as a table, its length lied about, its data changed as bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = seed.random()
    if kind < 0.6:
        header = mutated_table(json.loads(header), seed, ("__metadata__", "dtype", "shape", "data_offsets"))
        return struct.pack("<Q", len(header)) + header + body
    if kind < 0.7:
        lie = seed.choice((0, 1, 7, length - 1, length + 1, len(data), 10**8, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", lie) + header + body
    if kind < 0.85:
        at = 4 * seed.randrange(len(body) // 4)
        odd = seed.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\0\0\0"))
        return (
            data[: 8 + length] + body[:at] + odd + body[at + 4 :]
        )  # NaN, infinities, the largest and the smallest float32
    return mutated_bytes(data, seed)


def spoil(path: Path, outside: Path, seed: random.Random) -> None:
    """Put something else in a file's place: nothing, a folder, a pipe, a device, a link to anywhere."""
    path.unlink()
    kind = seed.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(outside)
    elif kind == 4:
        path.symlink_to(path.name)
    elif kind == 5:
        path.write_bytes(b"")


if __name__ == "__main__":
    _serve()
