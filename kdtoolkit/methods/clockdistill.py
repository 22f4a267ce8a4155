"""CLoCKDistill: what the encoder remembers, and what decoders say at the objects (Lan and Tian, arXiv 2502.10683).

Two parts, for DETR's relatives whose queries have a place:

1. Memory, the maps that the decoder takes. Squared difference of both, with a weight for each cell: 1 / (area of the
   smallest box over it, in cells), or 1 / (number of background cells) where there is no box. It is summed over cells,
   channels and levels and divided by the number of images (`foreground`, `background`). If a detector masks padding,
   cells there are neither objects nor background.
2. Queries made from the ground truth go through both decoders: for each object a query at its box, whose content is a
   random embedding of its class that stays the same in the whole run. So both decoders look at the same place for the
   same thing. Terms at each decoder layer: KL of class scores, L1 (summed over four sides) and 1 - GIoU of boxes in
   shares of the image, weighted by the teacher's largest class score at that query and divided by the sum of these
   weights. They are added up over the layers (`cls`, `box`, `giou`).

The authors' code is not public, so there are no numbers to compare with; tests compare with plain loops. Where the
description is silent, this file chooses: the KL of sigmoid scores is the sum over classes of that of a yes and a no.
Embeddings are drawn from a standard normal distribution; detectors of unequal width get their own. Decoders are trained
on many queries that see each other, most of which find nothing. So each image gets the same number of queries: those
without an object are of the whole image, have no content, and weigh 0. Then no image's loss depends on the rest of the
batch. If a detector's queries have positions that do not follow from their place, as in Conditional DETR, these are 0.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit import processes
from kdtoolkit.compatibility import shared_levels, why_no_shared_level, why_scores_differ
from kdtoolkit.contract import Batch, Capability, DetectorSpec, Exchange, Method, View
from kdtoolkit.errors import KDError
from kdtoolkit.methods.common import EPS, cells_with_meaning, distribution_kl, resize_like
from kdtoolkit.methods.fgd import region_masks
from kdtoolkit.methods.queries import Outputs, box_distances, in_shares, layer_outputs, layer_pairs
from kdtoolkit.methods.repair import repaired

SEED = 0  # of the embeddings of classes


def memory_losses(student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Squared differences of maps (N, C, H, W), weighted on objects and on background (N, H, W): two scalars."""
    square = (student - teacher.detach()).square().sum(1)
    return (square * foreground).sum() / len(student), (square * background).sum() / len(student)


