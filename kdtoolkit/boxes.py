"""Arithmetic on boxes (..., 4) xyxy in pixels, in float32 whatever autocast says.

torchvision.ops has the rest. Its functions take boxes (N, 4) alone (torchvision 0.21), and compare each with each.
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
    """IoU (...) of boxes at the same place of `a` and `b` (..., 4), which may broadcast; 0 where both are empty."""
    intersection, union = _intersection_union(a.float(), b.float())
    return intersection / union


def elementwise_giou(a: Tensor, b: Tensor, eps: Tensor | float = 0.0) -> Tensor:
    """Generalised IoU (...) in [-1, 1] of boxes at the same place of `a` and `b` (..., 4), which may broadcast.

    Source: Rezatofighi et al., arXiv 1902.09630, with union and hull clamped at 1e-7. `eps` is added to both divisors,
    as some published losses do: the GIoU of equal boxes is then below 1.
    """
    a, b = a.float(), b.float()
    intersection, union = _intersection_union(a, b)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull_area = (hull[..., 0] * hull[..., 1]).clamp(min=EPS)
    return intersection / (union + eps) - (hull_area - union) / (hull_area + eps)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (..., P, Q) of each of `a` (..., P, 4) with each of `b` (..., Q, 4); leading dimensions broadcast."""
    return elementwise_iou(a[..., :, None, :], b[..., None, :, :])


def centres(boxes: Tensor) -> Tensor:
    """Centres (..., 2) of boxes (..., 4)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (..., 4) cut at images of `sizes` (..., 2) as (height, width); leading dimensions broadcast."""
    width_height = sizes.flip(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat([width_height, width_height], -1))


def distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (..., 4) of `points` (..., 2) to the left, top, right and bottom side; negative outside the box."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def from_distances(points: Tensor, sides: Tensor) -> Tensor:
    """The inverse of `distances`: boxes (..., 4) from `sides` (..., 4) around `points` (..., 2)."""
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)
