"""How long a run will still take, estimated from what its cells have cost so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from kdtoolkit.benchmark.cell import Report, Task
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE

# A method's step costs a plain step and a forward pass of the teacher: about this share of the teacher's training step.
TEACHER_SHARE = 1 / 3
FIRST_STEPS = 10  # a running cell is measured from this many steps on


class Costs:
    """Seconds per step of each row: the mean over its finished cells. If there are none, a running cell's seconds."""

    def __init__(self) -> None:
        self._measured: dict[str, list[float]] = {}
        self._running: dict[str, float] = {}
        self._first: dict[Task, Report] = {}
        self._around: list[float] = []
        self._start_up = 0.0

    def finished(self, row: str, seconds_per_step: float) -> None:
        """A cell of the row has finished, at this cost."""
        self._measured.setdefault(row, []).append(seconds_per_step)

    def ended(self, task: Task, seconds: float, trained: float) -> None:
        """A cell has ended after `seconds`; it has trained for `trained` seconds.

        The rest went into its start, reading of data and evaluation. A training that went on from a checkpoint has
        seconds of an earlier run, which are not part of `seconds`.
        """
        first = self._first.get(task)
        earlier = first.seconds if first is not None and first.step > 1 else 0.0
        self._around.append(max(0.0, seconds - (trained - earlier)))

    def running(self, task: Task, report: Report, seconds: float) -> None:
        """A cell is running, for `seconds` so far."""
        if report.phase != "training":
            return
        if task not in self._first:
            self._first[task] = report
            self._start_up = max(0.0, seconds - report.seconds)
        first = self._first[
            task
        ]  # earlier steps do not count: they are slow, since memory is allocated and kernels are chosen
        if (steps := report.step - first.step) >= FIRST_STEPS:
            self._running[task.entry] = (report.seconds - first.seconds) / steps

    def of(self, row: str) -> float | None:
        """Seconds per step of a row; None if they are not known yet."""
        if row in self._measured:
            return statistics.fmean(self._measured[row])
        if row in self._running:
            return self._running[row]
        if row in (BASELINE, TEACHER):
            return None
        plain, teacher = self.of(BASELINE), self.of(TEACHER)
        if plain is None or row in (EQUAL_TIME, TWICE):
            return plain
        return None if teacher is None else plain + TEACHER_SHARE * teacher

    def remaining(
        self,
        pending: Iterable[Task],
        running: Mapping[Task, Report],
        jobs: int,
        later: Sequence[Task],
        entries: Iterable[str],
    ) -> float | None:
        """Seconds until the run is done; None as long as a row's cost is unknown, or no cell has room (`jobs` is 0).

        `later`: the cells of the row "equal time" that are not pending yet, with their schedule before it is
        stretched. Each will take as long as the slowest of `entries` takes for this schedule.
        """
        if not jobs:
            return None
        around = statistics.fmean(self._around) if self._around else self._start_up
        seconds: dict[str, float] = {}
        cells = [*((task, 0) for task in pending), *((task, report.step) for task, report in running.items())]
        for task, done in cells:
            cost = self.of(task.entry)
            if cost is None:
                return None
            left = cost * (task.steps - done) + around * (done < task.steps)
            seconds[task.entry] = seconds.get(task.entry, 0) + left
        slowest = max((cost for row in entries if (cost := self.of(row)) is not None), default=0.0)
        total = sum(seconds.values()) + sum(task.steps * slowest + around for task in later)
        teacher = seconds.get(TEACHER, 0.0)
        after = total - teacher - seconds.get(BASELINE, 0.0)
        return max(total / jobs, teacher + after / jobs)
