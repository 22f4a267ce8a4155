"""Distiller: one pass of each detector a step, shared by all methods; the sum of named losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import register_pytree_node

from kdtoolkit import processes
from kdtoolkit.checks import checked_batch
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import (
    Batch,
    Capability,
    DetectorAdapter,
    DetectorSpec,
    Exchange,
    Method,
    Target,
    View,
    check_precision,
)
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import all_methods


class Losses(dict[str, Tensor]):
    """Loss terms by name: `task/...` are the student's own, the others those of methods (`crosskd/cls`)."""

    @property
    def total(self) -> Tensor:
        """The sum of all terms, to call `backward` on."""
        return reduce(torch.add, self.values())


# DistributedDataParallel and torch.compile look for tensors in what forward returns, and know only what is registered.
register_pytree_node(
    Losses,
    lambda losses: (list(losses.values()), list(losses)),
    lambda values, names: Losses(zip(names, values, strict=True)),
)


def working_methods(student: DetectorSpec, teacher: DetectorSpec) -> list[str]:
    """Names of all known methods that can distil this pair with their default settings."""
    return [name for name, cls in all_methods().items() if why_refused(cls, student, teacher) is None]


class Distiller(nn.Module):
    """Train `student` with the help of `teacher` by any number of methods.

    Its parameters are the student's and what the methods must learn; the teacher is held beside, in eval mode and
    frozen, and is neither saved nor trained with it. It moves with it: `to`, `cuda`, `half` and the like take the
    teacher along. How to train over several processes, in half precision and so on: docs/training.md.

    Args:
        teacher: a detector, or an adapter of one; None if there are no methods.
        student: likewise. Nothing is added to it: its state dict fits the plain model at any time.
        methods: what to distil by. With none, the losses are the student's own, to the last bit.
        accumulation: how many calls in training mode make one optimiser step; the methods' schedules count steps.

    Raises:
        IncompatibleError: a method cannot work between the two; says why, and which methods would.
        KDError: no adapter knows a model's class; teacher and student are one model or on different devices; no
            parameter of the student is trainable; `accumulation` is no number from 1.
    """

    def __init__(
        self,
        teacher: nn.Module | DetectorAdapter | None,
        student: nn.Module | DetectorAdapter,
        methods: Sequence[Method] = (),
        *,
        accumulation: int = 1,
    ) -> None:
        super().__init__()
        if accumulation < 1:
            raise KDError(f"accumulation ({accumulation}) is a number of calls for one optimiser step, from 1")
        methods = _checked(methods)
        self.student_adapter = adapt(student)
        self.student = self.student_adapter.model
        if not any(p.requires_grad for p in self.student.parameters()):
            raise KDError(
                f"no parameter of the student ({type(self.student).__name__}) is trainable, so it would stay as it is: "
                "call student.requires_grad_(True). Checkpoints of a moving average hold such models, as YOLO's do"
            )
        self.teacher_adapter = None if teacher is None else adapt(teacher)
        self.methods = nn.ModuleList(methods)
        self.accumulation = accumulation
        self.calls = 0
        self._names = _unique_names(methods)
        # Detectors tell their facts once: some work them out anew each time.
        ours = self.student_adapter.spec
        self._specs = ours, ours if self.teacher_adapter is None else self.teacher_adapter.spec
        if self.teacher_adapter is None:
            if methods:
                raise KDError("methods need a teacher: Distiller(teacher, student, methods=[...])")
            return
        _check_models(self.teacher_adapter.model, self.student)
        specs = self._specs
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
        for method in methods:
            method.in_use = True

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Losses:
        """Losses of one step, for images (3, H, W) in [0, 1] and their ground truth, in torchvision's convention.

        Ground truth may be on the host: it is checked there, then copied to the images' device.

        Raises KDError for a batch that cannot be learnt from.
        """
        for adapter in (self.student_adapter, self.teacher_adapter):  # half() may have been called meanwhile
            if adapter is not None:
                check_precision(adapter.model)
        images, targets = checked_batch(images, targets, self.student, self._specs[0])
        factors = [method.schedule.factor(self.step) for method in self._methods]
        self.calls += self.training
        active = [each for each in zip(self._names, self._methods, factors, strict=True) if each[2]]
        student, methods = self.student_adapter, [method for _, method, _ in active]
        batch = student.prepare(images, targets)
        features = student.features(batch)
        trace = student.head(features, batch, stages=_stages(methods, 0))
        own, assignment = student.task_losses(trace, batch)
        losses = Losses({f"task/{name}": loss for name, loss in own.items()})
        if processes.count() > 1:
            name = next(iter(losses))
            losses[name] = processes.reach(losses[name], [p for p in self.parameters() if p.requires_grad])
        if not active:
            return losses
        view = View(student, batch, features, trace, assignment, spec=self._specs[0])
        exchange = Exchange(view, self._observe_teacher(images, targets, batch, _stages(methods, 1)))
        for name, method, factor in active:
            terms = _checked_terms(method, method(exchange.at_strides(method.strides)))
            losses.update({f"{name}/{term}": factor * loss for term, loss in terms.items()})
        return losses

    @torch.no_grad()
    def _observe_teacher(
        self, images: Sequence[Tensor], targets: Sequence[Target], like: Batch, stages: frozenset[int] | None
    ) -> View:
        """The teacher's view of what the student was shown; its head runs when a method asks for it."""
        teacher, (ours, theirs) = self.teacher_adapter, self._specs
        assert teacher is not None  # methods without a teacher are refused at construction
        teacher.model.eval()  # whoever called train() on a module that holds it meanwhile
        if theirs.num_classes != ours.num_classes:
            # Its classes are others: what is left to learn from it does not ask for any, and it may have fewer of them.
            targets = [Target(boxes=t["boxes"], labels=torch.zeros_like(t["labels"])) for t in targets]
        batch = teacher.prepare(images, targets, like=like)
        return View(teacher, batch, teacher.features(batch), spec=theirs, stages=stages, frozen=True)

    @torch.no_grad()
    def locate_non_finite(self, images: Sequence[Tensor], targets: Sequence[Target]) -> str:
        """Where the first value that is not finite comes up in this batch, detector by detector, in words.

        A level is named by its stride. Where all is finite, the largest values are told: losses of them overflowed.
        """
        images, targets = checked_batch(images, targets, self.student, self._specs[0])
        student, teacher = self.student_adapter, self.teacher_adapter
        roles = [("student", student)] + ([] if teacher is None else [("teacher", teacher)])
        found = [f"{role}: {_first_non_finite(adapter, images, targets)}" for role, adapter in roles]
        return "; ".join(found)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the student's frozen batch norms, which keep their statistics.

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
        # One without parameters is in eval mode because the whole student is, or because it was set so by itself.
        return not any(p.requires_grad for p in parameters) and (bool(parameters) or self.student.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the teacher too: it is no submodule, for it would be saved and trained if it were."""
        if self.teacher_adapter is not None and recurse:
            self.teacher_adapter.model._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def step(self) -> int:
        """The number of optimiser steps done: of `accumulation` calls in training mode each."""
        return self.calls // self.accumulation

    @property
    def vanishing(self) -> frozenset[str]:
        """Names of the loss terms that are zero where the student shows what the teacher shows: `pkd/feature`."""
        methods = zip(self._names, self._methods, strict=True)
        return frozenset(f"{name}/{term}" for name, method in methods for term in method.vanishing)

    @property
    def _methods(self) -> list[Method]:
        return [cast(Method, method) for method in self.methods]

    def get_extra_state(self) -> dict[str, int]:
        """The number of steps done, for `state_dict`: schedules go by it."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on at the step of a saved state."""
        self.calls = state["step"] * self.accumulation


def _first_non_finite(adapter: DetectorAdapter, images: Sequence[Tensor], targets: Sequence[Target]) -> str:
    batch = adapter.prepare(images, targets)
    strides = adapter.spec.strides
    features = adapter.features(batch)
    seen = [("images", batch.images)]
    seen += [(f"features at stride {stride}", x) for stride, x in zip(strides, features, strict=True)]
    trace = adapter.head(features, batch)
    for stage, state in zip(adapter.spec.stages, trace.states, strict=True):
        for branch, tensors in state.items():
            at = [f" at stride {stride}" for stride in strides] if len(tensors) == len(strides) else [""]
            seen += [(f"state '{stage.name}' of branch {branch}{w}", x) for w, x in zip(at, tensors, strict=True)]
    predictions = trace.predictions
    sizes = list(predictions.priors.per_level)
    for name, value in (("logits", predictions.logits), ("regression", predictions.regression)):
        at = [f" at stride {stride}" for stride in strides] if len(sizes) == len(strides) else [""] * len(sizes)
        seen += [(f"{name}{where}", x) for where, x in zip(at, torch.split(value, sizes, 1), strict=True)]
    for name, value in seen:
        if not bool(value.isfinite().all()):
            return f"{name} not finite, the first of all"
    largest, place = max((float(x.abs().max()), name) for name, x in seen if x.numel())
    return f"all finite, the largest {largest:.3g} ({place})"


def _stages(methods: Sequence[Method], role: int) -> frozenset[int] | None:
    """The stages of the student's (role 0) or the teacher's (1) head whose states methods take; None for all."""
    stages = [method.stages for method in methods if Capability.STAGES in method.needs]
    if None in stages:
        return None
    return frozenset(each[role] for each in stages if each)


def _checked(methods: Sequence[Method]) -> list[Method]:
    if not isinstance(methods, Sequence) or not all(isinstance(method, Method) for method in methods):
        raise KDError(f"methods must be a list of methods, as in methods=[CrossKD(), PKD()]; it is {methods!r}")
    if len({id(method) for method in methods}) < len(methods):
        raise KDError("a method is listed twice: make a second one, for each learns parameters of its own")
    if used := [type(method).__name__ for method in methods if method.in_use]:
        raise KDError(
            f"this {used[0]} is in another Distiller already, which trains what it learns: make a new one, "
            f"{used[0]}(), for each Distiller"
        )
    return list(methods)


def _checked_terms(method: Method, terms: object) -> dict[str, Tensor]:
    """What a method's forward returned, if it keeps the contract. Raises TypeError saying what does not."""
    name = type(method).__name__
    if not isinstance(terms, dict):
        raise TypeError(f"{name}.forward must return a dict of loss terms; it returned a {type(terms).__name__}")
    for term, loss in terms.items():
        if term not in method.terms:
            raise TypeError(f"{name}.forward returned the term {term!r}, and {name}.terms declares {method.terms}")
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            what = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"{name}.forward returned {what} as the term {term!r}: it must be a scalar float tensor")
    return terms


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
