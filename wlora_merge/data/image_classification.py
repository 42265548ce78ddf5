"""Images as pixel values, decoded and processed when they are asked for.

A picture of 224×224 takes 600 kB as pixel values, so what is processed is kept only up to a limit. This room knows
images and image processors. It knows neither models nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .columns import LABEL_NAMES, Form
from .labels import LabelSet
from .task import Encoded, load_auto
from .text_classification import TextClassification, targets

if TYPE_CHECKING:
    import torch

    from .examples import Examples

KEEP_BYTES = 1 << 30  # of processed images, for each set of examples


class EncodedImages(Sequence[dict[str, Any]]):
    """A sequence of {pixel_values [C, H, W] float32, labels}."""

    def __init__(self, examples: Examples, processor: Any, targets: Sequence[Any]) -> None:
        self.examples, self.processor, self.targets = examples, processor, targets
        # one mean for each channel: a processor with one mean wants one channel
        self.mode = "L" if len(getattr(processor, "image_mean", None) or "RGB") == 1 else "RGB"
        self._kept: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> Any:
        return {"pixel_values": self._pixels(range(len(self))[index]), "labels": self.targets[index]}

    def _pixels(self, index: int) -> torch.Tensor:
        if index in self._kept:
            return self._kept[index]
        import PIL.Image

        try:
            image = self.examples[index]["image"].convert(self.mode)
        except (OSError, SyntaxError, ValueError, AttributeError, PIL.Image.DecompressionBombError) as error:
            # an AttributeError: no image at all
            raise DataError(f"image {index + 1} of {self.examples.source} cannot be decoded: {error}.") from error
        pixels: torch.Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        if (len(self._kept) + 1) * pixels.numel() * pixels.element_size() <= KEEP_BYTES:
            self._kept[index] = pixels
        return pixels


class ImageClassification(TextClassification):
    """One image: a class, several, or a number."""

    def config_changes(self, labels: LabelSet | None, processor: Any = None) -> dict[str, Any]:
        return super().config_changes(labels)

    def load_processor(self, base_folder: str | Path) -> Any:
        return load_auto("AutoImageProcessor", base_folder, "image processor")

    def encode(
        self, examples: Examples, processor: Any, *, max_length: int | None = None, labels: LabelSet | None = None
    ) -> Encoded:
        return EncodedImages(examples, processor, targets(examples, labels))

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        import transformers

        return transformers.DefaultDataCollator()


IMAGE_CLASSIFICATION = ImageClassification(
    name="image-classification",
    auto_class_name="AutoModelForImageClassification",
    pipeline_tag="image-classification",
    has_labels=True,
    classifies_examples=True,
    takes_images=True,
    forms=(Form(("image", "label")),),
    conventions={"image": ("image", "img", "picture"), "label": LABEL_NAMES},
)
