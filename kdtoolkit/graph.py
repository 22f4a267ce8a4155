"""A whole detector as one graph of tensors, which an exporter can follow: what the graphs of all libraries share.

A graph is a module that `DetectorAdapter.graph` builds. Its input is `images` (N, 3, H, W) float32 RGB in [0, 1]. It
returns `boxes` (N, D, 4) xyxy in pixels of the input, `scores` (N, D) and `labels` (N, D) int64, best first. Gaps at
the end have the score 0, the label -1 and a box of zeros. All shapes follow from the input's, so that N, H and W can
stay free.

Exporters cannot follow some steps through torch's own operators if sizes are free. These are operators of our own:
`pad`, `resize`, `pool` and `suppress`. `kdtoolkit.deploy.operators` says what they become in ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms, roi_align

Detected = tuple[Tensor, Tensor, Tensor]
"""`boxes` (N, D, 4), `scores` (N, D) and `labels` (N, D) of a graph."""


@torch.library.custom_op("kdtoolkit::pad", mutates_args=())
def pad(images: Tensor, multiple: int, square: bool, value: float) -> Tensor:
    """Pad images (N, C, H, W) at the right and bottom to multiples of a number, and with `square` to a square."""
    height, width = padded_size(images.shape[-2], images.shape[-1], multiple, square)
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), value=value)


@pad.register_fake
def _(images: Tensor, multiple: int, square: bool, value: float) -> Tensor:
    size = padded_size(images.shape[-2], images.shape[-1], multiple, square)
    return images.new_empty((images.shape[0], images.shape[1], *size))


def padded_size(height: int, width: int, multiple: int, square: bool) -> tuple[int, int]:
    """The size to which `pad` brings images."""
    size: Any = (torch.sym_max(height, width),) * 2 if square else (height, width)
    high, wide = ((side + multiple - 1) // multiple * multiple for side in size)
    return high, wide


@torch.library.custom_op("kdtoolkit::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float, limit: int) -> Tensor:
    """Non-maximum suppression of each row of scores by itself.

    Args:
        boxes: (N, B, 4).
        scores: (N, K, B). Boxes with a score of 0 or less are no candidates.
        iou: of two boxes with a larger IoU, the one of lower score is dropped.
        limit: the largest number of boxes that each row keeps.

    Returns the scores of kept boxes, and 0 elsewhere.
    """
    kept = torch.zeros_like(scores)
    for image, rows in enumerate(scores):
        for row, each in enumerate(rows):
            candidates = (each > 0).nonzero()[:, 0]
            chosen = candidates[nms(boxes[image, candidates], each[candidates], iou)[:limit]]
            kept[image, row, chosen] = each[chosen]
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, limit: int) -> Tensor:
    return torch.empty_like(scores)


@torch.library.custom_op("kdtoolkit::resize", mutates_args=())
def resize(images: Tensor, shortest: float, longest: float) -> Tensor:
    """Resize images (N, C, H, W) as torchvision does: the shorter side to `shortest`, the longer to at most `longest`.

    Proportions are kept, up to rounding.
    """
    height, width = images.shape[-2:]
    scale = min(shortest / min(height, width), longest / max(height, width))
    size = (math.floor(height * scale), math.floor(width * scale))
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


@resize.register_fake
def _(images: Tensor, shortest: float, longest: float) -> Tensor:
    height, width = images.shape[-2:]
    shorter, longer = torch.sym_min(height, width), torch.sym_max(height, width)
    size = (torch.sym_min(int(shortest) * x // shorter, int(longest) * x // longer) for x in (height, width))
    return images.new_empty((images.shape[0], images.shape[1], *size))


@torch.library.custom_op("kdtoolkit::pool", mutates_args=())
def pool(
    maps: list[Tensor], boxes: Tensor, levels: Tensor, scales: list[float], size: list[int], sampling: int
) -> Tensor:
    """Pool each box (N, P, 4) from the map of its level (N, P): torchvision's RoIAlign.

    `scales` are cells per pixel of each map. Returns (N * P, C, *size).
    """
    rows = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    numbered = torch.cat([rows[:, None].to(boxes), boxes.flatten(0, 1)], 1)
    pooled = maps[0].new_zeros(len(numbered), maps[0].shape[1], *size)
    for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        own = (levels.flatten() == level).nonzero()[:, 0]
        pooled[own] = roi_align(features, numbered[own], size, scale, sampling)
    return pooled


@pool.register_fake
def _(maps: list[Tensor], boxes: Tensor, levels: Tensor, scales: list[float], size: list[int], sampling: int) -> Tensor:
    return maps[0].new_empty((boxes.shape[0] * boxes.shape[1], maps[0].shape[1], *size))


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean from images (N, 3, H, W), and divide by the standard deviation."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def clip_to(boxes: Tensor, height: int, width: int) -> Tensor:
    """Cut boxes (..., 4) at the borders of an image."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], -1)


def at_least_the_best(scores: Tensor, count: int) -> Tensor:
    """Set all scores (..., B) but the `count` best of each row to 0."""
    padded = F.pad(scores, (0, count))  # a row may have fewer
    return scores * (scores >= padded.topk(count).values[..., -1:])


def best(boxes: Tensor, scores: Tensor, count: int) -> Detected:
    """Choose the `count` best of scores (N, B, K) of K classes. A score of 0 is no detection.

    Boxes are (N, B, 4), or (N, B, K, 4) if each class has its own.
    """
    classes = scores.shape[-1]
    found, index = F.pad(scores.flatten(1), (0, count)).topk(count)
    real = found > 0
    index = torch.where(real, index, 0)
    place = index if boxes.ndim == 4 else index // classes
    chosen = boxes.flatten(1, -2).gather(1, place[..., None].expand(-1, -1, 4))
    return chosen * real[..., None], found * real, torch.where(real, index % classes, -1)


def best_first(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detected:
    """Sort detections by falling score again, after some scores have become 0, and clear these."""
    scores, order = scores.topk(scores.shape[1])
    real = scores > 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * real[..., None]
    return boxes, scores, torch.where(real, labels.gather(1, order), -1)
