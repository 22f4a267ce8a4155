"""ATSS: adaptive training sample selection (Zhang et al., CVPR 2020, arXiv 1912.02424).

Each cell has one square anchor. Losses are the focal loss for classes, GIoU for boxes, which are offsets from the
anchor, and BCE for centerness. Scores are multiplied by centerness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from kdtoolkit import processes
from kdtoolkit.boxes import centres, distances, elementwise_giou
from kdtoolkit.contract import Assignment, Batch, Predictions, Priors
from kdtoolkit.detectors.assign import ATSSAssigner
from kdtoolkit.detectors.dense import EPS, DenseDetector, select, square_anchors

ANCHOR_SCALE = 8.0
BOX_WEIGHT = 2.0
STDS = (0.1, 0.1, 0.2, 0.2)
LOG_SIZE_LIMIT = math.log(1000 / 16)


def decode_offsets(offsets: Tensor, anchors: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Decode (dx, dy, dw, dh) (..., 4), relative to anchors, into boxes (..., 4).

    They are in units of `stds`. Log sizes are clipped.
    """
    shift, log_size = (offsets.float() * torch.tensor(stds, device=offsets.device)).chunk(2, -1)
    middle, size = box_convert(anchors, "xyxy", "cxcywh").chunk(2, -1)
    factor = log_size.clamp(-LOG_SIZE_LIMIT, LOG_SIZE_LIMIT).exp()
    return box_convert(torch.cat([middle + shift * size, factor * size], -1), "cxcywh", "xyxy")


def centerness(sides: Tensor) -> Tensor:
    """Centerness (...) in [0, 1] of distances > 0 to left, top, right and bottom (..., 4). Source: FCOS, eq. 3."""
    low, high = torch.minimum(sides[..., :2], sides[..., 2:]), torch.maximum(sides[..., :2], sides[..., 2:])
    return (low / high).prod(-1).sqrt()


class ATSS(DenseDetector):
    """The ATSS detector. It takes the arguments of DenseDetector."""

    has_quality: ClassVar[bool] = True
    published_predictors: ClassVar[Mapping[str, str]] = {
        "atss_cls": "cls",
        "atss_reg": "reg",
        "atss_centerness": "quality",
    }

    @property
    def assigner(self) -> ATSSAssigner:
        """The ATSS assigner with its published settings."""
        return ATSSAssigner()

    def priors(self, grid: tuple[tuple[int, int], ...]) -> Priors:
        """One square anchor per cell."""
        return square_anchors(grid, self.strides, ANCHOR_SCALE, self.scales.device)

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Decode offsets (..., A, 4) into boxes (..., A, 4)."""
        return decode_offsets(regression, priors.boxes, STDS)

    def assign(self, predictions: Predictions, batch: Batch) -> Assignment:
        """Assign by ATSS."""
        return self.assigner(predictions.priors, batch, self.num_classes)

    def losses(self, predictions: Predictions, assignment: Assignment) -> dict[str, Tensor]:
        """Compute `cls` (focal), `box` (GIoU weighted by centerness, times 2) and `centerness` (BCE)."""
        assert predictions.quality is not None
        image, prior = assignment.positive.nonzero(as_tuple=True)
        target_boxes = assignment.boxes[image, prior]
        priors = select(predictions.priors, prior)
        boxes = self.decode(predictions.regression[image, prior], priors)
        target_centerness = centerness(distances(centres(priors.boxes), target_boxes))
        labels = F.one_hot(assignment.labels, self.num_classes + 1)[..., :-1].float()
        cls = sigmoid_focal_loss(predictions.logits, labels, alpha=0.25, gamma=2).sum(-1)
        quality = F.binary_cross_entropy_with_logits(
            predictions.quality[image, prior], target_centerness, reduction="sum"
        )
        box = (1 - elementwise_giou(boxes, target_boxes)) * target_centerness
        normaliser = assignment.normaliser + EPS
        return {
            "cls": (cls * assignment.weights).sum() / normaliser,
            "box": BOX_WEIGHT * box.sum() / processes.share(target_centerness.sum(), at_least=1),
            "centerness": quality / normaliser,
        }
