"""Where cells run: what the runner asks of it. `workers.py` is this machine, `ray_workers.py` a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kdtoolkit.benchmark.cell import Failure, Report, Task
from kdtoolkit.benchmark.datasets import DataSets
from kdtoolkit.engine.hardware import device_name, machine
from kdtoolkit.engine.precision import Precision, resolve_precision


@dataclass(frozen=True)
class Hardware:
    """What cells are computed on.

    `device`: `cpu` or `cuda`. `device_name`: `cpu`, or the name of the GPU. `machine`: processor, cores and system, in
    words. `precision`: what `auto` means on it.
    """

    device: str
    device_name: str
    machine: str
    precision: Precision

    @classmethod
    def here(cls, device: str) -> Hardware:
        """This machine, with this device."""
        return cls(device, device_name(device), machine(), resolve_precision("auto", device))

    def __str__(self) -> str:
        return self.machine if self.device == "cpu" else self.device_name


@dataclass(frozen=True)
class Ended:
    """A cell has ended; `failure` says why if it is not finished. A finished cell's result is in the store."""

    failure: Failure | None


class Executor(Protocol):
    """Runs cells, several at a time. The runner starts no more than `slots`, and reads `events` until each has ended.

    `threads`: how many threads each cell uses.
    """

    threads: int

    @property
    def hardware(self) -> Hardware:
        """What the cells are computed on."""

    @property
    def slots(self) -> int:
        """How many cells can run at the same time. It may change while they run."""

    def __len__(self) -> int:
        """How many cells were started and have not ended."""

    def begin(self, sets: DataSets) -> None:
        """Make the data ready that all tasks use. Called once, before the first task. Raises KDError."""

    def start(self, task: Task) -> None:
        """Start a cell."""

    def events(self, timeout: float) -> Iterator[tuple[Task, Report | Ended]]:
        """What the cells reported. Waits at most `timeout` seconds, and no longer than until the first report.

        Raises StoreError if no result can be stored any more.
        """

    def stop(self) -> None:
        """End all cells now. What they have not stored is lost, except for their checkpoints."""
