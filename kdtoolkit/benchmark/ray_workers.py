"""Cells on a Ray cluster. It is imported only where Ray is asked for (`pip install 'kdtoolkit[ray]'`)."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError

from kdtoolkit.benchmark.cell import Failure, Report, Task
from kdtoolkit.benchmark.datasets import DataSets
from kdtoolkit.benchmark.executor import Ended, Hardware
from kdtoolkit.benchmark.keys import key_of
from kdtoolkit.benchmark.needs import Place, paths_of, place_of, places_of_data
from kdtoolkit.benchmark.remote import Begun, Done, Sent, run_shipped
from kdtoolkit.benchmark.store import discard_runs, holding, usable_result, write_atomic
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.errors import KDError
from kdtoolkit.words import counted

RETRIES = 3  # of a cell whose worker has died
NODES_SECONDS = 5.0  # between two looks at the cluster's nodes, which may come and go
REACH_SECONDS = 5.0  # for the cluster's head to answer; Ray itself tries for many minutes, and says nothing
WAIT_SECONDS = 30.0  # without a reply of a busy cluster, after which the wait is told


@dataclass(eq=False)
class _Cell:
    """A cell on the cluster, or one that waits for its teacher's lock. `begun`: where it runs, once it does."""

    task: Task
    messages: Any = None  # Ray's generator of the cell's messages
    begun: Begun | None = None
    retries: int = 0
    lost_on: list[str] = field(default_factory=list)  # the node of each worker that died
    told_waiting: bool = False
    held: ExitStack = field(default_factory=ExitStack)


class _HeldByOtherError(Exception):
    pass


