"""ObjectKD: object by object, the student's predictions against the teacher's best prediction.

Methods of predictions compare two heads at the same priors, so they refuse most pairs of detectors. Here the labelled
objects stand between the two. The student's own assignment says which of its predictions answer for an object. The
teacher's best prediction for the object is the one with the largest p * IoU, where p is its score for the object's
class, and IoU compares its box with the object's box. So dense detectors, detectors of two stages and DETR's relatives
teach each other in any mix. For each of the student's predictions of an object:

    cls           BCE(s, p * r), where s is the student's score for the object's class
    box           r * (L1 + 2 (1 - GIoU)); L1 is that of (centre, size) in shares of the image
    distribution  r * KL(teacher's || student's box sides) * T^2, the mean of four sides

r = min(1, o / IoU) says how good the prediction's box is beside the teacher's box: o is its own IoU with the object's
box. It has no gradient. The teacher's score belongs to the teacher's box, so a prediction with a worse box is taught a
lower score. If all predictions of an object learned the same score, the best box would no longer win. And a prediction
far from the object would take as much of the box terms as the one that detects it.

An object's predictions are averaged, so objects with many predictions count as much as objects with one. Each object
has the weight p * IoU of the teacher's prediction: what the teacher hardly finds hardly counts. The sum over objects is
divided by the number of objects of all processes' batch that the student has predictions for, not by the sum of the
weights. So a teacher that finds few of the objects teaches little, and does not draw the student to these few.

A softmax and sigmoids are compared as scores: the logit of a softmax is that of the class against all others and
background together. Distributions are over distances from a prior, and the two priors differ, in place and in stride.
So the teacher's distribution is first carried to the student's bins: each of its bins is a place in the image, and its
probability is divided between the two nearest bins of the student. Bins may differ in number and kind.

Source of the idea: object distillation of D-FINE's relatives, which compares predictions that are matched to the same
object. The terms and the weights are those of KD-DETR (arXiv 2211.08071), where r is 1. No paper has this form of it,
so there are no published numbers. docs/choosing.md has what r changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.boxes import elementwise_iou, pairwise_iou
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, Predictions
from kdtoolkit.methods.queries import box_distances

GIOU = 2.0  # weight of 1 - GIoU beside the L1 of boxes, as in DETR's matching
COVERING = 0.05, 0.5  # least score and IoU of a teacher's prediction that covers an object, for the counts alone
SMALLEST_IOU = 1e-6  # of a teacher's box; below it nothing is divided
STEEP = 1e4  # a logit so far below the others has the probability 0 in float32
FLAT = 1e-4  # px; the least width of a bin


def class_logit(logits: Tensor, labels: Tensor, activation: str) -> Tensor:
    """The logit (R,) of the score of one class in each row of `logits` (R, K), or (R, K + 1) for a softmax.

    Its sigmoid is the class's probability, whatever the activation.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    if activation == "sigmoid":
        return own
    return own - logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)


