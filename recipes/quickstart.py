"""The main job on a zoo that this file makes itself: no network, no downloads, two cores, under three minutes.

The images are scikit-learn's handwritten digits: 1797 real ones, shipped inside the package. From them we make

    a base model       a tiny ViT, trained on plain digits
    six adapters       LoRAs, trained with PEFT, each on digits that are shifted in one way: rotated, blurred, inverted, ...

Then someone comes with a few shots, one or three pictures per class, of a shift that no adapter has seen. `wlora-merge
fit` learns from them how much of each adapter each module should get, `export` folds the result into folders that a server
loads, `verify` checks them. At the end stands a table: the learned mixture against everything simpler, on held-out images.

Read it from the bottom: `main` is the story, what stands above it are the parts.

    python recipes/quickstart.py --out quickstart-out
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageFilter
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

import wlora_merge
from wlora_merge.cli import main as wlora_merge_command

SIZE = 16  # pixels; the digits are 8 × 8, drawn twice as large so that shifts have room
TASK = "image-classification"
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]  # every linear layer but the classifier

console = Console(highlight=False)
Pool = Any  # what has a `map` like the built-in one: a ProcessPoolExecutor, or this process itself (`Here`)


@dataclass(frozen=True)
class Settings:
    """What the zoo is made with. A zoo made with other settings is not reused."""

    base_steps: int = 600
    base_learning_rate: float = 2e-3
    adapter_steps: int = 400
    adapter_learning_rate: float = 5e-3
    batch_size: int = 64
    r: int = 8
    seed: int = 0


@dataclass(frozen=True)
class FewShot:
    """How one learns from a few shots. All of this was chosen on draws of shots that the table does not use."""

    steps: int = 60
    learning_rate: float = 0.15  # of the mixture logits
    scratch_steps: int = 100
    scratch_learning_rate: float = 1e-2
    batch_size: int = 32


# ---------------------------------------------------------------------------------------------------------- shifts
# A shift takes images [E, 16, 16] uint8 and a strength from 0 to 1, and gives images of the same shape.

Images = np.ndarray
Shift = Callable[..., Images]  # (images, strength = 1)


def _each(images: Images, draw: Callable[[Image.Image], Image.Image]) -> Images:
    return np.stack([np.asarray(draw(Image.fromarray(image))) for image in images])


def rotated(images: Images, strength: float = 1.0) -> Images:
    """By up to 45 degrees, counter-clockwise; a strength above 1 turns further."""
    return _each(images, lambda image: image.rotate(45 * strength, Image.Resampling.BILINEAR))


def blurred(images: Images, strength: float = 1.0) -> Images:
    """With a Gaussian of up to 2 pixels."""
    return _each(images, lambda image: image.filter(ImageFilter.GaussianBlur(2 * strength)))


def inverted(images: Images, strength: float = 1.0) -> Images:
    """Black on white; there is no half of it."""
    return 255 - images


def noisy(images: Images, strength: float = 1.0) -> Images:
    """Gaussian noise of up to 60 grey levels, the same whenever it is asked for."""
    noise = np.random.default_rng(0).normal(0, 60 * strength, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def faded(images: Images, strength: float = 1.0) -> Images:
    """Contrast down to a fifth, around middle grey."""
    return (images * (1 - 0.8 * strength) + 102 * strength).astype(np.uint8)


def moved(images: Images, strength: float = 1.0) -> Images:
    """By up to 3 pixels to the right and down."""
    by = round(3 * strength)
    return _each(images, lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, -by, 0, 1, -by)))


UPSTREAM: dict[str, Shift] = {
    "rotated": rotated,
    "blurred": blurred,
    "inverted": inverted,
    "noisy": noisy,
    "faded": faded,
    "moved": moved,
}
STRENGTHS = (0.4, 0.7, 1.0)  # what an adapter is trained on: a shift in several strengths, as in real collections

# What no adapter has seen: two compositions of two shifts, and one shift further than any adapter saw it.
DOWNSTREAM: dict[str, Callable[[Images], Images]] = {
    "inverted + blurred": lambda images: blurred(inverted(images)),
    "inverted + faded": lambda images: faded(inverted(images), 0.75),
    "rotated further": lambda images: rotated(images, 1.33),
}


# ---------------------------------------------------------------------------------------------------------- digits


@dataclass(frozen=True)
class Digits:
    """Images [E, 16, 16] uint8 and their labels [E]."""

    images: Images
    labels: np.ndarray

    def select(self, indices: np.ndarray) -> Digits:
        return Digits(self.images[indices], self.labels[indices])

    def shifted(self, shift: Callable[[Images], Images]) -> Digits:
        return Digits(shift(self.images), self.labels)

    def strengths(self, shift: Shift) -> Digits:
        """All images, once in each strength of a shift."""
        images = np.concatenate([shift(self.images, strength) for strength in STRENGTHS])
        return Digits(images, np.tile(self.labels, len(STRENGTHS)))

    def shots(self, per_class: int, seed: int) -> Digits:
        """As many images of each class, drawn at random."""
        order = np.random.default_rng(seed).permutation(len(self.labels))
        return self.select(np.concatenate([order[self.labels[order] == digit][:per_class] for digit in range(10)]))


@cache
def read_digits() -> tuple[Digits, Digits, Digits]:
    """Three parts that share no image: 900 to make the zoo from, 300 to draw shots from, 597 held out to judge on."""
    data = load_digits()
    images = (data.images * 255 / 16).round().astype(np.uint8)  # 0..16 in the data set
    digits = Digits(_each(images, lambda i: i.resize((SIZE, SIZE), Image.Resampling.BILINEAR)), data.target)
    order = np.random.default_rng(0).permutation(len(data.target))
    return digits.select(order[:900]), digits.select(order[900:1200]), digits.select(order[1200:])


def tensors(digits: Digits, base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """pixel_values [E, 3, 16, 16] and labels [E], by the base's own image processor, as a server does it."""
    processor = AutoImageProcessor.from_pretrained(base)
    pictures = [Image.fromarray(image).convert("RGB") for image in digits.images]
    return processor(pictures, return_tensors="pt")["pixel_values"], torch.from_numpy(digits.labels)


