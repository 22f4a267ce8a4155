"""DETRDistill: distillation for DETR and its relatives (Chang et al., ICCV 2023, arXiv 2211.10156).

Three parts, each for each decoder layer, added up over the layers:

1. Hungarian matching of predictions. The student's queries are matched one to one with the teacher's, by BCE of classes
   + 5 L1 - 2 GIoU of boxes. Terms between matched queries: BCE with the teacher's scores as targets, L1, 1 - GIoU, all
   divided by the number of pairs (`cls`, `box`, `giou`).
2. The teacher's assignment. The student also decodes the teacher's queries. Each query answers for the object that the
   teacher's own matching gives it. Terms: the detection losses, a focal loss, L1 and 1 - GIoU, divided by the number of
   objects (`prior_cls`, `prior_box`, `prior_giou`).
3. Features where the teacher's queries look. Each of the teacher's best class scores times its query's best IoU with an
   object weighs the cosine of the query's state and a cell. The sum, at least 0.01 and divided by its maximum in the
   image, is the mask of the cells: the term is the mean of (mask * (t - s))^2 (`feature`). If a detector masks padding,
   cells there count neither for the maximum nor for the mean.

Numbers agree with the authors' code for Deformable DETR (BIVLab-USTC/DETRDistill @b5ee33d). The same functions also
give the numbers of TPRD's version of it (xingyitong1/TPRD @bb8ed01). The defaults are the authors'. As in their code,
the teacher's boxes are cut at the image's border in part 1, and the GIoU has no epsilon. There are these differences:

- Part 2 matches by the rule of the teacher's own loss. The code has one set of costs (2 focal, 5 L1, 2 GIoU).
- Part 3 compares the maps that the decoder takes. The code compares those before the encoder, padding included.
- The code knows sigmoid scores only. For a softmax over classes (DETR), cross entropy stands for BCE and focal loss. In
  part 2 background has the weight 0.1, as in DETR's own loss.
- Detectors of different depth can be compared: `kdtoolkit.methods.queries.layer_pairs` says which layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit import processes
from kdtoolkit.boxes import elementwise_giou, pairwise_iou
from kdtoolkit.compatibility import shared_levels, why_no_shared_level, why_priors_differ, why_scores_differ
from kdtoolkit.contract import Assignment, Capability, DetectorSpec, Exchange, HeadTrace, Method, View
from kdtoolkit.errors import KDError
from kdtoolkit.methods.common import cells_with_meaning, quality_focal_kd, resize_like
from kdtoolkit.methods.queries import (
    Outputs,
    box_distances,
    centres_and_sizes,
    in_shares,
    layer_outputs,
    layer_pairs,
    objects_in_shares,
    why_no_queries,
)
from kdtoolkit.methods.repair import repaired

Assigned = tuple[Assignment, Tensor]  # of a layer, with the objects' boxes in shares of the image

BACKGROUND = 0.1  # weight of background in the cross entropy, DETR's eos_coefficient
LEAST = 0.01  # of the mask of cells, before it is divided by its maximum


def soft_class_loss(student: Outputs, teacher: Outputs) -> Tensor:
    """Cross entropy (N, Q) of the student's classes with the teacher's scores as targets; BCE summed over sigmoids."""
    if not student.softmax:
        return quality_focal_kd(student.logits, teacher.logits, beta=0).sum(-1)
    return -(teacher.logits.detach().softmax(-1) * student.logits.log_softmax(-1)).sum(-1)


def matching_costs(
    student: Outputs, teacher: Outputs, costs: tuple[float, float, float] = (1.0, 5.0, 2.0), eps: float = 0.0
) -> Tensor:
    """What it costs to match each query of the student with each of the teacher: (N, Q, Q'), without gradient.

    Args:
        student: Q queries.
        teacher: Q' queries.
        costs: factors of the class loss, of L1 (summed over four sides), and of 1 - GIoU.
        eps: what is added to union and hull in the GIoU, in shares of the image's area.
    """
    with torch.no_grad(), torch.autocast(student.logits.device.type, enabled=False):
        logits, theirs = student.logits, teacher.logits
        if student.softmax:
            classes = -(logits.log_softmax(-1) @ theirs.softmax(-1).mT)
        else:  # BCE(s, p) is softplus(s) - s p
            classes = F.softplus(logits).sum(-1, keepdim=True) - logits @ theirs.sigmoid().mT
        l1 = torch.cdist(centres_and_sizes(student.boxes), centres_and_sizes(teacher.boxes), p=1)
        overlap = elementwise_giou(student.boxes[:, :, None], teacher.boxes[:, None], eps)
        return costs[0] * classes + costs[1] * l1 + costs[2] * (1 - overlap)


def match(costs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The cheapest one-to-one matching of each image: for each entry of `costs` (N, Q, Q') the pairs (N, M), (N, M).

    The first of a pair are the student's queries, in rising order; M is the smaller of Q and Q'. A GPU's host waits
    once.
    """
    # Imported here, because `import kdtoolkit.methods` shall not wait for it.
    from scipy.optimize import linear_sum_assignment

    device = costs[0].device
    tables = torch.stack(list(costs)).nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9).cpu().numpy()
    pairs = torch.from_numpy(np.array([[linear_sum_assignment(image) for image in layer] for layer in tables]))
    return [(each[:, 0], each[:, 1]) for each in pairs.to(device, non_blocking=True)]  # each is (N, 2, M)


