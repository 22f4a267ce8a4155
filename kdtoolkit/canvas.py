"""How images lie on a batch's canvas: what adapters do before a backbone, where their library has no code of its own.

layout = Layout.padded(images, 32) if like is None else Layout.of(like, 32)
batch = lay_out(images, targets, layout, mean=..., std=...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.contract import Batch, Target
from kdtoolkit.errors import KDError

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Layout:
    """Where images lie: at the top left of a `canvas`, each of its size in `sizes`; the rest is as in `Batch`."""

    sizes: tuple[Size, ...]
    padded_sizes: tuple[Size, ...]
    canvas: Size

    @classmethod
    def padded(cls, images: Sequence[Tensor], divisor: int) -> Layout:
        """Images as large as they are, padded to multiples of `divisor`, on the smallest canvas for all of them."""
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        padded = tuple((round_up(height, divisor), round_up(width, divisor)) for height, width in sizes)
        return cls(sizes, padded, (max(height for height, _ in padded), max(width for _, width in padded)))

    @classmethod
    def of(cls, batch: Batch, divisor: int = 1) -> Layout:
        """The layout of a batch, on a canvas that is padded further to multiples of `divisor`."""
        height, width = batch.images.shape[-2:]
        return cls(batch.sizes, batch.padded_sizes, (round_up(height, divisor), round_up(width, divisor)))

    @classmethod
    def fitted(cls, batch: Batch, canvas: Size) -> Layout:
        """The layout of a batch whose canvas is scaled to another one as a whole: for detectors built for one size."""
        factors = [new / old for new, old in zip(canvas, batch.images.shape[-2:], strict=True)]

        def scaled(size: Size) -> Size:
            height, width = (max(1, round(side * factor)) for side, factor in zip(size, factors, strict=True))
            return height, width

        return cls(tuple(map(scaled, batch.sizes)), tuple(map(scaled, batch.padded_sizes)), canvas)

    def squared(self) -> Layout:
        """The same on squares."""
        squares = tuple((max(size),) * 2 for size in self.padded_sizes)
        return replace(self, padded_sizes=squares, canvas=(max(self.canvas),) * 2)


def lay_out(
    images: Sequence[Tensor],
    targets: Sequence[Target] | None,
    layout: Layout,
    *,
    mean: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
    std: Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    fill: float = 0.0,
) -> Batch:
    """Images (3, H, W) in [0, 1] on one canvas: scaled to the sizes of the layout (bilinear), normalised, padded.

    `mean` is subtracted, `std` divided by: three numbers, or a tensor (3, 1, 1) where the images are. `fill` is what
    stands in padding, after that. Boxes are scaled like their images.

    Raises KDError for images that are not (3, H, W) floats.
    """
    check_images(images)
    images = [image.float() for image in images]
    subtract, divide = (
        x if isinstance(x, Tensor) else _channels(tuple(x), images[0].dtype, images[0].device) for x in (mean, std)
    )
    canvas = images[0].new_full((len(images), 3, *layout.canvas), fill)
    for i, (image, (height, width)) in enumerate(zip(images, layout.sizes, strict=True)):
        canvas[i, :, :height, :width] = (_resized(image, (height, width)) - subtract) / divide
    originals = tuple((image.shape[-2], image.shape[-1]) for image in images)
    if targets is None:
        return Batch(canvas, layout.sizes, layout.padded_sizes, originals)
    boxes = tuple(
        scaled(target["boxes"].float().reshape(-1, 4), size, original)
        for target, size, original in zip(targets, layout.sizes, originals, strict=True)
    )
    labels = tuple(target["labels"].long() for target in targets)
    return Batch(canvas, layout.sizes, layout.padded_sizes, originals, boxes, labels)


def check_images(images: Sequence[Tensor]) -> None:
    """Raise KDError for images that are not (3, H, W) floats."""
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise KDError(
                f"image {i} of the batch is {tuple(image.shape)} {image.dtype}; expected (3, H, W) floats in [0, 1]"
            )


def round_up(size: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is not below `size`."""
    return -(-size // divisor) * divisor


def _resized(image: Tensor, size: Size) -> Tensor:
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def scaled(boxes: Tensor, size: Size, original: Size) -> Tensor:
    """Boxes (G, 4) in pixels of an image of size `original`, in pixels of that image resized to `size`."""
    if size == original:
        return boxes
    (height, width), (old_height, old_width) = size, original
    return boxes * boxes.new_tensor([width / old_width, height / old_height]).repeat(2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor made in that mode could not be trained with later
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3, 1, 1); kept, for each copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]
