"""FGD: focal and global feature distillation (Yang et al., CVPR 2022, arXiv 2111.11837).

Focal terms (section 3.1): the squared difference of features, weighted by the teacher's spatial and channel attention,
for foreground and background separately; and the L1 distance between both detectors' attentions. Global term (section
3.2): the squared difference after each map has gone through its own context block. All terms are sums over a level
divided by N, as published.

Numbers agree with the published code (yzd-v/FGD @c03a6cf), with one difference. There boxes are scaled as if the map
showed an image's content alone. On padded images its masks miss the objects, by the factor of the padding. Here masks
lie where the boxes are; `published_masks=True` gives the published ones.

All terms are sums over whole maps. `compare` reads both maps once to compute everything that the terms need, and once
more for the gradient. No step writes another map of that size, and the masks need no loop over boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit.contract import Batch, DetectorSpec, Exchange
from kdtoolkit.methods.features import FeatureMethod, Level

CHUNK = 2**18  # entries that the walk through a map takes at a time, so that they stay in a processor's cache


def _attention(strength: Tensor, temperature: float) -> Tensor:
    """Softmax of (N, M), scaled to mean 1."""
    return (strength / temperature).softmax(1) * strength.shape[1]


def spatial_attention(x: Tensor, temperature: float = 0.5) -> Tensor:
    """Where features (N, C, H, W) are strong: (N, H, W), mean 1 over the cells."""
    strength = x.float().abs().mean(1)
    return _attention(strength.flatten(1), temperature).view_as(strength)


def channel_attention(x: Tensor, temperature: float = 0.5) -> Tensor:
    """Which channels of features (N, C, H, W) are strong: (N, C), mean 1."""
    return _attention(x.float().abs().mean((2, 3)), temperature)


def region_masks(cells: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Foreground and background weights (N, height, width) of the cells of one level.

    A cell's foreground weight is 1 / (area in cells) of the smallest box over it; a box covers every cell it touches.
    The background is where no box is; its weights sum to 1 in each image. Source: section 3.1.

    Args:
        cells: boxes (N, G, 4) xyxy, in cells of the map; NaN is no box.
        height: of the map.
        width: of the map.
    """
    # One more that is no box, so that there is something to take the maximum of. NaN lies over no cell.
    cells = torch.cat([cells, cells.new_full((len(cells), 1, 4), torch.nan)], 1)
    first, last = cells[..., :2].floor(), cells[..., 2:].ceil()
    share = 1 / (last + 1 - first).prod(-1, keepdim=True)
    (x1, y1), (x2, y2) = (corner.unsqueeze(-1).unbind(2) for corner in (first, last))
    x, y = torch.arange(width, device=cells.device), torch.arange(height, device=cells.device)
    columns = ((x >= x1) & (x <= x2)).float()
    rows = torch.where((y >= y1) & (y <= y2), share, 0.0)
    foreground = (rows[..., :, None] * columns[..., None, :]).amax(1)
    background = (foreground == 0).float()
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def cells_of_content(boxes: Tensor, sizes: Sequence[tuple[int, int]], height: int, width: int) -> Tensor:
    """Boxes (N, G, 4) in cells, as if the map showed each image's content alone; `sizes` are (height, width) in pixels.

    This is what the published code does. On padded images the boxes then miss the objects.
    """
    content = boxes.new_tensor([(w, h, w, h) for h, w in sizes])[:, None]
    return boxes / content * boxes.new_tensor([width, height, width, height])


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the channels of maps (N, C, P). On accelerators it is one slice: there each call costs much."""
    images, channels, cells = x.shape
    step = max(CHUNK // max(images * cells, 1), 1) if x.device.type == "cpu" else channels
    return (slice(start, start + step) for start in range(0, channels, step))


def _strengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of |x| of maps (N, C, P) over channels (N, P), and over cells (N, C); without gradient."""
    images, channels, cells = x.shape
    spatial, channel = x.new_zeros(images, cells), x.new_empty(images, channels)
    for part in _chunks(x):
        magnitude = x[:, part].abs()
        spatial += magnitude.sum(1)
        channel[:, part] = magnitude.mean(2)
    return spatial / channels, channel


