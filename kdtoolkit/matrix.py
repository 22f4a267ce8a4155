"""The matrix: every method on every ordered pair of detector families, with tiny random models.

    matrix = run_matrix(families(), all_methods())

A cell is one step of a pair, as `Distiller` does it: the student in train mode, the frozen teacher in eval mode, and
the method's loss terms with their gradient. Such a step does not change weights, so work is shared: each student runs
once, each teacher once per size of the students' canvases, and each pair's heads once for all methods.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import DetectorAdapter, Exchange, Method, Target, View
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt, adapter_classes
from kdtoolkit.testing import example_batch, observe

NUM_CLASSES = 3
SEED = 0
SIZES = ((64, 64), (50, 60))  # pixels; two sizes, so that every detector pads one of the images

Family = Callable[[int], nn.Module]
"""Builds a tiny detector with random weights, for a number of classes."""


class Outcome(enum.StrEnum):
    """The result of a method on a pair."""

    WORKS = "works"  # finite terms, and gradient that reaches the student's pyramid
    REFUSED = "refused"  # at construction, with a reason
    REFUSED_LATE = "refused late"  # at the first step, with a reason
    FAILED = "failed"  # with an error: a fault of the toolkit or of a library


@dataclass(frozen=True)
class Cell:
    """One method on one pair. `reason` says in one line why it does not work; empty if it works."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Matrix:
    """A cell for each (method, student, teacher): all methods on all ordered pairs of families."""

    families: tuple[str, ...]
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, str, str], Cell]

    def count(self, outcome: Outcome, method: str | None = None) -> int:
        """Number of cells with an outcome, for one method or for all methods."""
        return sum(
            cell.outcome == outcome for (name, _, _), cell in self.cells.items() if method is None or name == method
        )

    def share(self, method: str | None = None) -> float:
        """Share in [0, 1] of the pairs that work, for one method or for all methods."""
        total = len(self.families) ** 2 * (len(self.methods) if method is None else 1)
        return self.count(Outcome.WORKS, method) / total if total else 0.0

    def reasons(self, method: str) -> list[str]:
        """Why pairs do not work with a method: each reason once, in the order of the cells."""
        own = (cell for (name, _, _), cell in self.cells.items() if name == method)
        return list(dict.fromkeys(cell.reason for cell in own if cell.outcome != Outcome.WORKS))

    def to_json(self) -> dict[str, object]:
        """The whole matrix as plain data, for json.dump."""
        return {
            "families": list(self.families),
            "methods": list(self.methods),
            "share": self.share(),
            "counts": {outcome.value: self.count(outcome) for outcome in Outcome},
            "cells": [
                {"method": method, "student": student, "teacher": teacher, "outcome": cell.outcome.value}
                | ({"reason": cell.reason} if cell.reason else {})
                for (method, student, teacher), cell in self.cells.items()
            ],
        }


def families() -> dict[str, Family]:
    """The example detectors of all adapters whose library is installed.

    Raises KDError if two adapters give their examples the same name.
    """
    found: dict[str, Family] = {}
    for cls in adapter_classes(load=True):
        for name, build in cls.examples().items():
            if name in found:
                raise KDError(f"two adapters have an example called {name!r}: rename that of {cls.__qualname__}")
            found[name] = build
    return found


def run_matrix(
    families: Mapping[str, Family], methods: Mapping[str, type[Method]], *, console: Console | None = None
) -> Matrix:
    """Try every method with its default settings on every ordered pair of families.

    An error of a detector or a method ends nothing: it becomes the reason of a failed cell. With a console, a bar shows
    the progress.
    """
    total = len(families) ** 2 * len(methods)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        bar = progress.add_task("building the detectors", total=total)
        with torch.random.fork_rng():
            students = {name: _student_view(build) for name, build in families.items()}
            teachers = {name: _Teacher.of(build) for name, build in families.items()}
            cells: dict[tuple[str, str, str], Cell] = {}
            for student, ours in students.items():
                for teacher, theirs in teachers.items():
                    progress.update(bar, description=f"{teacher} → {student}")
                    pair = _exchange(ours, theirs)
                    for name, method in methods.items():
                        cells[name, student, teacher] = _try(method, pair)
                        progress.advance(bar)
    return Matrix(tuple(families), tuple(methods), cells)


