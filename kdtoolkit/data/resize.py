"""Resizes images to one fixed size, or to a size that is drawn for each step (multi-scale training)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torchvision.transforms.v2.functional import resize  # type: ignore[attr-defined]

from kdtoolkit.contract import Target

_GRID = 32  # pixels between the sizes that are drawn

Pixels = Annotated[int, Field(ge=32)]


class InputSize(BaseModel):
    """The size of images: a range [low, high] of their shorter side, in steps of 32 pixels, and the longest side.

    Images keep their proportions. Evaluation uses the largest size of the range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    short: tuple[Pixels, Pixels] = Field(description="range of the shorter side in pixels, as in [640, 800]")
    long: Pixels = Field(default=1333, description="largest longer side in pixels")

    @model_validator(mode="after")
    def _low_before_high(self) -> InputSize:
        if not self.short[0] <= self.short[1] <= self.long:
            raise ValueError(f"input_size: short is a range [low, high] up to long ({self.long}), not {self.short}")
        return self

    def draw(self, generator: torch.Generator) -> int:
        """A shorter side of the range, drawn at random."""
        low, high = self.short
        return low + _GRID * int(torch.randint((high - low) // _GRID + 1, (), generator=generator))

    def apply(self, image: Tensor, short: int | None = None) -> Tensor:
        """An image (3, H, W) uint8 resized to a shorter side, by default the largest."""
        height, width = image.shape[1:]
        factor = min((short or self.short[1]) / min(height, width), self.long / max(height, width))
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        return image if size == [height, width] else resize(image, size, antialias=True)


def with_boxes(target: Target, old: Tensor, new: Tensor) -> Target:
    """The ground truth of an image after it was resized from `old` to `new`, tensors (3, H, W)."""
    if old.shape == new.shape:
        return target
    ratio = torch.tensor([new.shape[2] / old.shape[2], new.shape[1] / old.shape[1]]).repeat(2)
    return {"boxes": target["boxes"] * ratio, "labels": target["labels"]}