def _over_cells(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over the cells of maps (N, C, P), weighted by (N, P): (N, C)."""
    return torch.bmm(weight[:, None], x.mT)[:, 0]


def _over_channels(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over the channels of maps (N, C, P), weighted by (N, C): (N, P)."""
    return torch.bmm(weight[:, None], x)[:, 0]


class _Compare(torch.autograd.Function):
    """The walk of `compare` through maps (N, C, P), and its gradient. Autograd would write a map at each step."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, channel_weight: Tensor, mask_weight: Tensor, mask_bias: Tensor
    ) -> tuple[Tensor, ...]:
        images, channels, cells = student.shape
        spatial, attended = student.new_zeros(images, cells), student.new_zeros(images, 1, cells)
        channel, mean, spread = (student.new_empty(images, channels) for _ in range(3))
        for part in _chunks(student):
            magnitude = student[:, part].abs()
            spatial += magnitude.sum(1)
            channel[:, part] = magnitude.mean(2)
            difference = student[:, part] - teacher[:, part]
            attended.baddbmm_(channel_weight[:, None, part], difference.square())
            mean[:, part] = difference.mean(2)
            spread[:, part] = difference.sub_(mean[:, part, None]).square_().sum(2)
        pooling = (_over_channels(student, mask_weight.expand(images, -1)) + mask_bias).softmax(1)
        ctx.save_for_backward(student, teacher, channel_weight, mask_weight, mean, pooling)
        return spatial / channels, channel, attended[:, 0], mean, spread, _over_cells(student, pooling)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, spatial: Tensor, channel: Tensor, attended: Tensor, mean: Tensor, spread: Tensor, context: Tensor
    ) -> tuple[Tensor | None, ...]:
        student, teacher, channel_weight, mask_weight, difference_mean, pooling = ctx.saved_tensors
        images, channels, cells = student.shape
        with torch.autocast(student.device.type, enabled=False):  # the caller of backward may have it on
            # Through the softmax of the pooling to its logits; then each entry's part in logits and context.
            pooled = pooling * _over_channels(student, context)
            logits = pooled - pooling * pooled.sum(1, keepdim=True)
            left = torch.stack([context, mask_weight.expand(images, -1)], 2)
            right = torch.stack([pooling, logits], 1)
            spatial, channel = spatial[:, None] / channels, channel[..., None] / cells
            attended, spread = 2 * attended[:, None], 2 * spread[..., None]
            shift = mean[..., None] / cells - spread * difference_mean[..., None]
            gradient = torch.empty_like(student)
            for part in _chunks(student):
                out = torch.sign(student[:, part], out=gradient[:, part])
                out *= spatial + channel[:, part]
                slope = torch.addcmul(spread[:, part], channel_weight[:, part, None], attended)
                out.addcmul_(slope, student[:, part] - teacher[:, part])
                out += shift[:, part]
                out.baddbmm_(left[:, part], right)
            return gradient, None, None, _over_cells(student, logits).sum(0), logits.sum().view(1)


class Comparison(NamedTuple):
    """What the terms of one level with P cells are computed from. No gradient reaches the teacher.

    `spatial` (N, P) and `channel` (N, C) are the student's attentions, `teacher_spatial` and `teacher_channel` the
    teacher's. `attended` (N, P): squared differences, weighted by both of these, summed over channels. `mean` (N, C)
    of the differences over cells, `spread` (N, C) the sum of their squared distances from it. `context` (N, C): what
    the student's context block pools.
    """

    spatial: Tensor
    channel: Tensor
    teacher_spatial: Tensor
    teacher_channel: Tensor
    attended: Tensor
    mean: Tensor
    spread: Tensor
    context: Tensor


def compare(student: Tensor, teacher: Tensor, mask_weight: Tensor, mask_bias: Tensor, temperature: float) -> Comparison:
    """Compare maps (N, C, H, W), float32, in one walk.

    Args:
        student: the map that gets gradient.
        teacher: the map that gets none.
        mask_weight: weight (C,) of the 1x1 convolution that says how much a cell counts in the student's context.
        mask_bias: its bias (1,).
        temperature: of the attentions.
    """
    # The walk is by channels. It would take twice as long on maps with channels last, so these are copied.
    student, teacher = student.flatten(2).contiguous(), teacher.detach().flatten(2).contiguous()
    teacher_spatial, teacher_channel = (_attention(x, temperature) for x in _strengths(teacher))
    spatial, channel, attended, mean, spread, context = _Compare.apply(
        student, teacher, teacher_channel, mask_weight, mask_bias
    )
    return Comparison(
        _attention(spatial, temperature),
        _attention(channel, temperature),
        teacher_spatial,
        teacher_channel,
        attended * teacher_spatial,
        mean,
        spread,
        context,
    )


def _focal(found: Comparison, foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = (found.channel - found.teacher_channel).abs().sum() + (
        found.spatial - found.teacher_spatial
    ).abs().sum()
    images = len(foreground)
    inside, outside = ((found.attended * mask.flatten(1)).sum() for mask in (foreground, background))
    return inside / images, outside / images, attention / images


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
    student, teacher = student.float(), teacher.float()
    no_context = student.new_zeros(student.shape[1]), student.new_zeros(1)
    return _focal(compare(student, teacher, *no_context, temperature), foreground, background)


class ContextBlock(nn.Module):
    """Add to a map what its cells have in common: GCNet's block (arXiv 1904.11492). It starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.LayerNorm([inner, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
        )
        nn.init.kaiming_normal_(self.mask.weight)
        for parameter in (self.mask.bias, self.add[3].weight, self.add[3].bias):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    @property
    def counting(self) -> tuple[Tensor, Tensor]:
        """Weight (C,) and bias (1,) of the convolution that says how much a cell counts."""
        return self.mask.weight.flatten(), cast(Tensor, self.mask.bias)

    def context(self, x: Tensor) -> Tensor:
        """What the cells of maps (N, C, H, W) have in common: (N, C)."""
        flat, (weight, bias) = x.flatten(2), self.counting
        weight = _over_channels(flat, weight.expand(len(x), -1)) + bias
        return _over_cells(flat, weight.softmax(1))

    def added(self, context: Tensor) -> Tensor:
        """What a context (N, C) adds to each cell: (N, C)."""
        # Of a single cell, so the 1x1 convolutions are products of matrices, which cost less to start.
        first, norm, activation, last = cast(Any, self.add)
        inner = F.linear(context, first.weight.flatten(1), first.bias)
        inner = F.layer_norm(inner, inner.shape[1:], norm.weight.flatten(), norm.bias.flatten(), norm.eps)
        return F.linear(activation(inner), last.weight.flatten(1), last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) in, the same out."""
        return x + self.added(self.context(x))[:, :, None, None]


class FGD(FeatureMethod):
    """Imitate the teacher's pyramid by its attention, on objects and background separately, and its global relations.

    Defaults are the paper's for RetinaNet and GFL.

    Args:
        temperature: of the softmax that makes the attentions; the paper's T.
        foreground_weight: the paper's alpha.
        background_weight: beta.
        attention_weight: gamma.
        global_weight: lambda.
        published_masks: lay boxes over the map as the published code does (`cells_of_content`). For images without
            padding both are the same.
    """

    terms = ("foreground", "background", "attention", "global")
    vanishing = ("foreground", "background", "attention")
    unlabelled = "detections"
    paper = "arXiv 2111.11837 (CVPR 2022)"
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
        published_masks: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weights = foreground_weight, background_weight, attention_weight, global_weight
        self.published_masks = published_masks

    @classmethod
    def for_fcos(cls) -> FGD:
        """For FCOS: T = 0.8, alpha 1.6e-3, beta and gamma 8e-4, lambda 8e-6."""
        return cls(
            temperature=0.8,
            foreground_weight=1.6e-3,
            background_weight=8e-4,
            attention_weight=8e-4,
            global_weight=8e-6,
        )

    @classmethod
    def for_faster_rcnn(cls) -> FGD:
        """For Faster R-CNN: alpha and gamma 5e-5, beta 2.5e-5, lambda 5e-7."""
        return cls(foreground_weight=5e-5, background_weight=2.5e-5, attention_weight=5e-5, global_weight=5e-7)

    @classmethod
    def for_yolox(cls) -> FGD:
        """For YOLOX: alpha 2e-3, beta and gamma 1e-3, lambda 1e-5."""
        return cls(foreground_weight=2e-3, background_weight=1e-3, attention_weight=1e-3, global_weight=1e-5)

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Build also two context blocks for each level."""
        super().setup(student_spec, teacher_spec)
        channels = [teacher_spec.channels[t] for _, t in self.levels]
        self.student_context = nn.ModuleList(map(ContextBlock, channels))
        self.teacher_context = nn.ModuleList(map(ContextBlock, channels))

    def masks(self, batch: Batch, sizes: Mapping[int, tuple[int, int]]) -> list[Tensor]:
        """Foreground and background weights (2, N, H, W) of the cells of each level.

        `sizes` are (H, W) by the level's stride in pixels.
        """
        boxes = pad_sequence(list(batch.boxes), batch_first=True, padding_value=torch.nan).float()
        found = []
        for stride, (height, width) in sizes.items():
            cells = cells_of_content(boxes, batch.sizes, height, width) if self.published_masks else boxes / stride
            found.append(torch.stack(region_masks(cells, height, width)))
        return found

    def regions(self, exchange: Exchange) -> list[Tensor]:
        """The masks (2, N, H, W) of each pair of levels, in the teacher's cells."""
        view = exchange.teacher
        maps = {view.spec.strides[t]: view.features[t] for _, t in self.levels}
        return self.masks(view.batch, {stride: (x.shape[2], x.shape[3]) for stride, x in maps.items()})

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The four terms of one level (4,)."""
        assert level.region is not None  # `regions` gives one for each pair
        contexts = self.student_context[level.index], self.teacher_context[level.index]
        ours, theirs = (cast(ContextBlock, block) for block in contexts)
        found = compare(student, teacher, *ours.counting, self.temperature)
        # Both blocks add a constant to each channel, so the squared distance is the spread of the differences and,
        # at each cell, the square of their mean.
        mean = found.mean + ours.added(found.context) - theirs.added(theirs.context(teacher))
        relation = found.spread.sum() + student.shape[2] * student.shape[3] * mean.square().sum()
        foreground, background = level.region
        return torch.stack([*_focal(found, foreground, background), relation / len(student)])