Examples = tuple[Sequence[Tensor], Sequence[Target]]


def _built(build: Family, seed: int) -> tuple[DetectorAdapter, Examples]:
    """A detector of a family, and a batch for it."""
    torch.manual_seed(seed)
    adapter = adapt(build(NUM_CLASSES))
    return adapter, example_batch(NUM_CLASSES, next(adapter.model.parameters()).device, SIZES)


def _student_view(build: Family) -> View | str:
    """What a family's detector shows of the example batch while it trains; or the error that prevents it."""
    try:
        adapter, examples = _built(build, SEED)
        adapter.model.train()
        view = observe(adapter, *examples)
        _, assignment = adapter.task_losses(view.head, view.batch)
        return View(adapter, view.batch, view.maps, view.head, assignment)
    except Exception as error:  # a detector of another package may raise anything, and the matrix reports it
        return f"as a student alone: {_line(error)}"


class _Teacher:
    """A frozen detector, and what it shows of the example batch on each canvas that students have."""

    def __init__(self, adapter: DetectorAdapter, examples: Examples) -> None:
        self.adapter = adapter
        self.examples = examples
        self._views: dict[object, View] = {}

    @classmethod
    def of(cls, build: Family) -> _Teacher | str:
        """The teacher of a family; or the error that prevents building it."""
        try:
            adapter, examples = _built(build, SEED + 1)
        except Exception as error:  # likewise
            return f"as a teacher alone: {_line(error)}"
        adapter.model.eval().requires_grad_(False)
        return cls(adapter, examples)

    @torch.no_grad()
    def beside(self, student_view: View) -> View:
        """Its view of the example batch, laid out as the student has it. Its head runs once for each canvas."""
        batch = student_view.batch
        key = batch.images.shape, batch.sizes, batch.padded_sizes
        if key not in self._views:
            prepared = self.adapter.prepare(*self.examples, like=batch)
            self._views[key] = View(self.adapter, prepared, self.adapter.features(prepared), frozen=True)
        return self._views[key]


def _exchange(student_view: View | str, teacher: _Teacher | str) -> Exchange | str:
    """What methods see of a pair; or the error that prevents it."""
    if isinstance(student_view, str):
        return student_view
    if isinstance(teacher, str):
        return teacher
    try:
        return Exchange(student_view, teacher.beside(student_view))
    except Exception as error:  # likewise
        return f"as a teacher of this student: {_line(error)}"


def _try(method: type[Method], pair: Exchange | str) -> Cell:
    """Take one step of a method on a pair."""
    if isinstance(pair, str):
        return Cell(Outcome.FAILED, pair)
    features, specs = pair.student.features, (pair.student.spec, pair.teacher.spec)
    try:
        if reason := why_refused(method, *specs):
            # Rows and columns name the detectors. Reasons without names are the same for many pairs, and listed once.
            for name in {spec.name for spec in specs}:
                reason = reason.replace(f" ({name})", "")
            return Cell(Outcome.REFUSED, reason)
        torch.manual_seed(SEED)
        instance = method()
        instance.setup(*(spec.at_strides(instance.strides) for spec in specs))
        found = instance.to(features[0].device)(pair.at_strides(instance.strides))
        terms = {name: loss for name, loss in found.items() if name in instance.terms}
        total = torch.stack([*terms.values()]).sum()
        if not torch.isfinite(total):
            values = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
            return Cell(Outcome.FAILED, f"losses are not finite: {values}")
        gradients = torch.autograd.grad(total, features, retain_graph=True, allow_unused=True)
        reached = [gradient for gradient in gradients if gradient is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in reached):
            return Cell(Outcome.FAILED, "the gradient is not finite")
        if not any(bool(gradient.any()) for gradient in reached):
            return Cell(Outcome.FAILED, "no gradient reaches the student's pyramid")
        return Cell(Outcome.WORKS)
    except IncompatibleError as error:
        return Cell(Outcome.REFUSED_LATE, _line(error))
    except Exception as error:  # this is a fault, and the matrix shows it
        return Cell(Outcome.FAILED, _line(error))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, KDError) else f"{type(error).__name__}: {text}"[:300]
