"""`kd data show`: pictures with their boxes drawn, as training gets them."""

from __future__ import annotations

import colorsys
import random
import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from kdtoolkit.data.dataset import DetectionDataset, Sample
from kdtoolkit.errors import KDError

LONGEST_NAME = 60  # characters


def show(dataset: DetectionDataset, folder: Path, *, count: int, seed: int) -> list[Path]:
    """Draw the boxes of `count` images, chosen by `seed`, and write them into `folder` as JPEG files.

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
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    longest = max(picture.size)
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont = ImageFont.load_default(max(10, longest // 50))
    for (x1, y1, x2, y2), label in zip(sample["boxes"].tolist(), sample["labels"].tolist(), strict=True):
        colour = _colour(label)
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour, width=max(1, longest // 400))
        name = class_names[label]
        left, top, right, bottom = draw.textbbox((x1, y1), name, font)
        shift = min(top, bottom - top)  # above the box, if there is room
        draw.rectangle((left, top - shift, right, bottom - shift), fill=colour)
        draw.text((x1, y1 - shift), name, "black", font)
    return picture


def _colour(label: int) -> tuple[int, int, int]:
    """A bright colour, different for neighbouring labels."""
    r, g, b = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.6, 1)
    return round(255 * r), round(255 * g), round(255 * b)
