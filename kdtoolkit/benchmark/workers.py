"""Worker processes: each cell runs in a new process. So cells share no memory, and a crash ends one cell only."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from kdtoolkit.benchmark.cell import Failure, Report, Task, run
from kdtoolkit.benchmark.cell_server import context
from kdtoolkit.benchmark.datasets import DataSets
from kdtoolkit.benchmark.executor import Ended, Hardware
from kdtoolkit.benchmark.store import StoreError, writing
from kdtoolkit.engine.hardware import cores
from kdtoolkit.errors import KDError


@dataclass
class _Running:
    task: Task
    process: BaseProcess
    pipe: Connection
    failure: Failure | None = None


class Workers:
    """Runs cells on this machine, each in a process. They end with `stop`, and when this process ends, even if killed.

    `slots`: how many cells run at the same time; None: as many as the cores have room for on a CPU, 1 on a GPU.
    `threads`: of each cell; None: its share of the cores, or 1 if `slots` is None too and there is no GPU.
    """

    def __init__(self, device: str = "cpu", slots: int | None = None, threads: int | None = None) -> None:
        self.slots = slots or (max(1, cores() // (threads or 1)) if device == "cpu" else 1)
        self.threads = threads or max(1, cores() // self.slots)
        self._device = device
        self._context = context()
        self._running: list[_Running] = []

    @cached_property
    def hardware(self) -> Hardware:
        """This machine."""
        return Hardware.here(self._device)

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, sets: DataSets) -> None:
        """Draw pictures and decode photos: they are then there for all cells."""
        for images in (sets.teacher, sets.student, sets.val):
            _ = images.in_memory()[0]

    def start(self, task: Task) -> None:
        """Start a cell in a new process."""
        ours, theirs = self._context.Pipe()
        process: BaseProcess = self._context.Process(target=work, args=(task, theirs), name=task.name)  # type: ignore[attr-defined]
        process.start()
        theirs.close()  # then the pipe closes when the process ends
        self._running.append(_Running(task, process, ours))

    def events(self, timeout: float) -> Iterator[tuple[Task, Report | Ended]]:
        """What the workers reported. Waits at most `timeout` seconds, and no longer than until the first report."""
        wait([worker.pipe for worker in self._running], timeout)
        for worker in list(self._running):
            try:
                while worker.pipe.poll():
                    message = worker.pipe.recv()
                    if isinstance(message, Failure):
                        worker.failure = message
                    else:
                        yield worker.task, message
            except (EOFError, OSError):
                worker.process.join()
                worker.pipe.close()
                self._running.remove(worker)
                yield worker.task, Ended(worker.failure or _death(worker.process.exitcode))

    def stop(self) -> None:
        """End all workers now. What they have not stored is lost."""
        for worker in self._running:
            worker.process.kill()
        for worker in self._running:
            worker.process.join()
            worker.pipe.close()
        self._running.clear()


def work(task: Task, pipe: Connection) -> None:
    """Run a cell in this process. Reports, and a Failure if the cell fails, go into `pipe`; the result goes to disk."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the run; the parent ends its workers
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    log = task.result.with_suffix(".log")
    try:
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("w", encoding="utf-8")
        with file:  # output of libraries and of crashes goes into the log: on the terminal it would break the display
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            run(task, pipe.send)
        if not log.stat().st_size:
            log.unlink()
    except StoreError as error:
        pipe.send(Failure(str(error), fatal=True))
    except KDError as error:
        pipe.send(Failure(str(error)))
    except Exception as error:
        pipe.send(Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _end_with_parent(pipe: Connection) -> None:
    """End this process when the parent has ended: the parent sends nothing, so the wait lasts until its end closes."""
    with suppress(EOFError, OSError):
        pipe.recv_bytes()
    os._exit(1)


def _death(exitcode: int | None) -> Failure | None:
    if exitcode == 0:
        return None
    if exitcode is not None and exitcode < 0:
        hint = " (out of memory? try a smaller --jobs)" if exitcode == -signal.SIGKILL else ""
        return Failure(f"its process was ended by {signal.Signals(-exitcode).name}{hint}", died=True)
    return Failure(f"its process ended with exit code {exitcode}", died=True)
