"""Prediction mimicking: the student's own predictions mimic the teacher's, the baseline of CrossKD (arXiv 2306.11369).

The losses are CrossKD's, but nothing of the teacher's head takes part: predictions that answer to the ground truth
are at the same time drawn towards the teacher's, and where the two disagree the targets conflict (section 3.1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from kdtoolkit.compatibility import check_grids, why_bins_differ, why_priors_differ, why_scores_differ
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method
from kdtoolkit.methods.common import check_beta, prediction_losses


class Mimic(Method):
    """Let the student's own predictions mimic the teacher's, prior by prior.

    Defaults are those of `CrossKD`, so that the two differ in nothing but whose predictions mimic.

    Args:
        cls_weight: factor of the classification term (1; FCOS 0.4).
        distribution_weight: factor of the localisation term where boxes are distributions (GFL: 4).
        box_weight: factor of the localisation term where they are not (RetinaNet, ATSS: 1; FCOS 0.75).
        quality_weight: factor of the centerness term (ATSS: 1; FCOS 0); there is none without such a branch.
        beta: exponent of the quality focal loss, 0, or 1 and more.
        box_loss: "giou" (RetinaNet, ATSS), or "iou" (FCOS).
    """

    needs = frozenset({Capability.PREDICTIONS, Capability.ASSIGNMENT})
    terms = ("cls", "box", "quality")
    vanishing = ("cls", "box")
    paper = "arXiv 2306.11369 (CVPR 2024), its baseline"

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        distribution_weight: float = 4.0,
        box_weight: float = 1.0,
        quality_weight: float = 1.0,
        beta: float = 1.0,
        box_loss: Literal["giou", "iou"] = "giou",
    ) -> None:
        super().__init__()
        self.cls_weight = cls_weight
        self.distribution_weight = distribution_weight
        self.box_weight = box_weight
        self.quality_weight = quality_weight
        self.beta = check_beta("Mimic", beta)
        self.box_loss: Literal["giou", "iou"] = box_loss

    @classmethod
    def for_fcos(cls) -> Mimic:
        """For FCOS, as `CrossKD.for_fcos`: -log IoU at weight 0.75, classification at 0.4, no centerness term."""
        return cls(cls_weight=0.4, box_weight=0.75, quality_weight=0.0, box_loss="iou")

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs whose priors do not correspond one to one, or that predict boxes in other ways."""
        if reason := why_priors_differ(student, teacher) or why_scores_differ(student, teacher):
            return reason
        if student.priors != teacher.priors:
            return (
                f"the student predicts boxes relative to {student.priors}, the teacher relative to {teacher.priors}. "
                "Use CrossKD or BCKD"
            )
        return why_bins_differ(student, teacher)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cls`, `box` and, where both heads judge quality, `quality`; those of weight 0 are left out.

        Raises IncompatibleError where the two detectors bring the batch to other sizes.
        """
        pair = exchange.matched()
        student, teacher = pair.student.predictions, pair.teacher.predictions
        check_grids("Mimic", student, teacher)
        # Proposals and queries lie at the same place of the image, though not always of the canvas.
        teacher = replace(teacher, decode=lambda regression, priors: pair.teacher_boxes)
        num_classes = exchange.teacher.spec.num_classes
        losses = prediction_losses(student, teacher, pair.teacher_assignment, num_classes, self.beta, self.box_loss)
        weights = {
            "cls": self.cls_weight,
            "box": self.distribution_weight if teacher.regression.ndim == 4 else self.box_weight,
            "quality": self.quality_weight,
        }
        return {name: weights[name] * loss for name, loss in losses.items() if weights[name]}
