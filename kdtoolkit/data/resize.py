"""Resizes images to a fixed size, or to one that is drawn for each step (multi-scale). Crops images before that."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torchvision.transforms.v2.functional import crop, resize  # type: ignore[attr-defined]

from kdtoolkit.contract import Target

_GRID = 32  # pixels between the sizes that are drawn

MIN_VISIBLE = 0.25  # of a box's area; an object that keeps less of it is left out

Pixels = Annotated[int, Field(ge=32)]


class InputSize(BaseModel):
    """The size of images: a range [low, high] of their shorter side, in steps of 32 pixels, and the longest side.

    Images keep their proportions. Evaluation uses the largest size of the range, and crops nothing. With `crop`, some
    training images show a random part of the image, as in DETR's recipe: the image is resized to one of `crop_short`,
    a part whose width and height lie in `crop_sides` is cut out, and this part is resized like any other image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    short: tuple[Pixels, Pixels] = Field(description="range of the shorter side in pixels, as in [640, 800]")
    long: Pixels = Field(default=1333, description="largest longer side in pixels")
    crop: float = Field(
        default=0.0, ge=0, le=1, description="probability that a training image is cropped before it is resized"
    )
    crop_short: tuple[Pixels, ...] = Field(
        default=(400, 500, 600),
        min_length=1,
        description="shorter sides in pixels; an image is resized to one of them before it is cropped",
    )
    crop_sides: tuple[Pixels, Pixels] = Field(
        default=(384, 600), description="range of the width and of the height of a crop in pixels"
    )

    @model_validator(mode="after")
    def _low_before_high(self) -> InputSize:
        if not self.short[0] <= self.short[1] <= self.long:
            raise ValueError(f"input_size: short is a range [low, high] up to long ({self.long}), not {self.short}")
        if not self.crop_sides[0] <= self.crop_sides[1]:
            raise ValueError(f"input_size: crop_sides is a range [low, high], not {self.crop_sides}")
        if min(self.crop_short) < self.crop_sides[0]:
            raise ValueError(
                f"input_size: crop_short has {min(self.crop_short)}, which is below the smallest side of a crop in "
                f"crop_sides, {self.crop_sides[0]}: raise crop_short or lower crop_sides"
            )
        return self

    def draw(self, generator: torch.Generator) -> int:
        """A shorter side of the range, drawn at random."""
        low, high = self.short
        return low + _GRID * _between(0, (high - low) // _GRID, generator)

    def cropped(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """With probability `crop` a random part of an image (3, H, W) uint8, and the target in the part's pixels.

        Boxes are cut at the part's edge; boxes that lie outside it are left out, with their labels.
        """
        if not self.crop or torch.rand((), generator=generator) >= self.crop:
            return image, target
        short = self.crop_short[_between(0, len(self.crop_short) - 1, generator)]
        whole = scaled(image, short / min(image.shape[1:]))
        low, high = self.crop_sides
        height, width = (_between(low, min(side, high), generator) for side in whole.shape[1:])
        top = _between(0, whole.shape[1] - height, generator)
        left = _between(0, whole.shape[2] - width, generator)
        window = (left, top, left + width, top + height)
        seen = cut(with_boxes(target, image, whole), window, min_visible=0)
        boxes = seen["boxes"] - torch.tensor([left, top, left, top])
        return crop(whole, top, left, height, width), {"boxes": boxes, "labels": seen["labels"]}

    def apply(self, image: Tensor, short: int | None = None) -> Tensor:
        """An image (3, H, W) uint8 resized to a shorter side, by default the largest."""
        return scaled(image, self._factor(image.shape[1], image.shape[2], short))

    def size_of(self, height: int, width: int, short: int | None = None) -> tuple[int, int]:
        """The (height, width) of what `apply` makes of an image of this size."""
        return _times(height, width, self._factor(height, width, short))

    def _factor(self, height: int, width: int, short: int | None) -> float:
        return min((short or self.short[1]) / min(height, width), self.long / max(height, width))


def scaled(image: Tensor, factor: float) -> Tensor:
    """An image (3, H, W) uint8 whose sides are the old ones times a factor, at least one pixel."""
    size = _times(image.shape[1], image.shape[2], factor)
    return image if size == image.shape[1:] else resize(image, list(size), antialias=True)


def with_boxes(target: Target, old: Tensor, new: Tensor) -> Target:
    """The ground truth of an image after it was resized from `old` to `new`, tensors (3, H, W)."""
    if old.shape == new.shape:
        return target
    ratio = torch.tensor([new.shape[2] / old.shape[2], new.shape[1] / old.shape[1]]).repeat(2)
    return {"boxes": target["boxes"] * ratio, "labels": target["labels"]}


def cut(target: Target, window: tuple[int, int, int, int], min_visible: float = MIN_VISIBLE) -> Target:
    """Boxes cut at a window (x1, y1, x2, y2) in pixels.

    A box is left out, with its label, if it keeps less than `min_visible` of its area, or nothing.
    """
    boxes = target["boxes"]
    x1, y1, x2, y2 = window
    low, high = torch.tensor([x1, y1, x1, y1]), torch.tensor([x2, y2, x2, y2])
    clipped = torch.maximum(torch.minimum(boxes, high), low)
    keep = (_areas(clipped) >= min_visible * _areas(boxes)) & (clipped[:, 2:] > clipped[:, :2]).all(1)
    return {"boxes": clipped[keep], "labels": target["labels"][keep]}


def _times(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, round(height * factor)), max(1, round(width * factor))


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _between(low: int, high: int, generator: torch.Generator) -> int:
    """A random whole number from `low` to `high`, both included."""
    return low + int(torch.randint(high - low + 1, (), generator=generator))
