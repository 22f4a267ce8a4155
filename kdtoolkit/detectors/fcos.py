"""FCOS: fully convolutional one-stage detection (Tian et al., ICCV 2019, arXiv 1904.01355).

Each cell has one point. Losses are the focal loss for classes, IoU for boxes, which are distances from the point, and
BCE for centerness. Scores are multiplied by centerness. The defaults follow the first version of the paper; the
options follow its journal version (arXiv 2006.09214).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from kdtoolkit import processes
from kdtoolkit.boxes import centres, distances, elementwise_iou, from_distances
from kdtoolkit.contract import Assignment, Batch, Predictions, PriorKind, Priors
from kdtoolkit.detectors.assign import pad_targets
from kdtoolkit.detectors.atss import centerness
from kdtoolkit.detectors.dense import EPS, DenseDetector, cached_by_grid, cell_priors, select

MIN_IOU = 1e-6  # below it the IoU loss grows no further


@cached_by_grid
def points(grid: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device) -> Priors:
    """Build one point per cell, at its middle."""
    return cell_priors(grid, strides, torch.full((1, 4), 0.5), device)


@dataclass(frozen=True)
class FCOSAssigner:
    """A point answers for the smallest box around it among those whose size fits its level (FCOS, section 3.2).

    The size fits if the largest distance to a side is 4 to 8 strides. The finest level has no lower limit, the coarsest
    no upper limit. With `center_sampling_radius` (strides), the point must also be that near to the box's centre.
    """

    center_sampling_radius: float | None = None

    def __call__(self, priors: Priors, batch: Batch, num_classes: int) -> Assignment:
        """Assign the batch's boxes to points (A, 4). The normaliser is the sum of the centerness of all positives.

        All weights are 1. If there is no positive, the normaliser is 1, where published code has 1e-6.
        """
        boxes, labels, _ = pad_targets(batch.boxes, batch.labels)  # what is not real is empty: no point lies in it
        middle, strides = centres(priors.boxes), priors.strides
        sides = distances(middle, boxes[:, :, None])  # (N, G, A, 4)
        reach = sides.amax(-1)
        lower = (4 * strides).masked_fill(strides == strides.min(), 0)
        upper = (8 * strides).masked_fill(strides == strides.max(), torch.inf)
        fits = (sides.amin(-1) > 0) & (reach >= lower) & (reach <= upper)
        if self.center_sampling_radius is not None:
            offset = (middle - centres(boxes)[:, :, None]).abs().amax(-1)
            fits &= offset < self.center_sampling_radius * strides
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, :, None]
        smallest, chosen = torch.where(fits, area, torch.inf).min(dim=1)
        assigned = smallest.isfinite()
        matched = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
        image, prior = assigned.nonzero(as_tuple=True)
        total = processes.share(centerness(distances(middle[prior], matched[image, prior])).sum())
        return Assignment(
            positive=assigned,
            labels=labels.gather(1, chosen).masked_fill(~assigned, num_classes),
            boxes=matched,
            weights=torch.ones_like(smallest),
            normaliser=torch.where(total > 0, total.clamp(min=1e-6), 1.0),
        )


class FCOS(DenseDetector):
    """The FCOS detector. It takes the arguments of DenseDetector, and three more.

    Args:
        norm_on_bbox: predict distances in strides, and cut them at 0. Otherwise the logarithm of pixels is predicted.
        centerness_on_reg: predict centerness from the regression tower instead of the classification tower.
        center_sampling_radius: train only on points that are this near to a box's centre, in strides (published: 1.5).
            None for all points in the box.
    """

    kind: ClassVar[PriorKind] = PriorKind.POINTS
    has_quality: ClassVar[bool] = True
    extra_levels_relu: ClassVar[bool] = True
    published_predictors: ClassVar[Mapping[str, str]] = {
        "conv_cls": "cls",
        "conv_reg": "reg",
        "conv_centerness": "quality",
    }

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
        norm_on_bbox: bool = False,
        centerness_on_reg: bool = False,
        center_sampling_radius: float | None = None,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
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
        self.norm_on_bbox = norm_on_bbox
        self.quality_branch = "reg" if centerness_on_reg else "cls"
        self.center_sampling_radius = center_sampling_radius

    @property
    def assigner(self) -> FCOSAssigner:
        """FCOS's assigner: it chooses the box of each point by the box's size and place."""
        return FCOSAssigner(self.center_sampling_radius)

    def priors(self, grid: tuple[tuple[int, int], ...]) -> Priors:
        """One point per cell."""
        return points(grid, self.strides, self.scales.device)

    def sides(self, regression: Tensor, priors: Priors) -> Tensor:
        """Turn what is predicted into distances (..., A, 4), in pixels, to the left, top, right and bottom side."""
        regression = regression.float()
        return regression.clamp(min=0) * priors.strides[:, None] if self.norm_on_bbox else regression.exp()

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Decode what is predicted (..., A, 4) into boxes (..., A, 4)."""
        return from_distances(centres(priors.boxes), self.sides(regression, priors))

    def assign(self, predictions: Predictions, batch: Batch) -> Assignment:
        """Assign boxes to points by the boxes' size and place, see `FCOSAssigner`."""
        return self.assigner(predictions.priors, batch, self.num_classes)

    def losses(self, predictions: Predictions, assignment: Assignment) -> dict[str, Tensor]:
        """Compute `cls` (focal), `box` (-log IoU, weighted by centerness) and `centerness` (BCE)."""
        assert predictions.quality is not None
        image, prior = assignment.positive.nonzero(as_tuple=True)
        target_boxes = assignment.boxes[image, prior]
        priors = select(predictions.priors, prior)
        boxes = self.decode(predictions.regression[image, prior], priors)
        target_centerness = centerness(distances(centres(priors.boxes), target_boxes))
        labels = F.one_hot(assignment.labels, self.num_classes + 1)[..., :-1].float()
        cls = sigmoid_focal_loss(predictions.logits, labels, alpha=0.25, gamma=2).sum()
        box = -elementwise_iou(boxes, target_boxes).clamp(min=MIN_IOU).log() * target_centerness
        quality = F.binary_cross_entropy_with_logits(
            predictions.quality[image, prior], target_centerness, reduction="sum"
        )
        positives = processes.share(assignment.positive.sum(), at_least=1) + EPS
        return {
            "cls": cls / positives,
            "box": box.sum() / (assignment.normaliser + EPS),
            "centerness": quality / positives,
        }
