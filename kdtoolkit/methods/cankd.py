"""CanKD: cross-attention as a non-local operation (Sun and Ohyama, WACV 2026, arXiv 2511.21503).

Before it is compared, each cell of the student's map adds what it finds in all cells of the teacher's: z = s + W(a),
a = theta(s) (phi(t)^T g(t)) / P, over the P cells of the teacher's map, pooled by 2. Then the mean squared difference
of z and the teacher's map, each standardised by channel in each image: instance normalisation without parameters.

Follows the published code (tori-hotaru/CanKD @1a75718). There theta(s) phi(t)^T is computed first: a matrix of cells
by cells. There is no softmax, so the product is associative. Here phi(t)^T g(t) is computed first: a matrix of
channels by channels. The result is the same, and takes a fraction of the time and memory. W has no biases here,
because the normalisation removes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract import DetectorSpec
from kdtoolkit.methods.common import batch_norm
from kdtoolkit.methods.features import FeatureMethod, Level


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Maps (N, C, H, W) of mean 0 and variance 1 over the cells of each image and channel, in float32.

    The variance is the biased one, with `eps` added.
    """
    x = x.float()
    x = x - x.mean((2, 3), keepdim=True)
    return x / (x.square().mean((2, 3), keepdim=True) + eps).sqrt()


def cankd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of maps (N, C, H, W), each standardised over the cells of each image and channel.

    A scalar; no gradient reaches the teacher.
    """
    difference = instance_norm(student) - instance_norm(teacher.detach())
    return difference.square().mean()


class CrossAttention(nn.Module):
    """Add to the student's map what its cells find in the teacher's map. The scale starts at 0: at first, nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Maps (N, C, H, W) each -> (N, C, H, W)."""
        # A level of a single row or column is not pooled in that direction.
        window = min(teacher.shape[2], 2), min(teacher.shape[3], 2)
        keys, values = (F.max_pool2d(layer(teacher), window).flatten(2) for layer in (self.phi, self.g))
        mixing = values @ keys.mT / keys.shape[2]  # (N, C', C')
        added = self.out((mixing @ self.theta(student).flatten(2)).unflatten(2, student.shape[2:]))
        # Batch normalisation by the batch's own statistics: it runs in training alone.
        return student + self.scale * batch_norm(added, 1e-5)


class CanKD(FeatureMethod):
    """Imitate the teacher's pyramid after each cell of the student has looked at the teacher's whole map.

    For all detectors with a pyramid. The default weight is the paper's (10 / 2 in the code). The paper distils the four
    finest levels; `at_strides` chooses levels.

    Args:
        weight: factor of the loss summed over levels; the paper's mu.
    """

    paper = "arXiv 2511.21503 (WACV 2026)"
    attention: nn.ModuleList

    def __init__(self, *, weight: float = 5.0) -> None:
        super().__init__(weight=weight)

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Build also an attention block for each level."""
        super().setup(student_spec, teacher_spec)
        self.attention = nn.ModuleList(CrossAttention(teacher_spec.channels[t]) for _, t in self.levels)

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level."""
        return cankd_loss(self.attention[level.index](student, teacher), teacher)
