"""`kd benchmark watch`: shows runs while they work, from their files alone, on any machine that sees their disk."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from itertools import pairwise
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdtoolkit.benchmark.cells import Cells
from kdtoolkit.benchmark.runs import find_runs, open_run
from kdtoolkit.benchmark.status import RunningCell, Status, read_status
from kdtoolkit.benchmark.store import Store
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.words import counted, duration

LOOK_SECONDS = 1.0  # between two looks at the files
PLAIN_SECONDS = 30.0  # between two lines in an output that is no terminal
SILENT_SECONDS = 300.0  # without a new status, after which a run is taken for dead; usually one comes every 2 seconds
GONE_SECONDS = 10.0  # without a new status, after which a run is dead if no process here has its number
_QUIET_SECONDS = 30.0  # after which the silence is told
_WIDTH = 20  # characters of a curve
_BLOCKS = "▁▂▃▄▅▆▇█"
_INDENT = " " * len("running    ")
_ASCII = "_.:-=+*#"


class State(Enum):
    """What is known of a run's process."""

    RUNNING = "running"
    ENDED = "ended"
    DEAD = "dead"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Seen:
    """A run as it was when its files were read. `age`: seconds since its status was written."""

    name: str
    state: State
    status: Status | None
    age: float
    cells: Cells

    @property
    def headline(self) -> str:
        """The run in one sentence."""
        stored = counted(sum(map(len, self.cells.rows.values())), "finished cell")
        if self.status is None:
            return f"{self.name}: no run works here, or none that has left a status; it has {stored}"
        who = f"process {self.status.process} on {self.status.host}"
        far = f"{self.status.done} of {self.status.cells} cells done" if self.status.cells else "starting"
        if self.state is State.ENDED:
            return f"{self.name}: ended {duration(self.age)} ago, {self.status.ended}; it has {stored}"
        if self.state is State.DEAD:
            return (
                f"{self.name}: dead. Its last sign of life, {far}, is {duration(self.age)} old ({who}): it was killed, "
                "or its machine stopped. The same `kd benchmark run` goes on from there"
            )
        silence = f", no sign of life for {duration(self.age)}" if self.age > _QUIET_SECONDS else ""
        return f"{self.name}: {far}, {_left(self.status, self.age)} ({who}{silence})"


class Watched:
    """A run's folder that is looked at again and again. Results are read again only when they have changed."""

    def __init__(self, root: Path) -> None:
        self._store = Store(root)
        self._stored: tuple[tuple[str, int], ...] | None = None
        self._cells = Cells({}, None, ())
        self._written = 0
        self._changed: float | None = None  # by time.monotonic, when the status changed while it was looked at

    def look(self) -> Seen:
        """The run as it is now. Raises KDError if a newer version of kdtoolkit has written its files."""
        status, age = self._status()
        stored = tuple(sorted((str(path), _written(path)) for path in self._results()))
        if stored != self._stored:
            self._stored, self._cells = stored, open_run(self._store.root).cells
        return Seen(self._store.root.name, _state(status, age), status, age, self._cells)

    def _results(self) -> list[Path]:
        return [self._store.teacher_copy, *self._store.root.glob("cells/*/seed*.json")]

    def _status(self) -> tuple[Status | None, float]:
        path = self._store.status_path
        if (status := read_status(path)) is None:
            return None, 0.0
        written = _written(path)
        if self._written not in (0, written):
            self._changed = time.monotonic()
        self._written = written
        if self._changed is not None:  # clocks of two machines may differ, so only the first look asks the calendar
            return status, time.monotonic() - self._changed
        return status, max(0.0, time.time() - written / 1e9)


def watch(path: Path, *, console: Console, once: bool = False) -> None:
    """Show a run, or all runs of a folder, until none works any more.

    Args:
        path: the folder of a run, or a folder of such folders.
        console: where to show them. A terminal is drawn anew each second; any different output gets a line at times.
        once: show them once.

    Raises KDError if there is no run, or if its files cannot be read.
    """
    runs = [Watched(root) for root in find_runs(path)]
    seen = [run.look() for run in runs]
    if not once:
        seen = _follow(runs, seen, console)
    console.print(_shown(seen, console))


