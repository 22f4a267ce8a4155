"""Simulates processes that train together, one after another in this process. A check needs no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from kdtoolkit import processes

T = TypeVar("T")

ROUNDS = 50


def side_by_side(steps: Sequence[Callable[[], T]]) -> list[T]:
    """Run each step as if it were in a process of its own; `kdtoolkit.processes` sums over all of them.

    The steps must be repeatable, since each is run several times. In each round, a step's sums use what the other
    steps added in the round before. The rounds end when these numbers no longer change. (Threads would not do: before
    Python 3.12 a `functools.cached_property` lets one thread in at a time.)

    Raises AssertionError if one step sums more often than another, or if the numbers change in every round.
    """
    handed: list[list[Tensor]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        before, handed = handed, [[] for _ in steps]
        results = [_run(steps[i], i, before, handed[i]) for i in range(len(steps))]
        counts = [len(parts) for parts in handed]
        if len(set(counts)) > 1:
            raise AssertionError(
                f"the processes sum over each other {', '.join(map(str, counts))} times in the same step, so that one "
                "waits for another for ever: sum in each step, also where there is nothing to count"
            )
        if all(_equal(*parts) for parts in zip(before, handed, strict=True)):
            return results
    raise AssertionError(f"what the processes sum over each other changes in each of {ROUNDS} runs of the same step")


def _run(step: Callable[[], T], rank: int, before: Sequence[Sequence[Tensor]], handed: list[Tensor]) -> T:
    """One step; what it hands to each sum is added to `handed`."""

    def summed(x: Tensor) -> Tensor:
        call = len(handed)
        handed.append(x.detach().clone())
        # In the first round the others are taken to have the same.
        parts = [parts[call] if i != rank and call < len(parts) else handed[call] for i, parts in enumerate(before)]
        return torch.stack(parts).sum(0)

    with (
        mock.patch.object(processes, "count", return_value=len(before)),
        mock.patch.object(processes, "_summed", summed),
    ):
        return step()


def _equal(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(before) == len(now) and all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
