"""Exchange: what a method sees of a step, and both heads brought to the same priors."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kdtoolkit.contract.data import Assignment, Batch, HeadTrace, Predictions, Priors, State
from kdtoolkit.contract.view import View
from kdtoolkit.errors import IncompatibleError

Whose = Literal["student", "teacher"]


class Matched:
    """Both heads on the same priors: states and predictions of `student` and `teacher` correspond one to one.

    On grids, where the teacher pads further than the student, its states and predictions are those of the student's
    cells alone. Boxes of each are on its own detector's canvas; `teacher_boxes` are the teacher's on the student's.
    """

    def __init__(self, student: View, teacher: View, passes: tuple[HeadTrace, HeadTrace]) -> None:
        self._views = student, teacher
        self._passes = passes
        self._rows = teacher.shown_rows(passes[1].predictions.priors)
        self.student = passes[0]
        self.teacher = teacher.cut_trace(passes[1], self._rows)

    @cached_property
    def student_assignment(self) -> Assignment:
        """Ground truth assigned to these priors by the student's own rule."""
        student, trace = self._views[0], self._passes[0]
        if student.assignment is not None and trace is student.trace:
            return student.assignment
        with torch.no_grad():
            return student.adapter.assign(trace, student.batch)

    @cached_property
    def teacher_assignment(self) -> Assignment:
        """Ground truth assigned to these priors by the rule of whose layout they are: what cross-head losses go by.

        That is the teacher's on a grid, and for its own proposals or queries; for the student's it is the student's.
        """
        student, teacher = self._views
        ours, theirs = (trace.predictions.priors for trace in self._passes)
        if not theirs.grid and self._passes[1] is not teacher.trace:
            return self.student_assignment
        alike = student.adapter.assigner == teacher.adapter.assigner and student.batch.sizes == teacher.batch.sizes
        # Kept anchors are the same tensor; to ask whether two are equal makes a GPU's host wait.
        if alike and ours.grid == theirs.grid and (ours.boxes is theirs.boxes or torch.equal(ours.boxes, theirs.boxes)):
            return self.student_assignment
        with torch.no_grad():
            found = teacher.adapter.assign(self._passes[1], teacher.batch)
        return found if self._rows is None else found.at_rows(self._rows)

    @property
    def teacher_boxes(self) -> Tensor:
        """The teacher's decoded boxes (N, A, 4), in pixels of the student's canvas."""
        student, teacher = self._views
        boxes = self.teacher.predictions.boxes
        if student.batch.sizes == teacher.batch.sizes:
            return boxes
        return boxes * _scale(student.batch, teacher.batch, boxes)

    def finish_with_teacher(self, state: State, stage: int) -> Predictions:
        """Cross-head predictions: the teacher's head, resumed from a student's `state` at the teacher's `stage`.

        Gradient flows through the teacher's frozen layers into `state` and nowhere else. Where the teacher has padded
        further than the student, its own state stays.
        """
        teacher, trace = self._views[1], self._passes[1]
        if self._rows is not None:
            own = trace.states[stage]
            state = {branch: tuple(map(_laid_over, own[branch], maps)) for branch, maps in state.items()}
        return teacher.cut_predictions(teacher.adapter.resume(state, stage, trace), self._rows)


class Exchange:
    """What a method sees of one training step: both detectors' views, and what can be derived from them."""

    def __init__(self, student: View, teacher: View) -> None:
        self.student = student
        self.teacher = teacher.beside(student.batch)
        self._matched: dict[Whose, Matched] = {}

    def matched(self, whose: Whose = "student") -> Matched:
        """Both heads on the same priors: on a grid each head's own pass, else with the priors of one of the two.

        With the student's proposals or queries each head runs once: the student's on its own, the teacher's on these
        alone. The teacher's need a second pass of the student's head, with gradient, run at the first call. Raises
        IncompatibleError for pairs whose priors do not correspond: those on a grid do, and those of equal `prior_form`.
        """
        student, teacher = self.student, self.teacher
        ours, theirs = student.spec, teacher.spec
        on_grids = ours.priors.on_grid and theirs.priors.on_grid
        if not on_grids and (ours.priors, ours.prior_form) != (theirs.priors, theirs.prior_form):
            raise IncompatibleError(
                f"{ours.priors} of {ours.name} (student) and {theirs.priors} of {theirs.name} (teacher) do not "
                "correspond: a method that compares them refuses such pairs (`unlike_priors` of "
                "kdtoolkit.methods._common)"
            )
        if on_grids:
            whose = "student"
        if whose not in self._matched:
            if on_grids:
                passes = student.head, teacher.head
            elif whose == "student":
                passes = student.head, teacher.run_head(_priors_for(teacher, student))
            else:
                passes = student.run_head(_priors_for(student, teacher)), teacher.head
            self._matched[whose] = Matched(student, teacher, passes)
        return self._matched[whose]

    def at_strides(self, strides: tuple[int, ...]) -> Exchange:
        """The exchange of some levels' features alone; itself where none is named."""
        if not strides:
            return self
        part = copy.copy(self)
        part.student, part.teacher = self.student.at_strides(strides), self.teacher.at_strides(strides)
        return part

    @cached_property
    def first_stage(self) -> Exchange | None:
        """The same step as seen by both detectors' first stages; None unless both have one."""
        student, teacher = _first_stage(self.student), _first_stage(self.teacher)
        return None if student is None or teacher is None else Exchange(student, teacher)


def _first_stage(view: View) -> View | None:
    """A detector's first stage, which its head's own pass has run already."""
    adapter, trace = view.adapter.first_stage, view.trace
    if adapter is None:
        return None
    return View(adapter, view.batch, view.maps, None if trace is None else trace.first, frozen=view.frozen)


def _priors_for(view: View, other: View) -> Priors:
    """The priors of the other view's own pass, brought to the scale of this one's images."""
    priors = other.head.predictions.priors
    if view.batch.sizes == other.batch.sizes:
        return priors
    return replace(priors, boxes=priors.boxes * _scale(view.batch, other.batch, priors.boxes))


def _scale(batch: Batch, other: Batch, like: Tensor) -> Tensor:
    """Factors (N, 1, 4) from boxes on the canvas of `other` to those on that of `batch`."""
    pairs = zip(batch.sizes, other.sizes, strict=True)
    return like.new_tensor([(w / v, h / u) * 2 for (h, w), (u, v) in pairs])[:, None]


def _laid_over(own: Tensor, x: Tensor) -> Tensor:
    """The map `own` (N, C, H, W) with `x` (N, C, h, w) over its top left part."""
    height, width = x.shape[-2:]
    return torch.cat([torch.cat([x, own[:, :, :height, width:]], 3), own[:, :, height:]], 2)
