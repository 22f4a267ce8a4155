"""How long a run still takes, from what its cells have cost so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from kdtoolkit.benchmark.cell import Report, Task
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER

METHOD_FACTOR = 2.0  # a step with a teacher costs about this many plain steps; used until one has been measured


class Costs:
    """Seconds per step of each row: means of what finished cells measured, and before that of a running one."""

    def __init__(self) -> None:
        self._measured: dict[str, list[float]] = {}
        self._running: dict[str, float] = {}

    def finished(self, row: str, seconds_per_step: float) -> None:
        """A cell of the row has cost this much."""
        self._measured.setdefault(row, []).append(seconds_per_step)

    def running(self, row: str, report: Report) -> None:
        """A cell of the row is under way."""
        if report.phase == "training" and report.step > 5:
            self._running[row] = report.seconds / report.step

    def of(self, row: str) -> float | None:
        """Seconds per step of a row, as far as they can be told."""
        if row in self._measured:
            return statistics.fmean(self._measured[row])
        if row in self._running:
            return self._running[row]
        if row in (BASELINE, TEACHER):
            return None
        plain = self.of(BASELINE)
        return None if plain is None else plain * (1 if row == EQUAL_TIME else METHOD_FACTOR)

    def remaining(
        self, pending: Iterable[Task], running: Mapping[Task, Report], jobs: int, equal_time: tuple[int, Iterable[str]]
    ) -> float | None:
        """Seconds until the run is done; None as long as a row's cost is unknown.

        `equal_time`: steps of the baseline times seeds that its stretched row still needs, and the methods it follows.
        """
        seconds: dict[str, float] = {}
        for task, done in [
            *((task, 0) for task in pending),
            *((task, report.step) for task, report in running.items()),
        ]:
            cost = self.of(task.entry)
            if cost is None:
                return None
            seconds[task.entry] = seconds.get(task.entry, 0) + cost * (task.steps - done)
        steps, rows = equal_time
        dearest = max((cost for row in rows if (cost := self.of(row)) is not None), default=0.0)
        total = sum(seconds.values()) + steps * dearest
        teacher = seconds.get(TEACHER, 0.0)
        after = total - teacher - seconds.get(BASELINE, 0.0)
        return max(total / jobs, teacher + after / jobs)
