"""FBKD: attention-guided features and non-local relations (Zhang & Ma, ICLR 2021, uKhGRvM8QNH).

The student's map mimics the teacher's where both detectors look. Its means over space and over channels mimic the
teacher's (section 3.1). The output of a non-local block, which relates all cells, mimics the teacher's (section 3.2).
Each term is a Euclidean norm over a whole level, neither squared nor divided by N.

Numbers agree with open-mmlab/mmrazor @90c7af1, level by level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.contract import DetectorSpec
from kdtoolkit.methods.common import batch_norm
from kdtoolkit.methods.features import FeatureMethod, Level


def spatial_attention(x: Tensor, temperature: float) -> Tensor:
    """Attention (N, 1, H, W) of maps (N, C, H, W), 1 on average: softmax over cells of the mean of |x|."""
    weight = (x.abs().mean(1).flatten(1) / temperature).softmax(1)
    return (weight * weight.shape[1]).reshape(len(x), 1, *x.shape[2:])


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over a whole tensor and the images of all processes: a scalar. Its gradient is 0 if all is 0."""
    # Not square().sum().sqrt(): its gradient is 0 / 0 where all is 0. In two steps, since taken in one the norm of a
    # level of 8 million entries loses 2e-4 to float32.
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1))
    if processes.count() == 1:
        return norm
    return processes.total(norm.square()).clamp(min=1e-24).sqrt()


class NonLocal(nn.Module):
    """Add to each cell what it gathers from all cells by dot product (arXiv 1711.07971). It starts as the identity.

    Keys and values are max-pooled over windows of `pool` x `pool` cells. In a smaller map the window is the whole map.
    """

    def __init__(self, channels: int, pool: int, reduction: int) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.pool = pool
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) in, the same out."""
        window = min(self.pool, x.shape[2]), min(self.pool, x.shape[3])
        key, value = (F.max_pool2d(conv(x), window).flatten(2) for conv in (self.key, self.value))
        query = self.query(x)
        # Values times keys first: there is no softmax between, so the relation of all cells to all keys, as large as
        # a map, is never written down.
        relation = torch.bmm(value, key.transpose(1, 2)) / key.shape[2]
        gathered = self.out(torch.bmm(relation, query.flatten(2)).view_as(query))
        # Batch normalisation in training mode. It also takes a single cell in all, which nn.BatchNorm2d refuses.
        return x + batch_norm(gathered, 1e-5) * self.scale + self.shift


class Connector(nn.Module):
    """What is learned for one level: the relations of both detectors, and projections to the teacher's channels."""

    def __init__(self, student_channels: int, teacher_channels: int, pool: int, reduction: int = 4) -> None:
        super().__init__()
        self.feature = nn.Conv2d(student_channels, teacher_channels, 1)
        self.channel = nn.Linear(student_channels, teacher_channels)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.relation = nn.Conv2d(student_channels, teacher_channels, 1)
        self.student_relation = NonLocal(student_channels, pool, reduction)
        self.teacher_relation = NonLocal(teacher_channels, pool, reduction)

    def forward(self, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The feature, channel, spatial and relation terms of maps (N, C, H, W) of equal size: unweighted scalars."""
        teacher = teacher.detach()
        attention = (spatial_attention(student, temperature) + spatial_attention(teacher, temperature)).detach() / 2
        differences = (
            (self.feature(student) - teacher) * attention.sqrt(),
            self.channel(student.mean((2, 3))) - teacher.mean((2, 3)),
            self.spatial(student.mean(1, keepdim=True)) - teacher.mean(1, keepdim=True),
            self.relation(self.student_relation(student)) - self.teacher_relation(teacher),
        )
        feature, channel, spatial, relation = map(norm, differences)
        return feature, channel, spatial, relation


class FBKD(FeatureMethod):
    """Imitate the teacher's pyramid weighted by attention, its means, and the relations between its cells.

    Keys and values are pooled over 64 x 64 pixels, or over 4 x 4 cells where these are larger, as published. The
    default weights are mmrazor's for Faster R-CNN.

    Args:
        temperature: of the attention.
        feature_weight: factor of the difference of features weighted by attention. All terms are summed over levels.
        channel_weight: factor of the difference of means over space.
        spatial_weight: factor of the difference of means over channels.
        relation_weight: factor of the non-local term.
    """

    terms = ("feature", "channel", "spatial", "relation")
    paper = "OpenReview uKhGRvM8QNH (ICLR 2021)"
    connectors: nn.ModuleList

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        feature_weight: float = 7e-5,
        channel_weight: float = 4e-3,
        spatial_weight: float = 4e-3,
        relation_weight: float = 7e-5,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weights = feature_weight, channel_weight, spatial_weight, relation_weight

    def projection(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Each term has a projection of its own, in the level's connector."""
        return nn.Identity()

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Build a connector for each level; it projects channels even where they are equal."""
        super().setup(student_spec, teacher_spec)
        self.connectors = nn.ModuleList(
            Connector(student_spec.channels[s], teacher_spec.channels[t], max(64 // student_spec.strides[s], 4))
            for s, t in self.levels
        )

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The four terms of one level (4,)."""
        return torch.stack(self.connectors[level.index](student, teacher, self.temperature))
