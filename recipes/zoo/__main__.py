"""A zoo to measure on: 72 adapters of MiniLM and 24 of SmolLM2, trained with PEFT, a fifth of them with shuffled labels.

    python recipes/zoo --out zoo-out
    wlora-merge mix --base MINILM --adapters zoo-out/minilm --out mixture

Each adapter appears whole or not at all. A run that was stopped goes on where it stopped. `zoo.json` beside the adapters is
written last, and says of each what it was trained on and how well it learned. A list for `--adapters` in the folder `unseen`
has those that have not seen a task: `zoo-out/minilm/unseen/banking-g1.txt`.

    design.py     what each adapter is trained on, and how
    texts.py      the rows that it learns
    training.py   one adapter, by PEFT alone
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wlora_merge.errors import WloraMergeError
from wlora_merge.io.locks import locked

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_fit"))  # the tasks that are judged
sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))  # processes side by side

from design import DESIGNS, Spec, usable
from processes import workers
from training import RECORD, make_adapter

INDEX = "zoo.json"


def make_zoo(specs: Sequence[Spec], base: Path, folder: Path, pool: Executor) -> list[dict[str, Any]]:
    """The records of all adapters, in the order of the specs; those that are not in the folder yet are trained."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, folder):
        refuse_strangers(specs, folder)
        for left in folder.glob(".making-*"):  # by a run that was killed
            shutil.rmtree(left)
        wanted = [spec for spec in specs if not is_made(spec, folder)]
        if wanted:
            (folder / INDEX).unlink(missing_ok=True)
        for number, record in enumerate(pool.map(partial(make_adapter, base=base, folder=folder), wanted), 1):
            print(f"{number}/{len(wanted)} {told(record)}", file=sys.stderr, flush=True)
        records = [json.loads((folder / spec.name / RECORD).read_text()) for spec in specs]
        write_index(specs, records, folder)
    return records


def is_made(spec: Spec, folder: Path) -> bool:
    """Whether the folder has the adapter, and of these settings."""
    file = folder / spec.name / RECORD
    if not file.is_file():
        return False
    record = json.loads(file.read_text())
    return all(record.get(key, ...) == value for key, value in spec.as_json().items())


def refuse_strangers(specs: Sequence[Spec], folder: Path) -> None:
    """No adapter that this zoo does not know of: `--adapters` would take it too."""
    names = {spec.name for spec in specs}
    for config in sorted(folder.glob("*/adapter_config.json")):
        if config.parent.name not in names:
            raise WloraMergeError(f"{config.parent}: is no adapter of this zoo: move it away, or give another --out.")


def write_index(specs: Sequence[Spec], records: list[dict[str, Any]], folder: Path) -> None:
    """The lists of what has not seen a task, and last of all zoo.json."""
    (folder / "unseen").mkdir(exist_ok=True)
    for job in sorted({job for spec in specs for job in spec.has_seen}):
        lines = [f"../{spec.name}\n" for spec in usable(specs, job)]
        (folder / "unseen" / f"{job.replace(':', '-')}.txt").write_text(f"# have not seen {job}\n" + "".join(lines))
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    scratch = folder / f".{INDEX}"
    scratch.write_text(json.dumps({"versions": versions, "adapters": records}, indent=1) + "\n")
    scratch.rename(folder / INDEX)


def told(record: dict[str, Any]) -> str:
    """One line about a trained adapter."""
    kind = "shuffled" if record["shuffled"] else "true"
    accuracies = f"{record['train_accuracy']:.0f} % of what it learned, {record['test_accuracy']:.0f} % of others"
    return f"{record['name']}: r={record['r']}, {record['targets']}, {kind} labels, {accuracies}, {record['cpu_seconds']} s"


def table(title: str, records: Iterable[dict[str, Any]]) -> Table:
    """A row for each kind of adapter: how many, and the median of what they learned."""
    shown = Table(title=title, title_justify="left")
    for column in ("dataset", "adapters", "labels", "r", "learned, %", "of others, %", "CPU-seconds each", "all"):
        shown.add_column(column, justify="left" if column in ("dataset", "labels") else "right")
    kinds: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for record in records:
        kinds.setdefault((kind_of(record), record["shuffled"]), []).append(record)
    for (kind, shuffled), mine in sorted(kinds.items()):
        ranks = "–".join(str(r) for r in sorted({min(m["r"] for m in mine), max(m["r"] for m in mine)}))
        middle = (
            f"{statistics.median(m[key] for m in mine):.0f}"
            for key in ("train_accuracy", "test_accuracy", "cpu_seconds")
        )
        total = f"{sum(m['cpu_seconds'] for m in mine):.0f}"
        shown.add_row(kind, str(len(mine)), "shuffled" if shuffled else "true", ranks, *middle, total)
    return shown


def kind_of(record: dict[str, Any]) -> str:
    """Of what kind an adapter's data are."""
    if record["dataset"] != "banking77" or record["base"] != "minilm":
        return str(record["dataset"])
    return f"banking77, {len(record['labels'])} intents"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("zoo-out"), help="a folder; a stopped run goes on there")
    parser.add_argument("--only", choices=list(DESIGNS), help="the adapters of one base; default: of both")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(os.environ.get("WLORA_MERGE_REAL_MODELS", "~/.cache/wlora_merge/real-models")).expanduser(),
        help="folder with minilm and smollm2, as ../shared/tools/get_real_models.py makes it",
    )
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    with workers(options.processes) as pool:
        for name in [options.only] if options.only else list(DESIGNS):
            try:
                records = make_zoo(DESIGNS[name](), options.models / name, options.out / name, pool)
            except WloraMergeError as error:
                raise SystemExit(f"Error: {error}") from error
            minutes = sum(record["cpu_seconds"] for record in records) / 60
            console.print(table(f"{name}: {len(records)} adapters, {minutes:.0f} CPU-minutes", records))


if __name__ == "__main__":
    main()
