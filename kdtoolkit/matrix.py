"""The matrix: every method on every ordered pair of detector families, with tiny random models.

    matrix = run_matrix(families(), all_methods())
    print_matrix(matrix, console)

A cell is one step of the pair as `Distiller` does it: what the student shows in train mode, the frozen teacher in eval
mode, the method's terms between the two and their gradient. But each student is run once, each teacher once for each
size of canvas that students have, and each pair's heads once for all methods, for a step does not change weights.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import DetectorAdapter, Exchange, Method, Target, View
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt, adapter_classes
from kdtoolkit.testing import example_batch, observe

NUM_CLASSES = 3
SEED = 0
SIZES = ((64, 64), (50, 60))  # pixels: of two sizes, so that all detectors pad one of them

Family = Callable[[int], nn.Module]
"""Builds a tiny detector with random weights, for a number of classes."""


class Outcome(enum.StrEnum):
    """What came of a method on a pair."""

    WORKS = "works"  # finite terms, and gradient that reaches the student's pyramid
    REFUSED = "refused"  # at construction, with a reason
    REFUSED_LATE = "refused late"  # at the first step, with a reason
    FAILED = "failed"  # with an error: a fault of the toolkit's, or of a library's


MARKS: Mapping[Outcome, str] = {
    Outcome.WORKS: "✓",
    Outcome.REFUSED: "·",
    Outcome.REFUSED_LATE: "~",
    Outcome.FAILED: "✗",
}
_COLOURS: Mapping[Outcome, str] = {
    Outcome.WORKS: "green",
    Outcome.REFUSED: "dim",
    Outcome.REFUSED_LATE: "yellow",
    Outcome.FAILED: "bold red",
}


@dataclass(frozen=True)
class Cell:
    """One method on one pair; `reason` says in a line why it does not work."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Matrix:
    """Cells by (method, student, teacher), for all methods and all ordered pairs of families."""

    families: tuple[str, ...]
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, str, str], Cell]

    def count(self, outcome: Outcome, method: str | None = None) -> int:
        """Number of cells of an outcome, of one method or of all."""
        return sum(
            cell.outcome == outcome for (name, _, _), cell in self.cells.items() if method is None or name == method
        )

    def share(self, method: str | None = None) -> float:
        """Share of pairs in [0, 1] that work, of one method or of all."""
        total = len(self.families) ** 2 * (len(self.methods) if method is None else 1)
        return self.count(Outcome.WORKS, method) / total if total else 0.0

    def reasons(self, method: str) -> list[str]:
        """The distinct reasons why pairs do not work with a method, in the order in which they come."""
        own = (cell for (name, _, _), cell in self.cells.items() if name == method)
        return list(dict.fromkeys(cell.reason for cell in own if cell.outcome != Outcome.WORKS))

    def to_json(self) -> dict[str, object]:
        """All of it as plain data, for json.dump."""
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

    Raises KDError where two adapters call their examples alike.
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

    No error of a detector or a method escapes: it is the reason of a failed cell. On a console a bar shows how far
    it is.
    """
    total = len(families) ** 2 * len(methods)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        bar = progress.add_task("building the detectors", total=total)
        with torch.random.fork_rng():
            students = {name: _student(build) for name, build in families.items()}
            teachers = {name: _Teacher.of(build) for name, build in families.items()}
            cells: dict[tuple[str, str, str], Cell] = {}
            for student, ours in students.items():
                for teacher, theirs in teachers.items():
                    progress.update(bar, description=f"{teacher} → {student}")
                    pair = _pair(ours, theirs)
                    for name, method in methods.items():
                        cells[name, student, teacher] = _try(method, pair)
                        progress.advance(bar)
    return Matrix(tuple(families), tuple(methods), cells)


Examples = tuple[Sequence[Tensor], Sequence[Target]]


def _built(build: Family, seed: int) -> tuple[DetectorAdapter, Examples]:
    torch.manual_seed(seed)
    adapter = adapt(build(NUM_CLASSES))
    return adapter, example_batch(NUM_CLASSES, next(adapter.model.parameters()).device, SIZES)


def _student(build: Family) -> View | str:
    """What a family's detector shows of the example batch while it trains, or the error that keeps it from it."""
    try:
        adapter, examples = _built(build, SEED)
        adapter.model.train()
        view = observe(adapter, *examples)
        _, assignment = adapter.task_losses(view.head, view.batch)
        return View(adapter, view.batch, view.maps, view.head, assignment)
    except Exception as error:  # a foreign detector may raise anything, and the matrix reports it
        return f"as a student alone: {_line(error)}"


