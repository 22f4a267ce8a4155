"""CrossKD: cross-head knowledge distillation (Wang et al., CVPR 2024, arXiv 2306.11369).

The student's hidden head state is handed to the teacher's frozen head, which finishes from there; the cross-head
predictions mimic the teacher's own. The student's own predictions, which answer to the ground truth, are left out of
it, so that the two targets do not conflict (section 3.2, equations 4 and 5).

Before it enters the teacher's head the state takes on the statistics of the teacher's state, channel by channel.
The settings are the published ones; where they differ between detectors, see the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, Predictions, State
from kdtoolkit.methods._common import channel_statistics, prediction_losses, projection, resize_like


def align_statistics(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """Give `student` the mean and std of `teacher`, both (N, C, ...), per channel over all else, in float32.

    Gradient flows through the student's statistics. Stds are unbiased; `eps` is added to the student's alone.
    """
    student, teacher = student.float(), teacher.float()
    (mean, std), (teacher_mean, teacher_std) = channel_statistics(student), channel_statistics(teacher)
    return (student - mean) / (std + eps) * teacher_std + teacher_mean


def cross_state(student: State, teacher: State, project: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, ...]]:
    """Make the student's state fit for the teacher's head: project, resize and align each branch and level."""
    return {
        branch: tuple(
            align_statistics(resize_like(module(s), t) if s.ndim == 4 else module(s), t)
            for s, t in zip(student[branch], teacher[branch], strict=True)
        )
        for branch, module in project.items()
    }


class CrossKD(Method):
    """Let the teacher's head finish from the student's hidden state, and mimic the teacher's own predictions.

    Args:
        stage: where the student's state enters the teacher's head: the paper's i (0 is the pyramid itself), or from
            the end: -1 leaves the teacher's last block to do, i = 3 of 4, the paper's choice. In heads of other depth
            a negative stage counts from each head's own end.
        cls_weight: factor of the classification term (1; FCOS 0.4).
        distribution_weight: factor of the localisation term where boxes are distributions (GFL: 4).
        box_weight: factor of the localisation term where they are not (RetinaNet, ATSS: 1; FCOS 0.75).
        quality_weight: factor of the centerness term (ATSS: 1; FCOS 0); there is none without such a branch.
        beta: exponent of the quality focal loss.
        box_loss: "giou" (RetinaNet, ATSS), or "iou" (FCOS).
        tap: take the state "after" the activation, as the published results do, or "before" it, as the text reads.
    """

    needs = frozenset({Capability.PREDICTIONS, Capability.STAGES, Capability.ASSIGNMENT})
    terms = ("cls", "box", "quality")
    paper = "arXiv 2306.11369 (CVPR 2024)"
    project: nn.ModuleDict
    stages: tuple[int, int]

    def __init__(
        self,
        *,
        stage: int = -1,
        cls_weight: float = 1.0,
        distribution_weight: float = 4.0,
        box_weight: float = 1.0,
        quality_weight: float = 1.0,
        beta: float = 1.0,
        box_loss: Literal["giou", "iou"] = "giou",
        tap: Literal["after", "before"] = "after",
    ) -> None:
        super().__init__()
        self.stage = stage
        self.cls_weight = cls_weight
        self.distribution_weight = distribution_weight
        self.box_weight = box_weight
        self.quality_weight = quality_weight
        self.beta = beta
        self.box_loss: Literal["giou", "iou"] = box_loss
        self.tap = tap

    @classmethod
    def for_fcos(cls) -> CrossKD:
        """The published settings for FCOS pairs: i = 2 of 4, no centerness term."""
        return cls(stage=-2, cls_weight=0.4, box_weight=0.75, quality_weight=0.0, box_loss="iou")

    def _index(self, spec: DetectorSpec) -> int:
        return self.stage if self.stage >= 0 else len(spec.stages) - 1 + self.stage

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Refuse pairs whose heads have no corresponding states."""
        if student.priors.on_grid != teacher.priors.on_grid:
            return f"the student predicts at {student.priors}, the teacher at {teacher.priors}"
        if student.priors.on_grid and student.strides != teacher.strides:
            return f"other pyramid levels: strides {student.strides} of the student, {teacher.strides} of the teacher"
        for role, spec in (("student", student), ("teacher", teacher)):
            if not 0 <= self._index(spec) < len(spec.stages):
                return f"the {role}'s head has stages 0 to {len(spec.stages) - 1}, so there is no stage {self.stage}"
        ours = student.stages[self._index(student)].channels
        theirs = teacher.stages[self._index(teacher)].channels
        if missing := [branch for branch in theirs if branch not in ours]:
            return f"the student's head has no branch {missing}, the teacher's has {list(theirs)}"
        return None

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Project each branch's channels where they differ; one projection serves all levels, as the towers do."""
        self.stages = self._index(student), self._index(teacher)
        ours, theirs = student.stages[self.stages[0]], teacher.stages[self.stages[1]]
        self.project = nn.ModuleDict(
            {branch: projection(ours.channels[branch], channels) for branch, channels in theirs.channels.items()}
        )
        self.activations = (ours.activation, theirs.activation) if self.tap == "after" else (None, None)

    def cross(self, exchange: Exchange) -> Predictions:
        """Cross-head predictions: the teacher's head, finishing from the student's state."""
        states = (
            exchange.matched.states[self.stages[0]],
            exchange.teacher.head.states[self.stages[1]],
        )
        student, teacher = (
            state if act is None else {branch: tuple(map(act, maps)) for branch, maps in state.items()}
            for state, act in zip(states, self.activations, strict=True)
        )
        aligned = cross_state(student, teacher, dict(self.project.items()))
        return exchange.finish_with_teacher(aligned, self.stages[1])

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """`cls`, `box` and, where the teacher judges quality, `quality`; those of weight 0 are left out."""
        cross, teacher = self.cross(exchange), exchange.teacher.head.predictions
        num_classes = exchange.teacher.spec.num_classes
        losses = prediction_losses(cross, teacher, exchange.teacher_assignment, num_classes, self.beta, self.box_loss)
        weights = {
            "cls": self.cls_weight,
            "box": self.distribution_weight if teacher.regression.ndim == 4 else self.box_weight,
            "quality": self.quality_weight,
        }
        return {name: weights[name] * loss for name, loss in losses.items() if weights[name]}