def write_pictures(digits: Digits, folder: Path) -> None:
    """As a user would have them: PNG files, one folder for each class."""
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        path = folder / str(label) / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


# -------------------------------------------------------------------------------------------- train and judge a model


def train(
    model: torch.nn.Module, digits: Digits, base: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    """AdamW with a linearly falling learning rate on what requires gradients."""
    pixels, labels = tensors(digits, base)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        batch = torch.randperm(len(labels), generator=generator)[:batch_size]
        model(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, digits: Digits, base: Path) -> float:
    """In percent."""
    pixels, labels = tensors(digits, base)
    return 100 * (model.eval()(pixel_values=pixels).logits.argmax(-1) == labels).float().mean().item()


def new_lora(base: Path, r: int, seed: int) -> PeftModel:
    """A fresh LoRA on the base, by PEFT. Without a task type, so that PEFT leaves the classifier frozen: the labels
    are the same ten digits for everyone."""
    torch.manual_seed(seed)
    model = ViTForImageClassification.from_pretrained(base)
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGET_MODULES))


# ------------------------------------------------------------------------------------------------------------- the zoo


@dataclass(frozen=True)
class Zoo:
    """Ordinary Hugging Face folders: a base model and the adapters made for it."""

    base: Path
    adapters: dict[str, Path]


def get_zoo(out: Path, settings: Settings, pool: Pool, *, fresh: bool = False) -> Zoo:
    """The zoo in `out/zoo`: found there complete, or made beside it and moved into place in one step."""
    folder = out / "zoo"
    wanted = json.dumps({"settings": asdict(settings), "strengths": STRENGTHS, "adapters": list(UPSTREAM)}, indent=2)
    note = folder / "zoo.json"  # says that the zoo is complete, and how it was made
    if not fresh and note.is_file() and note.read_text() == wanted:
        console.print(f"reusing the zoo in {folder} (--fresh makes it again)")
    else:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".zoo-") as scratch:
            made = Path(scratch) / "zoo"
            build_zoo(made, folder / "base", settings, pool)
            (made / "zoo.json").write_text(wanted)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return Zoo(folder / "base", {name: folder / "adapters" / name for name in UPSTREAM})


def build_zoo(folder: Path, base_name: Path, settings: Settings, pool: Pool) -> None:
    """Train and save the base, then every adapter; `base_name` is what the adapters' configs call the base."""
    console.print(
        "base model, on plain digits: {:.0f} % on held-out images".format(train_base(folder / "base", settings))
    )
    train_one = partial(train_adapter, folder, base_name, settings)
    for name, (before, after) in zip(UPSTREAM, pool.map(train_one, UPSTREAM), strict=True):
        console.print(f"adapter {name}: from {before:.0f} to {after:.0f} % on held-out images that are {name}")


def train_adapter(folder: Path, base_name: Path, settings: Settings, name: str) -> tuple[float, float]:
    """One LoRA, trained and saved by PEFT alone; the accuracy on its own shift, without and with it."""
    digits, _, held_out = read_digits()
    base, judged = folder / "base", held_out.shifted(UPSTREAM[name])
    model = new_lora(base, settings.r, settings.seed)
    before = accuracy(model, judged, base)
    train(
        model,
        digits.strengths(UPSTREAM[name]),
        base,
        steps=settings.adapter_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.adapter_learning_rate,
        seed=settings.seed,
    )
    model.peft_config["default"].base_model_name_or_path = str(base_name)
    model.save_pretrained(folder / "adapters" / name)
    return before, accuracy(model, judged, base)