class _Teacher:
    """A frozen detector, and what it shows of the example batch on each canvas that students have."""

    def __init__(self, adapter: DetectorAdapter, examples: Examples) -> None:
        self.adapter = adapter
        self.examples = examples
        self._views: dict[object, View] = {}

    @classmethod
    def of(cls, build: Family) -> _Teacher | str:
        """Of a family, or the error that keeps it from being built."""
        try:
            adapter, examples = _built(build, SEED + 1)
        except Exception as error:  # likewise
            return f"as a teacher alone: {_line(error)}"
        adapter.model.eval().requires_grad_(False)
        return cls(adapter, examples)

    @torch.no_grad()
    def beside(self, student: View) -> View:
        """Its view of the example batch as a student has it; its head runs once on each canvas."""
        batch = student.batch
        key = batch.images.shape, batch.sizes, batch.padded_sizes
        if key not in self._views:
            prepared = self.adapter.prepare(*self.examples, like=batch)
            self._views[key] = View(self.adapter, prepared, self.adapter.features(prepared), frozen=True)
        return self._views[key]


def _pair(student: View | str, teacher: _Teacher | str) -> Exchange | str:
    """What methods see of a pair, or why there is nothing to see."""
    if isinstance(student, str):
        return student
    if isinstance(teacher, str):
        return teacher
    try:
        return Exchange(student, teacher.beside(student))
    except Exception as error:  # likewise
        return f"as a teacher of this student: {_line(error)}"


def _try(method: type[Method], pair: Exchange | str) -> Cell:
    if isinstance(pair, str):
        return Cell(Outcome.FAILED, pair)
    student, specs = pair.student, (pair.student.spec, pair.teacher.spec)
    try:
        if reason := why_refused(method, *specs):
            # Rows and columns say which detectors these are; without their names reasons are few.
            for name in {spec.name for spec in specs}:
                reason = reason.replace(f" ({name})", "")
            return Cell(Outcome.REFUSED, reason)
        torch.manual_seed(SEED)
        instance = method()
        instance.setup(*(spec.at_strides(instance.strides) for spec in specs))
        terms = instance.to(student.features[0].device)(pair.at_strides(instance.strides))
        total = torch.stack([*terms.values()]).sum()
        if not torch.isfinite(total):
            values = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
            return Cell(Outcome.FAILED, f"losses are not finite: {values}")
        gradients = torch.autograd.grad(total, student.features, retain_graph=True, allow_unused=True)
        reached = [gradient for gradient in gradients if gradient is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in reached):
            return Cell(Outcome.FAILED, "the gradient is not finite")
        if not any(bool(gradient.any()) for gradient in reached):
            return Cell(Outcome.FAILED, "no gradient reaches the student's pyramid")
        return Cell(Outcome.WORKS)
    except IncompatibleError as error:
        return Cell(Outcome.REFUSED_LATE, _line(error))
    except Exception as error:  # must not happen; where it does, the matrix is where it is to be seen
        return Cell(Outcome.FAILED, _line(error))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, KDError) else f"{type(error).__name__}: {text}"[:300]


def print_matrix(matrix: Matrix, console: Console, method: str | None = None) -> None:
    """Print how many methods work for each pair; or, for one `method`, a mark a pair and the reasons below.

    Raises KDError where there is no such method.
    """
    if method is None:
        _print_whole(_overview(matrix), console)
        console.print(_by_method(matrix))
        console.print(_summary(matrix))
        return
    if method not in matrix.methods:
        raise KDError(f"no method {method!r}; there are {', '.join(matrix.methods)}")
    _print_whole(_grid(matrix, method), console)
    for number, reason in enumerate(matrix.reasons(method), 1):
        console.print(f"{number:>3}  {escape(reason)}")
    console.print(_summary(matrix, method))


def _print_whole(table: Table, console: Console) -> None:
    """Print all columns, in lines longer than a narrow terminal's if need be: it would leave some out."""
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    wide = Console(file=console.file, width=max(needed, console.width), force_terminal=console.is_terminal)
    wide.print(table)


