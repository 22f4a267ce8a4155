"""How long a run still takes, from what its cells have cost so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from kdtoolkit.benchmark.cell import Report, Task
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER

TEACHER_SHARE = 1 / 3  # of a teacher's training step is its forward pass, which a method's step has besides its own
FIRST_STEPS = 10  # after so many a running cell's cost counts


class Costs:
    """Seconds per step of each row: means of what finished cells measured, and before that of a running one."""

    def __init__(self) -> None:
        self._measured: dict[str, list[float]] = {}
        self._running: dict[str, float] = {}
        self._first: dict[Task, Report] = {}
        self._around: list[float] = []
        self._start_up = 0.0

    def finished(self, row: str, seconds_per_step: float) -> None:
        """A cell of the row has cost this much."""
        self._measured.setdefault(row, []).append(seconds_per_step)

    def ended(self, seconds_around: float) -> None:
        """A cell has spent this much besides training: starting, reading data, evaluation."""
        self._around.append(seconds_around)

    def running(self, task: Task, report: Report, seconds: float) -> None:
        """A cell is under way, for `seconds` so far."""
        if report.phase != "training":
            return
        if task not in self._first:
            self._first[task] = report
            self._start_up = max(0.0, seconds - report.seconds)
        first = self._first[task]  # the steps before it are slow: memory is allocated, kernels are chosen
        if (steps := report.step - first.step) >= FIRST_STEPS:
            self._running[task.entry] = (report.seconds - first.seconds) / steps

    def of(self, row: str) -> float | None:
        """Seconds per step of a row, as far as they can be told."""
        if row in self._measured:
            return statistics.fmean(self._measured[row])
        if row in self._running:
            return self._running[row]
        if row in (BASELINE, TEACHER):
            return None
        plain, teacher = self.of(BASELINE), self.of(TEACHER)
        if plain is None or row == EQUAL_TIME:
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
        """Seconds until the run is done; None as long as a row's cost is unknown.

        `later`: the cells of the baseline at equal time while they are not pending yet, with the schedule unstretched.
        Each will take as long as this schedule takes the dearest of `entries`.
        """
        around = statistics.fmean(self._around) if self._around else self._start_up
        seconds: dict[str, float] = {}
        cells = [*((task, 0) for task in pending), *((task, report.step) for task, report in running.items())]
        for task, done in cells:
            cost = self.of(task.entry)
            if cost is None:
                return None
            left = cost * (task.steps - done) + around * (done < task.steps)
            seconds[task.entry] = seconds.get(task.entry, 0) + left
        dearest = max((cost for row in entries if (cost := self.of(row)) is not None), default=0.0)
        total = sum(seconds.values()) + sum(task.steps * dearest + around for task in later)
        teacher = seconds.get(TEACHER, 0.0)
        after = total - teacher - seconds.get(BASELINE, 0.0)
        return max(total / jobs, teacher + after / jobs)
