"""KD-DETR: distillation at consistent points, for DETR and its relatives (Wang et al., CVPR 2024, arXiv 2211.08071).

Each DETR has its own queries, so the predictions of two do not correspond. Therefore both decoders run on one set of
queries: the teacher's, which the paper calls specific sampling. The student also runs on its own queries; that pass is
trained on the ground truth. Most queries are background, so each has a weight w, the teacher's largest class
probability. The terms are the sum of w * KL of classes, and L1 and GIoU of boxes, averaged by w.

Numbers agree with the public code for DAB-DETR (Myleswork/KD-DETR @e7dfccb), with these differences. There each of the
student's six decoder layers is compared with the teacher's last layer, and the terms are summed: `layers="all"`. By
default only the last layer is compared here, so the terms are about a sixth. The paper's additional random queries are
left out. The code adds 1e-6 to union and hull of the GIoU, in shares of the image's area: 0.1 % of an object of 32 x 32
px in an image of 800 x 1333. Here GIoU is exact, and `published_giou` has the code's. Classification is a sum over the
queries of the batch of all processes, so it grows with the batch. There it is a sum over the batch of each process (8
or 16 images).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.compatibility import why_priors_differ, why_scores_differ, why_too_few_classes
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, Whose
from kdtoolkit.methods.common import EPS, distribution_kl
from kdtoolkit.methods.queries import PUBLISHED_EPS, box_distances, layer_outputs, why_no_queries


def class_divergence(student: Tensor, teacher: Tensor, temperature: float = 10.0) -> Tensor:
    """KL of a softmax over class logits (N, Q, K), divided by K: (N, Q); a softmax even if scores are sigmoids."""
    return distribution_kl(student, teacher, temperature) / student.shape[-1]


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
        layers: compare the student's "last" decoder layer with the teacher's last, or "all" of its layers, and add up
            the terms.
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
        layers: Literal["last", "all"] = "last",
        published_giou: bool = False,
    ) -> None:
        super().__init__()
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.temperature = temperature
        self.priors: Whose = priors
        self.layers = layers
        self.giou_eps = PUBLISHED_EPS if published_giou else 0.0
        if published_giou:
            self.vanishing = ("cls", "box")

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse detectors without queries or of one class, and pairs whose queries or scores differ in form."""
        if reason := why_no_queries(student_spec, teacher_spec):
            return reason
        if self.cls_weight and (reason := why_too_few_classes(student_spec)):
            return f"{reason}. Use KDDETR(cls_weight=0), which compares boxes alone"
        return why_priors_differ(student_spec, teacher_spec) or why_scores_differ(student_spec, teacher_spec)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cls`, `box` and `giou`, weighted; terms of weight 0 are left out."""
        pair = exchange.matched(self.priors)
        passes = exchange.student.layers(pair.student) if self.layers == "all" else (pair.student,)
        students = layer_outputs(passes, exchange.student.batch)
        (teacher,) = layer_outputs((pair.teacher,), exchange.teacher.batch)
        weight = pair.teacher.predictions.scores.detach()
        total = processes.share(weight.sum(), at_least=EPS)
        losses = []
        for student in students:
            divergence = class_divergence(student.logits, teacher.logits, self.temperature)
            distance, overlap = box_distances(student.boxes, teacher.boxes, self.giou_eps)
            cls = (weight * divergence).sum() * processes.count()
            losses.append(torch.stack([cls, (weight * distance).sum() / total, (weight * overlap).sum() / total]))
        factors = self.cls_weight, self.box_weight, self.giou_weight
        terms = zip(self.terms, factors, torch.stack(losses).sum(0), strict=True)
        return {name: factor * loss for name, factor, loss in terms if factor}