def weights_where(foreground: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of objects and of background (N, H, W), 0 in cells that do not count; `counts` (N, H, W) bool.

    Those of background sum to 1 in each image. `foreground` is that of `region_masks`.
    """
    background = (counts & (foreground == 0)).float()
    return foreground * counts, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def class_kl(student: Outputs, teacher: Outputs) -> Tensor:
    """KL (N, Q) of class scores. For sigmoids it is the sum over classes of the KL of a yes and a no."""
    if student.softmax:
        return distribution_kl(student.logits, teacher.logits)
    logits, theirs = student.logits, teacher.logits.detach()
    return (F.softplus(logits) - F.softplus(theirs) - (logits - theirs) * theirs.sigmoid()).sum(-1)


def query_losses(student: Outputs, teacher: Outputs, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL of classes, L1 summed over four sides, and 1 - GIoU, averaged with weights (N, Q): three scalars."""
    distance, overlap = box_distances(student.boxes, teacher.boxes)
    total = processes.share(weight.sum(), at_least=EPS)
    cls, box, giou = ((weight * x).sum() / total for x in (class_kl(student, teacher), 4 * distance, overlap))
    return cls, box, giou


def filled(batch: Batch, count: int, background: int) -> tuple[Tensor, Tensor]:
    """Boxes (N, count, 4) and labels (N, count) of the first objects of each image.

    What is left is filled with boxes of the whole image and the label `background`.
    """
    boxes = batch.images.new_tensor([(0, 0, width, height) for height, width in batch.sizes], dtype=torch.float32)
    boxes = boxes[:, None].repeat(1, count, 1)
    labels = torch.full(boxes.shape[:2], background, device=boxes.device)
    for i, (own, classes) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        boxes[i, : len(own)], labels[i, : len(own)] = own[:count], classes[:count]
    return boxes, labels


class CLoCKDistill(Method):
    """Teach the student what the teacher's encoder remembers, and what its decoder says where objects are.

    The default weights are the published ones.

    Args:
        foreground_weight: factor of the difference of memories on objects; the paper's alpha.
        background_weight: factor of the difference of memories elsewhere; beta.
        cls_weight: factor of the KL of classes at the queries of objects.
        box_weight: factor of the L1 of boxes there.
        giou_weight: factor of 1 - GIoU there.
        queries: how many queries each image gets. Objects beyond this number are left out; `metrics` count them.
        repair: first repair the teacher's predictions by its earlier layers (TPRD, see `kdtoolkit.methods.repair`).
    """

    needs = frozenset({Capability.FEATURES, Capability.PREDICTIONS, Capability.PLACED_QUERIES})
    unlabelled = "detections"
    terms = ("foreground", "background", "cls", "box", "giou")
    metrics = ("left_out",)
    vanishing: tuple[str, ...] = ("foreground", "background", "cls", "box", "giou")
    paper = "arXiv 2502.10683 (WACV 2026)"
    align: nn.ModuleList
    student_content: Tensor
    teacher_content: Tensor

    def __init__(
        self,
        *,
        foreground_weight: float = 5e-5,
        background_weight: float = 1e-7,
        cls_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        queries: int = 100,
        repair: bool = False,
    ) -> None:
        super().__init__()
        if queries < 1:
            raise KDError(f"CLoCKDistill(queries={queries}): it must be 1 or more, enough for the objects of an image")
        self.memory_weights = foreground_weight, background_weight
        self.query_weights = cls_weight, box_weight, giou_weight
        self.queries = queries
        self.repair = repair
        if repair:  # a student that equals the teacher still has to learn what its earlier layers know
            self.vanishing = ("foreground", "background")

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride, if memories are compared, and pairs whose scores differ in kind."""
        if any(self.memory_weights) and (reason := why_no_shared_level(student_spec, teacher_spec)):
            return f"{reason}. CLoCKDistill(foreground_weight=0, background_weight=0) leaves the memory out"
        return why_scores_differ(student_spec, teacher_spec)

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Pair the levels of equal stride, project the student's maps where channels differ, and embed the classes."""
        self.levels = shared_levels(student_spec, teacher_spec) if any(self.memory_weights) else []
        channels = ((student_spec.channels[s], teacher_spec.channels[t]) for s, t in self.levels)
        self.align = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in channels)
        for name, spec in (("student_content", student_spec), ("teacher_content", teacher_spec)):
            width = next(iter(spec.stages[0].channels.values()))[0]
            drawn = torch.randn(spec.num_classes, width, generator=torch.Generator().manual_seed(SEED))
            self.register_buffer(name, F.pad(drawn, (0, 0, 0, 1)), persistent=False)  # the last is of gaps

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The weighted terms of one step; terms of weight 0 are left out. And the number of objects without a query."""
        losses: list[Tensor] = []
        factors: tuple[float, ...] = ()
        told: dict[str, Tensor] = {}
        if any(self.memory_weights):
            factors, losses = self.memory_weights, self._memory(exchange)
        names = self.terms[: len(factors)]
        if any(self.query_weights):
            factors, losses = (*factors, *self.query_weights), losses + self._queries(exchange)
            names = (*names, *self.terms[2:])
            left_out = sum(max(0, len(boxes) - self.queries) for boxes in exchange.student.batch.boxes)
            told["left_out"] = exchange.student.batch.images.new_full((), left_out * processes.count()).float()
        terms = {name: factor * loss for name, factor, loss in zip(names, factors, losses, strict=True) if factor}
        return terms | told

    def _memory(self, exchange: Exchange) -> list[Tensor]:
        """The two terms of memories, added up over levels."""
        view = exchange.teacher
        boxes = pad_sequence(list(view.batch.boxes), batch_first=True, padding_value=torch.nan).float()
        losses = []
        for (s, t), align in zip(self.levels, self.align, strict=True):
            teacher = view.features[t].float()
            with torch.autocast(teacher.device.type, enabled=False):
                student = resize_like(align(exchange.student.features[s].float()), teacher)
                foreground, _ = region_masks(boxes / view.spec.strides[t], teacher.shape[2], teacher.shape[3])
                weights = weights_where(foreground, cells_with_meaning(exchange.student, view, t))
                losses.append(memory_losses(student, teacher, *weights))
        return [reduce(torch.add, each) for each in zip(*losses, strict=True)]

    def _queries(self, exchange: Exchange) -> list[Tensor]:
        """The three terms at the queries of objects, added up over decoder layers."""
        student, _, _ = self._said(exchange.student, self.student_content)
        teacher, labels, boxes = self._said(exchange.teacher, self.teacher_content)
        positive = labels < len(self.teacher_content) - 1
        if self.repair:
            teacher = [repaired(teacher[: i + 1], positive, labels, boxes) for i in range(len(teacher))]
        losses = [
            query_losses(ours, theirs, theirs.probabilities.amax(-1).detach() * positive)
            for ours, theirs in layer_pairs(student, teacher)
        ]
        return [reduce(torch.add, each) for each in zip(*losses, strict=True)]

    def _said(self, view: View, content: Tensor) -> tuple[list[Outputs], Tensor, Tensor]:
        """What each decoder layer says at the objects; the labels (N, Q), and boxes (N, Q, 4) in shares."""
        boxes, labels = filled(view.batch, self.queries, len(content) - 1)
        trace = view.run_head(view.adapter.queries_at(content[labels], boxes, view.batch))
        return layer_outputs(view.layers(trace), view.batch), labels, in_shares(boxes, view.batch)
