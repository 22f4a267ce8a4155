"""Runs a suite: teacher and baselines, then the methods, then the baselines with longer schedules.

The board is written again while cells finish.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from kdtoolkit.benchmark.cell import Failure, Report, Task
from kdtoolkit.benchmark.datasets import DataSets, load_data
from kdtoolkit.benchmark.detections_file import detections_path, keep_ground_truth
from kdtoolkit.benchmark.display import Display
from kdtoolkit.benchmark.estimate import Costs
from kdtoolkit.benchmark.executor import Ended, Executor
from kdtoolkit.benchmark.plan import Plan, check_methods
from kdtoolkit.benchmark.report import View, write_report
from kdtoolkit.benchmark.status import StatusFile
from kdtoolkit.benchmark.store import (
    CellResult,
    Store,
    StoreError,
    discard,
    discard_runs,
    holding,
    read_result,
    set_aside,
    write_atomic,
    write_result,
)
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE, Suite
from kdtoolkit.benchmark.workers import Workers
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.log import check_trackers
from kdtoolkit.errors import KDError
from kdtoolkit.files import bytes_in
from kdtoolkit.options import did_you_mean
from kdtoolkit.words import counted, duration, size

BOARD_PAUSE = 20  # after a board, relative to the time that it took: boards take at most a twentieth of a run


@dataclass
class Outcome:
    """How a run ended: why cells failed, by their names, and whether it was interrupted or its time was up."""

    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    out_of_time: bool = False

    @property
    def in_words(self) -> str:
        """How it ended, as the end of a sentence."""
        if self.interrupted:
            return "interrupted"
        if self.out_of_time:
            return "because its time was up"
        return f"with {counted(len(self.failures), 'failed cell')}" if self.failures else "with all its cells done"


class _OutOfTimeError(Exception):
    pass


def run_suite(
    suite: Suite,
    root: Path,
    *,
    console: Console,
    jobs: int | None = None,
    device: str | torch.device = "cpu",
    executor: Executor | None = None,
    only: Sequence[str] = (),
    fresh: bool = False,
    any_version: bool = False,
    seeds: range | None = None,
    long_baselines: bool = True,
    seconds: float | None = None,
    tensorboard: bool = False,
) -> Outcome:
    """Run those cells of a suite that are not done yet.

    Args:
        suite: what to run.
        root: the run's folder. It is made if it does not exist. Teachers are kept in a folder beside it.
        console: where to show progress.
        jobs: how many cells run at the same time. None: one for each core on a CPU, 1 on a GPU.
        device: `cpu` or `cuda`.
        executor: where cells run, such as a `RayWorkers`, which has its own device and number of cells at a time. None:
            on this machine.
        only: the entries to run besides the baseline. Empty: all entries.
        fresh: run finished cells again: those of `only`, or all rows and the teacher if `only` is empty.
        any_version: keep finished cells with the same settings, even if the source code of kdtoolkit, the versions of
            libraries or the hardware have changed since. The board lists all of them.
        seeds: which of the suite's seeds to run. None: all.
        long_baselines: run the baselines with longer schedules too: at equal time, and with twice the steps where the
            suite asks for it (`plateau`).
        seconds: stop after this time. Cells that are cut off go on from their last checkpoint in the next call.
        tensorboard: write curves of the cells that are run, for TensorBoard, in a folder `tensorboard` of `root`.

    Raises KDError if `fresh` leaves nothing for `any_version` to keep, if TensorBoard is asked for and not installed,
    if the suite does not fit the data, if the folder cannot be written, or if another run works in it.
    """
    unknown = [name for name in only if name not in (BASELINE, *suite.entries)]
    if unknown:
        known = ", ".join([BASELINE, *suite.entries])
        raise KDError(
            f"suite {suite.name} has no entry '{unknown[0]}'{did_you_mean(unknown[0], suite.entries)}; it has {known}"
        )
    if fresh and any_version and not only:
        raise KDError(
            "--fresh runs everything again, so --any-version has nothing to keep: leave one of them out, or name the "
            "entries that are to be run again (--only)"
        )
    if tensorboard:
        check_trackers(["tensorboard"])
    end = None if seconds is None else time.monotonic() + seconds
    store = Store(root)
    if executor is None:
        executor = Workers(str(device), jobs)
    if suite.data.root is not None:
        console.print(Text(f"reading {suite.data.root}"), soft_wrap=True)  # many large files take a while
    sets = load_data(suite.data, store.pictures)
    plan = Plan(
        suite,
        store,
        sets,
        device=executor.hardware.device,
        threads=executor.threads,
        hardware=executor.hardware,
        any_version=any_version,
        seeds=seeds,
        tensorboard=tensorboard,
    )
    rows = [BASELINE, *(row for row in suite.entries if not only or row in only)]
    if not fresh and plan.complete(rows, long_baselines=long_baselines):
        console.print(Text(f"{root}: all cells are done, so nothing is run (--fresh runs them again)"), soft_wrap=True)
        with store.lock(), Display(console) as display:
            return _Run(plan, sets, display, executor, rows, [], long_baselines, end).refresh()
    checked = check_methods(suite, sets, rows)
    with store.lock(), Display(console) as display:
        for notice in sets.notices:
            display.line(f"note: {notice}", "yellow")
        stale = (list(only) or [TEACHER, BASELINE, EQUAL_TIME, TWICE, *suite.entries]) if fresh else []
        return _Run(plan, sets, display, executor, rows, stale, long_baselines, end).run(checked)


class _Run:
    def __init__(
        self,
        plan: Plan,
        sets: DataSets,
        display: Display,
        executor: Executor,
        rows: list[str],
        fresh: list[str],
        long_baselines: bool,
        end: float | None,
    ) -> None:
        self.plan = plan
        self.sets = sets
        self.display = display
        self.executor = executor
        self.rows = rows
        self.fresh = fresh  # rows whose results are deleted first
        self.long_baselines = long_baselines
        self.end = end  # by time.monotonic
        self.costs = Costs()
        self.outcome = Outcome()
        self.pending: list[Task] = []
        self.later: list[Task] = []  # cells of the baseline at equal time, until their schedule is known
        self.running: dict[Task, Report] = {}
        self.begun: dict[Task, float] = {}
        self.done = 0
        self.warned: set[tuple[str, str]] = set()
        self.started = time.monotonic()
        self.estimated = False
        self.status = StatusFile(plan.store.status_path)
        self.has_data = False  # whether the executor has it
        self.next_board = 0.0  # by time.monotonic

    def refresh(self) -> Outcome:
        """Bring the folder of a run whose cells are all done up to date.

        The run may have been killed before its last board, or its suite may ask for fewer rows than before.
        """
        with self._told_if_stopped():
            self._take_suite()
            self._keep_teacher()
            self.done = sum(len(self.plan.measured(row)) for row in (*self.rows, EQUAL_TIME, TWICE))
            self.status.update(self.done, self.done, None, {}, {})
        self._finish()
        return self.outcome

    def run(self, pair: Distiller) -> Outcome:
        """Run the cells that are not done. `pair`: a student and its teacher with random weights."""
        try:
            self._prepare()
            self._introduce(pair)
            self._drain()
            if self.long_baselines:
                self._plan_equal_time()
                self._drain()
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        except _OutOfTimeError:
            self.outcome.out_of_time = True
        except BaseException:
            self.status.end("with an error")
            raise
        finally:
            self.executor.stop()
        self._finish()
        if not self.outcome.interrupted:
            self._tell_cache()
            self.display.line(f"took {duration(time.monotonic() - self.started)}")
        return self.outcome

    def _finish(self) -> None:
        with self._told_if_stopped():
            self._write_board(last=True)
        self.status.end(self.outcome.in_words)
        if not self.outcome.interrupted:  # a user who waits for the run to stop gets no pictures
            root = self.plan.store.root
            write_report([View.of(root, pictures=True)], root)

    @contextmanager
    def _told_if_stopped(self) -> Iterator[None]:
        """If Ctrl-C or an error stops the block, the status says that the run has ended."""
        try:
            yield
        except BaseException as error:
            self.status.end("interrupted" if isinstance(error, KeyboardInterrupt) else "with an error")
            raise

    def _prepare(self) -> None:
        plan, display = self.plan, self.display
        self._tidy_teacher()
        for row in self.fresh:
            for path in [plan.store.result_path(row, seed) for seed in plan.seeds if row != TEACHER]:
                discard(path)
                discard_runs(path)
        self._take_suite()
        teacher = plan.teacher_task()
        if plan.result(teacher) is None:
            discard(plan.store.teacher_copy)
            self.pending.append(teacher)
        else:
            self._keep_teacher()
            self.costs.finished(TEACHER, self._teacher_result().seconds_per_step)
            display.line(f"teacher: taken from {teacher.weights}")
        for task in self._cells():
            if (result := self._finished(task)) is None:
                self.pending.append(task)
            else:
                self.costs.finished(task.entry, result.seconds_per_step)
                self.done += 1
        if self.long_baselines and len(self.rows) > 1 and not plan.measured(EQUAL_TIME):
            self.later = plan.cells([EQUAL_TIME])
        if self.done:
            display.line(f"done already: {self.done} cells, not counting the baseline at equal time")

    def _set_aside_unusable(self) -> None:
        for name, reason in self.plan.set_aside_unusable().items():
            self.display.line(f"{name} {reason}", "yellow")

    def _cells(self) -> list[Task]:
        """The students but the baseline at equal time."""
        return [*self.plan.cells(self.rows), *(self.plan.twice() if self.long_baselines else [])]

    def _take_suite(self) -> None:
        """Write the suite, once results of an old one are set aside: they are never in one folder with a new suite."""
        self._set_aside_unusable()
        write_atomic(self.plan.store.suite_path, self.plan.suite.to_yaml().encode())
        keep_ground_truth(self.plan.store.ground_truth_path, self.sets.val)

    def _tidy_teacher(self) -> None:
        """Delete what an earlier training of the teacher left: all of it if it is to run afresh, else its run folder.

        If another run trains the teacher just now, it is left to that run, and its result is as fresh as can be.
        """
        teacher = self.plan.teacher_task()
        if TEACHER not in self.fresh and not teacher.run_folder.exists():
            return
        try:
            with holding(teacher.lock_folder):
                if TEACHER in self.fresh:
                    discard(teacher.result)
                    discard_runs(teacher.result)
                self._finished(teacher)
        except StoreError:
            raise
        except KDError:
            return

    def _finished(self, task: Task) -> CellResult | None:
        """The result of a task that is done. Deletes its run folder, which a run leaves if it is killed just then."""
        result = self.plan.result(task)
        if result is not None:
            discard_runs(task.result)
        return result

    def _introduce(self, pair: Distiller) -> None:
        """Print what the run will do, before anything takes long."""
        suite, display = self.plan.suite, self.display
        if any(task.entry == TEACHER for task in self.pending):
            plan = suite.teacher.train
            training = "evaluated only" if plan is None else f"{plan.steps} steps"
            display.line(f"teacher: {suite.teacher.model}, {training}")
        rows, seeds = ", ".join(self.rows), counted(len(self.plan.seeds), "seed")
        if self.plan.seeds.start:
            seeds += f" ({', '.join(map(str, self.plan.seeds))})"
        display.line(f"students: {seeds} each of {rows}; {suite.student.train.steps} steps")
        if suite.init is not None:
            display.line("all students start from the teacher's weights, where these fit")
        if self.long_baselines and suite.plateau:
            display.line("and the baseline with twice the steps")
        if self.long_baselines and len(self.rows) > 1:
            display.line("then the baseline again, with a schedule that takes as long as the slowest method")
        threads = f"{counted(self.plan.threads, 'thread')} each"
        display.line(f"on {self.plan.hardware}: {self.executor.slots} at a time, {threads}, {self._precision()}")
        display.line(f"convolutions: {self._convolutions(pair)}")
        display.line(f"results: {self.plan.store.root}; after Ctrl-C, run the same command to continue")

    def _precision(self) -> str:
        """The precision of the cells and, if `auto` chose it, why."""
        sections = (self.plan.suite.teacher.train, self.plan.suite.student.train)
        precision = self.plan.cell(BASELINE, 0).parts["precision"]
        if any(train is not None and train.precision != "auto" for train in sections):
            return precision
        return f"{precision}, because this hardware has {'' if precision == 'bfloat16' else 'no '}bfloat16"

    def _convolutions(self, pair: Distiller) -> str:
        """How the cells compute convolutions and, if the hardware chose it, why."""
        section = self.plan.cell(BASELINE, 0).detector
        assert section.train is not None  # students are trained
        return Arithmetic.of_config(pair, section.train, torch.device(self.plan.device)).convolutions_and_why

    def _plan_equal_time(self) -> None:
        self.later = []
        found = self.plan.stretch()
        if found is None:
            if any(self.plan.measured(row) for row in self.plan.suite.entries):
                self.display.line(
                    "no baseline at equal time: no method was measured on the same hardware as the baseline", "yellow"
                )
            return
        slowest, stretch = found
        for task in self.plan.cells([EQUAL_TIME], stretch):
            if self._finished(task) is not None:
                self.done += 1
                continue
            self.pending.append(task)
            if task.result.exists():
                set_aside(task.result)  # its schedule was shorter, and all cells of the row need the same
        if self.pending:
            steps = self.pending[0].steps
            self.display.line(
                f"equal time: a step of {slowest} takes as long as {stretch:.2f} plain steps, so {steps} steps"
            )

    def _drain(self) -> None:
        """Run all pending tasks in order, several at the same time. Methods wait until the teacher is trained."""
        if self.pending and not self.has_data:
            self.has_data = True
            self.display.line(f"data: {self.sets.description}")
            self.executor.begin(self.sets)
        while self.pending or len(self.executor):
            if self.end is not None and time.monotonic() > self.end:
                raise _OutOfTimeError
            while len(self.executor) < self.executor.slots and (task := self._next()) is not None:
                self.pending.remove(task)
                self.running[task] = Report("starting")
                discard(self._error_path(task))
                self.begun[task] = time.monotonic()
                self.executor.start(task)
                self.display.started(task)
            for task, event in self.executor.events(timeout=0.5):
                if isinstance(event, Ended):
                    self._end(task, event.failure)
                else:
                    self._progress(task, event)
            self._show_overall()

    def _next(self) -> Task | None:
        waiting = any(task.entry == TEACHER for task in self.running)
        return next((task for task in self.pending if not (waiting and task.teacher_weights)), None)

    def _progress(self, task: Task, report: Report) -> None:
        self.running[task] = report
        self.status.note(task, report)
        self.costs.running(task, report, time.monotonic() - self.begun[task])
        self.display.progress(task, report)
        if report.notice:
            self.display.line(report.notice, "yellow")
        for warning in report.warnings:
            if (task.entry, warning) not in self.warned:
                self.warned.add((task.entry, warning))
                self.display.line(f"WARNING  {task.entry}: {warning}", "bold red")

    def _end(self, task: Task, failure: Failure | None) -> None:
        last = self.running.pop(task)
        result = self.plan.result(task)  # a cell has succeeded if its result is on disk
        if result is None:
            reason = self.plan.why_unusable(task)
            failure = failure or Failure(f"it {reason}" if reason else "its process ended without a result")
            self._fail(task, failure)
            return
        self.done += 1
        self.costs.finished(task.entry, result.seconds_per_step)
        if last.phase == "storing":  # else another run trained it
            self.costs.ended(task, time.monotonic() - self.begun[task], result.train_seconds)
        ap = result.evaluation["ap"]
        shown = "undefined" if ap is None else f"{ap:.1f}"
        cost = f"{result.cost_ms or 0:.0f} ms/step, {duration(result.train_seconds)}" if result.steps else "not trained"
        self.display.ended(task, f"finished  {task.name}: AP {shown}, {cost}", "green")
        if task.entry == TEACHER:
            self._keep_teacher()
            self._teach_again()
        self._write_board()

    def _teach_again(self) -> None:
        """Add the finished cells whose teacher had other weights than it has now, after it was trained again."""
        self._set_aside_unusable()
        known = {task.name for task in (*self.pending, *self.running)}
        again = [task for task in self._cells() if task.teacher_weights and task.name not in known]
        again = [task for task in again if self.plan.result(task) is None]
        self.pending += again
        self.done -= len(again)

    def _fail(self, task: Task, failure: Failure) -> None:
        self.display.ended(task, f"FAILED    {task.name}: {failure.message}", "bold red")
        if failure.fatal:
            raise StoreError(failure.message)
        self.outcome.failures[task.name] = failure.message
        write_atomic(self._error_path(task), f"{failure.message}\n{failure.details}".encode())
        if task.entry == TEACHER:
            for dependent in [other for other in self.pending if other.teacher_weights]:
                self.pending.remove(dependent)
                self.outcome.failures[dependent.name] = "not run, because the teacher failed"
            self.display.line("the methods are not run, because the teacher failed", "bold red")

    def _error_path(self, task: Task) -> Path:
        if task.entry == TEACHER:
            return self.plan.store.teacher_copy.with_suffix(".error")
        return task.result.with_suffix(".error")

    def _keep_teacher(self) -> None:
        """Copy the teacher's result and detections into the run's folder, so that the folder can be read alone."""
        copy, found = self.plan.store.teacher_copy, detections_path(self.plan.teacher_task().result)
        if found.exists():
            write_atomic(detections_path(copy), found.read_bytes())
        else:
            discard(detections_path(copy))  # those of an earlier teacher
        write_result(copy, self._teacher_result())
        discard(copy.with_suffix(".error"))  # it may have failed here, and another run has trained it

    def _tell_cache(self) -> None:
        """Say where the teacher cache lies, and how large it is."""
        folder = self.plan.teacher_cache
        if folder is not None and folder.is_dir():
            taken = size(bytes_in(folder))
            self.display.line(f"teacher cache: {folder}, {taken}; it may be deleted, and then is made again")

    def _teacher_result(self) -> CellResult:
        result = read_result(self.plan.teacher_task().result)
        assert result is not None  # the callers have checked that it is there
        return result

    def _write_board(self, *, last: bool = False) -> None:
        """Write the board without pictures, unless it was written just now: each has all cells, so many take long."""
        begun = time.monotonic()
        if begun >= self.next_board or last:
            root = self.plan.store.root
            write_report([View.of(root)], root)
            now = time.monotonic()
            self.next_board = now + BOARD_PAUSE * (now - begun)

    def _show_overall(self) -> None:
        left = self.costs.remaining(self.pending, self.running, self.executor.slots, self.later, self.rows[1:])
        if left is None:
            words = "no estimate yet"
        else:
            words = f"about {duration(left)} left"
            if not self.estimated:
                self.estimated = True
                self.display.line(
                    f"time: about {duration(left)}, estimated from the first steps on this machine", "bold"
                )
        cells = self.done + len(self.pending) + len(self.running) + len(self.later) + len(self.outcome.failures)
        self.display.overall(self.plan.suite.name, self.done, cells, words)
        self.status.update(self.done, cells, left, self.running, self.outcome.failures)
