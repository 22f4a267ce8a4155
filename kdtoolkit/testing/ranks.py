"""Several processes that train together, played by threads of one process, so that a check needs no process group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from kdtoolkit import processes

T = TypeVar("T")

_local = threading.local()


class _Rank:
    """One of the processes. Each hands what it sums to all, and takes one part of each, in order."""

    def __init__(self, inboxes: Sequence[SimpleQueue[Tensor | None]]) -> None:
        self.outboxes: list[SimpleQueue[Tensor | None]] = []
        self.inboxes = inboxes

    def send(self, part: Tensor | None) -> None:
        for outbox in self.outboxes:
            outbox.put(part)

    def summed(self, x: Tensor) -> Tensor:
        self.send(x.detach())
        parts = [part for part in (inbox.get() for inbox in self.inboxes) if part is not None]
        if len(parts) < len(self.inboxes):
            raise AssertionError(
                "a process sums over processes more often than another in the same step, so it waits for ever"
            )
        return torch.stack(parts).sum(0)


def side_by_side(steps: Sequence[Callable[[], T]]) -> list[T]:
    """Run each step as if it were in a process of its own; `kdtoolkit.processes` sums over all of them.

    The steps must not share what they change. Raises the first step's error, if one fails, and AssertionError where one
    step sums more often than another.
    """
    queues = [[SimpleQueue[Any]() for _ in steps] for _ in steps]
    ranks = [_Rank(queues[i]) for i in range(len(steps))]
    for i, rank in enumerate(ranks):
        rank.outboxes = [inboxes[i] for inboxes in queues]
    results: list[Any] = [None] * len(steps)
    errors: list[BaseException | None] = [None] * len(steps)

    def run(i: int) -> None:
        _local.rank = ranks[i]
        try:
            results[i] = steps[i]()
        except BaseException as error:  # handed to the thread that asked
            errors[i] = error
        finally:
            ranks[i].send(None)

    with (
        mock.patch.object(processes, "count", lambda: len(steps)),
        mock.patch.object(processes, "_summed", lambda x: _local.rank.summed(x)),
    ):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(steps))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Where one process fails, the others fail after it, because they wait for it in vain.
    failed = [error for error in errors if error is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, AssertionError)):
        raise error
    return results
