"""SL2: features where the teacher sees objects (score-weighted L2, Ultralytics' own distillation of 2026).

At each level of the neck, two 1x1 convolutions with a ReLU between them turn the student's map into one of the
teacher's channels. Each cell's squared difference to the teacher's map is weighted by the teacher's largest class score
in that cell. The sum over a level is divided by the sum of these weights times the number of channels, so a level
counts the same however many objects it has:

    loss = weight * sum over levels of  sum_p w_p |g(s_p) - t_p|^2 / (C sum_p w_p),   w_p = max over classes of score_p

The formula is written from its description; no code of Ultralytics was used. Where the description is silent, this file
chooses: both convolutions have the teacher's number of channels, all priors of a cell count by their largest score, and
the levels are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.compatibility import why_not_on_grid
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Predictions
from kdtoolkit.methods.features import FeatureMethod, Level

LEAST = 1e-9  # of the sum of a level's weights; if no cell has any score, the loss of the level is 0


def sl2_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Mean squared difference of maps (N, C, H, W), weighted in each cell by `weights` (N, H, W): a scalar.

    No gradient reaches the teacher. The cells of all processes count, as if one process had them.
    """
    difference = (student - teacher.detach()).square().mean(1)
    return (difference * weights).sum() / processes.share(weights.sum(), at_least=LEAST)


def score_maps(predictions: Predictions) -> list[Tensor]:
    """The largest class score in each cell of a grid, over classes and priors: one map (N, H, W) for each level."""
    levels = torch.split(predictions.scores.detach(), list(predictions.priors.per_level), 1)
    return [
        x.reshape(len(x), height, width, -1).amax(-1)
        for x, (height, width) in zip(levels, predictions.priors.grid, strict=True)
    ]


class SL2(FeatureMethod):
    """Imitate the teacher's pyramid in the cells where the teacher's class scores are high.

    The teacher must predict on a grid; the student may be of any kind. The two may have different classes: without a
    class map, the scores of all of the teacher's classes count.

    Args:
        weight: factor of the loss summed over levels. 6 is Ultralytics' for YOLO26.
    """

    needs = frozenset({Capability.FEATURES, Capability.PREDICTIONS})
    compares_classes = False
    paper = "docs.ultralytics.com/guides/knowledge-distillation (2026)"

    def __init__(self, *, weight: float = 6.0) -> None:
        super().__init__(weight=weight)

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse teachers whose scores are no maps, and pairs without a common stride."""
        return why_not_on_grid(teacher_spec, "teacher") or super().refuses(student_spec, teacher_spec)

    def projection(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Two 1x1 convolutions with a ReLU between them, also where channels are equal."""
        return nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1),
        )

    def regions(self, exchange: Exchange) -> list[Tensor]:
        """The teacher's score in each cell (N, H, W) of each pair of levels."""
        view = exchange.teacher
        maps = score_maps(view.head.predictions)
        return [view.cut(maps[t][:, None], t)[:, 0] for _, t in self.levels]

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level."""
        assert level.region is not None  # `regions` gives one for each pair
        return sl2_loss(student, teacher, level.region)
