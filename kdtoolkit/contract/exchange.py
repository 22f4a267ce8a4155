"""Exchange: what a method sees of a step, and both heads on the same priors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
    """Both heads on the same priors, so that their states and predictions correspond one to one.

    `student` and `teacher` are passes of the two heads. If the teacher's canvas is padded further than the student's,
    `teacher` is cut to the cells of the student's canvas. Boxes of each pass are in pixels of its own detector's
    canvas. `teacher_boxes` are the teacher's boxes on the student's canvas.
    """

    def __init__(self, student_view: View, teacher_view: View, passes: tuple[HeadTrace, HeadTrace]) -> None:
        self._views = student_view, teacher_view
        self._passes = passes
        self._rows = teacher_view.shown_rows(passes[1].predictions.priors)
        self.student = passes[0]
        self.teacher = teacher_view.cut_trace(passes[1], self._rows)
        # Up to Python 3.11 functools.cached_property takes a lock, which breaks a compiled step into parts.
        self._assignments: dict[Whose, Assignment] = {}

    @property
    def student_assignment(self) -> Assignment:
        """Ground truth assigned to these priors by the student's own rule."""
        if "student" not in self._assignments:
            self._assignments["student"] = self._assigned_by_student()
        return self._assignments["student"]

    @property
    def teacher_assignment(self) -> Assignment:
        """Ground truth assigned to these priors by the rule of the detector that the priors come from.

        Cross-head losses use it. On a grid, and for the teacher's own proposals or queries, it is the teacher's rule.
        For the student's proposals or queries it is the student's rule.
        """
        if "teacher" not in self._assignments:
            self._assignments["teacher"] = self._assigned_by_teacher()
        return self._assignments["teacher"]

    def _assigned_by_student(self) -> Assignment:
        view, trace = self._views[0], self._passes[0]
        if trace is view.trace:
            return view.own_assignment
        with torch.no_grad():
            return view.adapter.assign(trace, view.batch)

    def _assigned_by_teacher(self) -> Assignment:
        student_view, teacher_view = self._views
        ours, theirs = (trace.predictions.priors for trace in self._passes)
        if not theirs.grid and self._passes[1] is not teacher_view.trace:
            return self.student_assignment
        one_rule = student_view.adapter.assigner == teacher_view.adapter.assigner
        one_geometry = student_view.batch.sizes == teacher_view.batch.sizes and ours.grid == theirs.grid
        if one_rule and one_geometry and _equal(ours.boxes, theirs.boxes):
            return self.student_assignment
        with torch.no_grad():
            found = teacher_view.adapter.assign(self._passes[1], teacher_view.batch)
        return found if self._rows is None else found.at_rows(self._rows)

    @property
    def teacher_boxes(self) -> Tensor:
        """The teacher's decoded boxes (N, A, 4), in pixels of the student's canvas."""
        ours, theirs = (view.batch for view in self._views)
        return _carried(self.teacher.predictions.boxes, theirs, ours)

    def of_teacher(self, name: str, of: Callable[[HeadTrace], Tensor]) -> Tensor:
        """What a method computes of each image from the teacher's pass: `of` makes a tensor (N, ...) of a pass.

        A teacher cache keeps it under `name`, in place of all that it is computed from. So the name must say all that
        it depends on besides the pass. Each image's part of it must depend on that image alone.
        """
        view, trace = self._views[1], self._passes[1]
        if self._rows is None and trace is view.trace:
            return view.part(name, lambda whole: of(whole.head))
        return of(self.teacher)

    def finish_with_teacher(self, state: State, stage: int) -> Predictions:
        """Cross-head predictions: put a student's `state` into the teacher's head at `stage`, and run it to its end.

        Gradient flows through the teacher's frozen layers into `state` and nowhere else. In cells that only the
        teacher's canvas has, the teacher's own state stays.
        """
        view, trace = self._views[1], self._passes[1]
        if self._rows is not None:
            own = trace.states[stage]
            state = {branch: tuple(map(_laid_over, own[branch], maps)) for branch, maps in state.items()}
        return view.cut_predictions(view.computed(lambda: view.adapter.resume(state, stage, trace)), self._rows)

    def teacher_on(self, maps: Sequence[Tensor]) -> tuple[HeadTrace, ...]:
        """Run the teacher's whole head on a student's maps, with the same priors: the pass after each decoder layer.

        There is a map for each of the teacher's levels, of the size of its `features`. In cells that only the
        teacher's canvas has, the teacher's own maps stay. Gradient flows through the teacher's frozen head into the
        maps and nowhere else.
        """
        view, priors = self._views[1], self._passes[1].predictions.priors
        given = tuple(map(_laid_over, view.maps, maps))
        return view.computed(lambda: view.adapter.layers(view.adapter.head(given, view.batch, priors, ())))

    @property
    def teacher_layers(self) -> tuple[HeadTrace, ...]:
        """The teacher's pass after each decoder layer."""
        return self._views[1].layers(self._passes[1])


