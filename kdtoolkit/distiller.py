"""Distiller: runs each detector once per step for all methods, and names their losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import chain, islice
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import register_pytree_node

from kdtoolkit import processes
from kdtoolkit.checks import checked_batch, checked_images, checked_recorded, without_recorded
from kdtoolkit.classes import ClassMap, SharedClasses, with_objects, with_recorded
from kdtoolkit.compatibility import why_no_student, why_refused
from kdtoolkit.contract import (
    Batch,
    CachedView,
    Capability,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    Exchange,
    HeldShare,
    Method,
    PriorKind,
    Recorded,
    RecordedAlone,
    Target,
    View,
    check_precision,
)
from kdtoolkit.contract.held import HELD_METRICS
from kdtoolkit.contract.method import checked_terms
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.gradients import scaled_norms
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import all_methods
from kdtoolkit.teacher_cache import TeacherCache
from kdtoolkit.teacher_lookup import TeacherLookup
from kdtoolkit.uncompiled import uncompiled

TEACHER_SCALES = (1.0, 0.5, 0.25)  # others would turn no stride into one of the student's
_FIXED = {"student", "teacher", "methods", "class_map", "teacher_scale"}
_TASK = "task"  # the name of the student's own losses
_SMALLEST_OBJECT = 1.0  # px; smaller detections do not stand for objects


class Losses(dict[str, Tensor]):
    """Loss terms by name. `task/...` are the student's own terms; all others are terms of methods (`crosskd/cls`).

    `metrics`: what methods report besides losses, by name (`objectkd/covered`). They have no gradient.
    """

    def __init__(
        self,
        terms: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
        metrics: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        super().__init__(terms)
        self.metrics = dict(metrics)

    @property
    def total(self) -> Tensor:
        """The sum of all terms. Call `backward` on it."""
        return reduce(torch.add, self.values())


def _losses_of(values: list[Tensor], terms: list[str], metrics: list[str]) -> Losses:
    return Losses(zip(terms, values, strict=False), zip(metrics, values[len(terms) :], strict=True))


# DistributedDataParallel and torch.compile look for tensors in the output of forward. They find them only in types that
# are registered.
register_pytree_node(
    Losses,
    lambda losses: ([*losses.values(), *losses.metrics.values()], ([*losses], [*losses.metrics])),
    lambda values, names: _losses_of(list(values), *names),
)


def working_methods(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> list[str]:
    """Names of all known methods that can distil this pair with their default settings."""
    return [name for name, cls in all_methods().items() if why_refused(cls, student_spec, teacher_spec) is None]


class Distiller(nn.Module):
    """Trains `student` with the help of `teacher`, by any number of methods.

    The parameters of a Distiller are the student's parameters and those that the methods must learn. The teacher is
    frozen and in eval mode. It is no submodule, so it is neither trained nor saved. But `to`, `cuda`, `half` and
    similar calls move it too. For several processes, half precision and more see docs/training.md.

    Args:
        teacher: a detector, or the adapter of one; None if there are no methods. `open_detector` also opens a file of
            detections as one (docs/detections.md).
        student: a detector, or the adapter of one. Nothing is added to it: its state dict always fits the plain model.
        methods: the methods to distil by. Without methods the losses are exactly the student's own.
        accumulation: number of calls in training mode that make one optimiser step. Schedules of methods count steps.
        teacher_scale: size of the teacher's images relative to the student's: 1, 0.5 or 0.25. A smaller teacher input
            costs less. The teacher's level of stride 8 then stands beside the student's of stride 16 or 32.
        class_map: which classes the two share, if their class lists differ. Methods then compare these classes only.
        score: in batches without labels, the teacher's detections with at least this score stand for objects.
        teacher_cache: keeps what the teacher computes for an image, so that later epochs need no pass of the teacher
            (docs/teacher_cache.md). A teacher that is a file of detections needs none.
        recompute: compute the passes of heads through which gradients flow again in the backward pass, instead of
            keeping what they computed. It saves memory and costs time; losses and gradients stay the same.

    Raises:
        IncompatibleError: a method cannot work between the two. The message says why, and which methods can.
        KDError: no adapter knows a model's class; the student can only teach; teacher and student share parameters or
            are on different devices; no parameter of the student is trainable; `accumulation` is below 1;
            `teacher_scale` is a different number, or not 1 for a file of detections; `class_map` names a class that a
            detector does not have; `score` is not between 0 and 1.
    """

    def __init__(
        self,
        teacher: nn.Module | DetectorAdapter | None,
        student: nn.Module | DetectorAdapter,
        methods: Sequence[Method] = (),
        *,
        accumulation: int = 1,
        teacher_scale: float = 1.0,
        class_map: ClassMap | None = None,
        score: float = 0.5,
        teacher_cache: TeacherCache | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if accumulation < 1:
            raise KDError(
                f"accumulation ({accumulation}) is the number of calls in one optimiser step: it must be 1 or more"
            )
        if teacher_scale not in TEACHER_SCALES:
            raise KDError(f"teacher_scale is {teacher_scale}: it must be 1, 0.5 or 0.25")
        if not 0 < score <= 1:
            raise KDError(f"score is {score}: it must be above 0 and at most 1")
        methods = _checked(methods)
        self.student_adapter = adapt(student)
        self.student = self.student_adapter.model
        if reason := why_no_student(self.student_adapter.spec):
            raise KDError(reason)
        if not any(p.requires_grad for p in self.student.parameters()):
            raise KDError(
                f"no parameter of the student ({type(self.student).__name__}) is trainable, so training would not "
                "change it: call student.requires_grad_(True). Models from a checkpoint of a moving average are often "
                "frozen, as YOLO's are"
            )
        self.teacher_adapter = None if teacher is None else adapt(teacher)
        self.methods = nn.ModuleList(methods)
        self.accumulation = accumulation
        self.teacher_scale = teacher_scale
        self.class_map = class_map
        self.score = score
        self.recompute = recompute
        self.teacher_cache = teacher_cache
        self._shared: tuple[SharedClasses, SharedClasses] | None = None
        self.calls = 0
        self.run_steps: int | None = None  # needed where schedules are given as shares of it
        self._names = _unique_names(methods)
        self._frozen: list[nn.Parameter] = []  # the teacher's
        if self.teacher_adapter is None:
            if methods:
                raise KDError("methods need a teacher: Distiller(teacher, student, methods=[...])")
            return
        if teacher_scale != 1 and self.teacher_adapter.spec.priors is PriorKind.DETECTIONS:
            raise KDError(
                f"{self.teacher_adapter.spec.name} is a file of detections and sees no images: leave teacher_scale out"
            )
        _check_models(self.teacher_adapter.model, self.student)
        self._lookup = TeacherLookup(self.teacher_adapter)
        self._shared = _shared(self.student_adapter, self.teacher_adapter, class_map)
        specs = self.seen[0].spec, self.seen[1].spec.on_images_scaled_by(teacher_scale)
        for name, method in zip(self._names, methods, strict=True):
            if reason := why_refused(method, *specs):
                working = ", ".join(working_methods(*specs)) or "none"
                raise IncompatibleError(
                    f"{type(method).__name__} ({name}) cannot distil {specs[1].name} into {specs[0].name}: {reason}. "
                    f"Methods that work for this pair: {working}."
                )
            method.setup(*(spec.at_strides(method.strides) for spec in specs))
            method.to(next(self.student.parameters()).device)
        self.teacher_adapter.model.eval().requires_grad_(False)
        self._frozen = [*self.teacher_adapter.model.parameters()]
        for method in methods:
            method.in_use = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a different student, teacher, list of methods and the like: methods are set up for what is there."""
        if name in _FIXED and (name == "teacher" or name in vars(self) or name in self._modules):
            raise KDError(
                f"the {name} of a Distiller cannot be changed, because its methods are set up once: make a new one, "
                "Distiller(teacher, student, methods)"
            )
        super().__setattr__(name, value)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | Sequence[RecordedAlone] | None,
        keys: Sequence[str] | None = None,
    ) -> Losses:
        """The losses of one step.

        Images are float tensors (3, H, W) in [0, 1]. Ground truth is in torchvision's convention. It may be on the
        host: then it is checked there and copied to the images' device. None means that the images have no labels: the
        student then learns from the teacher alone, and has no losses of its own. If the teacher is a file of
        detections, each target brings what the teacher found on its image, `recorded`; without labels, this alone.

        `keys`: for a teacher cache, the digest of each image, such as `kdtoolkit.teacher_cache.digest` of its pixels.
        None computes them here. On a GPU the host then waits for the images.

        Raises KDError if images or ground truth are clearly wrong (shape, range, labels), if there are no labels and
        no method that works without them, or if the number of keys is not that of the images.
        """
        images, ground_truth, recorded, step, active = self._begun(images, targets)
        methods = [method for _, method, _ in active]
        batch = self.student_adapter.prepare(images, ground_truth)
        teacher_view = None
        if active:  # The teacher is first: what its pass needs is freed before the student's pass keeps its own.
            teacher_view = self._teacher_view(images, ground_truth, batch, recorded, keys, methods)
            if ground_truth is None and any(method.unlabelled == "detections" for method in methods):
                teacher_view, batch = self._with_detections(teacher_view, batch)
        # All in this function: what interrupts a compiled step would cut a function of its own into more graphs.
        student = self.student_adapter
        student_view = View(student, batch, student.features(batch), stages=_stages(methods, 0))
        student_view.recompute = self.recompute
        trace, losses = student_view.head, Losses()
        if ground_truth is not None:
            own, student_view.assignment = student.task_losses(trace, batch)
            losses.update({f"{_TASK}/{name}": loss for name, loss in own.items()})
        if teacher_view is not None:
            exchange = Exchange(self._with_shared_classes(student_view, methods), teacher_view)
            found = [checked_terms(method, method(exchange.at_strides(method.strides))) for method in methods]
            if self.teacher_cache is not None and isinstance(teacher_view, CachedView):
                self._lookup.keep(self.teacher_cache, teacher_view)
            if self.held and ground_truth is not None and self.training and torch.is_grad_enabled():
                self._hold_shares(step, losses.total, methods, [terms for terms, _ in found])
            device = batch.images.device
            for (name, method, factor), (terms, metrics) in zip(active, found, strict=True):
                if method.held is not None:
                    factor *= method.held.factor
                    metrics |= {key: torch.full((), x, device=device) for key, x in method.held.metrics.items()}
                losses.update({f"{name}/{term}": _times(factor, loss) for term, loss in terms.items()})
                losses.metrics.update({f"{name}/{metric}": value for metric, value in metrics.items()})
        if not losses:  # then there are no labels either
            names = ", ".join(type(method).__name__ for method in methods)
            raise KDError(
                f"there is nothing to learn from images without labels: the terms of {names} have the weight 0, or do "
                "not exist for these two detectors. Raise a weight, or leave the images out"
            )
        if processes.count() > 1:
            name = next(iter(losses))
            losses[name] = processes.reach(losses[name], [p for p in self.parameters() if p.requires_grad])
        return losses

    # Uncompiled: a compiler takes `calls` for a constant, and would compile each step anew. The checks read values.
    @uncompiled
    def _begun(
        self, images: Sequence[Tensor], targets: Sequence[Target] | Sequence[RecordedAlone] | None
    ) -> tuple[Sequence[Tensor], Sequence[Target] | None, list[Recorded] | None, int, list[tuple[str, Method, float]]]:
        """Check a batch and count the call: images, ground truth, recorded detections, step, methods at work."""
        for adapter in (self.student_adapter, self.teacher_adapter):
            # The user may have called half(), which converts all parameters; to look at each takes a millisecond.
            if adapter is not None and _first_type(adapter.model) != torch.float32:
                check_precision(adapter.model)
        for parameter in self._frozen:
            if parameter.requires_grad:  # the user may have called requires_grad_() on a module that holds the teacher
                parameter.requires_grad_(False)
        targets, recorded = without_recorded(targets)
        if targets is None:
            images = checked_images(images, self.student)
        else:
            images, targets = checked_batch(images, targets, self.student, self.student_adapter.spec)
        step = self.step
        active = self.active(step, labelled=targets is not None)
        if targets is None and not active:
            reason = self.why_not_unlabelled() or (
                "no method that can work without labels is at work in it: hand in images with labels"
            )
            raise KDError(f"the images of step {step + 1} have no labels, and {reason}")
        self.calls += self.training
        return images, targets, recorded, step, active

    @torch.no_grad()
    def _teacher_view(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None,
        like: Batch,
        recorded: Sequence[Recorded] | None,
        keys: Sequence[str] | None,
        methods: Sequence[Method],
    ) -> View:
        """What methods see of the teacher's pass. Its head runs when a method asks for it."""
        adapter, stages, scale = self.seen[1], _stages(methods, 1), self.teacher_scale
        if adapter.model.training:  # the user may have called train() on a module that holds the teacher
            adapter.model.eval()
        batch = self.teacher_batch(images, targets, like, recorded)
        view: View
        if self.teacher_cache is None or adapter.spec.priors is PriorKind.DETECTIONS:
            view = View(adapter, batch, adapter.features(batch), stages=stages, frozen=True, scale=scale)
        else:
            view = self._lookup.view(self.teacher_cache, adapter, batch, images, keys, stages=stages, scale=scale)
        view.recompute = self.recompute
        if adapter.spec.priors.on_grid and any(Capability.PREDICTIONS in m.needs for m in methods):
            _ = view.head  # on a grid a method asks for this pass, and for no pass with different priors
        return view

    def _with_shared_classes(self, view: View, methods: Sequence[Method]) -> View:
        """What methods see of the student's pass: the classes that it shares with the teacher."""
        if self._shared is None:
            return view
        seen, assignment = self._shared[0], view.assignment
        shown = None if assignment is None else seen.seen_assignment(assignment)
        part = View(
            seen, seen.seen(view.batch), view.maps, seen.seen_trace(view.head), shown, stages=_stages(methods, 0)
        )
        part.recompute = self.recompute
        return part

    def _hold_shares(
        self, step: int, task: Tensor, methods: Sequence[Method], found: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Set the factors of methods whose share is held, where that is due; `found` are the methods' terms."""
        due = {
            method.held: reduce(torch.add, terms.values())
            for method, terms in zip(methods, found, strict=True)
            if method.held is not None and method.held.is_due(step) and terms
        }
        if due:
            parameters = [p for p in self.student.parameters() if p.requires_grad]
            for held, (own, its) in zip(due, scaled_norms([*due.values()], task, parameters), strict=True):
                held.set(step, own, its)

    def teacher_batch(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None,
        like: Batch,
        recorded: Sequence[Recorded] | None = None,
    ) -> Batch:
        """What the teacher sees: the images on the student's canvas (`like`), scaled by `teacher_scale`.

        Of the objects it sees those whose class it knows. `recorded`: its detections, if it is a file of them.
        """
        student, teacher = self.seen
        if targets is not None and self._shared is not None:
            targets = self._shared[0].seen_objects(targets)
        elif targets is not None and teacher.spec.num_classes != student.spec.num_classes:
            # Then no method uses the labels (`why_refused`), and they may be too large for the teacher.
            targets = [Target(boxes=t["boxes"], labels=torch.zeros_like(t["labels"])) for t in targets]
        like = like.geometry_scaled_by(self.teacher_scale)
        batch = teacher.prepare(images, targets, like=like)
        if self.teacher_scale != 1 and batch.sizes != like.sizes:
            raise KDError(
                f"{teacher.spec.name} is built for images of one size, so it cannot be shown smaller ones: leave "
                "teacher_scale out"
            )
        assert self.teacher_adapter is not None
        own = self.teacher_adapter.spec
        if recorded is None or own.priors is not PriorKind.DETECTIONS:
            return batch
        return with_recorded(batch, checked_recorded(recorded, images, own))

    @torch.no_grad()
    def _with_detections(self, teacher_view: View, batch: Batch) -> tuple[View, Batch]:
        """The teacher's view and the student's batch, with the teacher's detections in the place of objects."""
        student, teacher = self.seen
        view = copy.copy(teacher_view)
        found = zip(teacher.detections(view.head, view.batch), view.batch.original_sizes, strict=True)
        objects = [_as_objects(each, size, self.score) for each, size in found]
        if teacher.spec.num_classes != student.spec.num_classes:  # as in `teacher_batch`
            objects = [Target(boxes=each["boxes"], labels=torch.zeros_like(each["labels"])) for each in objects]
        view.batch = with_objects(teacher, view.batch, objects)
        if self._shared is not None:
            objects = self._shared[0].own_objects(objects)
        return view, with_objects(self.student_adapter, batch, objects)

    @property
    def seen(self) -> tuple[DetectorAdapter, DetectorAdapter]:
        """Student and teacher as methods see them: with the classes that they share."""
        assert self.teacher_adapter is not None  # methods without a teacher are refused at construction
        return self._shared or (self.student_adapter, self.teacher_adapter)

    def active(self, step: int, *, labelled: bool = True) -> list[tuple[str, Method, float]]:
        """The methods that work in a step, on images with or without labels: names, and the factors of their losses."""
        factors = [method.schedule.factor(step, self.run_steps) for method in self._methods]
        found = zip(self._names, self._methods, factors, strict=True)
        return [each for each in found if each[2] and (labelled or self._takes_unlabelled(each[1]))]

    def _takes_unlabelled(self, method: Method) -> bool:
        """Whether a method can work on images without labels. If it needs objects, the teacher must find them."""
        if method.unlabelled == "detections":
            return Capability.PREDICTIONS in self.seen[1].spec.capabilities
        return method.unlabelled == "images"

    def why_not_unlabelled(self) -> str | None:
        """Why the methods cannot teach by images without labels, as the end of a sentence; None if they can."""
        if not self._methods:
            return "without a method nothing can be learnt from them: name a teacher and a method"
        if any(map(self._takes_unlabelled, self._methods)):
            return None
        names = ", ".join(type(method).__name__ for method in self._methods)
        if any(method.unlabelled == "detections" for method in self._methods):
            return (
                f"the methods ({names}) need objects, and a teacher that shows features alone finds none: add one that "
                "needs no objects (`kd methods` tells)"
            )
        return f"none of the methods ({names}) can work without labels: add one that can (`kd methods` tells)"

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules except the student's frozen batch norms, which keep their statistics.

        A batch norm is frozen if it is in eval mode and has no trainable parameter.
        """
        frozen = [module for module in self.student.modules() if self._is_frozen(module)]
        super().train(mode)
        for module in frozen:
            module.eval()
        return self

    def _is_frozen(self, module: nn.Module) -> bool:
        if not isinstance(module, _BatchNorm) or module.training:
            return False
        parameters = [*module.parameters()]
        # A batch norm without parameters counts as frozen only if the student around it is in train mode.
        return not any(p.requires_grad for p in parameters) and (bool(parameters) or self.student.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the teacher too, which is no submodule."""
        if self.teacher_adapter is not None and recurse:
            self.teacher_adapter.model._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def step(self) -> int:
        """The number of optimiser steps done. Each consists of `accumulation` calls in training mode."""
        return self.calls // self.accumulation

    def restart(self) -> None:
        """Begin a new run: schedules of methods count from here, and shares are measured anew."""
        self.calls = 0
        for held in self.held.values():
            held.restart()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the methods in losses and logs, in the order of `methods`."""
        return tuple(self._names)

    @property
    def held(self) -> dict[str, HeldShare]:
        """What holds the share of a method, by the method's name."""
        pairs = zip(self._names, self._methods, strict=True)
        return {name: method.held for name, method in pairs if method.held is not None}

    @property
    def vanishing(self) -> frozenset[str]:
        """Names (`pkd/feature`) of the loss terms that are zero if the student shows exactly what the teacher shows."""
        methods = zip(self._names, self._methods, strict=True)
        return frozenset(f"{name}/{term}" for name, method in methods for term in method.vanishing)

    @property
    def terms(self) -> list[str]:
        """Names (`pkd/feature`) of all loss terms that the methods may have, at work or not."""
        methods = zip(self._names, self._methods, strict=True)
        return [f"{name}/{term}" for name, method in methods for term in method.terms]

    @property
    def metrics(self) -> list[str]:
        """Names (`objectkd/covered`, `pkd/factor`) of what is reported besides losses."""
        methods = zip(self._names, self._methods, strict=True)
        return [
            f"{name}/{metric}"
            for name, method in methods
            for metric in (*method.metrics, *(() if method.held is None else HELD_METRICS))
        ]

    @property
    def _methods(self) -> list[Method]:
        if len(self.methods) != len(self._names):
            raise KDError(
                f"the Distiller was made with {len(self._names)} methods and has {len(self.methods)} now. Methods are "
                "set up once: make a new one, Distiller(teacher, student, methods)"
            )
        return [cast(Method, method) for method in self.methods]

    def get_extra_state(self) -> dict[str, int]:
        """The number of steps done, which `state_dict` saves for the schedules."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue at the step of a saved state."""
        self.calls = state["step"] * self.accumulation


def _times(factor: float, loss: Tensor) -> Tensor:
    return loss if factor == 1 else factor * loss


def _first_type(model: nn.Module) -> torch.dtype:
    """The type of a model's first parameter; float32 if it has none."""
    first = next(model.parameters(), None)
    return torch.float32 if first is None else first.dtype


def _stages(methods: Sequence[Method], role: int) -> frozenset[int] | None:
    """The stages of the student's (role 0) or teacher's (role 1) head whose states the methods take; None means all."""
    stages = [method.stages for method in methods if Capability.STAGES in method.needs]
    if None in stages:
        return None
    return frozenset(each[role] for each in stages if each)


def _shared(
    student: DetectorAdapter, teacher: DetectorAdapter, class_map: ClassMap | None
) -> tuple[SharedClasses, SharedClasses] | None:
    """Student and teacher with the classes that they share; None if these are all classes of both."""
    if class_map is None or class_map.is_identity(student.spec.num_classes, teacher.spec.num_classes):
        return None
    return SharedClasses(student, class_map.student), SharedClasses(teacher, class_map.teacher)


def _as_objects(found: Detections, size: tuple[int, int], score: float) -> Target:
    """The detections of an image of `size` (height, width) with at least this score, cut at its edge, as objects."""
    height, width = size
    limit = found["boxes"].new_tensor([width, height, width, height])
    boxes = torch.minimum(found["boxes"].clamp(min=0), limit)
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = (found["scores"] >= score) & (sides >= _SMALLEST_OBJECT).all(1)
    return Target(boxes=boxes[keep].float(), labels=found["labels"][keep])


def _checked(methods: Sequence[Method]) -> list[Method]:
    """The methods as a list. Raises KDError if they are no methods, or have been used already."""
    if not isinstance(methods, Sequence) or not all(isinstance(method, Method) for method in methods):
        raise KDError(f"methods must be a list of methods, as in methods=[CrossKD(), PKD()], but it is {methods!r}")
    if len({id(method) for method in methods}) < len(methods):
        raise KDError("a method is listed twice, and each learns parameters of its own: make a second instance")
    if used := [type(method).__name__ for method in methods if method.in_use]:
        raise KDError(
            f"this {used[0]} belongs to another Distiller, which trains its parameters: make a new one, {used[0]}(), "
            "for each Distiller"
        )
    return list(methods)


def _unique_names(methods: Sequence[Method]) -> list[str]:
    """Class names in lower case, with a number where a name is taken: `pkd`, `pkd2`. `task` is the student's own."""
    names: list[str] = []
    for method in methods:
        base = name = type(method).__name__.lower()
        number = 1
        while name in (_TASK, *names):
            number += 1
            name = f"{base}{number}"
        names.append(name)
    return names


def _check_models(teacher: nn.Module, student: nn.Module) -> None:
    """Raise KDError if the two are one model, or on different devices."""
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise KDError("teacher and student share parameters: hand in two models (copy.deepcopy makes a second one)")
    tensors = (islice(chain(model.parameters(), model.buffers()), 1) for model in (teacher, student))
    devices = {str(tensor.device) for tensor in chain(*tensors)}
    if len(devices) > 1:
        raise KDError(
            f"teacher and student are on different devices ({', '.join(sorted(devices))}): move one, as in "
            "teacher.to('cuda')"
        )
