"""KD-DETR: distillation at consistent points of DETR kin (Wang et al., CVPR 2024, arXiv 2211.08071).

Each DETR has queries of its own, so predictions of two do not correspond. Both decoders therefore answer one set of
queries, beside the student's own pass, which alone meets the ground truth: the teacher's queries, the paper's specific
sampling. Queries weigh w, the teacher's largest class probability, since most are background: sum w * KL of classes,
and L1 and GIoU of boxes averaged by w.

Formulas and weights follow the public code for DAB-DETR (Myleswork/KD-DETR @eecf170). There the predictions of each of
the student's six decoder layers are compared with the teacher's last and summed; here those of the last layer alone,
a sixth of the terms. The paper's further, random queries are left out. Classification is a sum over the queries of the
batch, as it is there, so it grows with the batch: that of all processes, where the published code sums the 2 images of
each GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.boxes import elementwise_giou
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, PriorKind, Whose
from kdtoolkit.methods._common import EPS, distribution_kl, unlike_priors, unlike_scores


def class_divergence(student: Tensor, teacher: Tensor, temperature: float = 10.0) -> Tensor:
    """KL of class scores (N, Q, K) as a softmax over classes, whatever activation they have, mean over them: (N, Q)."""
    return distribution_kl(student, teacher, temperature) / student.shape[-1]


def centres_and_sizes(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy as (centre x, centre y, width, height)."""
    low, high = boxes.chunk(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def box_distances(student: Tensor, teacher: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean L1 of centres and sizes relative to the image, and 1 - GIoU, of boxes (N, Q, 4): (N, Q) each.

    Args:
        student: xyxy in pixels.
        teacher: likewise, of the same image size; gets no gradient.
        scale: (N, 1, 4) width, height, width, height of each image in pixels.
    """
    student, teacher = student.float(), teacher.detach().float()
    difference = (centres_and_sizes(student) - centres_and_sizes(teacher)) / scale
    return difference.abs().mean(-1), 1 - elementwise_giou(student, teacher)


class KDDETR(Method):
    """Teach the student's decoder what the teacher's predicts at the same queries.

    For two detectors that predict at queries of one make (`prior_form`). The default weights and temperature are the
    published ones for DAB-DETR.

    Args:
        cls_weight: factor of the classification term.
        box_weight: factor of the L1 of boxes.
        giou_weight: factor of 1 - GIoU.
        temperature: of the class scores.
        priors: whose queries go through both decoders.
    """

    needs = frozenset({Capability.PREDICTIONS})
    terms = ("cls", "box", "giou")
    vanishing = ("cls", "box", "giou")
    paper = "arXiv 2211.08071 (CVPR 2024)"

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        temperature: float = 10.0,
        priors: Whose = "teacher",
    ) -> None:
        super().__init__()
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.temperature = temperature
        self.priors: Whose = priors

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse detectors that do not predict at queries of one make, or score classes in other ways."""
        for role, spec in (("student", student), ("teacher", teacher)):
            if spec.priors is not PriorKind.QUERIES:
                return f"it compares queries, and the {role} predicts at {spec.priors}"
        return unlike_priors(student, teacher) or unlike_scores(student, teacher)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cls`, `box` and `giou`, weighted."""
        pair = exchange.matched(self.priors)
        student, teacher = pair.student.predictions, pair.teacher.predictions
        weight = teacher.scores.detach()
        divergence = class_divergence(student.logits, teacher.logits, self.temperature)
        sizes = exchange.student.batch.sizes
        scale = weight.new_tensor([(width, height) * 2 for height, width in sizes])[:, None]
        distance, overlap = box_distances(student.boxes, pair.teacher_boxes, scale)
        total = processes.share(weight.sum(), at_least=EPS)
        return {
            "cls": self.cls_weight * (weight * divergence).sum() * processes.count(),
            "box": self.box_weight * (weight * distance).sum() / total,
            "giou": self.giou_weight * (weight * overlap).sum() / total,
        }
