"""What a run shows while it works: a line with the remaining time on a terminal, plain lines in any other output."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from kdtoolkit.engine.result import Progress as Training
from kdtoolkit.errors import printable
from kdtoolkit.words import duration

PLAIN_SECONDS = 30.0  # between two lines in an output that is no terminal
LONG_SECONDS = 2 * 3600.0  # of a training, from which on the user is told how to shorten it
FIRST_STEPS = 10  # before the time is estimated


class Clock:
    """Estimates how long a training still takes, from its steps and evaluations so far."""

    def __init__(self, steps: int, evaluations: int, evaluation_seconds: float) -> None:
        self._evaluations = evaluations
        self._evaluation_seconds = evaluation_seconds
        self._steps = steps
        self._first: Training | None = None
        self._last: tuple[float, float] | None = None  # wall and training seconds of the last report

    def left(self, now: Training, wall: float) -> float | None:
        """Seconds until the training ends; None as long as too few steps are done."""
        if self._last is not None and (paused := wall - self._last[0] - (now.seconds - self._last[1])) > 0.5:
            self._evaluation_seconds = paused
        self._last = wall, now.seconds
        if self._first is None:
            self._first = now  # the first steps are slower: memory is allocated, kernels are chosen
        done = now.step - self._first.step
        if done < min(FIRST_STEPS, self._steps // 3):
            return None
        if not done:
            return 0.0
        pace = (now.seconds - self._first.seconds) / done
        evaluations = self._evaluations - now.step * self._evaluations // self._steps
        return (self._steps - now.step) * pace + evaluations * self._evaluation_seconds


class Display:
    """Shows one training or evaluation after the other. It is a context manager, which leaves the terminal clean."""

    def __init__(self, console: Console, loud: Console) -> None:
        """`loud` is the console for what the user must see even if all else is quiet."""
        self.console = console
        self._loud = loud
        self.evaluation_seconds = 0.0  # that the last evaluation took
        self._bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.quiet,
        )
        self._told: set[str] = set()
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def line(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self.console.print(Text(printable(text), style=style), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning, once."""
        if text not in self._told:
            self._told.add(text)
            self._loud.print(Text(printable(f"warning: {text}"), style="bold yellow"), soft_wrap=True)

    def counting(self, what: str) -> Callable[[int, int], None]:
        """A bar for something that is counted; give it how much is done, and of how much."""
        bar = self._bars.add_task(what, total=1, text="", visible=False)

        def count(done: int, total: int) -> None:
            self._bars.update(bar, completed=done, total=total, visible=done < total)

        return count

    def part(self, what: str, until: int) -> Callable[[Training], None]:
        """A bar for one of many trainings, up to a step. Its warnings and its end are for the caller to tell."""
        bar = self._bars.add_task(what, total=until, text="", visible=False)

        def show(now: Training) -> None:
            self._bars.update(bar, completed=now.step, text=_in_words(now.losses), visible=now.step < until)

        return show

    def training(self, what: str, clock: Clock, *, another: bool = False) -> Callable[[Training], None]:
        """What shows the progress of a training; `another`: one more follows, which takes no longer than this one."""
        bar = self._bars.add_task(what, total=1, text="", visible=False)
        self._last_line = time.monotonic()
        estimated = False

        def show(now: Training) -> None:
            nonlocal estimated
            wall = time.monotonic()
            left = clock.left(now, wall)
            losses = _in_words(now.losses)
            text = losses if left is None else f"{duration(left)} left  {losses}"
            self._bars.update(bar, completed=now.step, total=now.steps, text=text, visible=now.step < now.steps)
            for warning in now.warnings:
                self.warn(warning)
            if left is not None and not estimated and now.step < now.steps:
                estimated = True
                end = datetime.now() + timedelta(seconds=2 * left if another else left)
                then = "then it trains without teacher; the run ends by" if another else "the run ends at"
                day = "" if end.date() == datetime.now().date() else f" on {end:%A}"
                self.line(f"{what}: about {duration(left)}; {then} about {end:%H:%M}{day}")
                if left > LONG_SECONDS:
                    self.line("Fewer --epochs or a smaller --image-size make it shorter, with a new --out")
            elif not self.console.is_terminal and wall - self._last_line > PLAIN_SECONDS:
                self._last_line = wall
                self.line(f"{what}: step {now.step}/{now.steps}  {text}")

        return show


def _in_words(losses: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in _by_method(losses).items())


def _by_method(losses: dict[str, float]) -> dict[str, float]:
    """One number for each method: there is no room for all terms."""
    sums: dict[str, float] = {}
    for name, value in losses.items():
        method = name.partition("/")[0]
        sums[method] = sums.get(method, 0.0) + value
    return sums
