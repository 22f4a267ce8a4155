"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

Each channel of a pyramid level becomes a distribution over its cells (a softmax), and the student's are pulled to the
teacher's by KL divergence: where a channel is active matters, not how strongly (section 3.2).

The loss agrees with open-mmlab/mmrazor @90c7af1, but the teacher gets no gradient here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdtoolkit.compatibility import (
    shared_levels,
    why_no_shared_level,
    why_not_on_grid,
    why_priors_differ,
    why_scores_differ,
)
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, Predictions
from kdtoolkit.methods.common import distribution_kl, projections, resize_like


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the channels' distributions over cells, maps (N, C, H, W), mean over N and C, times T^2: a scalar."""
    return distribution_kl(student.flatten(2), teacher.flatten(2), temperature).mean()


def logit_maps(predictions: Predictions) -> list[Tensor]:
    """Class logits as maps (N, C, H, W) of each level of a grid, one channel a class and prior of a cell."""
    levels = torch.split(predictions.logits, list(predictions.priors.per_level), 1)
    return [
        x.reshape(len(x), height, width, -1).permute(0, 3, 1, 2)
        for x, (height, width) in zip(levels, predictions.priors.grid, strict=True)
    ]


class CWD(Method):
    """Imitate where each channel of the teacher's pyramid, or of its class logits, is active.

    Args:
        weight: factor of the loss summed over levels. 10 is mmrazor's setting for features; published results have
            5, for the features of RetinaNet's four finest levels and for GFL's class logits.
        temperature: of the softmax over cells.
        on: "features", or "logits": for detectors on grids with as many priors a cell.
    """

    needs = frozenset({Capability.FEATURES})
    terms = ("feature",)
    vanishing = ("feature",)
    paper = "arXiv 2011.13256 (ICCV 2021)"
    levels: list[tuple[int, int]]
    align: nn.ModuleList

    def __init__(
        self, *, weight: float = 10.0, temperature: float = 1.0, on: Literal["features", "logits"] = "features"
    ) -> None:
        super().__init__()
        if on == "logits":
            self.needs = frozenset({Capability.PREDICTIONS})
        self.on = on
        self.weight = weight
        self.temperature = temperature

    @classmethod
    def for_logits(cls) -> CWD:
        """For class logits, as published for GFL: weight 5."""
        return cls(weight=5.0, on="logits")

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride; for logits, those without corresponding maps."""
        if self.on == "features":
            return why_no_shared_level(student, teacher)
        if reason := why_not_on_grid(student, "student", use="CWD(on='features')"):
            return reason
        return why_priors_differ(student, teacher) or why_scores_differ(student, teacher)

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Pair the levels of equal stride; project where channels differ."""
        self.levels = shared_levels(student, teacher)
        if self.on == "features":
            self.align = projections(self.levels, student, teacher)
        else:
            self.align = nn.ModuleList(nn.Identity() for _ in self.levels)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`feature`: the weighted loss, summed over levels."""
        student: Sequence[Tensor] = exchange.student.features
        teacher: Sequence[Tensor] = exchange.teacher.features
        if self.on == "logits":
            pair = exchange.matched()
            student, teacher = logit_maps(pair.student.predictions), logit_maps(pair.teacher.predictions)
        losses = [
            cwd_loss(resize_like(align(student[s]), teacher[t]), teacher[t], self.temperature)
            for (s, t), align in zip(self.levels, self.align, strict=True)
        ]
        return {"feature": self.weight * torch.stack(losses).sum()}