def train_base(folder: Path, settings: Settings) -> float:
    """A ViT of four layers, width 64, 4 × 4 patches: 140,000 parameters; its accuracy on plain held-out digits."""
    digits, _, held_out = read_digits()
    names = {digit: str(digit) for digit in range(10)}
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SIZE,
        patch_size=4,
        id2label=names,
        label2id={name: digit for digit, name in names.items()},
    )
    transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    torch.manual_seed(settings.seed)
    model = ViTForImageClassification(config)
    train(
        model,
        digits,
        folder,
        steps=settings.base_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.base_learning_rate,
        seed=settings.seed,
    )
    # under the names that the modules have: transformers 5 would spell a ViT's tensors as version 4 called its modules
    model.save_pretrained(folder, save_original_format=False)
    return accuracy(model, held_out, folder)


# ------------------------------------------------------------------------------------------------------------- measure

BASE, UNIFORM, SCRATCH = "base model", "uniform composition", "LoRA from scratch"
ALONE = {f"{name} alone": name for name in UPSTREAM}
LEARNED = {"learned, per layer": "layer", "learned, per module": "module"}  # method -> granularity
METHODS = [BASE, *ALONE, UNIFORM, *LEARNED, SCRATCH]  # the rows of the table


@dataclass(frozen=True)
class Trial:
    """One number to measure. What needs no shots is tried once, with `per_class` 0."""

    method: str
    shift: str
    per_class: int = 0
    seed: int = 0


Results = dict[tuple[str, str, int], list[float]]
"""(method, shift, shots per class) -> accuracy in percent, one for each seed."""


def trials(shots: Sequence[int], seeds: int) -> list[Trial]:
    """All that the table needs."""
    fixed = [Trial(method, shift) for shift in DOWNSTREAM for method in (BASE, *ALONE, UNIFORM)]
    drawn = [(shift, n, seed) for shift in DOWNSTREAM for n in shots for seed in range(seeds)]
    return fixed + [Trial(method, *draw) for draw in drawn for method in (*LEARNED, SCRATCH)]


def measure(zoo: Zoo, settings: Settings, few: FewShot, planned: Sequence[Trial], pool: Pool) -> Results:
    """Run every trial."""
    results: Results = {}
    done = pool.map(partial(run_trial, zoo, settings, few), planned)
    for trial, percent in track(zip(planned, done, strict=True), "", total=len(planned), console=console):
        results.setdefault((trial.method, trial.shift, trial.per_class), []).append(percent)
    return results


def run_trial(zoo: Zoo, settings: Settings, few: FewShot, trial: Trial) -> float:
    """Make the model of this trial from its shots, and judge it on shifted held-out images."""
    _, pool, held_out = read_digits()
    change = DOWNSTREAM[trial.shift]
    shots = pool.shots(trial.per_class, trial.seed).shifted(change) if trial.per_class else None
    return accuracy(make_model(zoo, settings, few, trial, shots), held_out.shifted(change), zoo.base)


def make_model(zoo: Zoo, settings: Settings, few: FewShot, trial: Trial, shots: Digits | None) -> torch.nn.Module:
    """The method of this trial."""
    if shots is None:
        model = ViTForImageClassification.from_pretrained(zoo.base)
        if trial.method == UNIFORM:
            return wlora_merge.attach(model, list(zoo.adapters.items()))  # the logits start at zero
        if trial.method == BASE:
            return model
        return PeftModel.from_pretrained(model, zoo.adapters[ALONE[trial.method]])
    if trial.method == SCRATCH:
        return from_scratch(zoo, shots, settings, few, trial.seed)
    return learned(zoo, shots, few, trial.seed, LEARNED[trial.method])


