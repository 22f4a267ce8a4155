"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

Each channel of a pyramid level becomes a distribution over its cells (a softmax), and the student's are pulled to the
teacher's by KL divergence: where a channel is active matters, not how strongly (section 3.2).

The loss agrees with open-mmlab/mmrazor @90c7af1, but the teacher gets no gradient here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method
from kdtoolkit.methods._common import distribution_kl, no_shared_level, projections, resize_like, shared_levels


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the channels' distributions over cells, maps (N, C, H, W), mean over N and C, times T^2: a scalar."""
    return distribution_kl(student.flatten(2), teacher.flatten(2), temperature).mean()


class CWD(Method):
    """Imitate where each channel of the teacher's pyramid is active.

    Args:
        weight: factor of the loss summed over levels. 10 is the published setting for features of detectors.
        temperature: of the softmax over cells.
    """

    needs = frozenset({Capability.FEATURES})
    terms = ("feature",)
    vanishing = ("feature",)
    paper = "arXiv 2011.13256 (ICCV 2021)"
    levels: list[tuple[int, int]]
    align: nn.ModuleList

    def __init__(self, *, weight: float = 10.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride."""
        return no_shared_level(student, teacher)

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Pair the levels of equal stride; project where channels differ."""
        self.levels = shared_levels(student, teacher)
        self.align = projections(self.levels, student, teacher)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`feature`: the weighted loss, summed over levels."""
        student, teacher = exchange.student.features, exchange.teacher.features
        losses = [
            cwd_loss(resize_like(align(student[s]), teacher[t]), teacher[t], self.temperature)
            for (s, t), align in zip(self.levels, self.align, strict=True)
        ]
        return {"feature": self.weight * torch.stack(losses).sum()}
