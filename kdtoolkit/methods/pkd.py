"""PKD: feature imitation by Pearson correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039).

Each channel of a pyramid level is standardised over batch and space in both detectors, and the mean squared
difference is halved: 1 - r of the channels, so scale and offset of the teacher's features do not matter and
detectors of different kinds can be paired (section 3.3, equations 4 and 5).
"""

from __future__ import annotations

from torch import Tensor, nn

from kdtoolkit.compatibility import shared_levels, why_no_shared_level
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method
from kdtoolkit.methods.common import projections, resize_like, standardise


def pkd_loss(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """Half the mean squared difference of standardised features, both (N, C, H, W): a scalar in [0, 2].

    Where sizes differ the smaller map is resized bilinearly to the larger. No gradient reaches the teacher. Source:
    equation 5.
    """
    teacher = teacher.detach()
    if student.shape[-2:].numel() < teacher.shape[-2:].numel():
        student = resize_like(student, teacher)
    else:
        teacher = resize_like(teacher, student)
    return (standardise(student, eps) - standardise(teacher, eps)).square().mean() / 2


class PKD(Method):
    """Imitate the teacher's pyramid up to scale and offset of each channel.

    Args:
        weight: factor of the loss summed over levels. 6 is used with CrossKD on GFL, and alone in mmrazor's settings
            for Faster R-CNN and for Mask R-CNN into RetinaNet; 10 there for FCOS and ResNeXt-101 into RetinaNet.
    """

    needs = frozenset({Capability.FEATURES})
    terms = ("feature",)
    vanishing = ("feature",)
    paper = "arXiv 2207.02039 (NeurIPS 2022)"
    levels: list[tuple[int, int]]
    align: nn.ModuleList

    def __init__(self, *, weight: float = 6.0) -> None:
        super().__init__()
        self.weight = weight

    @classmethod
    def for_fcos(cls) -> PKD:
        """For FCOS beside CrossKD: weight 2."""
        return cls(weight=2.0)

    @classmethod
    def for_retinanet(cls) -> PKD:
        """For RetinaNet beside CrossKD: weight 2."""
        return cls(weight=2.0)

    @classmethod
    def for_atss(cls) -> PKD:
        """For ATSS beside CrossKD: weight 1."""
        return cls(weight=1.0)

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride."""
        return why_no_shared_level(student, teacher)

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Pair the levels of equal stride; project where channels differ."""
        self.levels = shared_levels(student, teacher)
        self.align = projections(self.levels, student, teacher)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`feature`: the weighted loss, summed over levels."""
        student, teacher = exchange.student.features, exchange.teacher.features
        pairs = zip(self.levels, self.align, strict=True)
        losses = [pkd_loss(align(student[s]), teacher[t]) for (s, t), align in pairs]
        return {"feature": self.weight * sum(losses[1:], losses[0])}