class RayWorkers:
    """Runs cells on a Ray cluster, each with one GPU, or on `threads` CPUs. It is an `Executor`, and a context manager.

    Data and weights are sent to each node once. Results come back into the store of this machine. A cell whose worker
    died is started again, up to 3 times.

    Args:
        address: the cluster: HOST:PORT of its head. None: the cluster that runs on this machine (`ray start`), or else
            one that is started here, and ends with the context. If Ray is initialised already, that cluster is used.
        device: `cpu` or `cuda`. None: `cuda` if the cluster has GPUs.
        slots: how many cells run at the same time. None: as many as the nodes have room for. More than that makes a
            cluster grow, if it can.
        threads: CPUs of each cell. None: 1 without GPUs; with GPUs, a GPU's share of its node's CPUs.
        tell: called with one line if a node has to be waited for.

    Raises KDError if the cluster cannot be reached, has no node with enough CPUs and GPUs, or lacks kdtoolkit.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        device: str | None = None,
        slots: int | None = None,
        threads: int | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self._owns = not ray.is_initialized()
        if self._owns:
            _connect(address)
        try:
            nodes = _nodes()
            self._device = device or ("cuda" if any(node.get("GPU") for node in nodes) else "cpu")
            self._kind = _kind_of_gpu(nodes) if self._device == "cuda" else ""
            usable = self._usable(nodes)
            if not usable and slots is None:
                raise KDError(
                    f"the Ray cluster has no GPU among {counted(len(nodes), 'node')}: use --device cpu, or start Ray "
                    "on a machine that has one"
                )
            shares = [int(node["CPU"] // node["GPU"]) for node in usable if self._device == "cuda"]
            self.threads = threads or max(1, min(shares, default=1))
            self._given_slots = slots
            self._slots, self._looked = 0, float("-inf")
            if not self.slots:
                raise KDError(
                    f"no node of the Ray cluster has {counted(self.threads, 'CPU')} for a cell: ask for fewer "
                    "(--threads)"
                )
            self._hardware = self._probed(tell)
        except BaseException:
            self.close()
            raise
        self._remote = cell_on(self._device)
        self._sets: DataSets | None = None
        self._sent: dict[Path, Sent] = {}
        self._data: list[Sent] = []
        self._cells: list[_Cell] = []
        self._idle_since: float | None = None  # when cells began to wait while none of them runs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, unless Ray was initialised before. A cluster that was started here ends."""
        if self._owns:
            ray.shutdown()

    @property
    def hardware(self) -> Hardware:
        """What the first node that answered computes on; its `machine` says how many nodes there are."""
        return self._hardware

    @property
    def slots(self) -> int:
        """How many cells can run at the same time, on the nodes that there are now."""
        if self._given_slots is not None:
            return self._given_slots
        if time.monotonic() - self._looked > NODES_SECONDS:
            self._looked = time.monotonic()
            usable = self._usable(_nodes())
            per = [[node["CPU"] // self.threads, *([node["GPU"]] if self._device == "cuda" else [])] for node in usable]
            self._slots = sum(int(min(room)) for room in per)
        return self._slots

    def places(self) -> dict[Task, Begun]:
        """Where each cell runs that has begun: the node, and the process of Ray's worker on it."""
        return {cell.task: cell.begun for cell in self._cells if cell.begun is not None}

    def __len__(self) -> int:
        return len(self._cells)

    def begin(self, sets: DataSets) -> None:
        """Take note of the data, which is sent with the first task. The nodes decode photos.

        What an earlier run has sent is forgotten: its data may be other data, and its teacher's file other weights.
        """
        self._sets, self._data, self._sent = sets, [], {}

    def start(self, task: Task) -> None:
        """Start a cell on the cluster."""
        cell = _Cell(task)
        self._cells.append(cell)
        if task.entry != TEACHER:
            self._submit(cell)

    def events(self, timeout: float) -> Iterator[tuple[Task, Report | Ended]]:
        """What the cells reported. Waits at most `timeout` seconds, and no longer than until the first report.

        Raises StoreError if a result cannot be stored.
        """
        for cell in [cell for cell in self._cells if cell.messages is None]:
            yield from self._take_teacher(cell)
        yield from self._told_idle()
        cells = {cell.messages: cell for cell in self._cells if cell.messages is not None}
        if not cells:
            time.sleep(min(timeout, 0.2))
            return
        ready, _ = ray.wait(list(cells), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(list(cells), num_returns=len(cells), timeout=0)
        for messages in ready:
            yield from self._next(cells[messages])

    def stop(self) -> None:
        """End all cells now. What they have not stored is lost, except for their checkpoints on the nodes."""
        for cell in self._cells:
            if cell.messages is not None:
                ray.cancel(cell.messages, force=True)
            cell.held.close()
        self._cells.clear()

    def _told_idle(self) -> Iterator[tuple[Task, Report]]:
        """One line if cells wait for the cluster and none of them runs."""
        waiting = [cell for cell in self._cells if cell.messages is not None]
        if not waiting or any(cell.begun for cell in waiting):
            self._idle_since = None
            return
        if self._idle_since is None:
            self._idle_since = time.monotonic()
        if time.monotonic() - self._idle_since >= WAIT_SECONDS:
            self._idle_since = float("inf")  # told once, until a cell runs
            yield waiting[0].task, Report("waiting", notice=f"no cell runs yet: {self._wait}")

    def _take_teacher(self, cell: _Cell) -> Iterator[tuple[Task, Report | Ended]]:
        """Start a teacher, once no different run trains it; it may be done then."""

        def taken(holder: str) -> None:
            raise _HeldByOtherError(holder)

        task = cell.task
        try:
            cell.held.enter_context(holding(task.lock_folder, taken))
        except _HeldByOtherError as holder:
            if not cell.told_waiting:
                cell.told_waiting = True
                yield task, Report("waiting", notice=f"teacher: waits for {holder}, which trains the same teacher")
            return
        if usable_result(task.result, lambda found: found.key == key_of(task.parts)) is None:
            self._submit(cell)
        else:
            yield task, self._end(cell, None)

    def _submit(self, cell: _Cell) -> None:
        task = cell.task
        if not self._data:
            assert self._sets is not None  # `begin` comes before the first task
            self._data = [self._send(place) for place in places_of_data(task.data, self._sets, task.pictures)]
        files = [self._sent.get(path) or self._send(place_of(path)) for path in paths_of(task)]
        name = hashlib.sha256(f"{socket.gethostname()} {task.result.absolute()}".encode()).hexdigest()[:32]
        cell.begun = None
        cell.messages = self._remote.options(**self._options()).remote(task, [*self._data, *files], name)

    def _send(self, place: Place) -> Sent:
        """Put a place into the cluster's store of objects, from which nodes fetch it."""
        pieces = [ray.put(piece) for piece in place.parcel.pieces()]
        sent = Sent(place.path, place.inside, place.parcel.digest, partial(_fetched, pieces))
        self._sent[place.path] = sent
        return sent

    def _next(self, cell: _Cell) -> Iterator[tuple[Task, Report | Ended]]:
        """The next message of a cell that has one."""
        try:
            message = ray.get(next(cell.messages))
        except (RayError, StopIteration) as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
                # An error in the code on the node, which a second try would meet again.
                yield cell.task, self._end(cell, Failure(_last_line(error), str(error)))
            else:
                yield self._again(cell, _why_lost(error))
        else:
            if isinstance(message, Begun):
                cell.begun = message
                yield cell.task, Report(f"on {message.node}")
            elif isinstance(message, Report):
                yield cell.task, message
            else:
                self._store(cell.task, message)
                if message.lost and message.failure is not None:
                    yield self._again(cell, message.failure.message)
                else:
                    yield cell.task, self._end(cell, message.failure)

    def _store(self, task: Task, done: Done) -> None:
        """Write a cell's files, the result last: no result may lack its weights."""
        for name in sorted(done.files, key=lambda name: name == task.result.name):
            write_atomic(task.result.parent / Path(name).name, done.files[name])
        for name, content in done.tracked.items():
            if task.tracked_in is not None:
                write_atomic(task.tracked_in / name, content)
        if done.failure is None:
            discard_runs(task.result)

    def _again(self, cell: _Cell, why: str) -> tuple[Task, Report | Ended]:
        """Start a cell again whose worker died, if it has not been too often."""
        node = "" if cell.begun is None else f" on {cell.begun.node}"
        if cell.begun is not None:
            cell.lost_on.append(cell.begun.node)
        if cell.retries == RETRIES:
            tried = f" (on {', '.join(cell.lost_on)})" if cell.lost_on else ""
            return cell.task, self._end(cell, Failure(f"{why}{node}; it was started {RETRIES + 1} times{tried}"))
        cell.retries += 1
        self._submit(cell)
        told = f"{cell.task.name}: {why}{node}; it is started again ({cell.retries} of {RETRIES})"
        return cell.task, Report("starting again", notice=told)

    def _end(self, cell: _Cell, failure: Failure | None) -> Ended:
        self._cells.remove(cell)
        cell.held.close()
        return Ended(failure)

    def _usable(self, nodes: list[dict[str, float]]) -> list[dict[str, float]]:
        """The nodes that cells run on: with GPUs, those of one kind, since a board compares times."""
        if self._device == "cpu":
            return nodes
        return [node for node in nodes if node.get("GPU") and (not self._kind or self._kind in node)]

    def _probed(self, tell: Callable[[str], None]) -> Hardware:
        """What a node computes on. Raises KDError if kdtoolkit does not work there.

        It needs no free CPU, so a busy cluster answers. A GPU must be free, or its name is not known.
        """
        asked = _hardware.options(**{**self._options(), "num_cpus": 0}).remote(self._device)
        try:
            if not ray.wait([asked], timeout=WAIT_SECONDS)[0]:
                tell(f"no node has answered yet: {self._wait}")
            found: Hardware = ray.get(asked)
        except RayError as error:
            raise KDError(
                f"a node of the Ray cluster cannot run cells ({_last_line(error)}): install kdtoolkit on all nodes, "
                "with the same version and extras as here"
            ) from error
        except BaseException:
            ray.cancel(asked)  # never after its answer: Ray 2.60 aborts this process if a task ends as it is cancelled
            raise
        nodes = counted(len(_nodes()), "node")
        return Hardware(found.device, found.device_name, f"a Ray cluster of {nodes}, {found.machine}", found.precision)

    @property
    def _wait(self) -> str:
        """What is waited for, in words."""
        needs = f"{counted(self.threads, 'CPU')}{' and a GPU' if self._device == 'cuda' else ''}"
        return f"waiting for a node of the Ray cluster with {needs} free for a cell (`ray status` shows what is in use)"

    def _options(self) -> dict[str, Any]:
        """What Ray reserves for a cell."""
        gpus = int(self._device == "cuda")
        return {
            "num_cpus": self.threads,
            "num_gpus": gpus,
            "max_retries": 0,  # Ray's own would repeat all reports; here each retry is named
            "resources": {self._kind: 0.001} if self._kind else {},
        }


def cell_on(device: str) -> Any:
    """The remote function that runs a cell. On a GPU, Ray starts a new worker for each cell.

    A worker's server of processes keeps the GPU that the worker had at first, and Ray may give its next cell another.
    """
    return ray.remote(max_calls=1 if device == "cuda" else 0)(_cell)  # 0: any number


def _cell(task: Task, sent: list[Sent], name: str) -> Iterator[Begun | Report | Done]:
    yield from run_shipped(task, sent, name)


@ray.remote
def _hardware(device: str) -> Hardware:
    return Hardware.here(device)


def _fetched(pieces: list[Any]) -> Iterable[bytes]:
    """A parcel's pieces, one at a time."""
    return (ray.get(piece) for piece in pieces)


def _connect(address: str | None) -> None:
    """Join a cluster, or start one here. Raises KDError."""
    _check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here tells nobody
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address or "auto", **quiet)
    except ConnectionError as error:
        if address is not None:
            raise KDError(f"there is no Ray cluster at {address} ({error}): see `ray status` on its head") from error
        _start_here(quiet)
    except (RuntimeError, ValueError) as error:  # versions that differ; no address
        raise KDError(f"cannot join the Ray cluster: {error}") from error


def _start_here(quiet: dict[str, Any]) -> None:
    """Start a cluster on this machine. Raises KDError."""
    try:
        ray.init(address="local", include_dashboard=False, **quiet)
    except OSError as error:  # a folder for temporary files that is full, or too long for the names of sockets
        raise KDError(
            f"Ray cannot start on this machine: {error}. Name a short folder with room, as in RAY_TMPDIR=/tmp"
        ) from error


def _check_reachable(given: str | None) -> None:
    """Check that a cluster answers at the address that Ray would take. Raises KDError."""
    of_shell = os.environ.get("RAY_ADDRESS", "")
    if given is not None:
        address, mend = given, "see `ray status` on its head"
    elif of_shell:
        address, mend = of_shell, "the variable RAY_ADDRESS names it: set it to a cluster that runs, or unset it"
    else:
        noted = _file_of_current_cluster()
        address = noted.read_text("utf-8").strip() if noted.is_file() else ""
        mend = f"{noted} names it: delete this file if the cluster has ended, or name a different one (--ray-address)"
    if address.startswith("ray://"):
        raise KDError(
            f"{address} is the address of a Ray Client, which cannot run cells: call the command on a node of the "
            "cluster, without --ray-address and without the variable RAY_ADDRESS"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # none, or one that Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the latter two: no port, no name
        raise KDError(f"there is no Ray cluster at {address} ({error}): {mend}") from error


def _file_of_current_cluster() -> Path:
    """The file in which `ray start` notes the cluster's address, and which is left if the machine stops."""
    folder = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None)
    return Path(folder or "/tmp", "ray", "ray_current_cluster")


def _nodes() -> list[dict[str, float]]:
    """What each living node with CPUs has."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [each for each in resources if each.get("CPU")]


def _kind_of_gpu(nodes: list[dict[str, float]]) -> str:
    """The kind of GPU that the cluster has most of, as Ray's name of a resource; empty if Ray does not know any."""
    counts: dict[str, float] = {}
    for node in nodes:
        for name in node:
            if name.startswith("accelerator_type:"):
                counts[name] = counts.get(name, 0.0) + node.get("GPU", 0.0)
    return max(counts, key=lambda name: counts[name], default="")


def _why_lost(error: BaseException) -> str:
    if isinstance(error, OutOfMemoryError):
        return "its worker was ended, because the node's memory was full,"
    if isinstance(error, NodeDiedError):
        return "its node died"
    return "its worker died"


def _last_line(error: BaseException) -> str:
    """An error of a node without its traceback."""
    return str(error).strip().rpartition("\n")[2]
