"""The zoo: a tiny ViT trained on plain digits, and one LoRA for each shift, trained and saved by PEFT alone.

The folders are what one finds on the hub: nothing in them knows of wlora_merge, and this file does not import it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from digits import SIZE, STRENGTHS, UPSTREAM, Digits, read_digits
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from rich.console import Console
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]  # every linear layer but the classifier


@dataclass(frozen=True)
class Settings:
    """What the zoo is made with. A zoo made with other settings is not reused."""

    base_steps: int = 600
    base_batch_size: int = 64
    base_learning_rate: float = 2e-3
    adapter_steps: int = 400
    adapter_batch_size: int = 64
    adapter_learning_rate: float = 5e-3
    r: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Zoo:
    """Ordinary Hugging Face folders: a base model and the adapters made for it."""

    base: Path
    adapters: dict[str, Path]


def get_zoo(out: Path, settings: Settings, pool: Executor, console: Console, *, fresh: bool = False) -> Zoo:
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
            build_zoo(made, folder / "base", settings, pool, console)
            (made / "zoo.json").write_text(wanted)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return Zoo(folder / "base", {name: folder / "adapters" / name for name in UPSTREAM})


def build_zoo(folder: Path, base_name: Path, settings: Settings, pool: Executor, console: Console) -> None:
    """Train and save the base, then every adapter; `base_name` is what the adapters' configs call the base."""
    plain = train_base(folder / "base", settings)
    console.print(f"base model: {plain:.0f} % on held-out images, all plain")
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
        batch_size=settings.adapter_batch_size,
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
        batch_size=settings.base_batch_size,
        learning_rate=settings.base_learning_rate,
        seed=settings.seed,
    )
    # under the names that the modules have: transformers 5 would spell a ViT's tensors as version 4 called its modules
    model.save_pretrained(folder, save_original_format=False)
    return accuracy(model, held_out, folder)


# -------------------------------------------------------------------------------------------- train and judge a model


def tensors(digits: Digits, base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """pixel_values [E, 3, 16, 16] and labels [E], by the base's own image processor, as a server does it."""
    processor = AutoImageProcessor.from_pretrained(base)
    pictures = [Image.fromarray(image).convert("RGB") for image in digits.images]
    return processor(pictures, return_tensors="pt")["pixel_values"], torch.from_numpy(digits.labels)


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
