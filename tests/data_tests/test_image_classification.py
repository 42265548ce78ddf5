"""The task image-classification."""

from __future__ import annotations

from pathlib import Path

import pytest

from wlora_merge.constants import SINGLE
from wlora_merge.data.examples import read_examples
from wlora_merge.data.tasks import get_task


@pytest.mark.parametrize("channels", [1, 3])
def test_images_take_the_channels_of_their_processor(tmp_path: Path, channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    half = [0.5] * channels
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=half, image_std=half).save_pretrained(
        tmp_path / "base"
    )
    for name, value in (("dark", 0), ("light", 255)):
        (tmp_path / "set" / name).mkdir(parents=True)
        image.new("RGBA" if value else "L", (4, 4), (value,) * 4 if value else value).save(
            tmp_path / "set" / name / "1.png"
        )
    task = get_task("image-classification")
    data = read_examples(tmp_path / "set", task=task.name)
    processor = task.load_processor(tmp_path / "base")
    encoded = task.encode(data, processor, labels=task.labels(data))
    batch = task.collator(processor)([encoded[0], encoded[-1]])
    assert batch["pixel_values"].shape == (2, channels, 8, 8)
    assert batch["pixel_values"].amin((1, 2, 3)).tolist() == [-1.0, 1.0]
    assert batch["labels"].tolist() == [0, 1]
    assert task.config_changes(task.labels(data))["problem_type"] == SINGLE
    assert "pad_token_id" not in task.config_changes(task.labels(data), processor)