def taken(outputs: Outputs, queries: Tensor) -> Outputs:
    """The outputs of the queries (N, M) with these indices."""
    logits, boxes = (
        x.gather(1, queries[..., None].expand(-1, -1, x.shape[-1])) for x in (outputs.logits, outputs.boxes)
    )
    return outputs._replace(logits=logits, boxes=boxes)


def imitation(student: Outputs, teacher: Outputs, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Class loss, L1 summed over four sides, and 1 - GIoU of corresponding queries: scalars, means over queries."""
    distance, overlap = box_distances(student.boxes, teacher.boxes, eps)
    return soft_class_loss(student, teacher).mean(), 4 * distance.mean(), overlap.mean()


def matched_losses(student: Sequence[Outputs], teacher: Sequence[Outputs]) -> list[Tensor]:
    """The terms of `imitation` between matched queries, added up over pairs of layers.

    The teacher's boxes are cut at the image's border.
    """
    pairs = layer_pairs(student, [each._replace(boxes=each.boxes.clamp(0, 1)) for each in teacher])
    matches = match([matching_costs(*pair) for pair in pairs])
    losses = [
        imitation(taken(ours, rows), taken(theirs, columns))
        for (ours, theirs), (rows, columns) in zip(pairs, matches, strict=True)
    ]
    return _summed(losses)


def detection_losses(
    student: Outputs, assignment: Assignment, boxes: Tensor, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Focal loss (or cross entropy), L1 and 1 - GIoU of queries that answer for objects: scalars.

    Args:
        student: N images, Q queries.
        assignment: which query answers for which object.
        boxes: (N, Q, 4) the objects' boxes, in shares of the image.
        eps: what is added to union and hull in the GIoU, in shares of the image's area.
    """
    logits, labels = student.logits, assignment.labels
    if student.softmax:
        weight = assignment.weights * torch.where(assignment.positive, 1.0, BACKGROUND)
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        cls = (weight * entropy).sum() / processes.share(weight.sum(), at_least=BACKGROUND)
    else:
        # Imported late: torchvision brings torch's compiler, and both take longer than torch itself.
        from torchvision.ops import sigmoid_focal_loss

        target = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits)
        focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2)
        cls = (focal * assignment.weights[..., None]).sum() / assignment.normaliser
    distance, overlap = box_distances(student.boxes, boxes, eps)
    l1, giou = ((x * assignment.positive).sum() for x in (4 * distance, overlap))
    return cls, l1 / assignment.normaliser, giou / assignment.normaliser


