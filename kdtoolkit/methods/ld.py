"""LD: localisation distillation (Zheng et al., CVPR 2022, arXiv 2102.12252; journal version arXiv 2204.05957).

Detectors whose box sides are distributions over bins can be taught to localise by KL divergence, as classifiers are
taught classes. Main region: at the student's positive priors. Valuable region: at priors of moderate overlap around
the objects. Both are sums, not divided by the number of positives, as published.

Numbers agree with the published code (HikariTJU/LD @4287990; the main region alone with mmdet 3.3.0 too). The valuable
region follows that code rather than the paper: see `valuable_region`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit.boxes import centres, pairwise_iou
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, PriorKind
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.methods._common import distribution_kl, unlike_bins, unlike_priors

POINT_SIDE = 8  # strides; side of the square that stands for a point: the anchor of ATSS and GFL


def side_divergence(student: Tensor, teacher: Tensor, temperature: float = 10.0) -> Tensor:
    """Divergence of box distributions (..., 4, B), mean over bins and sides, times T^2: (...)."""
    return distribution_kl(student, teacher, temperature).mean(-1) / student.shape[-1]


def atss_thresholds(overlaps: Tensor, distances: Tensor, per_level: Sequence[int], topk: int = 9) -> Tensor:
    """ATSS's overlap threshold of each box (N, G): mean plus unbiased std over its candidates.

    Candidates are the `topk` priors of each level nearest to the box's centre. Source: arXiv 1912.02424, algorithm 1.

    Args:
        overlaps: IoU (N, A, G).
        distances: (N, A, G) between centres; infinite where a prior is none of the image's.
        per_level: number of priors on each level.
        topk: candidates a level.
    """
    sizes = list(per_level)
    chosen = [level.topk(min(topk, level.shape[1]), 1, largest=False) for level in torch.split(distances, sizes, 1)]
    levels = zip(torch.split(overlaps, sizes, 1), chosen, strict=True)
    overlap = torch.cat([level.gather(1, best.indices) for level, best in levels], 1)
    candidate = torch.cat([best.values for best in chosen], 1).isfinite()
    count = candidate.sum(1)
    mean = (overlap * candidate).sum(1) / count.clamp(min=1)
    variance = ((overlap - mean[:, None]).square() * candidate).sum(1) / (count - 1).clamp(min=1)
    return mean + variance.sqrt()


def valuable_region(
    anchors: Tensor, boxes: Sequence[Tensor], valid: Tensor, per_level: Sequence[int], lower: float = 0.25
) -> Tensor:
    """Weight of each anchor in the valuable localisation region (N, A), 0 outside it.

    An anchor belongs to a box if its distance measure lies in [lower * threshold, threshold) of that box's ATSS
    threshold; its weight is its largest IoU with such a box. The paper's measure is DIoU; the published code divides
    the intersection by the anchor's area instead of the union, which takes in more anchors smaller than the object.
    That is what published figures rest on, and what is done here.

    Args:
        anchors: (A, 4) xyxy in pixels, level by level.
        boxes: of each image (G, 4) xyxy in pixels.
        valid: (N, A) bool, False where an anchor lies in the batch's padding.
        per_level: number of anchors on each level.
        lower: lower end of the region, as a share of the threshold.
    """
    # Boxes of no extent fill up images with fewer boxes: their threshold is 0, so they have no region.
    padded = pad_sequence(list(boxes), batch_first=True).float()
    padded = torch.cat([padded, padded.new_zeros(len(boxes), 1, 4)], 1)  # (N, G, 4)
    iou = pairwise_iou(anchors, padded)  # (N, A, G)
    area, box_area = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (anchors.float(), padded))
    area, box_area = area[:, None], box_area[:, None]
    corners, box_corners = anchors[:, None], padded[:, None]
    hull = torch.maximum(corners[..., 2:], box_corners[..., 2:]) - torch.minimum(corners[..., :2], box_corners[..., :2])
    distance = (centres(corners) - centres(box_corners)).square().sum(-1)
    thresholds = atss_thresholds(iou, distance.masked_fill(~valid[..., None], torch.inf), per_level)[:, None]
    intersection = iou * (area + box_area) / (1 + iou)
    measure = intersection / area - distance / hull.square().sum(-1)
    inside = (measure >= lower * thresholds) & (measure < thresholds) & valid[..., None]
    return (iou * inside).amax(-1)


class LD(Method):
    """Teach the student's box distributions the teacher's, at the same priors.

    By default the main region alone, the paper's conference version. The journal version's settings for GFL are
    `valuable_weight=0.25, cls_weight=10`.

    Args:
        weight: factor of the main region's term.
        temperature: of the box distributions.
        valuable_weight: factor of the valuable region's term.
        cls_weight: factor of the KL of class scores (a softmax over classes), averaged over each level's positives.
        cls_temperature: of the class scores.
    """

    needs = frozenset({Capability.PREDICTIONS, Capability.DISTRIBUTIONS, Capability.ASSIGNMENT})
    terms = ("main", "valuable", "cls")
    paper = "arXiv 2102.12252 (CVPR 2022)"

    def __init__(
        self,
        *,
        weight: float = 0.25,
        temperature: float = 10.0,
        valuable_weight: float = 0.0,
        cls_weight: float = 0.0,
        cls_temperature: float = 2.0,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.valuable_weight = valuable_weight
        self.cls_weight = cls_weight
        self.cls_temperature = cls_temperature

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs whose priors or distributions do not correspond one to one."""
        if self.valuable_weight and not student.priors.on_grid:
            return f"the valuable region is of priors on a grid, and the student has {student.priors}"
        return unlike_priors(student, teacher) or unlike_bins(student, teacher)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`main` and, where their weight is not 0, `valuable` and `cls`.

        Raises IncompatibleError where the two detectors bring the batch to other sizes.
        """
        pair = exchange.matched()
        student, teacher = pair.student.predictions, pair.teacher.predictions
        if student.priors.grid != teacher.priors.grid:
            raise IncompatibleError(
                f"LD compares equal grids; this batch has {student.priors.grid} (H, W) in the student and "
                f"{teacher.priors.grid} in the teacher: let both resize and pad images alike"
            )
        assignment = pair.student_assignment
        positive = assignment.positive(exchange.student.spec.num_classes)
        score = student.probabilities.detach().float().amax(-1)
        divergence = side_divergence(student.regression[positive], teacher.regression[positive], self.temperature)
        main = (score[positive] * divergence).sum()
        terms = {"main": self.weight * main}
        if self.valuable_weight:
            anchors = student.priors.boxes
            if exchange.student.spec.priors is PriorKind.POINTS:
                reach = student.priors.strides[:, None] * POINT_SIDE / 2
                anchors = anchors + torch.cat([-reach, -reach, reach, reach], 1)
            region = valuable_region(
                anchors, exchange.student.batch.boxes, assignment.weights > 0, student.priors.per_level
            )
            inside = region > 0
            divergence = side_divergence(student.regression[inside], teacher.regression[inside], self.temperature)
            # Published so: sides averaged, then a quarter again.
            terms["valuable"] = self.valuable_weight * (region[inside] * divergence).sum() / 4
        if self.cls_weight:
            # Each positive weighs 1 / (positives of its level), and a level without any has none.
            per_level = torch.tensor(student.priors.per_level, device=positive.device)
            level = torch.arange(len(per_level), device=positive.device).repeat_interleave(per_level)
            level = level.expand_as(positive)[positive]
            share = 1 / level.bincount(minlength=len(per_level)).clamp(min=1)
            kl = distribution_kl(student.logits[positive], teacher.logits[positive], self.cls_temperature)
            terms["cls"] = self.cls_weight * (kl * share[level]).sum() / student.logits.shape[-1]
        return terms
