"""How images lie on a batch's canvas: code for `DetectorAdapter.prepare`, if the library's own code cannot be used.

layout = Layout.padded(images, 32) if like is None else Layout.of(like, 32)
batch = lay_out(images, targets, layout, mean=..., std=...)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """Where images lie: each at the top left of a `canvas`, with its size in `sizes`. Fields are as in `Batch`."""

    sizes: tuple[Size, ...]
    padded_sizes: tuple[Size, ...]
    canvas: Size

    @classmethod
    def padded(cls, images: Sequence[Tensor], divisor: int) -> Layout:
        """Images in their own size, each padded to multiples of `divisor`, on the smallest canvas that holds all."""
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        padded = tuple((round_up(height, divisor), round_up(width, divisor)) for height, width in sizes)
        return cls(sizes, padded, (max(height for height, _ in padded), max(width for _, width in padded)))

    @classmethod
    def of(cls, batch: Batch, divisor: int = 1) -> Layout:
        """The layout of a batch, with its canvas padded further to multiples of `divisor`."""
        height, width = batch.images.shape[-2:]
        return cls(batch.sizes, batch.padded_sizes, (round_up(height, divisor), round_up(width, divisor)))

    @classmethod
    def fitted(cls, batch: Batch, canvas: Size) -> Layout:
        """The layout of a batch with its whole canvas scaled to `canvas`, for a detector that is built for one size."""
        factors = [new / old for new, old in zip(canvas, batch.images.shape[-2:], strict=True)]

        def scaled(size: Size) -> Size:
            height, width = (max(1, round(side * factor)) for side, factor in zip(size, factors, strict=True))
            return height, width

        return cls(tuple(map(scaled, batch.sizes)), tuple(map(scaled, batch.padded_sizes)), canvas)

    def squared(self) -> Layout:
        """The same layout with each canvas made square by padding."""
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
    """Put images (3, H, W) in [0, 1] on one canvas.

    Each image is scaled to its size in the layout (bilinear) and normalised: `mean` is subtracted, then the result is
    divided by `std`. Both are three numbers, or a tensor (3, 1, 1) on the images' device. Padding is filled with
    `fill`, which is not normalised. Boxes are scaled with their images.

    Raises KDError if an image is not a float tensor (3, H, W).
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


def check_images(images: Iterable[Tensor]) -> None:
    """Raise KDError if an image is not a float tensor (3, H, W) with at least one pixel."""
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            hint = ": torch.from_numpy(image) makes a tensor" if type(image).__module__ == "numpy" else ""
            raise KDError(f"image {i} is {type(image).__name__}; images are float tensors (3, H, W) in [0, 1]{hint}")
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            hint = ": hand in image.permute(2, 0, 1)" if image.ndim == 3 and image.shape[-1] == 3 else ""
            raise KDError(f"image {i} has the shape {tuple(image.shape)}; images are (3, H, W){hint}")
        if not image.is_floating_point():
            hint = ": hand in image.float() / 255" if image.dtype == torch.uint8 else ""
            raise KDError(f"image {i} is {image.dtype}; images are floats in [0, 1]{hint}")


def round_up(size: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `size`."""
    return -(-size // divisor) * divisor


def _resized(image: Tensor, size: Size) -> Tensor:
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def scaled(boxes: Tensor, size: Size, original: Size) -> Tensor:
    """Boxes (G, 4) of an image of size `original`, after the image has been resized to `size`."""
    if size == original:
        return boxes
    (height, width), (old_height, old_width) = size, original
    return boxes * boxes.new_tensor([width / old_width, height / old_height]).repeat(2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor (3, 1, 1). It is cached, because each copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]
