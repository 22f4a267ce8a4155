"""Random changes of one image and its boxes. They have their own generator and leave the global random state alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torchvision.transforms.v2.functional import (  # type: ignore[attr-defined]
    crop,
    horizontal_flip,
    pad,
    resize,
)

from kdtoolkit.contract import Target
from kdtoolkit.data.colour import Change, brightness, contrast, hue, recoloured, saturation
from kdtoolkit.data.mix import GREY, Item, mixup, mosaic
from kdtoolkit.data.resize import cut

_Probability = Annotated[float, Field(ge=0, le=1)]
# Changes of colour in their order, each with the range of its amount: those of RandomPhotometricDistort.
_DISTORTIONS = ((brightness, 0.875, 1.125), (contrast, 0.5, 1.5), (saturation, 0.5, 1.5), (hue, -0.05, 0.05))


class Augmentation(BaseModel):
    """What is changed at random in a training image. The size of the image stays.

    The changes come in this order: `mosaic`, `flip`, `zoom`, `colour`, `photometric`, `mixup`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: _Probability = Field(0.5, description="probability of mirroring left to right")
    colour: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="strength: brightness, contrast and saturation by a factor in 1 ± this, hue by 0.1 of it",
    )
    zoom: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 1.0), description="range of the scale; larger images are cropped, smaller ones set on grey"
    )
    photometric: _Probability = Field(
        0.0, description="probability of each change of colour of torchvision's RandomPhotometricDistort"
    )
    mosaic: _Probability = Field(0.0, description="probability of showing four images at half their size")
    mixup: _Probability = Field(0.0, description="probability of showing the mean of two images")

    @field_validator("zoom")
    @classmethod
    def _low_before_high(cls, zoom: tuple[float, float]) -> tuple[float, float]:
        if zoom[0] > zoom[1]:
            raise ValueError(f"zoom is a range [low, high]; {zoom[0]} is above {zoom[1]}")
        return zoom

    @property
    def never_repeat(self) -> tuple[str, ...]:
        """The changes that are on and give an image different pixels each time. A mirror image comes again."""
        on = {
            "colour": self.colour,
            "zoom": self.zoom != (1.0, 1.0),
            "photometric": self.photometric,
            "mosaic": self.mosaic,
            "mixup": self.mixup,
        }
        return tuple(name for name, chosen in on.items() if chosen)

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Change an image (3, H, W) uint8 and its target; the originals stay as they are.

        Boxes are cut at the image's edge; one that keeps less than a quarter of its area is left out.
        """
        if self.mirrors(generator):
            image, target = _mirror(image, target)
        if self.zoom != (1.0, 1.0):
            image, target = _zoom(image, target, self.zoom, generator)
        if self.colour:
            image = _recolour(image, self.colour, generator)
        if self.photometric:
            image = _distort(image, self.photometric, generator)
        return image, target

    def mirrors(self, generator: torch.Generator) -> bool:
        """Whether to mirror an image, drawn at random."""
        return bool(self.flip) and _uniform(0, 1, generator) < self.flip

    def of(self, item: Item, draw: Callable[[], Item], generator: torch.Generator) -> Item:
        """Change an image and its target, with all that is switched on; `draw` gives a random image to mix with it."""
        if self.mosaic and _uniform(0, 1, generator) < self.mosaic:
            item = mosaic([item, draw(), draw(), draw()], generator)
        item = self(*item, generator)
        if self.mixup and _uniform(0, 1, generator) < self.mixup:
            item = mixup(item, self(*draw(), generator))
        return item


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _mirror(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[2]
    boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
    return horizontal_flip(image), {"boxes": boxes, "labels": target["labels"]}


def _zoom(
    image: Tensor, target: Target, scales: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Target]:
    height, width = image.shape[1:]
    scale = math.exp(_uniform(math.log(scales[0]), math.log(scales[1]), generator))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    # Where the old image begins in the new one: negative if cropped.
    top = round(_uniform(0, height - size[0], generator))
    left = round(_uniform(0, width - size[1], generator))
    image = resize(image, list(size), antialias=True)
    # Beyond its edge crop gives black, so grey goes around first.
    padding = [max(left, 0), max(top, 0), max(width - size[1] - left, 0), max(height - size[0] - top, 0)]
    image = pad(image, padding, fill=[GREY])
    image = crop(image, max(-top, 0), max(-left, 0), height, width)
    ratio = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    boxes = target["boxes"] * ratio + torch.tensor([left, top, left, top])
    return image, cut({"boxes": boxes, "labels": target["labels"]}, (0, 0, width, height))


def _recolour(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    changes: list[Change] = [
        (change, _uniform(1 - strength, 1 + strength, generator)) for change in (brightness, contrast, saturation)
    ]
    return recoloured(image, [*changes, (hue, _uniform(-0.1 * strength, 0.1 * strength, generator))])


def _distort(image: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Change an image as torchvision's RandomPhotometricDistort does (SSD, arXiv 1512.02325)."""
    *chosen, permuted = (torch.rand(len(_DISTORTIONS) + 1, generator=generator) < probability).tolist()
    amounts = torch.rand(len(_DISTORTIONS), generator=generator).tolist()
    changes: list[Change] = [
        (change, low + (high - low) * amount)
        for (change, low, high), amount, wanted in zip(_DISTORTIONS, amounts, chosen, strict=True)
        if wanted
    ]
    if torch.rand((), generator=generator) < 0.5:  # the contrast last
        changes.sort(key=lambda each: each[0] is contrast)
    image = recoloured(image, changes)
    return image[torch.randperm(3, generator=generator)] if permuted else image
