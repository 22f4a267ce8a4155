"""GFL: generalised focal loss (Li et al., NeurIPS 2020, arXiv 2006.04388).

Class scores are trained towards the IoU of the box (quality focal loss). Each box side is a distribution over `bins`
distances of 0, 1, 2 and so on strides (distribution focal loss). The box lies at the means of the distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.boxes import centres, distances, elementwise_giou, elementwise_iou, from_distances
from kdtoolkit.contract import Assignment, Batch, Predictions, Priors
from kdtoolkit.detectors.assign import ATSSAssigner
from kdtoolkit.detectors.dense import EPS, DenseDetector, predictor, select, square_anchors

ANCHOR_SCALE = 8.0
BOX_WEIGHT = 2.0
DFL_WEIGHT = 0.25


def quality_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """BCE times the squared difference of score and target, elementwise. Source: equation 3, beta 2."""
    modulation = (logits.sigmoid() - target).square()
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") * modulation


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy (...) of logits (..., B) with the two bins around `target` (...) in [0, B - 1). Source: eq. 6."""
    left = target.long()
    log_probability = logits.log_softmax(-1)
    below = log_probability.gather(-1, left[..., None])[..., 0]
    above = log_probability.gather(-1, left[..., None] + 1)[..., 0]
    return -(below * (left + 1 - target) + above * (target - left))


class GFL(DenseDetector):
    """The GFL detector. It takes the arguments of DenseDetector, and `bins`: the number of bins for each box side."""

    published_predictors: ClassVar[Mapping[str, str]] = {"gfl_cls": "cls", "gfl_reg": "reg"}

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet50",
        backbone_args: Mapping[str, object] | None = None,
        pretrained: bool | str = False,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        neck_channels: int = 256,
        head_channels: int = 256,
        head_blocks: int = 4,
        head_groups: int = 32,
        bins: int = 17,
        score_threshold: float = 0.05,
        nms_iou: float = 0.6,
        detections_per_image: int = 100,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            backbone=backbone,
            backbone_args=backbone_args,
            pretrained=pretrained,
            strides=strides,
            neck_channels=neck_channels,
            head_channels=head_channels,
            head_blocks=head_blocks,
            head_groups=head_groups,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            detections_per_image=detections_per_image,
            image_mean=image_mean,
            image_std=image_std,
        )
        self.bins = bins
        self.predictors["reg"] = predictor(head_channels if head_blocks else neck_channels, 4 * bins)

    @property
    def assigner(self) -> ATSSAssigner:
        """The ATSS assigner with its published settings."""
        return ATSSAssigner()

    def priors(self, grid: tuple[tuple[int, int], ...]) -> Priors:
        """One square anchor per cell. Boxes depend on its centre only; the assigner needs its size."""
        return square_anchors(grid, self.strides, ANCHOR_SCALE, self.scales.device)

    def shape_regression(self, regression: Tensor) -> Tensor:
        """Return logits (N, A, 4, B) of the sides left, top, right and bottom."""
        return regression.view(*regression.shape[:-1], 4, self.bins)

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Decode distributions (..., A, 4, B) into boxes (..., A, 4) at their means."""
        # Not a matrix product: autocast would run that in half precision.
        probability = regression.float().softmax(-1)
        mean = (probability * torch.arange(self.bins, device=regression.device)).sum(-1)
        return from_distances(centres(priors.boxes), mean * priors.strides[:, None])

    def assign(self, predictions: Predictions, batch: Batch) -> Assignment:
        """Assign by ATSS."""
        return self.assigner(predictions.priors, batch, self.num_classes)

    def losses(self, predictions: Predictions, assignment: Assignment) -> dict[str, Tensor]:
        """Compute `cls` (QFL), `box` (GIoU, times 2) and `dfl` (times 0.25).

        The latter two are weighted by the class score.
        """
        logits = predictions.logits
        image, prior = assignment.positive.nonzero(as_tuple=True)
        labels = assignment.labels[image, prior]
        target_boxes = assignment.boxes[image, prior]
        priors, regression = select(predictions.priors, prior), predictions.regression[image, prior]
        boxes = self.decode(regression, priors)
        target_bins = distances(centres(priors.boxes), target_boxes) / priors.strides[:, None]
        dfl = distribution_focal_loss(regression, target_bins.clamp(0, self.bins - 1 - 0.1)).mean(-1)

        with torch.no_grad():
            quality = torch.zeros_like(logits)
            quality[image, prior, labels] = elementwise_iou(boxes, target_boxes)
            weight = logits[image, prior].amax(-1).sigmoid()
            divisor = processes.share(weight.sum(), at_least=1)
        cls = quality_focal_loss(logits, quality).sum(-1)
        return {
            "cls": (cls * assignment.weights).sum() / (assignment.normaliser + EPS),
            "box": BOX_WEIGHT * ((1 - elementwise_giou(boxes, target_boxes)) * weight).sum() / divisor,
            "dfl": DFL_WEIGHT * (dfl * weight).sum() / divisor,
        }
