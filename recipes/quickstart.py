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
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

import wlora_merge

SIZE = 16  # pixels; the digits are 8 × 8, drawn twice as large so that shifts have room
TASK = "image-classification"
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]  # every linear layer but the classifier

console = Console(highlight=False)


@dataclass(frozen=True)
class Settings:
    """What the zoo and the fits are made with. A zoo made with other settings is not reused."""

    base_steps: int = 600
    base_learning_rate: float = 2e-3
    adapter_steps: int = 400
    learning_rate: float = 5e-3
    batch_size: int = 32
    r: int = 4
    seed: int = 0


@dataclass(frozen=True)
class FewShot:
    """How one learns from a few shots: equally many steps on equally large batches for every method."""

    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 0.1  # of the mixture logits
    scratch_learning_rate: float = 1e-2  # of a LoRA from scratch: the best of 0.002, 0.005, 0.01 on other draws


# ---------------------------------------------------------------------------------------------------------- shifts
# A shift takes images [E, 16, 16] uint8 and a strength from 0 to 1, and gives images of the same shape.

Images = np.ndarray
Shift = Callable[[Images, float], Images]


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
    "inverted and blurred": lambda images: blurred(inverted(images), 0.75),
    "inverted and faded": lambda images: faded(inverted(images), 0.75),
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


def get_zoo(out: Path, digits: Digits, settings: Settings, *, fresh: bool = False) -> Zoo:
    """The zoo in `out/zoo`: found there complete, or made beside it and moved into place in one step."""
    folder = out / "zoo"
    wanted = json.dumps({"settings": asdict(settings), "adapters": list(UPSTREAM)}, indent=2)
    note = folder / "zoo.json"  # written last
    if fresh or not note.is_file() or note.read_text() != wanted:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".zoo-") as scratch:
            made = Path(scratch) / "zoo"
            build_zoo(made, folder / "base", digits, settings)
            (made / "zoo.json").write_text(wanted)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    else:
        console.print(f"reusing the zoo in {folder} (--fresh makes it again)")
    return Zoo(folder / "base", {name: folder / "adapters" / name for name in UPSTREAM})


def build_zoo(folder: Path, base_name: Path, digits: Digits, settings: Settings) -> None:
    """Train and save the base and every adapter; `base_name` is what the adapters' configs call the base."""
    with timed("base model: plain digits"):
        train_base(folder / "base", digits, settings)
    for name, shift in UPSTREAM.items():
        with timed(f"adapter {name}"):
            model = new_lora(folder / "base", settings.r, settings.seed)
            train(model, digits.strengths(shift), folder / "base", steps=settings.adapter_steps,
                  batch_size=settings.batch_size, learning_rate=settings.learning_rate, seed=settings.seed)  # fmt: skip
            model.peft_config["default"].base_model_name_or_path = str(base_name)
            model.save_pretrained(folder / "adapters" / name)


def train_base(folder: Path, digits: Digits, settings: Settings) -> None:
    """A ViT of four layers, width 64, with 4 × 4 patches: 136,000 parameters."""
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
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    torch.manual_seed(settings.seed)
    model = ViTForImageClassification(config)
    train(model, digits, folder, steps=settings.base_steps, batch_size=settings.batch_size,
          learning_rate=settings.base_learning_rate, seed=settings.seed)  # fmt: skip
    # under the names that the modules have: transformers 5 would spell a ViT's tensors as version 4 called its modules
    model.save_pretrained(folder, save_original_format=False)


# ------------------------------------------------------------------------------------------------------------- measure

Results = dict[tuple[str, str, int], list[float]]
"""(method, shift, shots per class) -> accuracy in percent, one for each seed; shots 0: needs none, one number."""
BASE, UNIFORM, LEARNED, SCRATCH = "base model", "uniform composition", "learned mixture", "LoRA from scratch"


def methods(adapters: Sequence[str]) -> list[str]:
    """The rows of the table."""
    return [BASE, *(f"adapter {name} alone" for name in adapters), UNIFORM, LEARNED, SCRATCH]


def measure(
    zoo: Zoo, pool: Digits, held_out: Digits, settings: Settings, few: FewShot, shots: Sequence[int], seeds: int
) -> Results:
    """Every method on every downstream shift; what learns does so once for each number of shots and each seed."""
    fixed = {BASE: ViTForImageClassification.from_pretrained(zoo.base), UNIFORM: uniform(zoo)}
    for name, folder in zoo.adapters.items():
        model = ViTForImageClassification.from_pretrained(zoo.base)
        fixed[f"adapter {name} alone"] = PeftModel.from_pretrained(model, folder)
    results: Results = {}
    for shift, change in DOWNSTREAM.items():
        judged = held_out.shifted(change)
        with timed(f"{shift}: {len(shots)} numbers of shots × {seeds} seeds"):
            for method, model in fixed.items():
                results[method, shift, 0] = [accuracy(model, judged, zoo.base)]
            for per_class in shots:
                for seed in range(seeds):
                    few_shots = pool.shots(per_class, seed).shifted(change)
                    for method, learn in ((LEARNED, learned), (SCRATCH, from_scratch)):
                        model = learn(zoo, few_shots, settings, few, seed)
                        results.setdefault((method, shift, per_class), []).append(accuracy(model, judged, zoo.base))
    return results


def uniform(zoo: Zoo) -> torch.nn.Module:
    """Uniform composition: all adapters attached, the logits at zero."""
    model = ViTForImageClassification.from_pretrained(zoo.base)
    return wlora_merge.attach(model, list(zoo.adapters.items()))


