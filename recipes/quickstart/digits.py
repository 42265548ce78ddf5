"""The images, and the ways in which they are shifted.

scikit-learn ships 1797 real handwritten digits of 8 × 8 pixels. A shift takes images and gives images; six of them have an
adapter in the zoo, three more are what someone comes with later. This file knows pictures and no models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

SIZE = 16  # pixels; the digits are drawn twice as large as they come, so that shifts have room

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
    """Gaussian noise of up to 60 grey levels, another for other images, the same for the same ones."""
    noise = np.random.default_rng(int(images.sum())).normal(0, 60 * strength, images.shape)
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


def write_pictures(digits: Digits, folder: Path) -> None:
    """As a user would have them: PNG files, one folder for each class."""
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        path = folder / str(label) / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
