"""Arithmetic on boxes (..., 4) xyxy in pixels, in float32 even under autocast.

What torchvision.ops has is not repeated here. Its functions take boxes (N, 4) only (torchvision 0.21), and compare each
box of one set with each box of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection, (_area(a) + _area(b) - intersection).clamp(min=EPS)


def elementwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (...) of the boxes at the same place in `a` and `b` (..., 4), which may broadcast.

    It is 0 if both are empty.
    """
    intersection, union = _intersection_union(a.float(), b.float())
    return intersection / union


def elementwise_giou(a: Tensor, b: Tensor, eps: Tensor | float = 0.0) -> Tensor:
    """Generalised IoU (...) in [-1, 1] of the boxes at the same place in `a` and `b` (..., 4), which may broadcast.

    Union and hull are at least 1e-7. `eps` is added to both divisors, as some published losses do; the GIoU of equal
    boxes is then below 1. Source: Rezatofighi et al., arXiv 1902.09630.
    """
    a, b = a.float(), b.float()
    intersection, union = _intersection_union(a, b)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull_area = (hull[..., 0] * hull[..., 1]).clamp(min=EPS)
    return intersection / (union + eps) - (hull_area - union) / (hull_area + eps)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (..., P, Q) of each box in `a` (..., P, 4) with each box in `b` (..., Q, 4). Leading dimensions broadcast."""
    return elementwise_iou(a[..., :, None, :], b[..., None, :, :])


def centres(boxes: Tensor) -> Tensor:
    """Centres (..., 2) of boxes (..., 4)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut boxes (..., 4) at the borders of images of `sizes` (..., 2).

    Sizes are (height, width). Leading dimensions broadcast.
    """
    width_height = sizes.flip(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat([width_height, width_height], -1))


def distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (..., 4) from `points` (..., 2) to the left, top, right and bottom side.

    They are negative outside the box.
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def from_distances(points: Tensor, sides: Tensor) -> Tensor:
    """Boxes (..., 4) from the distances `sides` (..., 4) of `points` (..., 2): the inverse of `distances`."""
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)
