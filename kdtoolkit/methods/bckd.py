"""BCKD: distillation by the protocol of dense detectors (Yang et al., ICCV 2023, arXiv 2308.14286).

Classification: each class of each prior is a binary task, as it is for the detector's own loss. So scores are compared
as sigmoids, not as a softmax over classes: the sum of BCE(s, p_t) * |p_s - p_t|. Localisation: 1 - GIoU of decoded
boxes, weighted by the largest |p_s - p_t| of the classes. Both are sums over all priors, divided by the number of
positives.

Numbers agree with the published code (TinyTigerPan/BCKD @121c9aa), with one difference. There a level counts only if
the batch has a positive prior on it; the paper does not say so. Here every level counts, so that an image's loss does
not depend on the images beside it. In the reference files the sums are 1.3 to 1.4 times as large. `published_levels`
has the published rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtoolkit.boxes import elementwise_giou
from kdtoolkit.compatibility import why_not_on_grid
from kdtoolkit.contract import DetectorSpec, Matched, Predictions
from kdtoolkit.methods.common import EPS, quality_focal_kd
from kdtoolkit.methods.predictions import PredictionMethod


def disagreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The largest difference of class probabilities of each prior (..., A), from logits (..., A, K). No gradient."""
    difference = student_logits.detach().float().sigmoid() - teacher_logits.detach().float().sigmoid()
    return difference.abs().amax(-1)


def iou_distance(student_boxes: Tensor, teacher_boxes: Tensor, weight: Tensor) -> Tensor:
    """Sum of `weight` (...) * (1 - GIoU) over boxes (..., 4), xyxy in pixels: a scalar."""
    return (weight * (1 - elementwise_giou(student_boxes, teacher_boxes.detach()))).sum()


class BCKD(PredictionMethod):
    """Teach the student the teacher's class scores as binary tasks, and its boxes by overlap.

    For detectors on a grid with sigmoid scores. They may predict boxes in different ways (GFL teaches ATSS). The
    default weights are the published ones for GFL.

    Args:
        cls_weight: factor of the classification term.
        box_weight: factor of the localisation term.
        published_levels: leave out levels without any positive prior in the batch, as the published code does.
    """

    terms = ("cls", "box")
    vanishing = ("cls", "box")
    paper = "arXiv 2308.14286 (ICCV 2023)"

    def __init__(self, *, cls_weight: float = 1.0, box_weight: float = 4.0, published_levels: bool = False) -> None:
        super().__init__()
        self.published_levels = published_levels
        self.cls_weight = cls_weight
        self.box_weight = box_weight

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse priors that are not on a grid or do not correspond one to one, and scores that are a softmax."""
        for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
            if reason := why_not_on_grid(spec, role):
                return reason
            if spec.activation != "sigmoid":
                return (
                    f"it compares each class by itself, and the {role}'s class scores are a {spec.activation} over all "
                    "classes. Use CrossKD or LogitKD"
                )
        return super().refuses(student_spec, teacher_spec)

    def losses(self, student: Predictions, teacher: Predictions, pair: Matched) -> dict[str, Tensor]:
        """`cls` and `box`."""
        assignment = pair.student_assignment
        normaliser, weights = assignment.normaliser + EPS, assignment.weights
        if self.published_levels:
            positive = assignment.positive.any(0)
            levels = torch.split(positive, list(student.priors.per_level))
            weights = weights * torch.cat([level.any().expand(len(level)) for level in levels])
        cls = (quality_focal_kd(student.logits, teacher.logits).sum(-1) * weights).sum()
        weight = disagreement(student.logits, teacher.logits) * weights
        box = iou_distance(student.boxes, teacher.boxes, weight)
        return {"cls": self.cls_weight * cls / normaliser, "box": self.box_weight * box / normaliser}
