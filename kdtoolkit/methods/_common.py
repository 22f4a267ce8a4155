"""What methods share: levels that correspond, projections, statistics of channels, divergence of distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract import DetectorSpec


def shared_levels(student: DetectorSpec, teacher: DetectorSpec) -> list[tuple[int, int]]:
    """Pairs (student level, teacher level) of equal stride, finest first."""
    return [(i, teacher.strides.index(stride)) for i, stride in enumerate(student.strides) if stride in teacher.strides]


def no_shared_level(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """The reason why features cannot be compared level by level, if so."""
    if shared_levels(student, teacher):
        return None
    return f"no pyramid level in common: strides {student.strides} of the student, {teacher.strides} of the teacher"


def projection(student_channels: int, teacher_channels: int) -> nn.Module:
    """A learned 1x1 convolution from the student's channels to the teacher's; nothing where they are equal."""
    if student_channels == teacher_channels:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, 1)


def projections(pairs: Sequence[tuple[int, int]], student: DetectorSpec, teacher: DetectorSpec) -> nn.ModuleList:
    """One `projection` for each pair of levels."""
    return nn.ModuleList(projection(student.channels[s], teacher.channels[t]) for s, t in pairs)


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly to the (H, W) of `reference`; unchanged where equal."""
    size = reference.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std of (N, C, ...) per channel over all else, kept as (1, C, 1, ...)."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    mean = x.mean(dims, keepdim=True)
    # Not x.std(): its gradient is 0 / 0 at a constant channel, and a single cell in all has no unbiased std.
    count = max(x.numel() // x.shape[1] - 1, 1)
    variance = (x - mean).square().sum(dims, keepdim=True) / count
    return mean, variance.clamp(min=1e-24).sqrt()


def distribution_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of distributions given as logits (..., B), summed over B, times T^2: (...), float32.

    No gradient reaches the teacher. LD divides it by B. Source: Hinton et al., arXiv 1503.02531.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2
