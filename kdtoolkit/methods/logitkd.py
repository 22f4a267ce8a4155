"""Logit distillation: three published forms (KD, DKD, DIST) for the class scores of corresponding priors.

KD (Hinton et al., arXiv 1503.02531): KL divergence of softened scores. DKD (Zhao et al., CVPR 2022, arXiv
2203.08679): KL of the target class against all others, and KL among the others; each has its own weight. DIST (Huang
et al., NeurIPS 2022, arXiv 2205.10536): 1 - Pearson's r of each prior's scores and of each class's scores over priors.

All three were made for classifiers with a softmax. Two-stage detectors have one too, with background as a class, and
there all priors count. Where scores are sigmoids, classes are compared at positive priors only. Numbers agree with
mmrazor's.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.compatibility import why_too_few_classes
from kdtoolkit.contract import DetectorSpec, Matched, Predictions, Whose
from kdtoolkit.methods.common import distribution_kl
from kdtoolkit.methods.predictions import PredictionMethod

Kind = Literal["kd", "dkd", "dist"]


def decoupled_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The two parts of DKD, (R,) each: KL of the target against the rest, and KL among the rest; both times T^2.

    Logits (R, K), labels (R,) in [0, K). Source: arXiv 2203.08679, equation 7.
    """
    target = F.one_hot(labels, student.shape[-1]).bool()

    def halves(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits.float() / temperature
        hit = scaled[target]
        rest = scaled.masked_fill(target, -torch.inf)
        return torch.stack([hit, rest.logsumexp(-1)], -1), scaled[~target].view(len(scaled), scaled.shape[-1] - 1)

    (student_target, student_rest), (teacher_target, teacher_rest) = halves(student), halves(teacher.detach())
    parts = (
        distribution_kl(student_target, teacher_target),
        distribution_kl(student_rest, teacher_rest),
    )
    return parts[0] * temperature**2, parts[1] * temperature**2


def relation_distance(student: Tensor, teacher: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """1 - Pearson's r along `dim` of two tensors of equal shape, averaged over all else: a scalar.

    Source: arXiv 2205.10536, equations 7 to 10; `eps` is added to the product of the norms.
    """
    centred = [x - x.mean(dim, keepdim=True) for x in (student, teacher)]
    # Not Tensor.norm: its gradient is 0 / 0 where all are equal.
    norms = [x.square().sum(dim).clamp(min=1e-24).sqrt() for x in centred]
    # Scores that are constant except for rounding correlate with nothing, and would get a gradient of size 1 / `eps`.
    varies = norms[0] > 1e-6 * student.detach().square().sum(dim).sqrt()
    correlation = (centred[0] * centred[1]).sum(dim) / (norms[0] * norms[1] + eps)
    return (1 - torch.where(varies, correlation, 0.0)).mean()


def dist_loss(student: Tensor, teacher: Tensor, temperature: float, inter: float = 1.0, intra: float = 1.0) -> Tensor:
    """DIST of logits (R, K), a scalar: T^2 (inter * over classes + intra * over rows). Source: arXiv 2205.10536."""
    p, q = ((x.float() / temperature).softmax(-1) for x in (student, teacher.detach()))
    distance = inter * relation_distance(p, q, dim=1) + intra * relation_distance(p, q, dim=0)
    return temperature**2 * distance


class LogitKD(PredictionMethod):
    """Bring the student's class scores to the teacher's, at the same priors.

    Args:
        kind: "kd", "dkd" or "dist".
        weight: factor of the loss, a mean over priors.
        temperature: divides both detectors' logits. 1 by default, as in DKD's own experiments on detectors.
        target_weight: DKD's alpha, the weight of the target class.
        others_weight: DKD's beta, the weight of the other classes (0.25 on detectors, 8 on ImageNet's classifiers).
        priors: whose proposals or queries go through both heads. By default the student's (in training, the ones that
            it samples), as in DKD's experiments on detectors. On grids it makes no difference.
    """

    terms = ("cls",)
    vanishing = ("cls",)
    paper = "arXiv 1503.02531; DKD: 2203.08679 (CVPR 2022); DIST: 2205.10536 (NeurIPS 2022)"

    def __init__(
        self,
        *,
        kind: Kind = "kd",
        weight: float = 1.0,
        temperature: float = 1.0,
        target_weight: float = 1.0,
        others_weight: float = 0.25,
        priors: Whose = "student",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.weight = weight
        self.temperature = temperature
        self.target_weight = target_weight
        self.others_weight = others_weight
        self.priors = priors

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs whose priors or scores do not correspond, or that have too few classes."""
        if reason := why_too_few_classes(student_spec, 3 if self.kind == "dkd" else 2):
            return f"{reason}. Use Mimic or BCKD, which compare each class by itself"
        return super().refuses(student_spec, teacher_spec)

    def losses(self, student: Predictions, teacher: Predictions, pair: Matched) -> dict[str, Tensor]:
        """`cls`: the weighted loss; 0 where no prior counts."""
        assignment = pair.teacher_assignment
        counts = assignment.weights > 0
        if student.activation == "sigmoid":
            counts = counts & assignment.positive
        chosen = counts.nonzero(as_tuple=True)
        ours, theirs = student.logits[chosen], teacher.logits[chosen]
        rows = processes.share(counts.sum(), at_least=1)
        if self.kind == "dist" and len(ours):
            loss = dist_loss(ours, theirs, self.temperature)
        elif self.kind == "dkd":
            target, others = decoupled_kl(ours, theirs, assignment.labels[chosen], self.temperature)
            loss = (self.target_weight * target + self.others_weight * others).sum() / rows
        else:
            loss = distribution_kl(ours, theirs, self.temperature).sum() / rows
        return {"cls": self.weight * loss}
