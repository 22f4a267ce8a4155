"""Changes of an image's colours with the values of torchvision's `adjust_*`, within one step of uint8, but faster.

A change takes and returns a picture (3, H, W) as uint8, int16 or float32. Fractions of float32 are cut off before the
next change, as in torchvision. A change may overwrite a float32 picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Change = tuple[Callable[[Tensor, float], Tensor], float]

_GREY = torch.tensor([0.2989, 0.587, 0.114])  # what red, green and blue add to the grey of a pixel


def recoloured(image: Tensor, changes: Sequence[Change]) -> Tensor:
    """Apply the changes to an image (3, H, W) uint8, one after the other. The image itself stays as it is."""
    if not changes:
        return image
    picture = image.contiguous()
    for change, amount in changes:
        picture = change(picture, amount)
    return picture.to(torch.int16).to(torch.uint8)  # in two steps it is five times as fast


def brightness(picture: Tensor, factor: float) -> Tensor:
    """Multiply all values by a factor of at least 0."""
    return _floats(picture).mul_(factor).clamp_(max=255)


def contrast(picture: Tensor, factor: float) -> Tensor:
    """Multiply the distance of all values from the picture's mean grey by a factor of at least 0."""
    picture = _floats(picture)
    return torch.add(_grey(picture).mean().mul_(1 - factor), picture, alpha=factor).clamp_(0, 255)


def saturation(picture: Tensor, factor: float) -> Tensor:
    """Multiply the distance of each pixel from its own grey by a factor of at least 0."""
    picture = _floats(picture)
    return torch.add(_grey(picture).mul_(1 - factor), picture, alpha=factor).clamp_(0, 255)


def hue(picture: Tensor, turn: float) -> Tensor:
    """Turn the colour circle, by at most a sixth of it (-1/6 to 1/6).

    On its way round the circle (red, green, blue) a channel rises while the one before it is larger than the one after
    it, then it falls. It rises and falls by the pixel's chroma in a sixth of the circle, and stays between the pixel's
    smallest and largest value. Without these two limits its value would be twice its own minus the middle one.
    """
    values = picture.to(torch.int16).numpy()  # numpy's arithmetic on int16 takes a third of torch's on float32
    red, green, blue = values
    largest = np.maximum(np.maximum(red, green), blue)
    smallest = np.minimum(np.minimum(red, green), blue)
    middle = red + green
    middle += blue
    middle -= smallest
    middle -= largest
    step = np.rint((largest - smallest) * np.float32(6 * turn)).astype(np.int16)
    rising = step - middle
    step += step
    turned = np.empty_like(values)
    for channel, own, before, after in zip(turned, values, (blue, red, green), (green, blue, red), strict=True):
        np.subtract(before, after, out=channel)
        channel >>= 15  # -1 where it falls, else 0
        channel &= step
        np.subtract(rising, channel, out=channel)
        channel += own
        channel += own
        np.maximum(channel, smallest, out=channel)
        np.minimum(channel, largest, out=channel)
    return torch.from_numpy(turned)


def _floats(picture: Tensor) -> Tensor:
    """The picture as floats without fractions."""
    return picture.floor_() if picture.is_floating_point() else picture.float()


def _grey(picture: Tensor) -> Tensor:
    """The grey (H, W) of each pixel of a picture that has no fractions, without fractions."""
    return (_GREY @ picture.flatten(1)).view(picture.shape[1:]).floor_()
