"""Distiller: one pass of each detector a step, shared by all methods; the sum of named losses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from kdtoolkit.contract import (
    Capability,
    DetectorAdapter,
    DetectorSpec,
    Exchange,
    Method,
    Target,
    View,
    adapt,
)
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.methods import all_methods

# What a method may need beyond features: all of it comes from one pass of the head.
_HEAD = {Capability.PREDICTIONS, Capability.STAGES, Capability.DISTRIBUTIONS, Capability.ASSIGNMENT}


class Losses(dict[str, Tensor]):
    """Loss terms by name: `task/...` are the student's own, the others those of methods (`crosskd/cls`)."""

    @property
    def total(self) -> Tensor:
        """The sum of all terms, to call `backward` on."""
        return reduce(torch.add, self.values())


def refusal(method: type[Method] | Method, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Why a method cannot distil this pair; None if it can. A class stands for its default settings."""
    for role, spec in (("student", student), ("teacher", teacher)):
        if missing := sorted(method.needs - spec.capabilities):
            return f"it needs {', '.join(missing)}, which the {role} ({spec.name}) does not show"
    if method.needs & _HEAD and student.num_classes != teacher.num_classes:
        return (
            f"it compares class scores, and the student has {student.num_classes} classes, "
            f"the teacher {teacher.num_classes}"
        )
    return (method() if isinstance(method, type) else method).refuses(student, teacher)


def working_methods(student: DetectorSpec, teacher: DetectorSpec) -> list[str]:
    """Names of all known methods that can distil this pair with their default settings."""
    return [name for name, cls in all_methods().items() if refusal(cls, student, teacher) is None]


class Distiller(nn.Module):
    """Train `student` with the help of `teacher` by any number of methods.

    Its parameters are the student's and what the methods must learn; the teacher is held beside, in eval mode and
    frozen, and is neither saved nor trained with it. Models are taken where they are: move them to their device first.

    Args:
        teacher: a detector, or an adapter of one; None if there are no methods.
        student: likewise. Nothing is added to it: its state dict fits the plain model at any time.
        methods: what to distil by. With none, the losses are the student's own, to the last bit.

    Raises:
        IncompatibleError: a method cannot work between the two; says why, and which methods would.
        KDError: no adapter knows a model's class; teacher and student are one model or on different devices.
    """

    def __init__(
        self,
        teacher: nn.Module | DetectorAdapter | None,
        student: nn.Module | DetectorAdapter,
        methods: Sequence[Method] = (),
    ) -> None:
        super().__init__()
        self.student_adapter = adapt(student)
        self.student = self.student_adapter.model
        self.teacher_adapter = None if teacher is None else adapt(teacher)
        self.methods = nn.ModuleList(methods)
        self._names = _unique_names(methods)
        self._needs: frozenset[Capability] = frozenset().union(*(method.needs for method in methods))
        if self.teacher_adapter is None:
            if methods:
                raise KDError("methods need a teacher: Distiller(teacher, student, methods=[...])")
            return
        _check_models(self.teacher_adapter.model, self.student)
        specs = self.student_adapter.spec, self.teacher_adapter.spec
        for name, method in zip(self._names, methods, strict=True):
            if reason := refusal(method, *specs):
                working = ", ".join(working_methods(*specs)) or "none"
                raise IncompatibleError(
                    f"{type(method).__name__} ({name}) cannot distil {specs[1].name} into {specs[0].name}: {reason}. "
                    f"Methods that work for this pair: {working}."
                )
            method.setup(*specs)
            method.to(next(self.student.parameters()).device)
        self.teacher_adapter.model.eval().requires_grad_(False)

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Losses:
        """Losses of one step, for images (3, H, W) in [0, 1] and their ground truth, in torchvision's convention.

        Raises IncompatibleError where the two detectors bring the batch to sizes that cannot be compared.
        """
        student = self.student_adapter
        batch = student.prepare(images, targets)
        features = student.features(batch)
        trace = student.head(features, batch)
        own, assignment = student.task_losses(trace, batch)
        losses = Losses({f"task/{name}": loss for name, loss in own.items()})
        if not self._names:
            return losses
        view = View(student, batch, features, trace, assignment)
        exchange = Exchange(view, self._observe_teacher(images, targets))
        for name, method in zip(self._names, self.methods, strict=True):
            losses.update({f"{name}/{term}": loss for term, loss in method(exchange).items()})
        return losses

    @torch.no_grad()
    def _observe_teacher(self, images: Sequence[Tensor], targets: Sequence[Target]) -> View:
        teacher = self.teacher_adapter
        assert teacher is not None  # methods without a teacher are refused at construction
        teacher.model.eval()  # whoever called train() on a module that holds it meanwhile
        batch = teacher.prepare(images, targets)
        features = teacher.features(batch)
        trace = teacher.head(features, batch) if self._needs & _HEAD else None
        return View(teacher, batch, features, trace)


def _unique_names(methods: Sequence[Method]) -> list[str]:
    """Lower-case class names; the second of a kind is called `pkd2`, and so on."""
    names: list[str] = []
    for method in methods:
        base = type(method).__name__.lower()
        seen = sum(type(other).__name__.lower() == base for other in methods[: len(names)])
        names.append(f"{base}{seen + 1}" if seen else base)
    return names


def _check_models(teacher: nn.Module, student: nn.Module) -> None:
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise KDError("teacher and student share parameters: hand in two models (copy.deepcopy makes a second one)")
    devices = {str(next(model.parameters()).device) for model in (teacher, student)}
    if len(devices) > 1:
        raise KDError(f"teacher and student are on different devices ({', '.join(sorted(devices))}): move one of them")
