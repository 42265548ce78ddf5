"""The main job on a zoo that it makes itself: no network, no downloads, two cores, under three minutes.

    python recipes/quickstart --out quickstart-out

The images are scikit-learn's handwritten digits: real ones, shipped inside the package. From them we make

    a base model       a tiny ViT, trained on plain digits
    six adapters       LoRAs, trained with PEFT, each on digits that are shifted in one way: rotated, blurred, inverted, ...

Then someone comes with a few shots, one or three pictures per class, of a shift that no adapter has seen. `wlora-merge
fit` learns from them how much of each adapter each layer should get, `export` folds the result into folders that a server
loads, `verify` checks them. At the end stands a table: the learned mixture against everything simpler, on held-out images.

    digits.py     the images, and the ways to shift them
    zoo.py        the base model and the adapters
    compare.py    the table
    processes.py  all cores at work
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import transformers
from compare import TASK, FewShot, measure, results_table, trials
from digits import DOWNSTREAM, Digits, read_digits, write_pictures
from peft import PeftModel
from processes import quiet, workers
from rich.console import Console
from zoo import Settings, Zoo, accuracy, get_zoo, tensors

from wlora_merge.cli.main import main as wlora_merge_command

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The zoo, the main job, the table."""
    start, options, settings, few = time.perf_counter(), parse(arguments), Settings(), FewShot()
    quiet()
    _, pool_of_shots, held_out = read_digits()
    shift, n = next(iter(DOWNSTREAM)), max(options.shots)
    with workers(options.workers) as pool:
        console.rule("1. a zoo: one base model, and adapters trained with PEFT")
        zoo = get_zoo(options.out, settings, pool, console, fresh=options.fresh)

        console.rule(f"2. the main job: {n} shots per class of '{shift}'")
        main_job(options.out, zoo, pool_of_shots.shots(n, seed=0).shifted(DOWNSTREAM[shift]), few)
        percents = served(options.out, zoo, held_out.shifted(DOWNSTREAM[shift]))

        console.rule("3. was it worth it? everything simpler, measured now")
        results = measure(zoo, settings, few, trials(options.shots, options.seeds), pool, console)
    console.print(results_table(results, options.shots))
    console.print(closing_words(options.out, percents, len(held_out.labels), options.seeds), soft_wrap=True)
    console.print(f"\n{time.perf_counter() - start:.0f} seconds in all.")


def main_job(out: Path, zoo: Zoo, shots: Digits, few: FewShot) -> None:
    """What a user does, with the commands that a user types: fit, three exports, three times verify."""
    shutil.rmtree(out / "shots", ignore_errors=True)
    write_pictures(shots, out / "shots")
    adapters = [part for name, path in zoo.adapters.items() for part in ("--adapter", f"{name}={path}")]
    data = ["--data", out / "shots", "--task", TASK, "--granularity", "layer"]
    learning = [
        "--max-steps",
        few.steps,
        "--batch-size",
        few.batch_size,
        "--learning-rate",
        few.learning_rate,
        "--normalize",
        "all",
    ]
    wlora("fit", "--base", zoo.base, *adapters, *data, *learning, "--out", out / "mixture", "--force")
    for kind in ("dense", "lora", "onnx"):
        wlora("export", out / "mixture", "--format", kind, "--out", out / kind, "--force")
        wlora("verify", out / kind)


def wlora(*arguments: object) -> None:
    """Show a `wlora-merge` command and run it, in this process: that saves the imports of seven new ones."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n$ wlora-merge {shlex.join(words)}", style="bold", soft_wrap=True)
    wlora_merge_command(words, standalone_mode=False)


def served(out: Path, zoo: Zoo, held_out: Digits) -> dict[str, float]:
    """Accuracy of the three exports, each loaded by the library that would serve it and by nothing of ours."""
    from onnxruntime import InferenceSession

    dense = transformers.AutoModelForImageClassification.from_pretrained(out / "dense")
    base = transformers.AutoModelForImageClassification.from_pretrained(zoo.base)
    lora = PeftModel.from_pretrained(base, out / "lora")
    session = InferenceSession(out / "onnx" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    pixels, labels = tensors(held_out, out / "onnx")
    logits = session.run(["logits"], {"pixel_values": pixels.numpy()})[0]
    return {
        "dense": accuracy(dense, held_out, out / "dense"),
        "lora": accuracy(lora, held_out, zoo.base),
        "onnx": 100 * float((logits.argmax(-1) == labels.numpy()).mean()),
    }


def closing_words(out: Path, percents: dict[str, float], judged: int, seeds: int) -> str:
    return f"""\
Accuracy in percent on {judged} held-out images; mean ± standard deviation over {seeds} draws of the shots. Shots are per
class. What has no ± learns nothing from them. Which adapter is the best one alone, only the held-out labels tell.

{out}/mixture  what was learned: mixture.json says how much of each adapter each layer got

Serve one of these; each is loaded by the library of its kind, without wlora_merge:
{out}/dense  {percents["dense"]:.1f} %  AutoModelForImageClassification.from_pretrained("{out}/dense")
{out}/lora   {percents["lora"]:.1f} %  PeftModel.from_pretrained(base_model, "{out}/lora")
{out}/onnx   {percents["onnx"]:.1f} %  onnxruntime.InferenceSession("{out}/onnx/onnx/model.onnx")"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fit, export and verify a mixture of LoRA adapters on real digits.")
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="folder for all that is made")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3], help="images per class to learn from (1 3)")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of shots the table averages over (3)")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4), help="processes (one per core, 4)")
    parser.add_argument("--fresh", action="store_true", help="make the zoo again even if it is there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
