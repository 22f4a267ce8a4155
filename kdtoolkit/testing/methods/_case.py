"""The method that is checked, with a pair of detectors and their images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import DetectorAdapter, Method, Target
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.teacher_cache import TeacherCache
from kdtoolkit.testing.report import SEED

MethodFactory = Callable[[], Method]


Change = Callable[[DetectorAdapter], DetectorAdapter]


ROUNDING = 1e-7  # absolute: what rounding leaves of a term that is 0


@dataclass(frozen=True)
class Case:
    factory: MethodFactory
    student: DetectorAdapter
    teacher: DetectorAdapter
    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]

    @cached_property
    def _copies(self) -> tuple[DetectorAdapter, DetectorAdapter, dict[str, Tensor]]:
        """Student, teacher, and the student's buffers: a step may change nothing but these."""
        student, teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        return student, teacher, {name: value.clone() for name, value in student.model.named_buffers()}

    def fresh(
        self,
        seed: int = SEED,
        *,
        factory: MethodFactory | None = None,
        change_student: Change = lambda adapter: adapter,
        change_teacher: Change = lambda adapter: adapter,
        teacher_cache: TeacherCache | None = None,
    ) -> Distiller:
        """A distiller with a new method; no model has gradients. `change_...`: what they show instead."""
        ours, theirs, _ = self._copies
        for model in (ours.model, theirs.model):
            model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        methods = [(factory or self.factory)()]
        return Distiller(change_teacher(theirs), change_student(ours), methods, teacher_cache=teacher_cache).train()

    @cached_property
    def usual(self) -> dict[str, Tensor]:
        """The terms of one plain step, without gradient."""
        return {name: value.detach() for name, value in self.terms(self.fresh()).items()}

    def terms(
        self, distiller: Distiller, images: Sequence[Tensor] | None = None, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor]:
        """The method's terms of one step. The student's buffers and the seed are the same each time."""
        return self._terms(distiller, images or self.images, self.targets if targets is None else targets)

    def unlabelled_terms(self, distiller: Distiller) -> dict[str, Tensor]:
        """The method's terms of one step whose images have no labels."""
        return self._terms(distiller, self.images, None)

    def _terms(
        self, distiller: Distiller, images: Sequence[Tensor], targets: Sequence[Target] | None
    ) -> dict[str, Tensor]:
        student, _, buffers = self._copies
        for name, value in student.model.named_buffers():
            if name in buffers:
                value.copy_(buffers[name])
        torch.manual_seed(SEED)
        losses = distiller(images, targets)
        return {name.split("/", 1)[1]: loss for name, loss in losses.items() if not name.startswith("task/")}

    def why_refused(self) -> str | None:
        if reason := why_refused(self.factory(), self.student.spec, self.teacher.spec):
            return reason
        try:
            self.terms(self.fresh())
        except IncompatibleError as error:
            return f"at the first step: {error}"
        return None


def method_of(distiller: Distiller) -> Method:
    (method,) = distiller.methods
    assert isinstance(method, Method)
    return method


def teacher_of(distiller: Distiller) -> nn.Module:
    assert distiller.teacher_adapter is not None
    return distiller.teacher_adapter.model
