"""What an attacker, a broken disk or a tired person makes of a file: seeded mutations, and processes that survive them.

`jailed` runs a command line in a fork with a bound on memory and on time, so a case costs what the command costs.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import Fork

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


def jailed(
    *argv: object,
    memory: int = MEMORY_BYTES,
    seconds: float = SECONDS,
    file_bytes: int = -1,
    stop: tuple[float, int] | None = None,
    ready: bool = False,
) -> Outcome:
    """Run one `wlora-merge` command line in a process with bounds.

    Args:
        argv: the command line, without the program.
        memory: bytes of address space beyond what the imports take.
        seconds: how long it may take.
        file_bytes: how long a file may become.
        stop: (seconds, signal): when to send it what; counted, if `ready`, from when it has begun to write.
        ready: see `stop`.
    """
    words = [str(a) for a in argv]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    child, started = Fork(_bounded, words, memory, file_bytes, environment=environment), time.monotonic()
    place = Path(words[words.index("--out") + 1]) if ready else None
    while child.returncode is None and time.monotonic() < started + seconds:
        if place is not None and _begun(place):
            started, place = time.monotonic(), None
        if stop is not None and place is None and time.monotonic() >= started + stop[0]:
            child.kill(stop[1])
            stop = None
        time.sleep(0.001)
    code = child.returncode
    if code is None:
        child.kill()
    return Outcome(code, "".join(child.communicate()))


def _bounded(argv: list[str], memory: int, file_bytes: int) -> None:
    from wlora_merge.cli.main import main

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if file_bytes >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    main(argv)


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
