"""What a run shows while it works: bars and losses on a terminal, plain lines in any other output."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from kdtoolkit.benchmark.cell import Report, Task

PLAIN_INTERVAL = 30  # seconds between two lines of progress in an output that is no terminal


class Display:
    """Shows a run on a console. It is a context manager: the terminal is left clean however the run ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._total = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} cells  {task.fields[left]}", markup=False),
            console=console,
        )
        self._cells = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20 if console.width >= 110 else 8),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
            TextColumn("{task.fields[phase]}", markup=False),
            console=console,
        )
        self._live = Live(Group(self._total, self._cells), console=console, refresh_per_second=4, transient=True)
        self._overall: TaskID | None = None
        self._bars: dict[Task, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def line(self, text: str, style: str = "") -> None:
        """Print a line that stays on the terminal; `style` is a style of rich."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def overall(self, title: str, done: int, cells: int, left: str) -> None:
        """Show how far the run is: `done` of `cells`, and the time `left` in words."""
        if self._overall is None:
            self._overall = self._total.add_task(title, total=cells, left=left)
        self._total.update(self._overall, description=title, completed=done, total=cells, left=left)
        if not self.console.is_terminal and time.monotonic() - self._last_line > PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            states = [self._cells.tasks[self._cells.task_ids.index(bar)] for bar in self._bars.values()]
            now = "; ".join(f"{s.description} {s.completed:.0f}/{s.total:.0f}" for s in states)
            self.line(f"{done}/{cells} cells, {left}. Running: {now}")

    def started(self, task: Task) -> None:
        """A cell has started."""
        self._bars[task] = self._cells.add_task(task.name, total=task.steps, phase="starting")
        if not self.console.is_terminal:
            self.line(f"started   {task.name}: {f'{task.steps} steps' if task.steps else 'evaluation'}")

    def progress(self, task: Task, report: Report) -> None:
        """A cell has reported where it is."""
        phase = report.phase
        if report.losses:  # one number for each method: there is no room for all terms
            losses = "  ".join(f"{method} {value:.3g}" for method, value in report.by_method.items())
            phase = f"{report.step_ms or 0:.0f} ms/step  {losses}{_last_ap(report)}"
        self._cells.update(self._bars[task], completed=report.step, phase=phase)

    def ended(self, task: Task, text: str, style: str = "") -> None:
        """A cell has ended; `text` says with what result."""
        self._cells.remove_task(self._bars.pop(task))
        self.line(text, style)


def _last_ap(report: Report) -> str:
    """The AP of the last evaluation, if there was one."""
    aps = [ap for _, ap in report.evaluated if ap is not None]
    return f"  AP {aps[-1]:.1f}" if aps else ""
