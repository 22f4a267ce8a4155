"""RetinaNet: focal loss for dense object detection (Lin et al., ICCV 2017, arXiv 1708.02002).

Each cell has nine anchors (three sizes, three aspect ratios). Losses are the focal loss for classes and L1 for boxes,
which are offsets from the anchor. The towers have no norm. The pyramid's coarser levels start from the backbone's last
map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from kdtoolkit import processes
from kdtoolkit.boxes import pairwise_iou
from kdtoolkit.contract import Assignment, Batch, Predictions, Priors
from kdtoolkit.detectors.assign import inside_padded, pad_targets
from kdtoolkit.detectors.atss import decode_offsets
from kdtoolkit.detectors.dense import EPS, DenseDetector, cached_by_grid, cell_priors

ANCHOR_SCALES = tuple(4 * 2 ** (i / 3) for i in range(3))  # square root of the area, in strides
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width
STDS = (1.0, 1.0, 1.0, 1.0)


@cached_by_grid
def anchors(grid: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device) -> Priors:
    """Build nine anchors per cell, with their centre on its first pixel: for each aspect ratio the three sizes."""
    root, scales = torch.tensor(ASPECT_RATIOS).sqrt()[:, None], torch.tensor(ANCHOR_SCALES)
    half = torch.stack([1 / root * scales, root * scales], -1).view(-1, 2) / 2
    return cell_priors(grid, strides, torch.cat([-half, half], -1), device)


def encode_offsets(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Encode boxes (..., 4) as (dx, dy, dw, dh) (..., 4) relative to anchors.

    Both must have an area. `decode` is the inverse.
    """
    middle, size = box_convert(boxes, "xyxy", "cxcywh").chunk(2, -1)
    anchor_middle, anchor_size = box_convert(anchors, "xyxy", "cxcywh").chunk(2, -1)
    return torch.cat([(middle - anchor_middle) / anchor_size, (size / anchor_size).log()], -1)


@dataclass(frozen=True)
class MaxIoUAssigner:
    """Each prior answers for the box of highest IoU, if the IoU is high enough (Faster R-CNN, arXiv 1506.01497, 3.1.2).

    A prior is positive from `positive_iou`, background below `negative_iou`, and has the weight 0 between. Moreover,
    each box gets the priors of highest IoU with it, however low that is. If several boxes claim one prior in this way,
    the last box gets it. Priors outside an image's own padding take no part.
    """

    positive_iou: float = 0.5
    negative_iou: float = 0.4

    def __call__(self, priors: Priors, batch: Batch, num_classes: int) -> Assignment:
        """Assign the batch's boxes to priors (A, 4). The normaliser is the sum over images of max(positives, 1)."""
        valid = inside_padded(priors, batch)
        boxes, labels, real = pad_targets(batch.boxes, batch.labels)
        iou = pairwise_iou(boxes, priors.boxes).masked_fill(~(real[:, :, None] & valid[:, None]), -1)  # (N, G, A)
        best, chosen = iou.max(dim=1)
        # A box that overlaps no prior gets none; in published code it gets all that it does not overlap.
        best_of_box = iou.amax(dim=2, keepdim=True)
        claimed = (iou == best_of_box) & (best_of_box > 0)
        order = torch.arange(1, boxes.shape[1] + 1, device=iou.device)[:, None]
        claim = (claimed * order).amax(dim=1)  # 0: none
        chosen = torch.where(claim > 0, claim - 1, chosen)
        assigned = (claim > 0) | (best >= self.positive_iou)
        ambiguous = ~assigned & (best >= self.negative_iou)
        return Assignment(
            positive=assigned,
            labels=labels.gather(1, chosen).masked_fill(~assigned, num_classes),
            boxes=boxes.gather(1, chosen[..., None].expand(-1, -1, 4)),
            weights=(valid & ~ambiguous).float(),
            normaliser=processes.share(assigned.sum(1).clamp(min=1).sum()),
        )


class RetinaNet(DenseDetector):
    """The RetinaNet detector. It takes the arguments of DenseDetector."""

    priors_per_cell: ClassVar[int] = len(ANCHOR_SCALES) * len(ASPECT_RATIOS)
    usual_head_groups: ClassVar[int] = 0
    usual_nms_iou: ClassVar[float] = 0.5
    has_scales: ClassVar[bool] = False
    extra_levels_from_input: ClassVar[bool] = True
    published_predictors: ClassVar[Mapping[str, str]] = {"retina_cls": "cls", "retina_reg": "reg"}

    @property
    def assigner(self) -> MaxIoUAssigner:
        """The assigner by IoU, with the published settings."""
        return MaxIoUAssigner()

    def priors(self, grid: tuple[tuple[int, int], ...]) -> Priors:
        """Nine anchors per cell."""
        return anchors(grid, self.strides, self.scales.device)

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Decode offsets (..., A, 4) into boxes (..., A, 4)."""
        return decode_offsets(regression, priors.boxes, STDS)

    def assign(self, predictions: Predictions, batch: Batch) -> Assignment:
        """Assign by IoU."""
        return self.assigner(predictions.priors, batch, self.num_classes)

    def losses(self, predictions: Predictions, assignment: Assignment) -> dict[str, Tensor]:
        """Compute `cls` (focal) and `box` (L1 of offsets)."""
        image, prior = assignment.positive.nonzero(as_tuple=True)
        target = encode_offsets(assignment.boxes[image, prior], predictions.priors.boxes[prior])
        box = F.l1_loss(predictions.regression[image, prior], target, reduction="sum")
        labels = F.one_hot(assignment.labels, self.num_classes + 1)[..., :-1].float()
        cls = sigmoid_focal_loss(predictions.logits, labels, alpha=0.25, gamma=2).sum(-1)
        normaliser = assignment.normaliser + EPS
        return {"cls": (cls * assignment.weights).sum() / normaliser, "box": box / normaliser}
