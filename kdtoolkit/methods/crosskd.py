"""CrossKD: cross-head knowledge distillation (Wang et al., CVPR 2024, arXiv 2306.11369).

A hidden state of the student's head is put into the teacher's frozen head, which runs to its end. These cross-head
predictions mimic the teacher's own. The student's own predictions learn from the ground truth alone, so the two targets
do not conflict (section 3.2, equations 4 and 5).

Before the state enters the teacher's head it takes on the statistics of the teacher's state, channel by channel. The
settings are the published ones for GFL. `CrossKD.for_fcos()` has those for FCOS; for other detectors see the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from kdtoolkit.compatibility import shared_levels, why_cells_differ, why_no_shared_level
from kdtoolkit.contract import (
    Assignment,
    Capability,
    DetectorSpec,
    Exchange,
    HeadTrace,
    Matched,
    Method,
    Predictions,
    PriorKind,
    Priors,
    State,
    Whose,
)
from kdtoolkit.methods.common import (
    by_statistics,
    cells_with_meaning,
    channel_statistics,
    image_moments,
    joined_statistics,
    resize_like,
    resize_to,
    rows_of_levels,
    standardise,
    statistics_where,
)
from kdtoolkit.methods.prediction_losses import BoxLoss, PredictionLosses


class StateProjection(nn.Conv2d):
    """A learned linear map of dim 1. It takes maps (N, C, H, W) and vectors (N, C) or (N, C, Q)."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, ...) to (N, C', ...)."""
        flat = super().forward(input.reshape(*input.shape[:2], -1, 1))
        return flat.reshape(flat.shape[0], flat.shape[1], *input.shape[2:])


