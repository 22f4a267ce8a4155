"""What methods share: rows of levels, cells on images, resizing, statistics of channels, divergences of predictions.

Methods of other packages may use all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdtoolkit import processes
from kdtoolkit.contract import Batch, Predictions, Priors, View

EPS = torch.finfo(torch.float32).eps
SMALLEST_VARIANCE = 1e-24  # of a channel, so that its std is never 0


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


def on_images(batch: Batch, stride: int, height: int, width: int, at: float = 0.5) -> Tensor:
    """Which cells of a level lie on an image, not on padding: (N, height, width) bool.

    `at` says which point of a cell counts, in shares of its sides: 0.5 is the centre, 0 is where it begins.
    """
    device = batch.images.device
    sizes = torch.tensor(batch.sizes).to(device, non_blocking=True)[:, :, None]
    y, x = ((torch.arange(cells, device=device) + at) * stride for cells in (height, width))
    return (y < sizes[:, 0])[:, :, None] & (x < sizes[:, 1])[:, None]


def cells_with_meaning(student_view: View, teacher_view: View, level: int) -> Tensor:
    """Which cells of the teacher's map of a level mean something to both detectors: (N, H, W) bool.

    All do, unless one of the detectors masks padding. Then it is those that begin on an image: each image has one.
    """
    maps, spec = teacher_view.features[level], teacher_view.spec
    if student_view.spec.masks_padding or spec.masks_padding:
        return on_images(teacher_view.batch, spec.strides[level], maps.shape[2], maps.shape[3], at=0)
    return torch.ones(len(maps), *maps.shape[2:], dtype=torch.bool, device=maps.device)


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
    if processes.count() == 1 and not x.requires_grad:
        mean, std = _fused_statistics(x)[1:]
        return _beside(mean, x), _beside(std, x)
    mean, variance = channel_moments(x, correction=1)
    # Not x.std(): its gradient is 0 / 0 at a constant channel, and a single cell in all has no unbiased std.
    return mean, variance.clamp(min=SMALLEST_VARIANCE).sqrt()


def image_moments(x: Tensor) -> Tensor:
    """Mean and variance of maps (N, C, H, W) per image and channel, (N, 2, C) float32; the variance divides by H * W.

    The moments of all images together give the `channel_statistics` of the maps: see `joined_statistics`.
    """
    x = x.float()
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square_().mean((2, 3))  # torch.var_mean takes several times as long on a CPU
    return torch.stack([mean[:, :, 0, 0], variance], 1)


def statistics_where(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The `channel_statistics` of maps (N, C, H, W) over the cells that count, (N, H, W) bool."""
    weight = counts[:, None].to(x)
    number = processes.total(weight.sum())
    mean = processes.total((weight * x).sum((0, 2, 3), keepdim=True)) / number
    squares = processes.total((weight * (x - mean).square()).sum((0, 2, 3), keepdim=True))
    return mean, (squares / (number - 1).clamp(min=1)).clamp(min=SMALLEST_VARIANCE).sqrt()


def joined_statistics(moments: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The `channel_statistics` (C,) of maps (N, C, H, W), from their `image_moments`. `cells` (C,) is H * W, as float.

    Moments of several maps may be joined along C, and then need one pass for all of them.
    """
    means, variances = moments.unbind(1)
    counts = len(moments) * cells
    mean = means.mean(0)
    if processes.count() > 1:  # each process may have images of a different size
        sums, counts = processes.total(torch.stack([cells * means.sum(0), counts])).unbind()
        mean = sums / counts
    squares = processes.total(cells * (variances + (means - mean).square()).sum(0))
    return mean, (squares / (counts - 1).clamp(min=1)).clamp(min=SMALLEST_VARIANCE).sqrt()


def batch_norm(x: Tensor, eps: float) -> Tensor:
    """Standardise (N, C, ...) per channel over all else: the biased variance + `eps` becomes 1.

    The images of all processes count, as if one process had them. A single cell in all becomes 0.
    """
    if processes.count() == 1:
        return torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)[0]
    mean, variance = channel_moments(x, correction=0)
    return (x - mean) * (variance + eps).rsqrt()


def standardise(x: Tensor, eps: float = 1e-6, to: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Standardise (N, C, ...) per channel over all else, by the unbiased std + `eps`, in float32.

    `to`: the mean and std that channels get instead of 0 and 1, C values each. They have no gradient.

    A channel that is constant except for rounding becomes 0 (or the mean in `to`) and gets no gradient. Otherwise its
    gradient would be 1 / `eps` times that of the loss.
    """
    x = x.float()
    to_mean, to_std = (None, None) if to is None else (each.flatten() for each in to)
    if processes.count() == 1:
        return cast(Tensor, _Standardise.apply(x, eps, to_mean, to_std))
    found = by_statistics(x, *channel_statistics(x), eps)
    return found if to_mean is None or to_std is None else found * _beside(to_std, x) + _beside(to_mean, x)


def by_statistics(x: Tensor, mean: Tensor, std: Tensor, eps: float = 1e-6) -> Tensor:
    """`standardise` by a given mean and std, (1, C, 1, ...) each."""
    return (x - mean) * torch.where(_varies(mean, std, eps), 1 / (std + eps), 0.0)


def _varies(mean: Tensor, std: Tensor, eps: float) -> Tensor:
    """Whether a channel is more than a constant with rounding."""
    return std > eps * mean.abs().clamp(min=1)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """Values (C,) as (1, C, 1, ...), with the dimensions of `x`."""
    return values.view(1, -1, *(1,) * (x.ndim - 2))


def _freedom(x: Tensor) -> tuple[int, int]:
    """The number of values of a channel, and what the sum of their squares is divided by for the unbiased variance."""
    cells = x.numel() // x.shape[1]
    return cells, max(cells - 1, 1)


def _fused_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x` with biased std 1 and mean 0, the mean (C,) and the unbiased std (C,), in one operation of torch."""
    standard, mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, SMALLEST_VARIANCE)
    cells, freedom = _freedom(x)
    return standard, mean, (cells / freedom) ** 0.5 / inverse


class _Standardise(torch.autograd.Function):
    """`standardise` in one process, by the kernels of batch normalisation. It keeps `x` alone for the gradient.

    They are several times as fast as sums and differences of maps, above all with channels last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, to_mean: Tensor | None, to_std: Tensor | None) -> Tensor:
        standard, mean, std = _fused_statistics(x)
        cells, freedom = _freedom(x)
        shrink = std / (std + eps)
        scale = shrink * _varies(mean, std, eps) * (freedom / cells) ** 0.5
        if to_std is not None:
            scale = scale * to_std
        ctx.save_for_backward(x, mean, std, shrink, scale)
        ctx.factor = (cells / freedom) ** 0.5
        return (
            standard * _beside(scale, x)
            if to_mean is None
            else torch.addcmul(_beside(to_mean, x), standard, _beside(scale, x))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, std, shrink, scale = ctx.saved_tensors
        # In batch normalisation nothing stands beside the std. With these weights and this std its gradient is ours.
        root = shrink.sqrt()
        found = torch.ops.aten.native_batch_norm_backward(
            gradient, x, scale / root, None, None, mean, root / std * ctx.factor, True, 0.0, [True, False, False]
        )
        return found[0], None, None, None


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
