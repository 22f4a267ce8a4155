"""Training images made of several images: mosaics of four, and the mean of two.

What a detector sees is one image with the boxes of all. Teacher and student are shown the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdtoolkit.contract import Target
from kdtoolkit.data.resize import cut, scaled, with_boxes

GREY = 128

Item = tuple[Tensor, Target]


def mosaic(items: Sequence[Item], generator: torch.Generator) -> Item:
    """Four images at half their size, around a random point near the middle of a canvas of the first image's size.

    Images (3, H, W) uint8. Each image is cut off at the border of its quarter of the canvas; free space is grey.
    """
    _, height, width = items[0][0].shape
    middle = torch.rand(2, generator=generator) * 0.5 + 0.25
    top, left = round(float(middle[0]) * height), round(float(middle[1]) * width)
    canvas = torch.full_like(items[0][0], GREY)
    targets = []
    for place, (image, target) in enumerate(items):
        below, right = divmod(place, 2)
        small = _fitted(image, height / 2, width / 2)
        target = with_boxes(target, image, small)
        y = top if below else top - small.shape[1]
        x = left if right else left - small.shape[2]
        window = (top if below else 0, left if right else 0, height if below else top, width if right else left)
        y1, x1, y2, x2 = (
            max(y, window[0]),
            max(x, window[1]),
            min(y + small.shape[1], window[2]),
            min(x + small.shape[2], window[3]),
        )
        canvas[:, y1:y2, x1:x2] = small[:, y1 - y : y2 - y, x1 - x : x2 - x]
        moved: Target = {"boxes": target["boxes"] + torch.tensor([x, y, x, y]), "labels": target["labels"]}
        targets.append(cut(moved, (x1, y1, x2, y2)))
    return canvas, _joined(targets)


def mixup(first: Item, second: Item) -> Item:
    """The mean of two images, on the canvas of the first; the second is fitted into it. The boxes of both stay."""
    image, target = first
    other = _fitted(second[0], *image.shape[1:])
    canvas = torch.full_like(image, GREY)
    canvas[:, : other.shape[1], : other.shape[2]] = other
    mixed = ((image.short() + canvas.short() + 1) // 2).to(torch.uint8)
    return mixed, _joined([target, with_boxes(second[1], second[0], other)])


def _fitted(image: Tensor, height: float, width: float) -> Tensor:
    """An image scaled to lie within a height and width, with its proportions."""
    return scaled(image, min(height / image.shape[1], width / image.shape[2]))


def _joined(targets: Sequence[Target]) -> Target:
    boxes, labels = (torch.cat([target[key] for target in targets]) for key in ("boxes", "labels"))
    return {"boxes": boxes, "labels": labels}
