"""PKD: feature imitation by Pearson correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039).

Each channel of a pyramid level is standardised over batch and space in both detectors. The loss is half the mean
squared difference, which equals 1 - Pearson's r of the channels. So scale and offset of the teacher's features do not
matter, and detectors of different kinds can be paired (section 3.3, equations 4 and 5).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.methods.common import resize_like, standardise
from kdtoolkit.methods.features import FeatureMethod, Level


def pkd_loss(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """Half the mean squared difference of standardised features, both (N, C, H, W): a scalar in [0, 2].

    If sizes differ, the smaller map is resized bilinearly to the larger. No gradient reaches the teacher. Source:
    equation 5.
    """
    teacher = teacher.detach()
    if student.shape[-2:].numel() < teacher.shape[-2:].numel():
        student = resize_like(student, teacher)
    else:
        teacher = resize_like(teacher, student)
    return F.mse_loss(standardise(student, eps), standardise(teacher, eps)) / 2


class PKD(FeatureMethod):
    """Imitate the teacher's pyramid up to scale and offset of each channel.

    Args:
        weight: factor of the loss summed over levels. Published: 6 together with CrossKD on GFL. mmrazor's settings,
            without another method: 6 for Faster R-CNN and for a Mask R-CNN that teaches RetinaNet; 10 for FCOS and for
            a ResNeXt-101 that teaches RetinaNet.
    """

    vanishing = ("feature",)
    resize_student = False
    paper = "arXiv 2207.02039 (NeurIPS 2022)"

    def __init__(self, *, weight: float = 6.0) -> None:
        super().__init__(weight=weight)

    @classmethod
    def for_fcos(cls) -> PKD:
        """For FCOS, together with CrossKD: weight 2."""
        return cls(weight=2.0)

    @classmethod
    def for_retinanet(cls) -> PKD:
        """For RetinaNet, together with CrossKD: weight 2."""
        return cls(weight=2.0)

    @classmethod
    def for_atss(cls) -> PKD:
        """For ATSS, together with CrossKD: weight 1."""
        return cls(weight=1.0)

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level."""
        return pkd_loss(student, teacher)
