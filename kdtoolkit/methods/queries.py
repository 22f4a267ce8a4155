"""What methods of queries share: boxes in shares of the image, their distances, and pairs of decoder layers.

Two detectors may see an image at different sizes. So boxes are compared relative to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kdtoolkit.boxes import elementwise_giou
from kdtoolkit.compatibility import use_instead
from kdtoolkit.contract import Batch, DetectorSpec, HeadTrace, PriorKind

PUBLISHED_EPS = 1e-6  # what published codes add to union and hull in the GIoU, as a share of the image's area

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


class Outputs(NamedTuple):
    """What a decoder layer says of its queries.

    `logits` (N, Q, K), or (N, Q, K + 1) if `softmax`. `boxes` (N, Q, 4) are xyxy in shares of each image.
    """

    logits: Tensor
    boxes: Tensor
    softmax: bool = False

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities (N, Q, K), without background."""
        return self.logits.softmax(-1)[..., :-1] if self.softmax else self.logits.sigmoid()


def why_no_queries(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
    """Why queries cannot be compared: one of the detectors has none."""
    for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
        if spec.priors is not PriorKind.QUERIES:
            instead = use_instead(spec) or ". Use CrossKD or PKD"
            return f"it compares queries, and the {role} predicts at {spec.priors}{instead}"
    return None


def in_shares(boxes: Tensor, batch: Batch) -> Tensor:
    """Boxes (N, ..., 4) in pixels of a batch's canvas, in shares of each image."""
    scale = boxes.new_tensor([(width, height) * 2 for height, width in batch.sizes])
    return boxes / scale.view(len(scale), *[1] * (boxes.ndim - 2), 4)


def objects_in_shares(batch: Batch) -> list[Tensor]:
    """The boxes (G, 4) of each image's objects, in shares of the image."""
    sizes = zip(batch.boxes, batch.sizes, strict=True)
    return [boxes / boxes.new_tensor((width, height) * 2) for boxes, (height, width) in sizes]


def layer_outputs(passes: Sequence[HeadTrace], batch: Batch) -> list[Outputs]:
    """What each decoder layer says: `passes` are those of `View.layers`, made from `batch`."""
    said = [each.predictions for each in passes]
    return [Outputs(p.logits.float(), in_shares(p.boxes.float(), batch), p.activation == "softmax") for p in said]


def layer_pairs(student: Sequence[Ours], teacher: Sequence[Theirs]) -> list[tuple[Ours, Theirs]]:
    """Each of the student's layers with the teacher's layer at the same share of its depth, rounded up.

    For equal numbers it is the same layer. Three layers beside six are compared with the second, fourth and sixth.
    """
    ours, theirs = len(student), len(teacher)
    return [(each, teacher[-(-(i + 1) * theirs // ours) - 1]) for i, each in enumerate(student)]


def centres_and_sizes(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy as (centre x, centre y, width, height)."""
    low, high = boxes.chunk(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def box_distances(student: Tensor, teacher: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two distances (...) of boxes (..., 4): mean L1 of centres and sizes, and 1 - GIoU.

    Args:
        student: xyxy in shares of the image.
        teacher: xyxy in shares of the image; gets no gradient.
        eps: what is added to union and hull in the GIoU.
    """
    student, teacher = student.float(), teacher.detach().float()
    distance = (centres_and_sizes(student) - centres_and_sizes(teacher)).abs().mean(-1)
    return distance, 1 - elementwise_giou(student, teacher, eps)