def learned(zoo: Zoo, shots: Digits, settings: Settings, few: FewShot, seed: int) -> torch.nn.Module:
    """The product, in Python: fit, export, and load what was exported. So the table judges what a server would load."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pictures(shots, folder / "shots")
        wlora_merge.fit(
            zoo.base,
            list(zoo.adapters.items()),
            folder / "shots",
            TASK,
            folder / "mixture",
            seed=seed,
            max_steps=few.steps,
            batch_size=few.batch_size,
            learning_rate=few.learning_rate,
            held_out=0.0,
        )
        wlora_merge.export(folder / "mixture", "dense", folder / "dense")
        return ViTForImageClassification.from_pretrained(folder / "dense")


def from_scratch(zoo: Zoo, shots: Digits, settings: Settings, few: FewShot, seed: int) -> torch.nn.Module:
    """What one would do without the adapters: train a new LoRA on the shots."""
    model = new_lora(zoo.base, settings.r, seed)
    train(model, shots, zoo.base, steps=few.steps, batch_size=few.batch_size,
          learning_rate=few.scratch_learning_rate, seed=seed)  # fmt: skip
    return model


def results_table(results: Results, adapters: Sequence[str], shots: Sequence[int], seeds: int) -> Table:
    """One row for each method, one column for each shift and number of shots; the best of each column in bold."""
    columns = [(shift, n) for shift in dict.fromkeys(shift for _, shift, _ in results) for n in shots]
    table = Table(title=f"accuracy on held-out images, percent; mean ± standard deviation over {seeds} draws of shots")
    table.add_column("")
    for shift, n in columns:
        table.add_column(f"{shift}\n{n} per class", justify="right")
    cells = {(m, c): results.get((m, *c)) or results[m, c[0], 0] for m in methods(adapters) for c in columns}
    best = {c: max(statistics.mean(cells[m, c]) for m in methods(adapters)) for c in columns}
    for method in methods(adapters):
        row = [_cell(cells[method, c], statistics.mean(cells[method, c]) == best[c]) for c in columns]
        table.add_row(method, *row, style="cyan" if method == LEARNED else None)
    return table


def _cell(values: Sequence[float], best: bool) -> str:
    text = f"{statistics.mean(values):.0f}" + (f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else "")
    return f"[bold]{text}[/bold]" if best else text


# ------------------------------------------------------------------------------------------------------ the main job


def main_job(out: Path, zoo: Zoo, shots: Digits, few: FewShot) -> None:
    """The same as a user does it, with the commands: fit, three exports, three times verify."""
    shutil.rmtree(out / "shots", ignore_errors=True)
    write_pictures(shots, out / "shots")
    adapters = [part for name, path in zoo.adapters.items() for part in ("--adapter", f"{name}={path}")]
    learning = ["--max-steps", few.steps, "--batch-size", few.batch_size, "--learning-rate", few.learning_rate]
    wlora("fit", "--base", zoo.base, *adapters, "--data", out / "shots", "--task", TASK, *learning,
          "--out", out / "mixture", "--force")  # fmt: skip
    for kind in ("dense", "lora", "onnx"):
        wlora("export", out / "mixture", "--format", kind, "--out", out / kind, "--force")
        wlora("verify", out / kind)


def wlora(*arguments: object) -> None:
    """Run `wlora-merge` as a user would, and show the command."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n$ wlora-merge {shlex.join(words)}", style="bold", soft_wrap=True)
    subprocess.run([sys.executable, "-m", "wlora_merge", *words], check=True)


# -------------------------------------------------------------------------------------------------------------- story


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    console.print(f"  {what} [dim]{time.perf_counter() - start:.0f} s[/dim]")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fit, export and verify a mixture of LoRA adapters on handwritten digits."
    )
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="folder for everything that is made")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3], help="images per class to learn from (1 3)")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of shots the table averages over (3)")
    parser.add_argument("--fresh", action="store_true", help="make the zoo again even if it is there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, settings: Settings = Settings(), few: FewShot = FewShot()) -> Results:
    """The zoo, the main job, the table."""
    options = parse(arguments)
    quiet()
    digits, pool, held_out = read_digits()

    console.rule("1. the zoo: a base model, and adapters that PEFT trains")
    zoo = get_zoo(options.out, digits, settings, fresh=options.fresh)

    shift, per_class = next(iter(DOWNSTREAM)), max(options.shots)
    console.rule(f"2. the main job: {per_class} shots per class of '{shift}', which no adapter saw")
    main_job(options.out, zoo, pool.shots(per_class, seed=0).shifted(DOWNSTREAM[shift]), few)

    console.rule("3. is it any good? everything measured now, on held-out images")
    results = measure(zoo, pool, held_out, settings, few, options.shots, options.seeds)
    console.print(results_table(results, list(zoo.adapters), options.shots, options.seeds))
    console.print(closing_words(options.out), soft_wrap=True)
    return results


def closing_words(out: Path) -> str:
    return f"""
{out}/mixture  the learned mixture: open mixture.json to see how much of each adapter each module got
{out}/dense    one model, nothing added at run time: AutoModelForImageClassification.from_pretrained("{out}/dense")
{out}/lora     the mixture as one LoRA, for a server that keeps the base: PeftModel.from_pretrained(model, "{out}/lora")
{out}/onnx     for ONNX Runtime, Optimum and transformers.js: InferenceSession("{out}/onnx/onnx/model.onnx")"""


def quiet() -> None:
    """One thread: for a model this small a second one costs more than it brings. And no chatter from the libraries."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torchvision.*")


if __name__ == "__main__":
    main()
