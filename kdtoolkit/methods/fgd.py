"""FGD: focal and global feature distillation (Yang et al., CVPR 2022, arXiv 2111.11837).

Focal: squared feature difference, weighted by the teacher's spatial and channel attention, with foreground and
background apart, and the L1 distance of both detectors' attention (section 3.1). Global: squared difference after a
context block each (section 3.2). All are sums over a level divided by N, as published.

Numbers agree with the published code (yzd-v/FGD @c03a6cf). The region masks need no loop over boxes, and each image's
boxes are scaled by the size of its content, although the map covers the padding too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method
from kdtoolkit.methods._common import no_shared_level, projections, resize_like, shared_levels


def spatial_attention(x: Tensor, temperature: float = 0.5) -> Tensor:
    """Where features (N, C, H, W) are strong: (N, H, W), mean 1 over the cells."""
    strength = x.float().abs().mean(1)
    return (strength.flatten(1) / temperature).softmax(1).view_as(strength) * strength[0].numel()


def channel_attention(x: Tensor, temperature: float = 0.5) -> Tensor:
    """Which channels of features (N, C, H, W) are strong: (N, C), mean 1."""
    strength = x.float().abs().mean((2, 3))
    return (strength / temperature).softmax(1) * strength.shape[1]


def region_masks(
    boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Foreground and background weights (N, H, W) of the cells of one level.

    A cell's foreground weight is 1 / (area in cells) of the smallest box over it; a box covers every cell it touches.
    The background is where no box is; its weights sum to 1 in each image. Source: section 3.1.

    Args:
        boxes: of each image (G, 4) xyxy, in pixels of the content.
        sizes: (height, width) of each image's content, in pixels, taken to fill the map.
        height: H.
        width: W.
    """
    padded = pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan).float()
    # One more that is no box, so that there is something to take the maximum of. NaN lies over no cell.
    padded = torch.cat([padded, padded.new_full((len(boxes), 1, 4), torch.nan)], 1)
    content = padded.new_tensor([(w, h, w, h) for h, w in sizes])[:, None]
    x1, y1, x2, y2 = (padded / content * padded.new_tensor([width, height, width, height])).unbind(-1)
    x1, y1, x2, y2 = x1.floor(), y1.floor(), x2.ceil(), y2.ceil()
    x, y = torch.arange(width, device=padded.device), torch.arange(height, device=padded.device)
    columns = (x >= x1[..., None]) & (x <= x2[..., None])
    rows = (y >= y1[..., None]) & (y <= y2[..., None])
    covered = rows[..., :, None] & columns[..., None, :]
    weight = 1 / ((y2 + 1 - y1) * (x2 + 1 - x1))
    foreground = torch.where(covered, weight[..., None, None], 0.0).amax(1)
    background = (foreground == 0).float()
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def focal_losses(
    student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor, temperature: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Foreground, background and attention loss of one level, scalars. Source: section 3.1.

    Args:
        student: (N, C, H, W), the only one that gets gradient.
        teacher: (N, C, H, W).
        foreground: weights (N, H, W).
        background: weights (N, H, W).
        temperature: of the attentions.
    """
    student, teacher = student.float(), teacher.detach().float()
    spatial, channel = spatial_attention(teacher, temperature), channel_attention(teacher, temperature)
    difference = ((student - teacher).square() * channel[:, :, None, None]).sum(1) * spatial
    attention = (channel_attention(student, temperature) - channel).abs().sum() + (
        spatial_attention(student, temperature) - spatial
    ).abs().sum()
    images = len(student)
    return (difference * foreground).sum() / images, (difference * background).sum() / images, attention / images


class ContextBlock(nn.Module):
    """Add to a map what its cells have in common: GCNet's block (arXiv 1904.11492), at first the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )
        nn.init.kaiming_normal_(self.mask.weight)
        for parameter in (self.mask.bias, self.add[3].weight, self.add[3].bias):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) in, the same out."""
        weight = self.mask(x).flatten(1).softmax(1)
        context = torch.einsum("ncp,np->nc", x.flatten(2), weight)
        added: Tensor = self.add(context[:, :, None, None])
        return x + added


class FGD(Method):
    """Imitate the teacher's pyramid where it looks, objects and background apart, and in its global relations.

    Defaults are the paper's for RetinaNet and GFL.

    Args:
        temperature: the paper's T, of the attentions.
        foreground_weight: the paper's alpha.
        background_weight: beta.
        attention_weight: gamma.
        global_weight: lambda.
    """

    needs = frozenset({Capability.FEATURES})
    terms = ("foreground", "background", "attention", "global")
    paper = "arXiv 2111.11837 (CVPR 2022)"
    levels: list[tuple[int, int]]
    align: nn.ModuleList
    student_context: nn.ModuleList
    teacher_context: nn.ModuleList

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        global_weight: float = 5e-6,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weights = foreground_weight, background_weight, attention_weight, global_weight

    @classmethod
    def for_fcos(cls) -> FGD:
        """The paper's settings for FCOS."""
        return cls(
            temperature=0.8,
            foreground_weight=1.6e-3,
            background_weight=8e-4,
            attention_weight=8e-4,
            global_weight=8e-6,
        )

    @classmethod
    def for_faster_rcnn(cls) -> FGD:
        """The paper's settings for Faster R-CNN."""
        return cls(foreground_weight=5e-5, background_weight=2.5e-5, attention_weight=5e-5, global_weight=5e-7)

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride."""
        return no_shared_level(student, teacher)

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Pair the levels of equal stride; project where channels differ; two context blocks a level."""
        self.levels = shared_levels(student, teacher)
        self.align = projections(self.levels, student, teacher)
        channels = [teacher.channels[t] for _, t in self.levels]
        self.student_context = nn.ModuleList(map(ContextBlock, channels))
        self.teacher_context = nn.ModuleList(map(ContextBlock, channels))

    def level_losses(self, student: Tensor, teacher: Tensor, masks: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The four terms of one pair of levels (4,), unweighted; `student` (N, C', H', W') as its neck gives it."""
        teacher = teacher.detach().float()
        student = resize_like(self.align[index](student.float()), teacher)
        relation = self.student_context[index](student) - self.teacher_context[index](teacher)
        focal = focal_losses(student, teacher, *masks, self.temperature)
        return torch.stack([*focal, relation.square().sum() / len(student)])

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`foreground`, `background`, `attention`, `global`: weighted, summed over levels."""
        student, teacher, batch = exchange.student.features, exchange.teacher.features, exchange.teacher.batch
        with torch.autocast(teacher[0].device.type, enabled=False):  # sums over whole maps overflow in half precision
            losses = [
                self.level_losses(
                    student[s], teacher[t], region_masks(batch.boxes, batch.sizes, *teacher[t].shape[2:]), i
                )
                for i, (s, t) in enumerate(self.levels)
            ]
        total = torch.stack(losses).sum(0)
        return {name: w * loss for name, w, loss in zip(self.terms, self.weights, total, strict=True)}