@torch.no_grad()
def best_scores(teacher: Outputs, truth: Sequence[Tensor], top: int) -> tuple[Tensor, Tensor]:
    """The queries of the `top` largest class scores, and each score times its best IoU with an object: (N, M) both.

    A query is named once for each of its classes among these. In images without objects it is the score alone.

    Args:
        teacher: N images, Q queries, K classes; M is `top`, or Q * K if that is less.
        truth: boxes (G, 4) of each image's objects, in shares of the image.
        top: how many scores.
    """
    probabilities = teacher.probabilities
    score, index = probabilities.flatten(1).topk(min(top, probabilities.shape[1] * probabilities.shape[2]))
    query = index // probabilities.shape[-1]
    if not any(map(len, truth)):
        return query, score
    boxes = teacher.boxes.gather(1, query[..., None].expand(-1, -1, 4))
    overlap = pairwise_iou(boxes, pad_sequence(list(truth), batch_first=True)).amax(-1)
    has_objects = torch.tensor([bool(len(each)) for each in truth]).to(score.device, non_blocking=True)
    return query, torch.where(has_objects[:, None], score * overlap, score)


@torch.no_grad()
def cell_mask(states: Tensor, query: Tensor, score: Tensor, feature: Tensor, counts: Tensor) -> Tensor:
    """How much each cell is like the teacher's best queries: (N, H, W), at most 1, and 0 in cells that do not count.

    Args:
        states: (N, Q, C) the states of the teacher's queries.
        query: (N, M) which of them count.
        score: (N, M) how much.
        feature: (N, C, H, W) the teacher's map.
        counts: (N, H, W) bool, which cells count; at least one in each image.
    """
    chosen = F.normalize(states.float(), dim=-1).gather(1, query[..., None].expand(-1, -1, states.shape[-1]))
    # A sum of cosines is the product with the sum of the directions.
    direction = (score[..., None] * chosen).sum(1)
    alike = torch.einsum("nc,nchw->nhw", direction, F.normalize(feature.float(), dim=1)).clamp(min=LEAST)
    alike = alike * counts
    return alike / alike.amax((1, 2), keepdim=True)