def _numbered(matrix: Matrix, title: str) -> Table:
    """A table of students by teachers, whose columns are the rows' numbers, for names would not fit."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("student \\ teacher", no_wrap=True)
    for i, _ in enumerate(matrix.families, 1):
        table.add_column(str(i), justify="right", no_wrap=True)
    return table


def _overview(matrix: Matrix) -> Table:
    table = _numbered(matrix, f"methods that work of {len(matrix.methods)}")
    for i, student in enumerate(matrix.families, 1):
        row = []
        for teacher in matrix.families:
            outcomes = [matrix.cells[name, student, teacher].outcome for name in matrix.methods]
            works = outcomes.count(Outcome.WORKS)
            colour = _COLOURS[Outcome.FAILED] if Outcome.FAILED in outcomes else ("green" if works else "dim")
            row.append(f"[{colour}]{works}[/]")
        table.add_row(f"{i} {escape(student)}", *row)
    return table


def _by_method(matrix: Matrix) -> Table:
    table = Table(title=f"pairs of {len(matrix.families)} x {len(matrix.families)} families")
    table.add_column("method")
    for outcome in Outcome:
        table.add_column(outcome.value, justify="right")
    for name in matrix.methods:
        table.add_row(name, *(str(matrix.count(outcome, name)) for outcome in Outcome))
    return table


def _grid(matrix: Matrix, method: str) -> Table:
    numbers = {reason: i for i, reason in enumerate(matrix.reasons(method), 1)}
    table = _numbered(matrix, method)
    for i, student in enumerate(matrix.families, 1):
        row = []
        for teacher in matrix.families:
            cell = matrix.cells[method, student, teacher]
            row.append(f"[{_COLOURS[cell.outcome]}]{MARKS[cell.outcome]}{numbers.get(cell.reason, '')}[/]")
        table.add_row(f"{i} {escape(student)}", *row)
    return table


def _summary(matrix: Matrix, method: str | None = None) -> str:
    counts = ", ".join(f"{matrix.count(outcome, method)} {outcome} {MARKS[outcome]}" for outcome in Outcome)
    return f"{matrix.share(method):.0%} work ({counts})"


def to_markdown(matrix: Matrix) -> str:
    """A page: one table for methods of equal outcomes, students by teachers, and the reasons, listed once each."""
    every = dict.fromkeys(reason for method in matrix.methods for reason in matrix.reasons(method))
    numbers = {reason: i for i, reason in enumerate(every, 1)}
    pairs = [(student, teacher) for student in matrix.families for teacher in matrix.families]
    alike: dict[tuple[Cell, ...], list[str]] = {}
    for method in matrix.methods:
        alike.setdefault(tuple(matrix.cells[method, *pair] for pair in pairs), []).append(method)
    head = "| student \\ teacher | " + " | ".join(map(str, range(1, len(matrix.families) + 1))) + " |"
    rule = "|---|" + ":-:|" * len(matrix.families)
    lines = [
        "# Every method on every pair of detector families",
        "",
        "Made by `kd adapters --matrix --markdown FILE`, with tiny detectors of random weights: ✓ finite losses and "
        "gradient to the student; · refused at construction; ~ refused at the first step; ✗ failed. Columns are "
        "teachers, in the order of the rows. Small numbers are reasons, listed at the end.",
        "",
        f"{len(matrix.methods)} methods on {len(pairs)} pairs of {len(matrix.families)} families: {_summary(matrix)}.",
        "",
        "| method | " + " | ".join(f"{outcome} {MARKS[outcome]}" for outcome in Outcome) + " |",
        "|---|" + "--:|" * len(Outcome),
    ]
    lines += [
        f"| {name} | {' | '.join(str(matrix.count(outcome, name)) for outcome in Outcome)} |" for name in matrix.methods
    ]
    for methods in alike.values():
        lines += ["", f"## {', '.join(methods)}", "", f"{_summary(matrix, methods[0])}", "", head, rule]
        for i, student in enumerate(matrix.families, 1):
            cells = (matrix.cells[methods[0], student, teacher] for teacher in matrix.families)
            marks = (
                MARKS[cell.outcome] + (f"<sup>{numbers[cell.reason]}</sup>" if cell.reason else "") for cell in cells
            )
            lines.append(f"| {i} {student} | {' | '.join(marks)} |")
    if numbers:
        lines += ["", "## Reasons", ""]
        lines += [f"{i}. {reason}" for reason, i in numbers.items()]
    return "\n".join(lines) + "\n"
