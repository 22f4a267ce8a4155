"""Feature imitation: FitNets' hints (Romero et al., ICLR 2015, arXiv 1412.6550), over all cells or over some.

Mean squared difference of the pyramid's features: over the whole map, over the priors inside boxes, or over the
priors that overlap a box well (Wang et al., CVPR 2019, arXiv 1906.03609). The papers of other feature methods compare
themselves with it.

Numbers agree with the imitation losses in HikariTJU/LD @4287990, with one difference. There a level counts only if a
prior on it is positive. Here it counts if its region is not empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.boxes import centres, pairwise_iou
from kdtoolkit.compatibility import why_not_on_grid
from kdtoolkit.contract import Batch, DetectorSpec, Exchange, PriorKind, Priors
from kdtoolkit.methods.common import resize_like
from kdtoolkit.methods.features import FeatureMethod, Level

Region = Literal["whole", "boxes", "fine-grained"]


def imitation_loss(student: Tensor, teacher: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean squared difference of maps (N, C, H, W), a scalar; over the cells of `region` (N, H, W) bool if given.

    It is 0 where the region is empty.
    """
    student, teacher = student.float(), teacher.detach().float()
    if region is None:
        return F.mse_loss(student, teacher)
    difference = F.mse_loss(student, teacher, reduction="none").sum(1)
    values = processes.share(region.sum() * student.shape[1], at_least=1)
    return torch.where(region, difference, 0.0).sum() / values


def box_region(priors: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Which priors (A, 4) have their centre strictly inside a box of the image: (N, A) bool. `boxes`: (G, 4) each."""
    points = centres(priors)[:, None]
    # Image by image, here and below: padded to the most boxes of an image, a batch would take several times the memory.
    return torch.stack([((points > own[:, :2]) & (points < own[:, 2:])).all(-1).any(-1) for own in boxes])


def fine_grained_region(priors: Tensor, boxes: Sequence[Tensor], valid: Tensor, share: float = 0.5) -> Tensor:
    """Which priors overlap a box by more than `share` of the best IoU any prior has with it: (N, A) bool.

    Args:
        priors: anchors (A, 4) xyxy in pixels.
        boxes: of each image (G, 4) xyxy in pixels.
        valid: (N, A) bool, False where a prior lies in the batch's padding.
        share: the paper's psi.
    """
    regions = []
    for own, real in zip(boxes, valid, strict=True):
        iou = pairwise_iou(priors, own) * real[:, None]  # (A, G)
        regions.append((iou > share * iou.amax(0)).any(-1))
    return torch.stack(regions)


def on_image(priors: Priors, batch: Batch) -> Tensor:
    """Which priors have their centre on the image or on the padding that it has alone: (N, A) bool."""
    points = centres(priors.boxes)
    return (points < points.new_tensor([(w, h) for h, w in batch.padded_sizes])[:, None]).all(-1)


class FitNet(FeatureMethod):
    """Imitate the teacher's features.

    Args:
        weight: factor of the loss summed over levels; 2 is LD's for its imitation terms on GFL.
        region: the "whole" map; "boxes": cells with a prior inside a box; "fine-grained": cells with an anchor that
            overlaps a box well. The last two need a student whose priors lie on a grid.
    """

    vanishing = ("feature",)
    resize_student = False
    paper = "arXiv 1412.6550 (ICLR 2015); fine-grained: arXiv 1906.03609 (CVPR 2019)"

    def __init__(self, *, weight: float = 2.0, region: Region = "whole") -> None:
        super().__init__(weight=weight)
        self.region = region
        if region != "whole":
            self.unlabelled = "detections"

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride, and regions that the student's priors cannot mark."""
        if self.region != "whole" and (
            reason := why_not_on_grid(student_spec, "student", use="FitNet(region='whole')")
        ):
            return reason
        if self.region == "fine-grained" and student_spec.priors is PriorKind.POINTS:
            return "region 'fine-grained' needs anchors, and the student predicts at points. Use FitNet(region='boxes')"
        return super().refuses(student_spec, teacher_spec)

    def regions(self, exchange: Exchange) -> list[Tensor] | None:
        """The region (N, H, W) bool of each pair of levels, in the student's cells; None for whole maps."""
        if self.region == "whole":
            return None
        # The student's head has run for its own loss, although this method needs features alone.
        priors, batch = exchange.student.head.predictions.priors, exchange.student.batch
        if self.region == "boxes":
            region = box_region(priors.boxes, batch.boxes)
        else:
            region = fine_grained_region(priors.boxes, batch.boxes, on_image(priors, batch))
        strides = exchange.student.adapter.spec.strides
        levels = zip(torch.split(region, list(priors.per_level), 1), priors.grid, strides, strict=True)
        shown = [
            level.view(len(region), height, width, -1).any(-1)
            for level, (height, width), stride in levels
            if stride in exchange.student.spec.strides
        ]
        return [shown[s] for s, _ in self.levels]

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level. The teacher's map is resized, for the region is in the student's cells."""
        return imitation_loss(student, resize_like(teacher, student), level.region)