def _follow(runs: Sequence[Watched], seen: list[Seen], console: Console) -> list[Seen]:
    """Look at the runs until none works any more, or until Ctrl-C. Gives what was seen last."""
    told = time.monotonic() - PLAIN_SECONDS
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while any(each.state is State.RUNNING for each in seen):
                if console.is_terminal:
                    live.update(_shown(seen, console), refresh=True)
                elif time.monotonic() - told >= PLAIN_SECONDS:
                    told = time.monotonic()
                    for each in seen:
                        console.print(Text(each.headline), soft_wrap=True)
                time.sleep(LOOK_SECONDS)
                seen = [run.look() for run in runs]
        except KeyboardInterrupt:
            pass
    return seen


def _written(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _state(status: Status | None, age: float) -> State:
    if status is None:
        return State.UNKNOWN
    if status.ended:
        return State.ENDED
    # A number that no process has proves nothing alone: two containers may have one host name and numbers of their own.
    here = status.host == socket.gethostname() and os.name == "posix"
    silence = GONE_SECONDS if here and not _exists(status.process) else SILENT_SECONDS
    return State.DEAD if age > silence else State.RUNNING


def _exists(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)  # no signal: it asks alone
    except ProcessLookupError:
        return False
    except PermissionError:  # of a different user
        return True
    return True


def _left(status: Status, age: float) -> str:
    if status.seconds_left is None:
        return "no estimate of the time left yet"
    seconds = max(0.0, status.seconds_left - age)
    at = datetime.now() + timedelta(seconds=seconds)
    return f"about {duration(seconds)} left, until about {at:%H:%M}"


def _shown(seen: Sequence[Seen], console: Console) -> RenderableType:
    """All runs: those that work in full; of several that do not, one sentence each."""
    parts: list[RenderableType] = []
    for each in seen:
        parts.append(Text(each.headline, style="bold" if each.state is State.RUNNING else ""))
        if len(seen) == 1 or each.state is State.RUNNING:
            parts += _details(each, console)
    return Group(*parts)


def _details(seen: Seen, console: Console) -> Iterator[RenderableType]:
    if seen.state is State.RUNNING and seen.status is not None:
        for cell in seen.status.running:
            yield from _running(cell, console)
        for name, reason in seen.status.failures.items():
            yield Text(f"FAILED    {name}: {reason}", style="bold red")
    rows = [(row, found) for row, found in seen.cells.rows.items() if found]
    if seen.cells.teacher is not None:
        rows.insert(0, (TEACHER, [seen.cells.teacher]))
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("finished so far", overflow="fold")
    for heading in ("seeds", "AP", "lowest to highest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, found in rows:
        aps = [ap for result in found if (ap := result.evaluation["ap"]) is not None]
        mean = f"{statistics.fmean(aps):.1f}" if aps else "undefined"
        spread = f"{min(aps):.1f} to {max(aps):.1f}" if len(aps) > 1 else ""
        table.add_row(Text(row), str(len(found)), mean, spread)
    yield table


def _running(cell: RunningCell, console: Console) -> Iterator[RenderableType]:
    where = f"{cell.step}/{cell.steps}" if cell.steps else ""
    pace = "" if cell.step_ms is None else f"{cell.step_ms:.0f} ms/step"
    losses = "  ".join(f"{method} {value:.3g}" for method, value in cell.losses.items())
    yield Text("  ".join(part for part in ("running  ", cell.name, cell.phase, where, pace) if part))
    if losses:
        yield Text(f"{_INDENT}{losses}")
    aps = [(step, ap) for step, ap in cell.evaluated if ap is not None]
    curves = []
    if len(cell.totals) > 1:
        curves.append(f"loss {_curve([value for _, value in cell.totals], console)}")
    if aps:
        curve = f"{_curve([ap for _, ap in aps], console)} " if len(aps) > 1 else ""
        curves.append(f"AP {curve}{aps[-1][1]:.1f} after step {aps[-1][0]}")
    if curves:
        yield Text(f"{_INDENT}{'   '.join(curves)}")


def _curve(values: Sequence[float], console: Console) -> str:
    """A curve in one line, from its lowest to its highest value."""
    marks = _ASCII if console.options.ascii_only else _BLOCKS
    count = min(_WIDTH, len(values))
    edges = [place * len(values) // count for place in range(count + 1)]
    means = [statistics.fmean(values[first:end]) for first, end in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(marks[round((len(marks) - 1) * (value - low) / (high - low or 1.0))] for value in means)
