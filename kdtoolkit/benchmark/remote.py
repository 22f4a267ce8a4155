"""A cell on a machine that shares no disk with the run: files come as parcels, reports and results go back as messages.

Nothing here knows how they travel.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdtoolkit.benchmark.cell import Failure, Report, Task
from kdtoolkit.benchmark.executor import Ended
from kdtoolkit.benchmark.keys import package_digest
from kdtoolkit.benchmark.needs import TRACKED, moved
from kdtoolkit.benchmark.parcels import cache_folder, cell_folder, pictures_folder, teacher_cache_folder, unpack
from kdtoolkit.benchmark.store import StoreError, writing
from kdtoolkit.benchmark.workers import Workers
from kdtoolkit.engine.hardware import device_name
from kdtoolkit.errors import KDError
from kdtoolkit.lock import hold

REPORT_SECONDS = 1.0  # between two reports of a cell; hundreds of cells report to one process


@dataclass(frozen=True)
class Sent:
    """A place that the task names, and how to get it: `pieces` are those of the parcel `digest`."""

    path: Path
    inside: str
    digest: str
    pieces: Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Begun:
    """The first message of a cell: where it runs. `node`: the machine's name. `process`: the process that sends."""

    node: str
    process: int


@dataclass(frozen=True)
class Done:
    """The last message of a cell: the files that belong beside its result, by name, and why it failed, if it did.

    `tracked`: the files that belong into its folder of curves, by their paths in it. `lost`: whether the reason lies in
    the machine, so that the cell may succeed on a different one, or later.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    tracked: dict[str, bytes] = field(default_factory=dict)
    failure: Failure | None = None
    lost: bool = False


def run_shipped(task: Task, sent: Sequence[Sent], name: str) -> Iterator[Begun | Report | Done]:
    """Run a cell here, in a process of its own. `name` names its folder here: no different cell may have it.

    `sent`: all places that the task names; the first one has its data.

    A cell that was cut off on this machine goes on from its last checkpoint.
    """
    yield Begun(socket.gethostname(), os.getpid())
    try:
        _check_same(task)
        cache = cache_folder()
        here = {each.path: unpack(each.digest, each.pieces(), cache) / each.inside for each in sent}
        folder = cell_folder(cache, name)
        pictures = pictures_folder(cache, sent[0].digest)
        if task.teacher_cache is not None:  # each machine has its own
            here[task.teacher_cache] = teacher_cache_folder(cache, task.teacher_cache.name)
        local = moved(task, here, pictures=pictures, results=folder)
        with writing(folder), hold(local.run_folder, lambda holder: None):
            local.result.unlink(missing_ok=True)  # the process of an earlier attempt has ended, but may have left it
    except StoreError as error:
        yield Done(failure=Failure(str(error)), lost=True)
        return
    except KDError as error:
        yield Done(failure=Failure(str(error)))
        return
    failure = yield from _reports(local)
    files, tracked = _contents(folder.glob("*"), folder), _contents(folder.glob(f"{TRACKED}/**/*"), folder / TRACKED)
    if failure is None:
        shutil.rmtree(folder, ignore_errors=True)
        yield Done(files, tracked)
    else:
        message = failure.message.replace(str(folder), str(task.result.parent))
        lost = failure.died or failure.fatal
        yield Done(files, tracked, Failure(message, failure.details), lost)


def _contents(paths: Iterable[Path], folder: Path) -> dict[str, bytes]:
    """The contents of those paths that are files, by their paths relative to a folder that holds them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def _reports(task: Task) -> Generator[Report, None, Failure | None]:
    """Run a cell and give out its reports: the latest of each second, and at once those with a notice.

    Returns why it failed, if it did.
    """
    failure: Failure | None = None
    latest: Report | None = None
    told = 0.0
    workers = Workers(task.device, 1)
    try:
        workers.start(task)
        while len(workers):
            for _, event in workers.events(timeout=REPORT_SECONDS):
                if isinstance(event, Ended):
                    failure = event.failure
                    continue
                latest = event
                if event.notice or time.monotonic() - told >= REPORT_SECONDS:
                    told, latest = time.monotonic(), None
                    yield event
    finally:
        workers.stop()
    if latest is not None:
        yield latest
    return failure


def _check_same(task: Task) -> None:
    """Check that this machine computes what the run has planned. Raises KDError that says what differs."""
    node = socket.gethostname()
    planned = {"kdtoolkit's source code": task.source, "torch": task.parts["torch"], "device": task.parts["device"]}
    found = (package_digest(), torch.__version__, device_name(task.device))
    for (what, wanted), own in zip(planned.items(), found, strict=True):
        if own != wanted:
            raise KDError(
                f"node {node} has a different {what} than the run: {own}, not {wanted}. Install the same versions on "
                "all nodes, and use GPUs of one kind"
            )
