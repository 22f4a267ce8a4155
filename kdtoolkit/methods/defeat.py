"""DeFeat: features decoupled into objects and background (Guo et al., CVPR 2021, arXiv 2103.14475).

Squared difference of the pyramid's features inside and outside ground-truth boxes, each region averaged by itself and
with its own weight, so that neither drowns the other: for each, 1 / (2 * region's values) * sum (a(s) - t)^2, a mean
over levels. The student's features go through a learned 3x3 convolution `a` first.

Regions, sums and weights follow the published code (ggjy/DeFeat.pytorch @cebb825): each box is an object on one level
only, chosen by its size, and background on the others; padding is background. One thing differs: `a` starts as the
identity where channels are equal, there near 0, where the student gets no gradient at first. The paper's other half,
the decoupled classification of proposals, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit import processes
from kdtoolkit.compatibility import shared_levels, why_no_shared_level
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method
from kdtoolkit.methods.common import resize_like

FINEST_SIDE = 56  # pixels; a box belongs to the finest level below twice this side, and one level up each doubling


def levels_of(boxes: Tensor, levels: int) -> Tensor:
    """The level (...) int64 on which each box (..., 4) is an object: by the root of its area, in [0, levels)."""
    sides = (boxes[..., 2:] - boxes[..., :2] + 1).prod(-1).sqrt()
    return (sides / FINEST_SIDE + 1e-6).log2().floor().clamp(0, levels - 1).long()


def object_region(boxes: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Cells (N, height, width) bool of one level under boxes (N, G, 4) xyxy in pixels; NaN is no box.

    A box covers the cells from that of its first corner up to, without it, that of its last; at least one.
    """
    first, last = (boxes / stride).floor().chunk(2, -1)
    limit = first.new_tensor([width, height])
    first = torch.minimum(first.clamp(min=0), limit - 1)
    last = torch.minimum(last, limit)
    # The published rule: a box without extent in one direction is a single cell, whatever its other extent.
    empty = (last <= first).any(-1, keepdim=True)
    last = torch.where(empty, first + 1, last)
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    columns = (x >= first[..., :1]) & (x < last[..., :1])
    rows = (y >= first[..., 1:]) & (y < last[..., 1:])
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def decoupled_losses(student: Tensor, teacher: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Half the mean squared difference of maps (N, C, H, W) in the region `objects` (N, H, W) bool and outside it.

    Scalars in float32, 0 where a region is empty. No gradient reaches the teacher.
    """
    difference = (student.float() - teacher.detach().float()).square().sum(1)
    values = [processes.share(region.sum() * student.shape[1], at_least=1) for region in (objects, ~objects)]
    inside = torch.where(objects, difference, 0.0).sum() / values[0]
    outside = torch.where(objects, 0.0, difference).sum() / values[1]
    return inside / 2, outside / 2


class DeFeat(Method):
    """Imitate the teacher's pyramid on objects and on background, each with its own weight.

    For all detectors with a pyramid. The default weights are those of the published configuration, for Faster R-CNN
    on Pascal VOC.

    Args:
        object_weight: factor of the term inside boxes.
        background_weight: factor of the term outside them.
    """

    needs = frozenset({Capability.FEATURES})
    terms = ("object", "background")
    vanishing = ("object", "background")
    paper = "arXiv 2103.14475 (CVPR 2021)"
    levels: list[tuple[int, int]]
    align: nn.ModuleList

    def __init__(self, *, object_weight: float = 3.0, background_weight: float = 12.0) -> None:
        super().__init__()
        self.weights = object_weight, background_weight

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride."""
        return why_no_shared_level(student, teacher)

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Pair the levels of equal stride; a convolution for each, the identity at first where channels are equal."""
        self.levels = shared_levels(student, teacher)
        self.align = nn.ModuleList()
        for s, t in self.levels:
            convolution = nn.Conv2d(student.channels[s], teacher.channels[t], 3, padding=1)
            if student.channels[s] == teacher.channels[t]:
                nn.init.dirac_(convolution.weight)
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            self.align.append(convolution)

    def regions(
        self, boxes: Sequence[Tensor], strides: Sequence[int], levels: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """The object region (N, H, W) bool of some `levels`, of (H, W) `sizes`, of a pyramid of `strides` in pixels."""
        padded = pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan).float()
        level_of = levels_of(padded.nan_to_num(), len(strides))[..., None]
        return [
            object_region(torch.where(level_of == level, padded, torch.nan), strides[level], height, width)
            for level, (height, width) in zip(levels, sizes, strict=True)
        ]

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`object` and `background`: weighted means over levels."""
        student, teacher = exchange.student.features, [exchange.teacher.features[t] for _, t in self.levels]
        # Whichever levels are compared, boxes belong to those of the whole pyramid.
        strides = exchange.teacher.adapter.spec.strides
        shown = [i for i, stride in enumerate(strides) if stride in exchange.teacher.spec.strides]
        levels = [shown[t] for _, t in self.levels]
        sizes = [(x.shape[2], x.shape[3]) for x in teacher]
        regions = self.regions(exchange.teacher.batch.boxes, strides, levels, sizes)
        with torch.autocast(teacher[0].device.type, enabled=False):
            losses = [
                torch.stack(decoupled_losses(resize_like(align(student[s].float()), t), t, region))
                for (s, _), align, t, region in zip(self.levels, self.align, teacher, regions, strict=True)
            ]
        means = torch.stack(losses).mean(0)
        return {name: w * loss for name, w, loss in zip(self.terms, self.weights, means, strict=True)}
