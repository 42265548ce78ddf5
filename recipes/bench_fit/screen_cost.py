"""What screening costs: whole `wlora-merge fit` commands with few adapters and with hundreds, their seconds and their memory.

The hundreds are copies of a few adapters under other names and with other values of alpha, so that each is one of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from jobs import Job


@dataclass
class Command:
    """A fit of so many adapters: seconds and peak resident bytes of each run."""

    adapters: int
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def row(self) -> tuple[str, str, str]:
        """Of a table: adapters, median seconds, median megabytes."""
        return (
            str(self.adapters),
            f"{statistics.median(self.seconds):.1f}",
            f"{statistics.median(self.bytes) / 1e6:.0f}",
        )


def copies(adapters: dict[str, Path], count: int, out: Path) -> Path:
    """A folder of so many adapters."""
    shutil.rmtree(out, ignore_errors=True)
    sources = list(adapters.values())
    for n in range(count):
        folder, source = out / f"copy-{n:03}", sources[n % len(sources)]
        folder.mkdir(parents=True)
        shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        config = json.loads((source / "adapter_config.json").read_text())
        config["lora_alpha"] = config["lora_alpha"] * (1 + n / count)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return out


def measure(job: Job, counts: list[int], options: list[str], rounds: int, out: Path) -> list[Command]:
    """Run `fit --keep` with each number of adapters in turn, round after round, four shots of each class."""
    data, commands = job.write(job.shots(4, 0), out), [Command(count) for count in counts]
    folders = {count: copies(job.adapters, count, out / f"copies-{count}") for count in counts}
    for _ in range(rounds):
        for command in commands:
            asked = ["--base", job.base, "--adapters", folders[command.adapters], "--data", data, "--task", job.task]
            asked += [*options, "--out", out / "mixture", "--force", "--no-report"]
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "wlora_merge", "fit", *map(str, asked)], stdout=subprocess.DEVNULL
            )
            _, status, used = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"a fit of {command.adapters} adapters failed.")
            command.seconds.append(time.perf_counter() - start)
            command.bytes.append(used.ru_maxrss * 1024)
    return commands
