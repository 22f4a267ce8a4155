"""Cosine: the student's deep features point where the teacher's do (RT-DETRv4, arXiv 2510.25257).

One level of the student, the deepest of stride 32 or finer, is compared with the teacher's level of the nearest stride.
A 1x1 convolution, which is the method's own, projects the student's map to the teacher's channels. The loss is 1 - the
cosine of both vectors, averaged over the cells that lie on images. It is made for teachers that were trained without
labels (`timm/...`), whose features have scales and channels of no detector. It works with a detector as teacher too.

The two maps need not have the same stride. The teacher's map is read bilinearly at the centres of the student's cells.
A ViT with patches of 14 px whose images are scaled by 0.5 has a stride of 28 px, beside the student's 32.

Optionally also the relations of cells are compared: the cosines of each cell's vector with those of all cells of its
image. These need no projection. The mean is over all pairs, and a cell with itself is one of them: its cosine is always
1, so that the term is smaller by a factor of 1 - 1/n in an image of n cells.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.contract import Batch, Capability, DetectorSpec, Exchange, Method, Unlabelled, View
from kdtoolkit.errors import KDError
from kdtoolkit.methods.common import on_images

EPS = 1e-6  # a shorter vector has no direction


def directions(x: Tensor) -> Tensor:
    """Vectors in dim 1 of (N, C, ...), divided by their length; those shorter than `EPS` become 0, without gradient."""
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length < EPS, 0.0, x / length.clamp(min=EPS))


def cosine_loss(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """1 - the cosine of the vectors of each cell of maps (N, C, H, W), averaged over the cells that count: a scalar.

    `counts` (N, H, W) bool. No gradient reaches the teacher. The cells of all processes count, as if one had them.
    """
    distance = 1 - (directions(student) * directions(teacher.detach())).sum(1)
    return (distance * counts).sum() / processes.share(counts.sum(), at_least=1)


def relation_loss(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """Mean squared difference of the cosines between all cells of an image that count: a scalar.

    The maps (N, C, H, W) may have different channels. `counts` and gradients are as in `cosine_loss`.
    """
    ours, theirs = (directions(x).flatten(2) for x in (student, teacher.detach()))
    difference = (torch.bmm(ours.transpose(1, 2), ours) - torch.bmm(theirs.transpose(1, 2), theirs)).square()
    pairs = counts.flatten(1)[:, :, None] & counts.flatten(1)[:, None]
    return (difference * pairs).sum() / processes.share(pairs.sum(), at_least=1)


def at_cells(student_view: View, teacher_view: View, levels: tuple[int, int]) -> Tensor:
    """The teacher's map, read bilinearly at the centres of the student's cells: (N, C, H, W) of the student's H and W.

    `levels`: the student's level and the teacher's. Beyond the teacher's canvas its last cells are repeated.
    """
    (s, t), maps = levels, teacher_view.features[levels[1]]
    size = student_view.features[s].shape[-2:]
    ratio = student_view.spec.strides[s] / teacher_view.spec.strides[t]
    factors = [ratio * scale for scale in _scales(student_view.batch, teacher_view)]
    if factors == [1.0, 1.0] and maps.shape[-2:] == size:
        return maps
    places = [
        2 * (torch.arange(cells, device=maps.device) + 0.5) * factor / theirs - 1
        for cells, factor, theirs in zip(size, factors, maps.shape[-2:], strict=True)
    ]
    y, x = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack([x, y], -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps.float(), grid, "bilinear", "border", align_corners=False)


def _scales(batch: Batch, teacher_view: View) -> tuple[float, float]:
    """How much larger the images are on the teacher's canvas than on the student's: in height and in width."""
    if teacher_view.scale != 1:
        return teacher_view.scale, teacher_view.scale
    # The sizes of single images are rounded, so the scale is that of all images together.
    ours, theirs = (tuple(map(sum, zip(*sizes, strict=True))) for sizes in (batch.sizes, teacher_view.batch.sizes))
    return theirs[0] / ours[0], theirs[1] / ours[1]


class Cosine(Method):
    """Turn the student's deepest features into the teacher's directions: for foundation teachers such as DINOv2.

    No weight is published that suits all detectors: RT-DETRv4 holds the loss at about a tenth of the gradient instead.

    Args:
        weight: factor of 1 - cosine, which is 0 to 2.
        relation_weight: factor of the mean squared difference of the cosines between cells; 0 leaves the term out.
        stride: the student's level is the deepest one of at most this stride, in pixels.
    """

    needs = frozenset({Capability.FEATURES})
    unlabelled: Unlabelled = "images"
    terms = ("cosine", "relation")
    paper = "arXiv 2510.25257 (RT-DETRv4)"
    levels: tuple[int, int]
    project: nn.Conv2d

    def __init__(self, *, weight: float = 1.0, relation_weight: float = 0.0, stride: int = 32) -> None:
        super().__init__()
        if stride < 1:
            raise KDError(f"Cosine(stride={stride}): it must be a stride in pixels, such as 16 or 32")
        self.weight = weight
        self.relation_weight = relation_weight
        self.stride = stride

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse students without a level that is fine enough."""
        if min(student_spec.strides) <= self.stride:
            return None
        return (
            f"it compares the student's deepest level of stride {self.stride} or finer, and the student's strides are "
            f"{student_spec.strides}. Use Cosine(stride={min(student_spec.strides)})"
        )

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Choose a level of each detector, and build the projection."""
        strides = student_spec.strides
        s = max((i for i, stride in enumerate(strides) if stride <= self.stride), key=lambda i: strides[i])
        t = min(
            range(len(teacher_spec.strides)), key=lambda i: abs(math.log(teacher_spec.strides[i] / strides[s]))
        )  # the nearest by ratio; of equally near ones the finer
        self.levels = s, t
        self.project = nn.Conv2d(student_spec.channels[s], teacher_spec.channels[t], 1)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cosine` and, if its weight is not 0, `relation`."""
        student_view, (s, _) = exchange.student, self.levels
        with torch.autocast(student_view.batch.images.device.type, enabled=False):  # lengths need more than 8 bits
            student, teacher = student_view.features[s].float(), at_cells(student_view, exchange.teacher, self.levels)
            teacher = teacher.detach().float()
            height, width = student.shape[-2:]
            counts = on_images(student_view.batch, student_view.spec.strides[s], height, width)
            terms = {"cosine": self.weight * cosine_loss(self.project(student), teacher, counts)}
            if self.relation_weight:
                terms["relation"] = self.relation_weight * relation_loss(student, teacher, counts)
        return terms
