"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

Each channel of a pyramid level becomes a distribution over its cells (a softmax), and KL divergence draws the
student's distributions to the teacher's. So it matters where a channel is active, not how strongly (section 3.2).

The loss agrees with open-mmlab/mmrazor @90c7af1, but the teacher gets no gradient here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdtoolkit.compatibility import (
    why_not_on_grid,
    why_priors_differ,
    why_scores_differ,
)
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Predictions
from kdtoolkit.methods.common import distribution_kl
from kdtoolkit.methods.features import FeatureMethod, Level


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the channels' distributions over cells of maps (N, C, H, W): mean over N and C, times T^2, a scalar."""
    return distribution_kl(student.flatten(2), teacher.flatten(2), temperature).mean()


def logit_maps(predictions: Predictions) -> list[Tensor]:
    """Class logits as maps (N, C, H, W), one for each level of a grid; a channel is one class of one prior."""
    levels = torch.split(predictions.logits, list(predictions.priors.per_level), 1)
    return [
        x.reshape(len(x), height, width, -1).permute(0, 3, 1, 2)
        for x, (height, width) in zip(levels, predictions.priors.grid, strict=True)
    ]


class CWD(FeatureMethod):
    """Imitate where each channel of the teacher's pyramid, or of its class logits, is active.

    Args:
        weight: factor of the loss summed over levels. 10 is mmrazor's setting for features; published results have
            5, for the features of RetinaNet's four finest levels and for GFL's class logits.
        temperature: of the softmax over cells.
        on: "features", or "logits", for two detectors on grids with the same number of priors in a cell.
    """

    vanishing = ("feature",)
    paper = "arXiv 2011.13256 (ICCV 2021)"

    def __init__(
        self, *, weight: float = 10.0, temperature: float = 1.0, on: Literal["features", "logits"] = "features"
    ) -> None:
        super().__init__(weight=weight)
        if on == "logits":
            self.needs = frozenset({Capability.PREDICTIONS})
        self.on = on
        self.temperature = temperature

    @classmethod
    def for_logits(cls) -> CWD:
        """For class logits, as published for GFL: weight 5."""
        return cls(weight=5.0, on="logits")

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride; on logits, pairs whose maps do not correspond."""
        if self.on == "features":
            return super().refuses(student_spec, teacher_spec)
        if reason := why_not_on_grid(student_spec, "student", use="CWD(on='features')"):
            return reason
        return why_priors_differ(student_spec, teacher_spec) or why_scores_differ(student_spec, teacher_spec)

    def projection(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """No projection for class logits: both detectors' maps have the same number of channels."""
        return nn.Identity() if self.on == "logits" else super().projection(student_channels, teacher_channels)

    def pyramids(self, exchange: Exchange) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The pyramids, or the maps of class logits."""
        if self.on == "features":
            return super().pyramids(exchange)
        pair = exchange.matched()
        return logit_maps(pair.student.predictions), logit_maps(pair.teacher.predictions)

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level."""
        return cwd_loss(student, teacher, self.temperature)
