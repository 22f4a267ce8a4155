"""The losses of CrossKD (arXiv 2306.11369, equations 4 and 5), which its baseline Mimic shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.boxes import elementwise_giou, elementwise_iou
from kdtoolkit.contract import Assignment, Predictions
from kdtoolkit.errors import KDError
from kdtoolkit.methods.common import EPS, distribution_kl, quality_focal_kd

BoxLoss = Literal["giou", "iou"]


def classification_kd(student: Predictions, teacher: Predictions, beta: float = 1.0) -> Tensor:
    """Classification term of each prior (N, A): quality focal loss summed over classes; KL if scores are a softmax."""
    if teacher.activation == "sigmoid":
        return quality_focal_kd(student.logits, teacher.logits, beta).sum(-1)
    return distribution_kl(student.logits, teacher.logits, temperature=1.0)


def box_kd(student: Predictions, teacher: Predictions, assignment: Assignment, kind: BoxLoss) -> tuple[Tensor, Tensor]:
    """Localisation term of each prior (N, A) and the divisor of its sum, each prior weighted by the teacher's score.

    If box sides are distributions, the term is their KL, averaged over the four sides; the divisor is the sum of the
    weights. Otherwise the term is 1 - GIoU, or -log IoU, of decoded boxes; the divisor is the normaliser of the
    teacher's assignment.
    """
    weight = teacher.scores * assignment.weights
    if teacher.regression.ndim == 4:
        divergence = distribution_kl(student.regression, teacher.regression, temperature=1.0).mean(-1)
        return weight * divergence, processes.share(weight.sum())
    if kind == "giou":
        distance = 1 - elementwise_giou(student.boxes, teacher.boxes)
    else:
        distance = -elementwise_iou(student.boxes, teacher.boxes).clamp(min=1e-6).log()
    return weight * distance, assignment.normaliser


@dataclass(frozen=True)
class PredictionLosses:
    """Losses `cls`, `box` and, where both heads judge quality, `quality`, between predictions at the same priors.

    The weight of `box` is `distribution_weight` if box sides are distributions, else `box_weight`.
    `beta` is the exponent of the quality focal loss. Raises KDError for one between 0 and 1: there the gradient is
    infinite at equal scores.
    """

    cls_weight: float
    distribution_weight: float
    box_weight: float
    quality_weight: float
    beta: float
    box_loss: BoxLoss

    def __post_init__(self) -> None:
        if self.beta != 0 and not self.beta >= 1:
            raise KDError(f"beta={self.beta}: it must be 0, or at least 1")

    def __call__(self, student: Predictions, teacher: Predictions, assignment: Assignment) -> dict[str, Tensor]:
        """The weighted losses; terms of weight 0 are left out. `assignment`: for the teacher's priors."""
        normaliser = assignment.normaliser + EPS
        losses = {}
        if self.cls_weight:
            cls = classification_kd(student, teacher, self.beta) * assignment.weights
            losses["cls"] = self.cls_weight * (cls.sum() / normaliser)
        if box_weight := self.distribution_weight if teacher.regression.ndim == 4 else self.box_weight:
            box, divisor = box_kd(student, teacher, assignment, self.box_loss)
            losses["box"] = box_weight * (box.sum() / (divisor + EPS))
        if self.quality_weight and student.quality is not None and teacher.quality is not None:
            target = teacher.quality.detach().float().sigmoid()
            bce = F.binary_cross_entropy_with_logits(student.quality.float(), target, reduction="none")
            losses["quality"] = self.quality_weight * ((bce * assignment.positive).sum() / normaliser)
        return losses