def align_statistics(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """Give `student` the mean and std of `teacher`, both (N, C, ...), per channel over all else, in float32.

    Gradient flows through the student's statistics. Stds are unbiased; `eps` is added to the student's std only. If a
    channel of the student does not vary, its values become the teacher's mean.
    """
    return standardise(student, eps, to=channel_statistics(teacher.detach().float()))


def align_where(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """`align_statistics` of maps (N, C, H, W) over the cells that count; in all others the teacher's values stay.

    `counts` (N, H, W) bool.
    """
    student, teacher = student.float(), teacher.detach().float()
    mean, std = statistics_where(teacher, counts)
    aligned = by_statistics(student, *statistics_where(student, counts)) * std + mean
    return torch.where(counts[:, None], aligned, teacher)


def cross_state(
    student: State, teacher: State, project: Mapping[str, nn.ModuleList], levels: Sequence[tuple[int, int]]
) -> dict[str, tuple[Tensor, ...]]:
    """Fit the student's state to the teacher's head: project, resize and align each branch and level.

    `levels` are pairs (student level, teacher level), one for each module of a branch. On all other levels the
    teacher's own state stays.
    """
    crossed = {}
    for branch, modules in project.items():
        tensors = list(teacher[branch])
        for module, (ours, theirs) in zip(modules, levels, strict=True):
            projected = module(student[branch][ours])
            sized = resize_like(projected, tensors[theirs]) if projected.ndim == 4 else projected
            tensors[theirs] = align_statistics(sized, tensors[theirs])
        crossed[branch] = tuple(tensors)
    return crossed


def state_projections(student: Sequence[int], teacher: Sequence[int]) -> nn.ModuleList:
    """Projections of a state's tensors from the student's channels to the teacher's; none where channels are equal.

    Levels with the same channels share one projection, as they share towers.
    """
    pairs = list(zip(student, teacher, strict=True))
    shared = {(s, t): nn.Identity() if s == t else StateProjection(s, t) for s, t in dict.fromkeys(pairs)}
    return nn.ModuleList(shared[pair] for pair in pairs)


def _activated(state: State, activation: Callable[[Tensor], Tensor] | None) -> State:
    """The state with an activation applied to all its tensors; the state itself if there is none."""
    return state if activation is None else {branch: tuple(map(activation, maps)) for branch, maps in state.items()}


def keep_levels(assignment: Assignment, priors: Priors, levels: Collection[int]) -> Assignment:
    """The assignment with the priors of all other levels left out: none is positive, and their weight is 0."""
    kept = torch.zeros_like(assignment.weights, dtype=torch.bool)
    kept[:, rows_of_levels(priors, sorted(levels))] = True
    return replace(assignment, positive=assignment.positive & kept, weights=assignment.weights * kept)


class CrossKD(Method):
    """Run the rest of the teacher's head on the student's hidden state; the result mimics the teacher's predictions.

    If two grids have only some strides in common, it works on the levels with these.

    Args:
        stage: where the student's state enters the teacher's head: the paper's i. 0 is the pyramid itself. Negative
            numbers count from the end of each head, at most down to stage 0: with -1 only the teacher's last block
            runs. That is the paper's choice (i = 3 of 4).
        cls_weight: factor of the classification term (1; FCOS 0.4).
        distribution_weight: factor of the localisation term where boxes are distributions (GFL: 4).
        box_weight: factor of the localisation term where they are not (RetinaNet, ATSS: 1; FCOS 0.75).
        quality_weight: factor of the centerness term (ATSS: 1; FCOS 0); only detectors with such a branch have it.
        beta: exponent of the quality focal loss, 0, or 1 and more.
        box_loss: "giou" (RetinaNet, ATSS), or "iou" (FCOS).
        state: what crosses. "head" is a hidden state of the head. "memory", for DETR and its relatives, is the maps
            that the decoder takes: the teacher's whole decoder runs on the student's memory, and all its layers are
            compared; the terms are added up over the layers. If a detector masks padding, the teacher's memory stays
            there. `stage` and `tap` then mean nothing. It is the authors' own variant for Deformable DETR
            (docs/cross_head.md).
        tap: take the state "after" the activation, as the published results do, or "before" it, as the text reads.
        priors: whose proposals or queries go through both heads. docs/cross_head.md says why the student's by default.
            On grids it makes no difference.
        proposal_weight: factor of the same losses on the region proposal networks, if both detectors have one. Then
            the student's pyramid goes through the teacher's network. It made results worse where we tried it
            (docs/cross_head.md); 0 leaves it out.
    """

    needs = frozenset({Capability.PREDICTIONS, Capability.STAGES, Capability.ASSIGNMENT})
    terms = ("cls", "box", "quality", "proposal_cls", "proposal_box")
    vanishing = ("cls", "box", "proposal_cls", "proposal_box")
    paper = "arXiv 2306.11369 (CVPR 2024)"
    project: nn.ModuleDict
    joints: tuple[int, int]

    def __init__(
        self,
        *,
        stage: int = -1,
        cls_weight: float = 1.0,
        distribution_weight: float = 4.0,
        box_weight: float = 1.0,
        quality_weight: float = 1.0,
        beta: float = 1.0,
        box_loss: BoxLoss = "giou",
        state: Literal["head", "memory"] = "head",
        tap: Literal["after", "before"] = "after",
        priors: Whose = "student",
        proposal_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.distances = PredictionLosses(cls_weight, distribution_weight, box_weight, quality_weight, beta, box_loss)
        self.state = state
        self.tap = tap
        self.priors: Whose = priors
        self.proposal_weight = proposal_weight
        self.proposals: CrossKD | None = None

    @classmethod
    def for_fcos(cls) -> CrossKD:
        """For FCOS: i = 2 of 4, -log IoU at weight 0.75, classification at 0.4, no centerness term."""
        return cls(stage=-2, cls_weight=0.4, box_weight=0.75, quality_weight=0.0, box_loss="iou")

    def _index(self, spec: DetectorSpec) -> int:
        return self.stage if self.stage >= 0 else max(len(spec.stages) - 1 + self.stage, 0)

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs whose heads have no corresponding states."""
        on_grids = student_spec.priors.on_grid and teacher_spec.priors.on_grid
        why_apart = why_no_shared_level if on_grids else why_cells_differ
        if reason := why_apart(student_spec, teacher_spec):
            return reason
        if self.state == "memory":
            if teacher_spec.priors is not PriorKind.QUERIES:
                return (
                    f"state='memory' is for detectors with queries, and these predict at {teacher_spec.priors}. Use "
                    "CrossKD(stage=0), where the pyramid crosses"
                )
            return why_no_shared_level(student_spec, teacher_spec)
        for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
            if not 0 <= self._index(spec) < len(spec.stages):
                return (
                    f"the {role}'s head has stages 0 to {len(spec.stages) - 1}, so there is no stage {self.stage}. Use "
                    "CrossKD(stage=-1), which counts from the end"
                )
        ours, theirs = student_spec.stages[self._index(student_spec)], teacher_spec.stages[self._index(teacher_spec)]
        if missing := [branch for branch in theirs.channels if branch not in ours.channels]:
            return (
                f"the teacher's head has the branches {', '.join(theirs.channels)}, and the student's head has none "
                f"called {', '.join(missing)}. Use Mimic or a method of features (PKD, FGD)"
            )
        first = student_spec.first_stage, teacher_spec.first_stage
        if self.proposal_weight and first[0] and first[1] and (reason := CrossKD().refuses(first[0], first[1])):
            return f"the two proposal networks do not fit: {reason}. CrossKD(proposal_weight=0) leaves them out"
        if ours.spatial != theirs.spatial:
            kinds = ("vectors", "maps")
            return (
                f"the student's stage '{ours.name}' gives {kinds[ours.spatial]}, the teacher's '{theirs.name}' gives "
                f"{kinds[theirs.spatial]}. Choose a stage at which both give the same, as in CrossKD(stage=0)"
            )
        return None

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Project each branch's channels where they differ; with `state="memory"` those of the maps."""
        if self.state == "memory":
            self.stages = 0, 0
            self.levels = shared_levels(student_spec, teacher_spec)
            widths = [(student_spec.channels[s], teacher_spec.channels[t]) for s, t in self.levels]
            self.project = nn.ModuleDict({"memory": state_projections(*zip(*widths, strict=True))})
            return
        self.joints = self._index(student_spec), self._index(teacher_spec)
        self.stages = None if self.proposal_weight else self.joints  # proposal networks have states besides
        ours, theirs = student_spec.stages[self.joints[0]], teacher_spec.stages[self.joints[1]]
        # Proposals and queries have one tensor a branch.
        self.levels = shared_levels(student_spec, teacher_spec) if teacher_spec.priors.on_grid else [(0, 0)]
        self.all_levels = len(self.levels) == (len(teacher_spec.strides) if teacher_spec.priors.on_grid else 1)
        self.project = nn.ModuleDict(
            {
                branch: state_projections(
                    [ours.channels[branch][s] for s, _ in self.levels], [channels[t] for _, t in self.levels]
                )
                for branch, channels in theirs.channels.items()
            }
        )
        self.widths = [width for channels in theirs.channels.values() for width in channels]
        self.activations = (ours.activation, theirs.activation) if self.tap == "after" else (None, None)
        if self.proposal_weight and student_spec.first_stage is not None and teacher_spec.first_stage is not None:
            self.proposals = CrossKD(beta=self.distances.beta, box_loss=self.distances.box_loss)
            self.proposals.setup(student_spec.first_stage, teacher_spec.first_stage)

    def cross(self, pair: Matched) -> Predictions:
        """Cross-head predictions: the teacher's head runs from the student's state to its end."""
        student = _activated(pair.student.states[self.joints[0]], self.activations[0])
        project = cast(dict[str, nn.ModuleList], dict(self.project.items()))
        if self.all_levels and pair.teacher.predictions.priors.grid:
            crossed = self._with_statistics(pair, student, project)
        else:
            teacher = _activated(pair.teacher.states[self.joints[1]], self.activations[1])
            crossed = cross_state(student, teacher, project, self.levels)
        return pair.finish_with_teacher(crossed, self.joints[1])

    def _with_statistics(
        self, pair: Matched, student: State, project: Mapping[str, nn.ModuleList]
    ) -> dict[str, tuple[Tensor, ...]]:
        """`cross_state` on a grid whose levels all correspond: of the teacher's state it takes the statistics alone.

        They are kept by image (`Matched.of_teacher`), which needs a small part of the state's memory.
        """
        grid, stage, act = pair.teacher.predictions.priors.grid, self.joints[1], self.activations[1]

        def moments(trace: HeadTrace) -> Tensor:
            """Those of all branches and levels, one after the other: (N, 2, the sum of their channels)."""
            maps = [x for branch in project for x in trace.states[stage][branch]]
            return torch.cat([image_moments(x if act is None else act(x)) for x in maps], 2)

        found = pair.of_teacher(f"CrossKD, moments {'before' if act is None else 'after'} activation {stage}", moments)
        sizes = [math.prod(cells) for _ in project for cells in grid]
        cells = torch.cat([found.new_full((width,), size) for width, size in zip(self.widths, sizes, strict=True)])
        of_maps = zip(*(torch.split(each, self.widths) for each in joined_statistics(found, cells)), strict=True)
        crossed = {}
        for branch, modules in project.items():
            resized = [
                resize_to(module(student[branch][ours]), grid[theirs])
                for module, (ours, theirs) in zip(modules, self.levels, strict=True)
            ]
            crossed[branch] = tuple(standardise(x, to=next(of_maps)) for x in resized)
        return crossed

    def _across_memory(self, exchange: Exchange, pair: Matched) -> dict[str, Tensor]:
        """The terms of the teacher's decoder on the student's memory, added up over its layers."""
        maps = list(exchange.teacher.features)
        for module, (ours, theirs) in zip(cast(nn.ModuleList, self.project["memory"]), self.levels, strict=True):
            sized = resize_like(module(exchange.student.features[ours]), maps[theirs])
            counts = cells_with_meaning(exchange.student, exchange.teacher, theirs)
            maps[theirs] = align_where(sized, maps[theirs], counts)
        crossed = pair.teacher_on(maps)
        layers = [
            self.distances(ours.predictions, theirs.predictions, pair.teacher_assignment)
            for ours, theirs in zip(crossed, pair.teacher_layers, strict=True)
        ]
        return {name: torch.stack([layer[name] for layer in layers]).sum() for name in layers[0]}

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cls`, `box` and, where the teacher judges quality, `quality`; terms of weight 0 are left out.

        Two-stage detectors also have `proposal_cls` and `proposal_box`.
        """
        pair = exchange.matched(self.priors)
        if self.state == "memory":
            return self._across_memory(exchange, pair)
        cross, teacher = self.cross(pair), pair.teacher.predictions
        assignment = pair.teacher_assignment
        if not self.all_levels:
            assignment = keep_levels(assignment, teacher.priors, [t for _, t in self.levels])
        terms = self.distances(cross, teacher, assignment)
        if self.proposals is not None and exchange.first_stage is not None:
            for name, loss in self.proposals(exchange.first_stage).items():
                terms[f"proposal_{name}"] = self.proposal_weight * loss
        return terms