def best_predictions(boxes: Tensor, scores: Tensor, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find for each of an image's objects the prediction whose score times IoU is largest.

    Returns its index, score and IoU, (G,) each. If no prediction overlaps the object, score and IoU are 0.

    Args:
        boxes: (A, 4) of the predictions.
        scores: (G, A) of the predictions, for the class of each object.
        objects: boxes (G, 4).
    """
    iou = pairwise_iou(objects, boxes)
    # An infinite box, as random weights may predict it, has an IoU of NaN.
    rank, index = torch.where(iou > 0, scores * iou, 0.0).max(1)
    score, overlap = (x.gather(1, index[:, None])[:, 0].masked_fill(rank <= 0, 0.0) for x in (scores, iou))
    return index, score, overlap


@dataclass(frozen=True)
class Sides:
    """The places of box sides that are distributions: bin value b lies at `origin + (b - bins[0]) * step`.

    `origin`, `step`: (R, 4) in pixels. `bins`: (B,), rising.
    """

    origin: Tensor
    step: Tensor
    bins: Tensor

    @property
    def places(self) -> Tensor:
        """The place of each bin (R, 4, B), in pixels."""
        return self.origin[..., None] + self.step[..., None] * (self.bins - self.bins[0])

    def values_at(self, places: Tensor) -> Tensor:
        """The bin values (R, 4, B') at places (R, 4, B') in pixels. They may lie beyond the bins."""
        step = torch.where(self.step < 0, -1, 1) * self.step.abs().clamp(min=FLAT)
        return self.bins[0] + (places - self.origin[..., None]) / step[..., None]


def sides_of(
    predictions: Predictions,
    bins: tuple[float, ...],
    rows: tuple[Tensor, ...],
    to_canvas: Callable[[Tensor], Tensor],
) -> Sides:
    """Where the bins of predictions lie.

    Boxes are linear in the bin value, so two boxes tell: those whose sides all lie at the first, or the last, bin.

    Args:
        predictions: with distributions.
        bins: the values of its bins.
        rows: indices (image, prior), (R,) each.
        to_canvas: carries boxes (N, A, 4) to the canvas in whose pixels places are wanted.
    """
    shape = predictions.regression.shape
    shared = predictions.priors.boxes.ndim == 2  # all images have the same priors
    images, priors = rows

    def edges(bin_: int) -> Tensor:
        logits = predictions.regression.new_full((1, *shape[1:]) if shared else shape, -STEEP)
        logits[..., bin_] = 0.0
        boxes = predictions.decode(logits, predictions.priors)
        return to_canvas(boxes.expand(shape[0], -1, -1))[images, priors]

    first, last = edges(0), edges(-1)
    values = first.new_tensor(bins)
    return Sides(first, (last - first) / (values[-1] - values[0]), values)


def carried(probabilities: Tensor, teacher: Sides, student: Sides) -> Tensor:
    """The teacher's distributions (R, 4, B) over the student's bins (R, 4, B').

    The probability of a bin is divided linearly between the two bins of the student that are nearest to its place.
    Beyond the ends, the last bin takes all of it.
    """
    values, bins = student.values_at(teacher.places)[..., None], student.bins
    passed = ((values - bins[:-1]) / (bins[1:] - bins[:-1])).clamp(0, 1)  # the share of each gap that lies below
    shares = F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1))  # (R, 4, B, B')
    with torch.autocast(shares.device.type, enabled=False):  # it would round the target
        return torch.einsum("rsb,rsbc->rsc", probabilities, shares)


class ObjectKD(Method):
    """Teach the student, for each object, what the teacher's best prediction says of it.

    It works wherever the student's adapter shows which of its predictions answer for an object (`assign`). `metrics`
    count the objects of a step. The teacher covers an object if its prediction has an IoU of 0.5 and a score of 0.05.
    `missed`: it does not. `covered`: it does, and the student has a prediction that answers for the object.
    `unassigned`: it does, and the student has none. Of two equal labels (box and class) in an image, predictions answer
    for the first alone, so the second is `unassigned` if the teacher covers it.

    Args:
        cls_weight: factor of the classification term.
        box_weight: factor of the box term.
        distribution_weight: factor of the distribution term, which there is if both detectors predict distributions.
        temperature: of the distributions.
    """

    needs = frozenset({Capability.PREDICTIONS})
    terms = ("cls", "box", "distribution")
    metrics = ("covered", "missed", "unassigned")
    paper = "none: the terms are of KD-DETR, arXiv 2211.08071"

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        distribution_weight: float = 0.25,
        temperature: float = 5.0,
    ) -> None:
        super().__init__()
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.distribution_weight = distribution_weight
        self.temperature = temperature

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse students that do not show which prediction answers for which object."""
        if student_spec.assigns:
            return None
        return (
            f"it must know which of the student's predictions answer for an object, and the adapter of "
            f"{student_spec.name} has no `assign`: write one (docs/own_detector.md), or use PKD"
        )

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cls`, `box` and `distribution`, weighted; terms of weight 0 are left out. And the counts of objects."""
        view, batch = exchange.student, exchange.student.batch
        student, teacher, assignment = view.head.predictions, exchange.teacher.head.predictions, view.own_assignment
        teacher_boxes = exchange.teacher_boxes.detach()
        objects, labels = torch.cat(batch.boxes).float(), torch.cat(batch.labels)
        counts = [len(boxes) for boxes in batch.boxes]
        images = [i for i, count in enumerate(counts) for _ in range(count)]
        image = torch.tensor(images, dtype=torch.long, device=labels.device)  # of each object

        # Image by image: all pairs of a batch's objects and predictions at once would take several times the memory.
        each = zip(teacher_boxes, teacher.probabilities.detach(), batch.boxes, batch.labels, strict=True)
        found = [best_predictions(boxes, scores[:, own].T, those) for boxes, scores, those, own in each]
        best, score, iou = (torch.cat(values) for values in zip(*found, strict=True))

        rows = (assignment.positive & (assignment.weights > 0)).nonzero(as_tuple=True)  # here a GPU's host waits
        owner = owners(assignment.boxes[rows], assignment.labels[rows], rows[0], objects, labels, image)
        answers = torch.zeros(len(objects), device=labels.device).index_add(0, owner, torch.ones_like(owner).float())
        quality = score * iou
        weight = (quality / answers.clamp(min=1))[owner] / processes.share((answers > 0).sum(), at_least=1)

        # What does not count must be finite too: an object that nothing overlaps is its own teacher.
        their_boxes = torch.where((quality > 0)[:, None], teacher_boxes[image, best], objects)
        our_boxes = student.boxes[rows]
        own = elementwise_iou(our_boxes.detach(), objects[owner])  # NaN for an infinite box
        good = torch.where(own > 0, own / iou[owner].clamp(min=SMALLEST_IOU), 0.0).clamp(max=1)
        terms = {}
        if self.cls_weight:
            logits = class_logit(student.logits[rows], labels[owner], student.activation)
            cls = F.binary_cross_entropy_with_logits(logits, score[owner] * good, reduction="none")
            terms["cls"] = self.cls_weight * (weight * cls).sum()
        if self.box_weight:
            sizes = objects.new_tensor([(width, height) * 2 for height, width in batch.sizes])
            scale = sizes[rows[0]]
            distance, overlap = box_distances(our_boxes / scale, their_boxes[owner] / scale)
            terms["box"] = self.box_weight * (weight * good * (4 * distance + GIOU * overlap)).sum()
        bins = view.spec.bins, exchange.teacher.spec.bins
        if self.distribution_weight and all(bins):
            theirs = image[owner], best[owner]
            with torch.no_grad():
                ours = sides_of(student, bins[0], rows, lambda boxes: boxes)
                places = sides_of(teacher, bins[1], theirs, exchange.to_student_canvas)
                target = carried((teacher.regression[theirs] / self.temperature).softmax(-1), places, ours)
            scores = (student.regression[rows] / self.temperature).log_softmax(-1)
            kl = (torch.xlogy(target, target) - target * scores).sum(-1).mean(-1) * self.temperature**2
            terms["distribution"] = self.distribution_weight * (weight * good * kl).sum()
        covers = (score >= COVERING[0]) & (iou >= COVERING[1])
        told = {"covered": covers & (answers > 0), "missed": ~covers, "unassigned": covers & (answers == 0)}
        return terms | {name: which.sum().float() * processes.count() for name, which in told.items()}


def owners(
    boxes: Tensor, labels: Tensor, images: Tensor, objects: Tensor, object_labels: Tensor, object_images: Tensor
) -> Tensor:
    """The index (R,) of the object that each positive prior answers for: the one of its image with its box and label.

    Args:
        boxes: (R, 4) of the assignment.
        labels: (R,) of the assignment.
        images: (R,) index of the prior's image.
        objects: boxes (G, 4) of all images of the batch.
        object_labels: (G,).
        object_images: (G,) index of the object's image.
    """
    if not len(boxes):
        return labels
    # The nearest box, because an adapter may have scaled the boxes and back.
    distance = (boxes[:, None] - objects).abs().sum(-1)
    alien = (labels[:, None] != object_labels) | (images[:, None] != object_images)
    return distance.masked_fill(alien, torch.inf).argmin(1)