def learned(zoo: Zoo, shots: Digits, few: FewShot, seed: int, granularity: str) -> torch.nn.Module:
    """The product, in Python: fit, export, and load what was exported. So the table judges what a server would load."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pictures(shots, folder / "shots")
        mixture = wlora_merge.fit(
            zoo.base,
            list(zoo.adapters.items()),
            folder / "shots",
            TASK,
            granularity=granularity,
            max_steps=few.steps,
            batch_size=few.batch_size,
            learning_rate=few.learning_rate,
            held_out=0.0,
            seed=seed,
        )
        wlora_merge.export(mixture, "dense", folder / "dense")
        return ViTForImageClassification.from_pretrained(folder / "dense")


def from_scratch(zoo: Zoo, shots: Digits, settings: Settings, few: FewShot, seed: int) -> torch.nn.Module:
    """What one would do without the adapters: train a new LoRA on the shots."""
    model = new_lora(zoo.base, settings.r, seed)
    train(
        model,
        shots,
        zoo.base,
        steps=few.scratch_steps,
        batch_size=few.batch_size,
        learning_rate=few.scratch_learning_rate,
        seed=seed,
    )
    return model


def results_table(results: Results, shots: Sequence[int]) -> Table:
    """One row for each method, one column for each shift and number of shots; the best of each column in bold."""
    columns = [(shift, n) for shift in dict.fromkeys(shift for _, shift, _ in results) for n in shots]
    cells = {(m, c): results.get((m, *c)) or results[m, c[0], 0] for m in METHODS for c in columns}
    best = {c: max(statistics.mean(cells[m, c]) for m in METHODS) for c in columns}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for shift, n in columns:
        table.add_column(
            "\n".join([*shift.replace(" + ", "+ ").split(" "), f"{n} shot{'s' * (n > 1)}"]), justify="right"
        )
    for method in METHODS:
        row = [_cell(cells[method, c], statistics.mean(cells[method, c]) == best[c]) for c in columns]
        table.add_row(method, *row, style="cyan" if method in LEARNED else None)
    return table


def _cell(values: Sequence[float], best: bool) -> str:
    text = f"{statistics.mean(values):.0f}" + (f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else "")
    return f"[bold]{text}[/bold]" if best else text


# ------------------------------------------------------------------------------------------------------ the main job


def main_job(out: Path, zoo: Zoo, shots: Digits, few: FewShot) -> None:
    """What a user does, with the commands that a user types: fit, three exports, three times verify."""
    shutil.rmtree(out / "shots", ignore_errors=True)
    write_pictures(shots, out / "shots")
    adapters = [part for name, path in zoo.adapters.items() for part in ("--adapter", f"{name}={path}")]
    data = ["--data", out / "shots", "--task", TASK, "--granularity", "layer"]
    learning = ["--max-steps", few.steps, "--batch-size", few.batch_size, "--learning-rate", few.learning_rate]
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


# -------------------------------------------------------------------------------------------------------------- story


class Here:
    """A pool of no processes, for tests and for one core."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)


@contextmanager
def workers(count: int) -> Iterator[Pool]:
    """Processes that train side by side, one thread each: a model this small cannot use two."""
    if count == 1:
        yield Here()
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        yield pool


def quiet() -> None:
    """One thread, and no chatter from the libraries between our lines."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fit, export and verify a mixture of LoRA adapters on real digits.")
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="folder for all that is made")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3], help="images per class to learn from (1 3)")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of shots the table averages over (3)")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4), help="processes (one per core, 4)")
    parser.add_argument("--fresh", action="store_true", help="make the zoo again even if it is there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The zoo, the main job, the table."""
    start, options, settings, few = time.perf_counter(), parse(arguments), Settings(), FewShot()
    quiet()
    _, pool_of_shots, held_out = read_digits()
    shift, n = next(iter(DOWNSTREAM)), max(options.shots)
    with workers(options.workers) as pool:
        console.rule("1. a zoo: one base model, and adapters trained with PEFT")
        zoo = get_zoo(options.out, settings, pool, fresh=options.fresh)

        console.rule(f"2. the main job: {n} shots per class of '{shift}'")
        main_job(options.out, zoo, pool_of_shots.shots(n, seed=0).shifted(DOWNSTREAM[shift]), few)
        percents = served(options.out, zoo, held_out.shifted(DOWNSTREAM[shift]))

        console.rule("3. was it worth it? everything simpler, measured now")
        results = measure(zoo, settings, few, trials(options.shots, options.seeds), pool)
    console.print(results_table(results, options.shots))
    console.print(closing_words(options.out, percents, len(held_out.labels), options.seeds), soft_wrap=True)
    console.print(f"\n{time.perf_counter() - start:.0f} seconds in all.")


def closing_words(out: Path, percents: dict[str, float], judged: int, seeds: int) -> str:
    return f"""\
Accuracy in percent on {judged} held-out images; mean ± standard deviation over {seeds} draws of the shots. Shots are per
class. What has no ± learns nothing from them. Which adapter is the best one alone, only the held-out labels tell.

{out}/mixture  what was learned: mixture.json says how much of each adapter each layer got

Serve one of these; each is loaded by the library of its kind, without wlora_merge:
{out}/dense  {percents["dense"]:.1f} %  AutoModelForImageClassification.from_pretrained("{out}/dense")
{out}/lora   {percents["lora"]:.1f} %  PeftModel.from_pretrained(base_model, "{out}/lora")
{out}/onnx   {percents["onnx"]:.1f} %  onnxruntime.InferenceSession("{out}/onnx/onnx/model.onnx")"""


if __name__ == "__main__":
    main()
