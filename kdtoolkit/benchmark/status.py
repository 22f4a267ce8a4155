"""What a run says about itself while it works, in a file of its folder: `kd benchmark watch` reads it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kdtoolkit import files
from kdtoolkit.benchmark.cell import Report, Task

WRITE_SECONDS = 2.0  # between two writings
POINTS = 40  # of a running cell's loss curve, at most twice as many


class RunningCell(BaseModel):
    """A cell that runs.

    `phase`: what it does, in words. `step_ms`: its mean step so far. `losses`: of the task and of each method, means of
    about the last second. `totals`: the sum of all losses by step. `evaluated`: AP by step.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    phase: str
    step: int
    steps: int
    step_ms: float | None
    losses: dict[str, float]
    totals: tuple[tuple[int, float], ...]
    evaluated: tuple[tuple[int, float | None], ...]


class Status(BaseModel):
    """How far a run is.

    `process`, `host`: who runs it. `done`, `cells`: how many cells are done, and of how many. `seconds_left`: the time
    that it still needs; None if it has no estimate yet. `failures`: why cells failed, by their names. `ended`: how the
    run ended, in words; empty while it works.
    """

    model_config = ConfigDict(frozen=True)

    process: int
    host: str
    done: int = 0
    cells: int = 0
    seconds_left: float | None = None
    running: tuple[RunningCell, ...] = ()
    failures: dict[str, str] = {}
    ended: str = ""


class StatusFile:
    """Writes the status of this process's run. A file that cannot be written does not disturb the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._status = Status(process=os.getpid(), host=socket.gethostname())
        self._totals: dict[Task, list[tuple[int, float]]] = {}
        self._next = 0.0  # by time.monotonic
        self._write()

    def note(self, task: Task, report: Report) -> None:
        """Take a point of a running cell's loss curve."""
        if report.losses:
            points = self._totals.setdefault(task, [])
            points.append((report.step, sum(report.losses.values())))
            if len(points) > 2 * POINTS:
                del points[1::2]

    def update(
        self, done: int, cells: int, left: float | None, running: Mapping[Task, Report], failures: Mapping[str, str]
    ) -> None:
        """Write how far the run is, if the last writing is some seconds old."""
        self._status = self._status.model_copy(
            update={
                "done": done,
                "cells": cells,
                "seconds_left": left,
                "running": tuple(self._cell(task, report) for task, report in running.items()),
                "failures": dict(failures),
            }
        )
        if time.monotonic() >= self._next:
            self._write()

    def end(self, words: str) -> None:
        """Write that the run has ended, and how."""
        self._status = self._status.model_copy(update={"ended": words, "running": (), "seconds_left": None})
        self._write()

    def _cell(self, task: Task, report: Report) -> RunningCell:
        return RunningCell(
            name=task.name,
            phase=report.phase,
            step=report.step,
            steps=task.steps,
            step_ms=report.step_ms,
            losses=report.by_method,
            totals=tuple(self._totals.get(task, ())),
            evaluated=report.evaluated,
        )

    def _write(self) -> None:
        self._next = time.monotonic() + WRITE_SECONDS
        with suppress(OSError):
            files.write_atomic(self._path, self._status.model_dump_json().encode())


def read_status(path: Path) -> Status | None:
    """The status of a run; None if there is none, or none that this version of kdtoolkit can read."""
    with suppress(OSError, ValidationError):
        return Status.model_validate_json(path.read_bytes())
    return None
