"""Runs a suite: teacher and baselines, then the methods, then the baseline at equal time; a board after each cell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.cell import DataSets, Failure, Report, Task, cores, device_name, load_data, machine
from kdtoolkit.benchmark.display import Display, duration
from kdtoolkit.benchmark.estimate import Costs
from kdtoolkit.benchmark.plan import Plan, check_methods
from kdtoolkit.benchmark.report import write_board
from kdtoolkit.benchmark.store import CellResult, Store, StoreError, discard, read_result, set_aside, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, Suite
from kdtoolkit.benchmark.workers import Ended, Workers
from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean


@dataclass
class Outcome:
    """How a run ended: messages of failed cells by name, and whether it was interrupted."""

    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_suite(
    suite: Suite,
    root: Path,
    *,
    console: Console,
    jobs: int | None = None,
    device: str | torch.device = "cpu",
    only: Sequence[str] = (),
    fresh: bool = False,
) -> Outcome:
    """Run what is not yet done of a suite, into the folder `root`; teachers are kept beside it.

    Args:
        suite: what to run.
        root: the run's folder; made if need be.
        console: where to show it.
        jobs: cells at a time; one a core on CPU and 1 on a GPU, if None.
        device: `cpu` or `cuda`.
        only: entries to run besides the baseline; all if empty.
        fresh: run again what `only` names, or all and the teacher.

    Raises KDError where the suite does not fit the data, the folder cannot be written or another run holds it.
    """
    unknown = [name for name in only if name not in (BASELINE, *suite.entries)]
    if unknown:
        known = ", ".join([BASELINE, *suite.entries])
        raise KDError(f"no entry '{unknown[0]}'{did_you_mean(unknown[0], suite.entries)} in {suite.name}: {known}")
    store = Store(root)
    device = str(device)
    jobs = jobs or (cores() if device == "cpu" else 1)
    if suite.data.root is not None:
        console.print(Text(f"reading {suite.data.root}"), soft_wrap=True)  # many large files take a while
    sets = load_data(suite.data, store.pictures)
    plan = Plan(suite, store, sets, device=device, threads=max(1, cores() // jobs))
    if not fresh and plan.complete([BASELINE, *(only or suite.entries)]):
        console.print(Text(f"{root}: all is done, nothing is run again"), soft_wrap=True)
        return Outcome()
    check_methods(suite, sets)
    with store.lock(), Display(console) as display:
        for notice in sets.notices:
            display.line(f"note: {notice}", "yellow")
        write_atomic(store.suite_path, suite.to_yaml().encode())
        return _Run(plan, sets, display, jobs, list(only), fresh).run()


class _Run:
    def __init__(self, plan: Plan, sets: DataSets, display: Display, jobs: int, only: list[str], fresh: bool) -> None:
        self.plan = plan
        self.sets = sets
        self.display = display
        self.jobs = jobs
        self.rows = [BASELINE, *(row for row in plan.suite.entries if not only or row in only)]
        self.fresh = (only or [TEACHER, BASELINE, EQUAL_TIME, *plan.suite.entries]) if fresh else []
        self.workers = Workers()
        self.costs = Costs()
        self.outcome = Outcome()
        self.pending: list[Task] = []
        self.later: list[Task] = []  # the baseline at equal time, until its schedule is known and its cells are pending
        self.running: dict[Task, Report] = {}
        self.begun: dict[Task, float] = {}
        self.done = 0
        self.warned: set[tuple[str, str]] = set()
        self.started = time.monotonic()
        self.estimated = False

    def run(self) -> Outcome:
        try:
            self._prepare()
            self._introduce()
            self._drain()
            self._plan_equal_time()
            self._drain()
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        finally:
            self.workers.stop()
        self._write_board()
        if not self.outcome.interrupted:
            self.display.line(f"took {duration(time.monotonic() - self.started)}")
        return self.outcome

    def _prepare(self) -> None:
        plan, display = self.plan, self.display
        for row in self.fresh:
            paths = (
                [plan.teacher().result]
                if row == TEACHER
                else [plan.store.result_path(row, seed) for seed in range(plan.suite.seeds)]
            )
            for path in paths:
                discard(path)
        for name, reason in plan.set_aside_unusable().items():
            display.line(f"{name} {reason}; its old result is kept as .json.old", "yellow")
        teacher = plan.teacher()
        if plan.result(teacher) is None:
            discard(plan.store.teacher_copy)
            self.pending.append(teacher)
        else:
            self._keep_teacher()
            self.costs.finished(TEACHER, self._teacher_result().seconds_per_step)
            display.line(f"teacher: taken from {teacher.result.with_suffix('.pt')}")
        for task in plan.cells(self.rows):
            if (result := plan.result(task)) is None:
                self.pending.append(task)
            else:
                self.costs.finished(task.entry, result.seconds_per_step)
                self.done += 1
        if len(self.rows) > 1 and not plan.measured(EQUAL_TIME):
            self.later = plan.cells([EQUAL_TIME])
        if self.done:
            display.line(f"done already: {self.done} cells, besides the baseline at equal time")

    def _introduce(self) -> None:
        """Say what is going to happen, before anything takes long."""
        suite, display = self.plan.suite, self.display
        if any(task.entry == TEACHER for task in self.pending):
            display.line(f"teacher: {suite.teacher.model}, {suite.teacher.train.steps} steps")
        rows, seeds = ", ".join(self.rows), f"{suite.seeds} seed{'s' if suite.seeds > 1 else ''}"
        display.line(f"students: {seeds} each of {rows}; {suite.student.train.steps} steps")
        if len(self.rows) > 1:
            display.line("then the baseline again, for as long as the dearest method took")
        threads = f"{self.plan.threads} thread{'s' if self.plan.threads > 1 else ''} each"
        where = machine() if self.plan.device == "cpu" else device_name(self.plan.device)
        display.line(f"on {where}: {self.jobs} at a time, {threads}, {self._precision()}")
        display.line(f"results: {self.plan.store.root}; after Ctrl-C the same command goes on")
        if self.pending:
            display.line(f"data: {self.sets.description}")
            for images in (self.sets.teacher, self.sets.student, self.sets.val):
                _ = images.in_memory()[0]  # drawn pictures and decoded photos are then there for all cells

    def _precision(self) -> str:
        """The precision of the cells, and why it was chosen where it was."""
        sections = self.plan.suite.teacher, self.plan.suite.student
        precision = self.plan.cell(BASELINE, 0).parts["precision"]
        if any(section.train.precision != "auto" for section in sections):
            return precision
        return f"{precision}, as its hardware has {'' if precision == 'bfloat16' else 'no '}bfloat16"

    def _plan_equal_time(self) -> None:
        self.later = []
        found = self.plan.stretch()
        if found is None:
            if any(self.plan.measured(row) for row in self.plan.suite.entries):
                self.display.line(
                    "no baseline at equal time: no method was timed on the hardware of the baseline", "yellow"
                )
            return
        dearest, stretch = found
        for task in self.plan.cells([EQUAL_TIME], stretch):
            if self.plan.result(task) is not None:
                self.done += 1
                continue
            self.pending.append(task)
            if task.result.exists():
                set_aside(task.result)  # of a shorter stretch: a row is of one stretch
        if self.pending:
            steps = self.pending[0].steps
            self.display.line(f"equal time: a step of {dearest} costs {stretch:.2f} plain ones, so {steps} steps")

    def _drain(self) -> None:
        """Run all pending tasks: as many as there are jobs, in order, methods only when the teacher is there."""
        while self.pending or len(self.workers):
            while len(self.workers) < self.jobs and (task := self._next()) is not None:
                self.pending.remove(task)
                self.running[task] = Report("starting")
                discard(self._error_path(task))
                self.begun[task] = time.monotonic()
                self.workers.start(task)
                self.display.started(task)
            for task, event in self.workers.events(timeout=0.5):
                if isinstance(event, Ended):
                    self._end(task, event.failure)
                else:
                    self._progress(task, event)
            self._show_overall()

    def _next(self) -> Task | None:
        waiting = any(task.entry == TEACHER for task in self.running)
        return next((task for task in self.pending if not (waiting and task.methods)), None)

    def _progress(self, task: Task, report: Report) -> None:
        self.running[task] = report
        self.costs.running(task, report, time.monotonic() - self.begun[task])
        self.display.progress(task, report)
        for warning in report.warnings:
            if (task.entry, warning) not in self.warned:
                self.warned.add((task.entry, warning))
                self.display.line(f"WARNING  {task.entry}: {warning}", "bold red")

    def _end(self, task: Task, failure: Failure | None) -> None:
        del self.running[task]
        result = self.plan.result(task)  # what counts is what lies on disk
        if result is None:
            failure = failure or Failure("it ended without a result")
            self._fail(task, failure)
            return
        self.done += 1
        self.costs.finished(task.entry, result.seconds_per_step)
        self.costs.ended(time.monotonic() - self.begun[task] - result.train_seconds)
        ap = result.evaluation["ap"]
        shown = "undefined" if ap is None else f"{ap:.1f}"
        cost = f"{result.step_ms:.0f} ms/step, {duration(result.train_seconds)}"
        self.display.ended(task, f"finished  {task.name}: AP {shown}, {cost}", "green")
        if task.entry == TEACHER:
            self._keep_teacher()
        self._write_board()

    def _fail(self, task: Task, failure: Failure) -> None:
        self.display.ended(task, f"FAILED    {task.name}: {failure.message}", "bold red")
        if failure.fatal:
            raise StoreError(failure.message)
        self.outcome.failures[task.name] = failure.message
        write_atomic(self._error_path(task), f"{failure.message}\n{failure.details}".encode())
        if task.entry == TEACHER:
            for dependent in [other for other in self.pending if other.methods]:
                self.pending.remove(dependent)
                self.outcome.failures[dependent.name] = "not run, for there is no teacher"
            self.display.line("the methods are not run, for there is no teacher", "bold red")

    def _error_path(self, task: Task) -> Path:
        if task.entry == TEACHER:
            return self.plan.store.teacher_copy.with_suffix(".error")
        return task.result.with_suffix(".error")

    def _keep_teacher(self) -> None:
        """The run's folder tells everything on its own: it has a copy of the teacher's result."""
        write_atomic(self.plan.store.teacher_copy, self._teacher_result().model_dump_json(indent=1).encode())

    def _teacher_result(self) -> CellResult:
        result = read_result(self.plan.teacher().result)
        assert result is not None  # called when it is there
        return result

    def _write_board(self) -> None:
        write_board(build_board(self.plan.store.root), self.plan.store.root)

    def _show_overall(self) -> None:
        left = self.costs.remaining(self.pending, self.running, self.jobs, self.later, self.rows[1:])
        if left is None:
            words = "first steps"
        else:
            words = f"about {duration(left)} left"
            if not self.estimated:
                self.estimated = True
                self.display.line(f"time: about {duration(left)}, by the first steps on this machine", "bold")
        cells = self.done + len(self.pending) + len(self.running) + len(self.later) + len(self.outcome.failures)
        self.display.overall(self.plan.suite.name, self.done, cells, words)
