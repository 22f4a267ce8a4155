"""LD: localisation distillation (Zheng et al., CVPR 2022, arXiv 2102.12252; journal version arXiv 2204.05957).

If box sides are distributions over bins, a detector can learn to localise by KL divergence, as a classifier learns
classes. The main region consists of the student's positive priors. The valuable region consists of priors near an
object that overlap it only moderately. Both terms are sums and are not divided by the number of positives, as
published.

Numbers agree with the published code (HikariTJU/LD @4287990); the main region's numbers also agree with mmdet 3.3.0.
The valuable region follows that code, not the paper: see `valuable_region`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit import processes
from kdtoolkit.boxes import centres, pairwise_iou
from kdtoolkit.compatibility import (
    check_grids,
    shared_levels,
    why_bins_differ,
    why_no_shared_level,
    why_not_on_grid,
    why_priors_differ,
    why_too_few_classes,
)
from kdtoolkit.contract import Assignment, Capability, DetectorSpec, Exchange, Method, Predictions, PriorKind
from kdtoolkit.methods.common import at_levels, distribution_kl, rows_of_levels

POINT_SIDE = 8  # strides; side of the square that stands for a point: the anchor of ATSS and GFL


def side_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 10.0, matching: Tensor | None = None
) -> Tensor:
    """Divergence of box distributions (R, 4, B), mean over bins and sides, times T^2: (R,).

    `matching` (4, teacher's B, student's B) carries the teacher's softened distributions to the student's bins.
    """
    if matching is None:
        return distribution_kl(student, teacher, temperature).mean(-1) / student.shape[-1]
    with torch.autocast(student.device.type, enabled=False):  # it would round the target
        target = torch.einsum("rst,stb->rsb", (teacher.detach().float() / temperature).softmax(-1), matching)
    scores = (student.float() / temperature).log_softmax(-1)
    kl = (torch.xlogy(target, target) - target * scores).sum(-1) * temperature**2
    return kl.mean(-1) / student.shape[-1]


def match_bins(student: Sequence[float], teacher: Sequence[float], offset: tuple[float, float]) -> Tensor:
    """Shares (4, teacher's B, student's B) by which each bin of the teacher falls into the student's bins.

    The paper has nothing like it. It makes two distributions comparable if their bins differ, or if their priors lie at
    different places in a cell. The probability of a bin is divided linearly between the two nearest bins of the
    student. Beyond the ends, the last bin takes all of it.

    Args:
        student: values of the student's bins, rising, in strides.
        teacher: values of the teacher's bins, rising, in strides.
        offset: (x, y) from the teacher's priors to the student's, in strides.
    """
    ours = torch.tensor(student)
    sides = []
    for shift in (offset[0], offset[1], -offset[0], -offset[1]):  # left, top, right, bottom
        values = (torch.tensor(teacher) + shift).clamp(ours[0], ours[-1])
        upper = torch.searchsorted(ours, values).clamp(1, len(ours) - 1)
        share = (values - ours[upper - 1]) / (ours[upper] - ours[upper - 1])
        row = torch.zeros(len(values), len(ours))
        row.scatter_(1, upper[:, None], share[:, None])
        sides.append(row.scatter_(1, upper[:, None] - 1, 1 - share[:, None]))
    return torch.stack(sides)


def atss_thresholds(overlaps: Tensor, distances: Tensor, per_level: Sequence[int], topk: int = 9) -> Tensor:
    """ATSS's overlap threshold of each box (N, G): mean plus unbiased std over its candidates.

    Candidates are the `topk` priors of each level nearest to the box's centre. Source: arXiv 1912.02424, algorithm 1.

    Args:
        overlaps: IoU (N, A, G).
        distances: (N, A, G) between centres; infinite where a prior does not belong to the image.
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

    An anchor belongs to a box if its distance measure lies in [lower * threshold, threshold), where `threshold` is the
    box's ATSS threshold. Its weight is its largest IoU with such a box. The paper's measure is DIoU. The published code
    divides the intersection by the anchor's area, not by the union. So the region has more anchors that are smaller
    than the object. The published figures come from that code, so it is followed here.

    Args:
        anchors: (A, 4) xyxy in pixels, level by level.
        boxes: of each image (G, 4) xyxy in pixels.
        valid: (N, A) bool, False where an anchor lies in the batch's padding.
        per_level: number of anchors on each level.
        lower: lower end of the region, as a share of the threshold.
    """
    # Images with fewer boxes are padded with empty boxes. Their threshold is 0, so they have no region.
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
    """Teach the student the teacher's box distributions, at the same priors.

    If two grids have only some strides in common, it works on these. The two detectors may have different bins, and
    different places of the priors in their cells.

    The default is the paper's conference version: the main region alone. The settings of the journal version for GFL
    are `valuable_weight=0.25, cls_weight=10`. Box terms are sums over positions of the batch of all processes, so they
    grow with the batch. The published code sums over the 2 or 3 images of each GPU.

    Args:
        weight: factor of the main region's term.
        temperature: of the box distributions.
        valuable_weight: factor of the valuable region's term.
        cls_weight: factor of the KL of class scores (a softmax over classes), averaged over each level's positives.
        cls_temperature: of the class scores.
    """

    needs = frozenset({Capability.PREDICTIONS, Capability.DISTRIBUTIONS, Capability.ASSIGNMENT})
    terms = ("main", "valuable", "cls")
    vanishing = ("main", "valuable", "cls")
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
        self.compares_classes = cls_weight != 0
        self.cls_temperature = cls_temperature

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs whose priors or distributions do not correspond one to one."""
        if self.valuable_weight and (reason := why_not_on_grid(student_spec, "student", use="LD(valuable_weight=0)")):
            return reason
        if self.cls_weight and (reason := why_too_few_classes(student_spec)):
            return f"{reason}. Use LD(cls_weight=0), which compares boxes alone"
        if not (student_spec.priors.on_grid and teacher_spec.priors.on_grid):
            return why_priors_differ(student_spec, teacher_spec) or why_bins_differ(student_spec, teacher_spec)
        pairs = shared_levels(student_spec, teacher_spec)
        counts = [(student_spec.priors_per_cell[s], teacher_spec.priors_per_cell[t]) for s, t in pairs]
        if unlike := [(s, t) for s, t in counts if s != t]:
            return f"the student has {unlike[0][0]} priors a cell, the teacher {unlike[0][1]}. Use CrossKD or PKD"
        return why_no_shared_level(student_spec, teacher_spec)

    def _corresponding(self, exchange: Exchange) -> tuple[Predictions, Predictions, Assignment, Tensor | None]:
        """Both predictions and the student's assignment on common levels; `match_bins` if bins or places differ."""
        pair, specs = exchange.matched(), (exchange.student.spec, exchange.teacher.spec_in_student_pixels)
        student, teacher, assignment = pair.student.predictions, pair.teacher.predictions, pair.student_assignment
        if not student.priors.grid:
            return student, teacher, assignment, None
        if specs[0].strides != specs[1].strides:
            levels = shared_levels(*specs)
            ours, theirs = [s for s, _ in levels], [t for _, t in levels]
            assignment = assignment.at_rows(rows_of_levels(student.priors, ours))
            student, teacher = at_levels(student, ours), at_levels(teacher, theirs)
        check_grids("LD", student, teacher)
        if specs[0].bins == specs[1].bins and student.priors.boxes is teacher.priors.boxes:
            return student, teacher, assignment, None
        # In cells, since the teacher's pixels may be larger than the student's.
        first = [centres(priors.boxes[0]) / priors.strides[0] for priors in (student.priors, teacher.priors)]
        x, y = (first[0] - first[1]).tolist()
        if specs[0].bins == specs[1].bins and x == y == 0:
            return student, teacher, assignment, None
        matching = match_bins(specs[0].bins, specs[1].bins, (x, y)).to(student.regression.device)
        return student, teacher, assignment, matching

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`main` and, where their weight is not 0, `valuable` and `cls`.

        Raises IncompatibleError if the two detectors bring the batch to grids of different sizes.
        """
        student, teacher, assignment, matching = self._corresponding(exchange)
        positive = assignment.positive.nonzero(as_tuple=True)
        divergence = side_divergence(
            student.regression[positive], teacher.regression[positive], self.temperature, matching
        )
        main = (student.scores.detach()[positive] * divergence).sum() * processes.count()
        terms = {"main": self.weight * main}
        if self.valuable_weight:
            anchors = student.priors.boxes
            if exchange.student.spec.priors is PriorKind.POINTS:
                reach = student.priors.strides[:, None] * POINT_SIDE / 2
                anchors = anchors + torch.cat([-reach, -reach, reach, reach], 1)
            # Image by image: padded to the most boxes of an image, a batch would take several times the memory.
            images = zip(exchange.student.batch.boxes, assignment.weights > 0, strict=True)
            region = torch.cat(
                [valuable_region(anchors, [own], real[None], student.priors.per_level) for own, real in images]
            )
            inside = (region > 0).nonzero(as_tuple=True)
            divergence = side_divergence(
                student.regression[inside], teacher.regression[inside], self.temperature, matching
            )
            # Published so: sides averaged, then a quarter again.
            terms["valuable"] = self.valuable_weight * (region[inside] * divergence).sum() * processes.count() / 4
        if self.cls_weight:
            # Each positive weighs 1 / (positives of its level), and a level without any has none.
            ends = torch.tensor([*accumulate(student.priors.per_level)], device=positive[1].device)
            level = torch.searchsorted(ends, positive[1], right=True)
            counts = torch.zeros_like(ends).index_add(0, level, torch.ones_like(level))
            share = 1 / processes.share(counts, at_least=1)
            kl = distribution_kl(student.logits[positive], teacher.logits[positive], self.cls_temperature)
            terms["cls"] = self.cls_weight * (kl * share[level]).sum() / student.logits.shape[-1]
        return terms
