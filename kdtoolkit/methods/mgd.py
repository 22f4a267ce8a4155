"""MGD: masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529).

Random cells of the student's map are blanked. From the rest, a small convolutional block must generate the teacher's
full map, so each cell has to know its surroundings (section 3.1). The loss is a sum over the level, divided by N.

Given the same random mask, numbers agree with open-mmlab/mmrazor @90c7af1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract import DetectorSpec
from kdtoolkit.errors import KDError
from kdtoolkit.methods.features import FeatureMethod, Level


def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of maps (N, C, H, W), summed and divided by N: a scalar."""
    return F.mse_loss(generated.float(), teacher.detach().float(), reduction="sum") / len(teacher)


def generator(channels: int) -> nn.Sequential:
    """The block that generates the teacher's map: 3x3 convolution, ReLU, 3x3 convolution."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class MGD(FeatureMethod):
    """Generate the teacher's pyramid from the student's, with part of its cells blanked at random.

    Defaults are the published ones for RetinaNet.

    Args:
        weight: factor of the loss summed over levels (the paper's alpha).
        mask_ratio: share of the cells that are blanked, in [0, 1) (the paper's lambda).
    """

    paper = "arXiv 2205.01529 (ECCV 2022)"
    generate: nn.ModuleList

    def __init__(self, *, weight: float = 2e-5, mask_ratio: float = 0.65) -> None:
        super().__init__(weight=weight)
        if not 0 <= mask_ratio < 1:
            raise KDError(f"MGD(mask_ratio={mask_ratio}): it must be at least 0 and below 1")
        self.mask_ratio = mask_ratio

    @classmethod
    def for_faster_rcnn(cls) -> MGD:
        """For Faster R-CNN: weight 5e-7, mask ratio 0.45; published on the four finest levels (`at_strides`)."""
        return cls(weight=5e-7, mask_ratio=0.45)

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Build also a generating block for each level."""
        super().setup(student_spec, teacher_spec)
        self.generate = nn.ModuleList(generator(teacher_spec.channels[t]) for _, t in self.levels)

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level. Draws the mask from torch's global generator."""
        kept = torch.rand_like(student[:, :1]) <= 1 - self.mask_ratio
        return mgd_loss(self.generate[level.index](student * kept), teacher)
