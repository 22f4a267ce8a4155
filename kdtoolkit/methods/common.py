"""What methods share: rows of levels, resizing, statistics of channels, divergences of predictions.

Methods of other packages may use all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.contract import Predictions, Priors

EPS = torch.finfo(torch.float32).eps


def rows_of_levels(priors: Priors, levels: Sequence[int]) -> Tensor:
    """Indices (A',) of the priors that lie on some levels, in the order of `levels`."""
    starts = [0, *accumulate(priors.per_level)]
    return torch.cat([torch.arange(starts[i], starts[i + 1], device=priors.boxes.device) for i in levels])


def at_levels(predictions: Predictions, levels: Sequence[int]) -> Predictions:
    """The predictions on some levels of a grid."""
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


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly to the (H, W) of `reference`. Maps of that size are returned unchanged."""
    return resize_to(x, (reference.shape[-2], reference.shape[-1]))


def resize_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly to `size`, (H, W). Maps of that size are returned unchanged."""
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


def image_moments(x: Tensor) -> Tensor:
    """Mean and variance of maps (N, C, H, W) per image and channel, (N, 2, C) float32; the variance divides by H * W.

    The moments of all images together give the `channel_statistics` of the maps: see `joined_statistics`.
    """
    variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    return torch.stack([mean, variance], 1)


def joined_statistics(moments: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The `channel_statistics` of maps (N, C, H, W), from their `image_moments`. `cells` is H * W."""
    means, variances = moments.unbind(1)
    count = len(moments) * cells
    mean = means.mean(0)
    freedom: Tensor | int = max(count - 1, 1)
    if processes.count() > 1:  # each process may have images of a different size
        sums = processes.total(torch.cat([cells * means.sum(0), means.new_full((1,), count)]))
        mean, freedom = sums[:-1] / sums[-1], sums[-1].detach() - 1
    squares = processes.total(cells * (variances + (means - mean).square()).sum(0))
    std = (squares / freedom).clamp(min=1e-24).sqrt()
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def standardise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise (N, C, ...) per channel over all else, by the unbiased std + `eps`, in float32.

    A channel that is constant except for rounding becomes 0 and gets no gradient. Otherwise its gradient would be 1 /
    `eps` times that of the loss.
    """
    x = x.float()
    mean, std = channel_statistics(x)
    varies = std > eps * mean.abs().clamp(min=1)
    return (x - mean) * torch.where(varies, 1 / (std + eps), 0.0)


def distribution_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of distributions given as logits (..., B), summed over B, times T^2: (...), float32.

    No gradient reaches the teacher. Source: Hinton et al., arXiv 1503.02531.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def quality_focal_kd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Quality focal loss towards the teacher's scores, elementwise in float32, for logits of any equal shape.

    It is BCE(s, sigmoid(t)) * |sigmoid(s) - sigmoid(t)|^beta. `beta` must be 0, or 1 and more: between 0 and 1 the
    gradient is infinite at equal scores. Source: GFL (arXiv 2006.04388), equation 7, with a soft target.
    """
    student_logits, target = student_logits.float(), teacher_logits.detach().float().sigmoid()
    modulation = (student_logits.sigmoid() - target).abs()
    if beta != 1:
        modulation = modulation.pow(beta)
    return F.binary_cross_entropy_with_logits(student_logits, target, reduction="none") * modulation
