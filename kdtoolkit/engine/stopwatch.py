"""The time that a run spends in training: by the clock, and of the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures seconds by the clock, and seconds of CPU time of this process over all its threads.

    Programs that run beside it change the first, and hardly the second. `seconds`, `cpu_seconds`: where they begin.
    """

    def __init__(self, seconds: float, cpu_seconds: float) -> None:
        self._begun = [time.perf_counter() - seconds, time.process_time() - cpu_seconds]

    def read(self) -> tuple[float, float]:
        """Seconds by the clock and of CPU time, without the pauses."""
        return time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        before = self.read()
        yield
        self._begun = [begun + now - then for begun, now, then in zip(self._begun, self.read(), before, strict=True)]
