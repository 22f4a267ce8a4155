"""`kd data show`: pictures with their boxes drawn, as training gets them."""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from PIL import Image

from kdtoolkit.data.dataset import DetectionDataset, Sample
from kdtoolkit.data.drawing import draw_boxes
from kdtoolkit.errors import KDError

LONGEST_NAME = 60  # characters


def show(dataset: DetectionDataset, folder: Path, *, count: int, seed: int) -> list[Path]:
    """Draw the boxes of `count` images, chosen by `seed`, and write them into `folder` as JPEG files.

    Small pictures are enlarged, so that the names of classes do not hide them.

    Raises KDError if an image cannot be decoded, or the folder cannot be written.
    """
    chosen = sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset))))
    names = [image["file_name"] for image in dataset.coco()["images"]]
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in chosen:
            pixels, sample = dataset[index]
            # Names of data may hold anything.
            stem = re.sub(r"[^\w-]+", "_", Path(names[index].replace("\\", "/")).stem)[-LONGEST_NAME:]
            path = folder / f"{index:06}_{stem}.jpg"
            drawn(pixels, sample, dataset.class_names).save(path, quality=90)
            written.append(path)
    except OSError as error:
        raise KDError(f"cannot write pictures to {folder}: {error.strerror or error}") from error
    return written


def drawn(pixels: torch.Tensor, sample: Sample, class_names: tuple[str, ...]) -> Image.Image:
    """An image (3, H, W) uint8 with its boxes and the names of their classes."""
    labels = sample["labels"].tolist()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return draw_boxes(picture, sample["boxes"].tolist(), labels, [class_names[label] for label in labels])
