"""DeFeat: features decoupled into objects and background (Guo et al., CVPR 2021, arXiv 2103.14475).

The squared difference of features is averaged inside and outside ground-truth boxes, and each region has its own
weight. So neither drowns the other. The term of a region is 1 / (2 * region's values) * sum (a(s) - t)^2, a mean over
levels. `a` is a learned 3x3 convolution of the student's features.

Regions, sums and weights follow the published code (ggjy/DeFeat.pytorch @cebb825). A box is an object on one level,
chosen by its size, and background on all others. Padding is background. One thing differs: where channels are equal,
`a` starts as the identity. In the published code it starts near 0, so that the student gets almost no gradient at
first. The second half of the paper, the decoupled classification of proposals, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit import processes
from kdtoolkit.contract import Exchange
from kdtoolkit.methods.features import FeatureMethod, Level

FINEST_SIDE = 56  # pixels; a box belongs to the finest level below twice this side, and one level up each doubling


def levels_of(boxes: Tensor, levels: int) -> Tensor:
    """The level (...) int64 on which each box (..., 4) is an object: by the root of its area, in [0, levels)."""
    sides = (boxes[..., 2:] - boxes[..., :2] + 1).prod(-1).sqrt()
    return (sides / FINEST_SIDE + 1e-6).log2().floor().clamp(0, levels - 1).long()


def object_region(boxes: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Which cells (N, height, width) of one level lie under boxes (N, G, 4) xyxy in pixels. A box of NaN is no box.

    A box covers the cells from its first corner's cell up to, but without, its last corner's cell; at least one cell.
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


def object_regions(
    boxes: Sequence[Tensor], strides: Sequence[int], levels: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """The object regions (N, H, W) bool of some levels. `sizes`: their (H, W). `strides`: the strides of all levels."""
    padded = pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan).float()
    level_of = levels_of(padded.nan_to_num(), len(strides))[..., None]
    return [
        object_region(torch.where(level_of == level, padded, torch.nan), strides[level], height, width)
        for level, (height, width) in zip(levels, sizes, strict=True)
    ]


def decoupled_losses(student: Tensor, teacher: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Half the mean squared difference of maps (N, C, H, W), inside the region `objects` (N, H, W) bool and outside it.

    Two scalars in float32; a term is 0 if its region is empty. No gradient reaches the teacher.
    """
    difference = (student.float() - teacher.detach().float()).square().sum(1)
    values = [processes.share(region.sum() * student.shape[1], at_least=1) for region in (objects, ~objects)]
    inside = torch.where(objects, difference, 0.0).sum() / values[0]
    outside = torch.where(objects, 0.0, difference).sum() / values[1]
    return inside / 2, outside / 2


class DeFeat(FeatureMethod):
    """Imitate the teacher's pyramid on objects and on background, each with its own weight.

    For all detectors with a pyramid. The default weights come from the published configuration for Faster R-CNN on
    Pascal VOC.

    Args:
        object_weight: factor of the term inside boxes.
        background_weight: factor of the term outside them.
    """

    terms = ("object", "background")
    vanishing = ("object", "background")
    unlabelled = "detections"
    mean_over_levels = True
    paper = "arXiv 2103.14475 (CVPR 2021)"

    def __init__(self, *, object_weight: float = 3.0, background_weight: float = 12.0) -> None:
        super().__init__()
        self.weights = object_weight, background_weight

    def projection(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """A 3x3 convolution. It starts as the identity where channels are equal."""
        convolution = nn.Conv2d(student_channels, teacher_channels, 3, padding=1)
        if student_channels == teacher_channels:
            nn.init.dirac_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        return convolution

    def regions(self, exchange: Exchange) -> list[Tensor]:
        """The object region (N, H, W) bool of each pair of levels, in the teacher's cells."""
        view = exchange.teacher
        # Boxes are assigned to the levels of the whole pyramid, also if only some levels are compared.
        strides = view.adapter.spec.strides
        shown = [i for i, stride in enumerate(strides) if stride in view.spec.strides]
        sizes = [(view.features[t].shape[2], view.features[t].shape[3]) for _, t in self.levels]
        return object_regions(view.batch.boxes, strides, [shown[t] for _, t in self.levels], sizes)

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """Both terms of one level (2,)."""
        assert level.region is not None  # `regions` gives one for each pair
        return torch.stack(decoupled_losses(student, teacher, level.region))