class Exchange:
    """What a method sees of one training step: the views of both detectors, and both heads on the same priors."""

    def __init__(self, student_view: View, teacher_view: View) -> None:
        self.student = student_view
        self.teacher = teacher_view.beside(student_view.batch)
        self._matched: dict[Whose, Matched] = {}

    def matched(self, whose: Whose = "student") -> Matched:
        """Both heads on the same priors.

        On a grid, each head has run on its own priors, which correspond. Otherwise `whose` says whose proposals or
        queries both heads get. With the student's, each head runs once. With the teacher's, the first call runs the
        student's head a second time, with gradient.

        Raises IncompatibleError if the priors cannot correspond. They can if both lie on a grid, or if their
        `prior_form` is equal.
        """
        student_view, teacher_view = self.student, self.teacher
        ours, theirs = student_view.spec, teacher_view.spec
        on_grids = ours.priors.on_grid and theirs.priors.on_grid
        if not on_grids and (ours.priors, ours.prior_form) != (theirs.priors, theirs.prior_form):
            raise IncompatibleError(
                f"the {ours.priors} of {ours.name} (student) do not correspond to the {theirs.priors} of "
                f"{theirs.name} (teacher). A method that compares them must refuse such pairs in `refuses`: "
                "kdtoolkit.compatibility has the check"
            )
        if on_grids:
            whose = "student"
        if whose not in self._matched:
            if on_grids:
                passes = student_view.head, teacher_view.head
            elif whose == "student":
                passes = student_view.head, teacher_view.run_head(_priors_for(teacher_view, student_view))
            else:
                passes = student_view.run_head(_priors_for(student_view, teacher_view)), teacher_view.head
            self._matched[whose] = Matched(student_view, teacher_view, passes)
        return self._matched[whose]

    def to_student_canvas(self, boxes: Tensor) -> Tensor:
        """Boxes (N, A, 4) in pixels of the teacher's canvas, in pixels of the student's canvas."""
        return _carried(boxes, self.teacher.batch, self.student.batch)

    @property
    def teacher_boxes(self) -> Tensor:
        """The boxes (N, A, 4) of the teacher's own predictions (`teacher.head`), in pixels of the student's canvas."""
        return self.to_student_canvas(self.teacher.head.predictions.boxes)

    def at_priors(self, student_priors: Priors, teacher_priors: Priors) -> Matched:
        """Both heads on priors that a method made, each in pixels of its own detector's canvas.

        Each call runs both heads once more, the student's with gradient.
        """
        passes = self.student.run_head(student_priors), self.teacher.run_head(teacher_priors)
        return Matched(self.student, self.teacher, passes)

    def at_strides(self, strides: tuple[int, ...]) -> Exchange:
        """The exchange of the levels with these strides; the whole exchange if `strides` is empty."""
        if not strides:
            return self
        part = copy.copy(self)
        part.student, part.teacher = self.student.at_strides(strides), self.teacher.at_strides(strides)
        return part

    @cached_property
    def first_stage(self) -> Exchange | None:
        """The same step for the first stages (proposal networks) of both detectors; None unless both have one."""
        student_view, teacher_view = _first_stage(self.student), _first_stage(self.teacher)
        return None if student_view is None or teacher_view is None else Exchange(student_view, teacher_view)


def _first_stage(view: View) -> View | None:
    """The view of a detector's first stage, which has run in the pass of its head."""
    adapter, trace = view.adapter.first_stage, view.trace
    if adapter is None:
        return None
    first = None if trace is None else trace.first
    return View(adapter, view.batch, view.maps, first, frozen=view.frozen, scale=view.scale)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are known to be equal. A compiler compares no values: a result would break its graph."""
    # Detectors cache their anchors, so the tensors are often identical. Comparing values makes a GPU's host wait.
    return a is b or (not torch.compiler.is_compiling() and torch.equal(a, b))


def _priors_for(view: View, source: View) -> Priors:
    """The priors that `source` used in its own pass, in pixels of this view's canvas."""
    priors = source.head.predictions.priors
    return replace(priors, boxes=_carried(priors.boxes, source.batch, view.batch))


def _carried(boxes: Tensor, source: Batch, to: Batch) -> Tensor:
    """Boxes (N, A, 4) on the canvas of `source`, as boxes on the canvas of `to`."""
    if source.sizes == to.sizes:
        return boxes
    pairs = zip(to.sizes, source.sizes, strict=True)
    return boxes * boxes.new_tensor([(w / v, h / u) * 2 for (h, w), (u, v) in pairs])[:, None]


def _laid_over(own: Tensor, x: Tensor) -> Tensor:
    """The map `own` (N, C, H, W) with `x` (N, C, h, w) in place of its top left part."""
    height, width = x.shape[-2:]
    return torch.cat([torch.cat([x, own[:, :, :height, width:]], 3), own[:, :, height:]], 2)
