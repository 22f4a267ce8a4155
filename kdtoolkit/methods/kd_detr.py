"""KD-DETR: distillation at consistent points, for DETR and its relatives (Wang et al., CVPR 2024, arXiv 2211.08071).

Each DETR has its own queries, so the predictions of two do not correspond. Therefore both decoders run on one set of
queries: the teacher's, which the paper calls specific sampling. The student also runs on its own queries; that pass is
trained on the ground truth. Most queries are background, so each has a weight w, the teacher's largest class
probability. The terms are the sum of w * KL of classes, and L1 and GIoU of boxes, averaged by w.

Numbers agree with the public code for DAB-DETR (Myleswork/KD-DETR @e7dfccb), with these differences. There each of the
student's six decoder layers is compared with the teacher's last layer, and the terms are summed. Here only the last
layer is compared, so the terms are a sixth. The paper's additional random queries are left out. The code's GIoU works
with areas relative to the image, and adds 1e-6 to union and hull: 0.1 % of an object of 32 x 32 px in an image of 800
x 1333. Here GIoU is exact, and `published_giou` has the code's. Classification is a sum over the queries of the batch
of all processes, so it grows with the batch. There it is a sum over the batch of each process (8 or 16 images).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.boxes import elementwise_giou
from kdtoolkit.compatibility import use_instead, why_priors_differ, why_scores_differ, why_too_few_classes
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, PriorKind, Whose
from kdtoolkit.methods.common import EPS, distribution_kl

PUBLISHED_EPS = 1e-6  # of the GIoU, as a share of the image's area


def class_divergence(student: Tensor, teacher: Tensor, temperature: float = 10.0) -> Tensor:
    """KL of a softmax over class logits (N, Q, K), divided by K: (N, Q); a softmax even if scores are sigmoids."""
    return distribution_kl(student, teacher, temperature) / student.shape[-1]


def centres_and_sizes(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy as (centre x, centre y, width, height)."""
    low, high = boxes.chunk(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def box_distances(student: Tensor, teacher: Tensor, scale: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two distances (N, Q) of boxes (N, Q, 4): mean L1 of centres and sizes relative to the image, and 1 - GIoU.

    Args:
        student: xyxy in pixels.
        teacher: xyxy in pixels of the same image; gets no gradient.
        scale: (N, 1, 4) width, height, width, height of each image in pixels.
        eps: what is added to union and hull in the GIoU, as a share of the image's area.
    """
    student, teacher = student.float(), teacher.detach().float()
    difference = (centres_and_sizes(student) - centres_and_sizes(teacher)) / scale
    area = scale[..., 0] * scale[..., 1]
    return difference.abs().mean(-1), 1 - elementwise_giou(student, teacher, eps * area)


class KDDETR(Method):
    """Teach the student's decoder the predictions of the teacher's decoder at the same queries.

    Both detectors must predict at queries of the same form (`prior_form`). The default weights and temperature are the
    published ones for DAB-DETR.

    Args:
        cls_weight: factor of the classification term.
        box_weight: factor of the L1 of boxes.
        giou_weight: factor of 1 - GIoU.
        temperature: of the class scores.
        priors: whose queries go through both decoders.
        published_giou: add the published code's epsilon to the GIoU's union and hull.
    """

    needs = frozenset({Capability.PREDICTIONS})
    unlabelled = "images"
    terms = ("cls", "box", "giou")
    vanishing: tuple[str, ...] = ("cls", "box", "giou")
    paper = "arXiv 2211.08071 (CVPR 2024)"

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        temperature: float = 10.0,
        priors: Whose = "teacher",
        published_giou: bool = False,
    ) -> None:
        super().__init__()
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.temperature = temperature
        self.priors: Whose = priors
        self.giou_eps = PUBLISHED_EPS if published_giou else 0.0
        if published_giou:
            self.vanishing = ("cls", "box")

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse detectors without queries or of one class, and pairs whose queries or scores differ in form."""
        for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
            if spec.priors is not PriorKind.QUERIES:
                instead = use_instead(spec) or ". Use CrossKD or PKD"
                return f"it compares queries, and the {role} predicts at {spec.priors}{instead}"
        if self.cls_weight and (reason := why_too_few_classes(student_spec)):
            return f"{reason}. Use KDDETR(cls_weight=0), which compares boxes alone"
        return why_priors_differ(student_spec, teacher_spec) or why_scores_differ(student_spec, teacher_spec)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cls`, `box` and `giou`, weighted; terms of weight 0 are left out."""
        pair = exchange.matched(self.priors)
        student, teacher = pair.student.predictions, pair.teacher.predictions
        weight = teacher.scores.detach()
        divergence = class_divergence(student.logits, teacher.logits, self.temperature)
        sizes = exchange.student.batch.sizes
        scale = weight.new_tensor([(width, height) * 2 for height, width in sizes])[:, None]
        distance, overlap = box_distances(student.boxes, pair.teacher_boxes, scale, self.giou_eps)
        total = processes.share(weight.sum(), at_least=EPS)
        terms = {
            "cls": (self.cls_weight, (weight * divergence).sum() * processes.count()),
            "box": (self.box_weight, (weight * distance).sum() / total),
            "giou": (self.giou_weight, (weight * overlap).sum() / total),
        }
        return {name: factor * loss for name, (factor, loss) in terms.items() if factor}