def masked_difference(student: Tensor, teacher: Tensor, masks: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Mean of (mask * (t - s))^2 of maps (N, C, H, W), added up over masks (N, H, W): a scalar.

    The masks are 0 in cells that do not count; `counts` (N, H, W) bool. The mean is over those of all processes.
    """
    square = (student - teacher.detach()).square().mean(1)
    return (reduce(torch.add, [mask.square() for mask in masks]) * square).sum() / processes.share(counts.sum())


class DETRDistill(Method):
    """Teach the student's decoder by the teacher's predictions, assignment, and the places where its queries look.

    The default weights are the published ones for Deformable DETR.

    Args:
        cls_weight: factor of the class loss of matched queries.
        box_weight: factor of their L1.
        giou_weight: factor of their 1 - GIoU.
        prior_cls_weight: factor of the class loss at the teacher's queries. These need queries of the same form. If all
            three factors are 0, the student decodes its own queries alone.
        prior_box_weight: factor of the L1 there.
        prior_giou_weight: factor of 1 - GIoU there.
        feature_weight: factor of the difference of features. It needs a common stride.
        top: how many class scores of a layer say where the teacher's queries look.
        repair: first repair the teacher's predictions of matched queries by its earlier layers (TPRD, see
            `kdtoolkit.methods.repair`).
    """

    needs = frozenset({Capability.FEATURES, Capability.PREDICTIONS, Capability.STAGES, Capability.ASSIGNMENT})
    unlabelled = "detections"
    terms = ("cls", "box", "giou", "prior_cls", "prior_box", "prior_giou", "feature")
    vanishing = ("feature",)
    paper = "arXiv 2211.10156 (ICCV 2023)"
    align: nn.ModuleList

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        prior_cls_weight: float = 2.0,
        prior_box_weight: float = 5.0,
        prior_giou_weight: float = 2.0,
        feature_weight: float = 1.0,
        top: int = 100,
        repair: bool = False,
    ) -> None:
        super().__init__()
        if top < 1:
            raise KDError(f"DETRDistill(top={top}): it must be 1 or more scores of each decoder layer")
        self.own_weights = cls_weight, box_weight, giou_weight
        self.prior_weights = prior_cls_weight, prior_box_weight, prior_giou_weight
        self.feature_weight = feature_weight
        self.top = top
        self.repair = repair

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse detectors without queries, and pairs whose scores differ in kind.

        Queries of different forms are refused if the student would decode the teacher's, and pairs without a common
        stride if features are compared.
        """
        if reason := why_no_queries(student_spec, teacher_spec):
            return reason
        if any(self.prior_weights) and (reason := why_priors_differ(student_spec, teacher_spec)):
            return (
                f"{reason}. DETRDistill(prior_cls_weight=0, prior_box_weight=0, prior_giou_weight=0) leaves the "
                "teacher's queries out"
            )
        if self.feature_weight and (reason := why_no_shared_level(student_spec, teacher_spec)):
            return f"{reason}. DETRDistill(feature_weight=0) leaves the features out"
        return why_scores_differ(student_spec, teacher_spec)

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Pair the levels of equal stride, and project the student's maps where channels differ."""
        self.levels = shared_levels(student_spec, teacher_spec) if self.feature_weight else []
        channels = ((student_spec.channels[s], teacher_spec.channels[t]) for s, t in self.levels)
        self.align = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in channels)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The weighted terms of one step; terms of weight 0 are left out."""
        student, teacher = exchange.student, exchange.teacher
        passes = teacher.layers(teacher.head)
        said = layer_outputs(passes, teacher.batch)
        assigned: list[Assigned] = []
        if any(self.prior_weights) or self.repair:
            assigned = [_assigned(teacher, each) for each in passes]
        terms: dict[str, Tensor] = {}
        if any(self.own_weights):
            own = layer_outputs(student.layers(student.head), student.batch)
            targets = _repaired(said, assigned) if self.repair else said
            terms |= _weighted(self.terms[:3], self.own_weights, matched_losses(own, targets))
        if any(self.prior_weights):
            asked = layer_outputs(student.layers(exchange.matched("teacher").student), student.batch)
            losses = [detection_losses(ours, *theirs) for ours, theirs in layer_pairs(asked, assigned)]
            terms |= _weighted(self.terms[3:6], self.prior_weights, _summed(losses))
        if self.feature_weight:
            terms["feature"] = self.feature_weight * self._features(exchange, passes, said)
        return terms

    def _features(self, exchange: Exchange, passes: Sequence[HeadTrace], said: Sequence[Outputs]) -> Tensor:
        """The difference of features where the teacher's queries look, added up over levels and layers."""
        truth = objects_in_shares(exchange.teacher.batch)
        looks = [
            (each.states[-1]["decoder"][0].mT, *best_scores(outputs, truth, self.top))
            for each, outputs in zip(passes, said, strict=True)
        ]
        losses = []
        with torch.autocast(said[0].logits.device.type, enabled=False):
            for (s, t), align in zip(self.levels, self.align, strict=True):
                theirs = exchange.teacher.features[t].detach().float()
                ours = resize_like(align(exchange.student.features[s].float()), theirs)
                counts = cells_with_meaning(exchange.student, exchange.teacher, t)
                masks = [cell_mask(*look, theirs, counts) for look in looks]
                losses.append(masked_difference(ours, theirs, masks, counts))
        return reduce(torch.add, losses)


def _assigned(view: View, trace: HeadTrace) -> Assigned:
    with torch.no_grad():
        found = view.adapter.assign(trace, view.batch)
    return found, in_shares(found.boxes, view.batch)


def _repaired(layers: Sequence[Outputs], assigned: Sequence[Assigned]) -> list[Outputs]:
    """Each layer's outputs, repaired by the layers before it."""
    return [
        repaired(layers[: i + 1], assignment.positive, assignment.labels, boxes)
        for i, (assignment, boxes) in enumerate(assigned)
    ]


def _weighted(names: Sequence[str], weights: Sequence[float], losses: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: weight * loss for name, weight, loss in zip(names, weights, losses, strict=True) if weight}


def _summed(losses: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Three terms of each layer, added up over the layers."""
    return [reduce(torch.add, each) for each in zip(*losses, strict=True)]
