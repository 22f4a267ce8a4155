"""What methods share: levels that correspond, projections, statistics of channels, divergences of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.boxes import elementwise_giou, elementwise_iou
from kdtoolkit.contract import Assignment, DetectorSpec, Predictions, Priors
from kdtoolkit.errors import KDError

EPS = torch.finfo(torch.float32).eps


def rows_of_levels(priors: Priors, levels: Sequence[int]) -> Tensor:
    """Indices (A',) into the priors of those on some levels, in order."""
    starts = [0, *accumulate(priors.per_level)]
    return torch.cat([torch.arange(starts[i], starts[i + 1], device=priors.boxes.device) for i in levels])


def at_levels(predictions: Predictions, levels: Sequence[int]) -> Predictions:
    """The predictions of some levels of a grid."""
    rows, priors = rows_of_levels(predictions.priors, levels), predictions.priors
    kept = Priors(
        priors.boxes[rows],
        priors.strides[rows],
        tuple(priors.grid[i] for i in levels),
        priors.context,
        tuple(priors.per_cell[i] for i in levels) if priors.per_cell else (),
    )
    return replace(
        predictions,
        logits=predictions.logits[:, rows],
        regression=predictions.regression[:, rows],
        quality=None if predictions.quality is None else predictions.quality[:, rows],
        priors=kept,
    )


class Projection(nn.Conv2d):
    """A learned 1x1 convolution of maps (N, C, H, W), in float32 also under autocast."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H, W)."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def projection(student_channels: int, teacher_channels: int) -> nn.Module:
    """A `Projection` from the student's channels to the teacher's; nothing where they are equal."""
    if student_channels == teacher_channels:
        return nn.Identity()
    return Projection(student_channels, teacher_channels)


class StateProjection(nn.Conv2d):
    """A learned linear map of dim 1, of maps (N, C, H, W) as of vectors (N, C) and (N, C, Q)."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, ...) to (N, C', ...)."""
        flat = super().forward(input.reshape(*input.shape[:2], -1, 1))
        return flat.reshape(flat.shape[0], flat.shape[1], *input.shape[2:])


def projections(pairs: Sequence[tuple[int, int]], student: DetectorSpec, teacher: DetectorSpec) -> nn.ModuleList:
    """One `projection` for each pair of levels."""
    return nn.ModuleList(projection(student.channels[s], teacher.channels[t]) for s, t in pairs)


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly to the (H, W) of `reference`; unchanged where equal."""
    size = reference.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def channel_moments(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of (N, C, ...) per channel over all else, kept as (1, C, 1, ...).

    The variance divides by the number of values - `correction`, at least by 1. The images of all processes count, as if
    one process had them.
    """
    dims = [dim for dim in range(x.ndim) if dim != 1]
    cells = x.numel() // x.shape[1]
    mean = x.mean(dims, keepdim=True)
    freedom: Tensor | int = max(cells - correction, 1)
    if processes.count() > 1:  # each process may have images of a different size
        sums = processes.total(torch.cat([x.sum(dims), x.new_full((1,), cells)]))
        mean, freedom = (sums[:-1] / sums[-1]).view_as(mean), sums[-1].detach() - correction
    return mean, processes.total((x - mean).square().sum(dims, keepdim=True)) / freedom


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std of (N, C, ...) per channel over all else, kept as (1, C, 1, ...).

    The images of all processes count, as if one process had them.
    """
    mean, variance = channel_moments(x, correction=1)
    # Not x.std(): its gradient is 0 / 0 at a constant channel, and a single cell in all has no unbiased std.
    return mean, variance.clamp(min=1e-24).sqrt()


def standardise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise (N, C, ...) per channel over all else, by the unbiased std + `eps`, in float32.

    A channel that does not vary, but for rounding, becomes 0 and gets no gradient, which would be 1 / `eps` times the
    loss's.
    """
    x = x.float()
    mean, std = channel_statistics(x)
    varies = std > eps * mean.abs().clamp(min=1)
    return (x - mean) * torch.where(varies, 1 / (std + eps), 0.0)


def distribution_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of distributions given as logits (..., B), summed over B, times T^2: (...), float32.

    No gradient reaches the teacher. LD divides it by B. Source: Hinton et al., arXiv 1503.02531.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def check_beta(method: str, beta: float) -> float:
    """The exponent of `quality_focal_kd` itself. Raises KDError for one with which the gradient may be infinite."""
    if beta != 0 and not beta >= 1:
        raise KDError(f"{method}(beta={beta}): must be 0, or 1 and more")
    return beta


def quality_focal_kd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Quality focal loss towards the teacher's scores, elementwise in float32, for logits of any equal shape.

    `beta` is 0, or 1 and more: between them the gradient is infinite where both scores are equal.
    BCE(s, sigmoid(t)) * |sigmoid(s) - sigmoid(t)|^beta. Source: GFL (arXiv 2006.04388), equation 7, soft target.
    """
    student_logits, target = student_logits.float(), teacher_logits.detach().float().sigmoid()
    modulation = (student_logits.sigmoid() - target).abs()
    if beta != 1:
        modulation = modulation.pow(beta)
    return F.binary_cross_entropy_with_logits(student_logits, target, reduction="none") * modulation


def classification_kd(student: Predictions, teacher: Predictions, beta: float = 1.0) -> Tensor:
    """Classification term of each prior (N, A), summed over classes: QFL, or KL where scores are a softmax."""
    if teacher.activation == "sigmoid":
        return quality_focal_kd(student.logits, teacher.logits, beta).sum(-1)
    return distribution_kl(student.logits, teacher.logits, temperature=1.0)


def box_kd(
    student: Predictions, teacher: Predictions, assignment: Assignment, kind: Literal["giou", "iou"]
) -> tuple[Tensor, Tensor]:
    """Localisation term of each prior (N, A) and the divisor of its sum, each prior weighted by the teacher's score.

    Distributions: KL averaged over the four sides, divided by the sum of the weights. Else: 1 - GIoU, or -log IoU,
    of decoded boxes, divided by the normaliser of the teacher's assignment.
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


def prediction_losses(
    student: Predictions,
    teacher: Predictions,
    assignment: Assignment,
    num_classes: int,
    beta: float,
    box_loss: Literal["giou", "iou"],
) -> dict[str, Tensor]:
    """Unweighted losses `cls`, `box` and, where both judge quality, `quality` of predictions at the same priors.

    The published ones of CrossKD (arXiv 2306.11369, equations 4 and 5); `assignment` is of the teacher's priors.
    """
    normaliser = assignment.normaliser + EPS
    cls = (classification_kd(student, teacher, beta) * assignment.weights).sum() / normaliser
    box, divisor = box_kd(student, teacher, assignment, box_loss)
    losses = {"cls": cls, "box": box.sum() / (divisor + EPS)}
    if student.quality is not None and teacher.quality is not None:
        target = teacher.quality.detach().float().sigmoid()
        bce = F.binary_cross_entropy_with_logits(student.quality.float(), target, reduction="none")
        losses["quality"] = (bce * assignment.positive(num_classes)).sum() / normaliser
    return losses
