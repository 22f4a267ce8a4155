"""Prediction mimicking: the student's own predictions mimic the teacher's, the baseline of CrossKD (arXiv 2306.11369).

The losses are CrossKD's, but no part of the teacher's head takes part. The student's predictions are drawn towards the
ground truth and towards the teacher's at the same time. Where these two disagree, the targets conflict (section 3.1).
"""

from __future__ import annotations

from torch import Tensor

from kdtoolkit.compatibility import why_bins_differ
from kdtoolkit.contract import DetectorSpec, Matched, Predictions
from kdtoolkit.methods.prediction_losses import BoxLoss, PredictionLosses
from kdtoolkit.methods.predictions import PredictionMethod


class Mimic(PredictionMethod):
    """Let the student's own predictions mimic the teacher's, prior by prior.

    The defaults are the same as in `CrossKD`, so the two methods differ only in the predictions that mimic the
    teacher's.

    Args:
        cls_weight: factor of the classification term (1; FCOS 0.4).
        distribution_weight: factor of the localisation term where boxes are distributions (GFL: 4).
        box_weight: factor of the localisation term where they are not (RetinaNet, ATSS: 1; FCOS 0.75).
        quality_weight: factor of the centerness term (ATSS: 1; FCOS 0); only detectors with such a branch have it.
        beta: exponent of the quality focal loss, 0, or 1 and more.
        box_loss: "giou" (RetinaNet, ATSS), or "iou" (FCOS).
    """

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
        box_loss: BoxLoss = "giou",
    ) -> None:
        super().__init__()
        self.distances = PredictionLosses(cls_weight, distribution_weight, box_weight, quality_weight, beta, box_loss)

    @classmethod
    def for_fcos(cls) -> Mimic:
        """For FCOS, as `CrossKD.for_fcos`: -log IoU at weight 0.75, classification at 0.4, no centerness term."""
        return cls(cls_weight=0.4, box_weight=0.75, quality_weight=0.0, box_loss="iou")

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs whose priors do not correspond one to one, or whose boxes are predicted differently."""
        if reason := super().refuses(student_spec, teacher_spec):
            return reason
        if student_spec.priors != teacher_spec.priors:
            return (
                f"the student predicts boxes relative to {student_spec.priors}, the teacher relative to "
                f"{teacher_spec.priors}. Use CrossKD or BCKD"
            )
        return why_bins_differ(student_spec, teacher_spec)

    def losses(self, student: Predictions, teacher: Predictions, pair: Matched) -> dict[str, Tensor]:
        """`cls`, `box` and, where both heads judge quality, `quality`; terms of weight 0 are left out."""
        return self.distances(student, teacher, pair.teacher_assignment)
