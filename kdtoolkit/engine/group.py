"""The processes that train one model together: joining them, and what they tell each other besides gradients."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.errors import KDError

T = TypeVar("T")


def join(device: str | None = None) -> torch.device:
    """Join the processes that `torchrun` has started; returns the device of this one.

    Call it first in a script, and move the models there. Without torchrun it only says where to train: on the first GPU
    if there is one, else on the CPU. `device="cpu"` stays on the CPU where there is a GPU. GPUs talk by NCCL, CPUs by
    gloo.
    """
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if started() == 1:
        return torch.device("cpu" if on_cpu else device or "cuda")
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu)
    atexit.register(state.destroy_process_group)
    found: torch.device = state.device
    return torch.device("cpu") if on_cpu else found  # without Accelerate's number, which models on a CPU do not have


def check_joined() -> None:
    """Raise KDError where torchrun has started several processes and they have not joined."""
    if started() > 1 and processes.count() == 1:
        raise KDError(
            f"torchrun has started {started()} processes, and each would train alone: call "
            "kdtoolkit.engine.group.join() first in the script, and move the models to the device that it returns"
        )


def started() -> int:
    """How many processes torchrun has started; 1 without it. They train together once they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The place of this process among those that train together, from 0."""
    return dist.get_rank() if processes.count() > 1 else 0


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process, and return its result in all. If it raises KDError, all processes raise it."""
    if processes.count() == 1:
        return make()
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [make()]
        except KDError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], KDError):
        raise outcome[0]
    result: T = outcome[0]
    return result


def gathered(parts: list[T]) -> list[T]:
    """The lists of all processes, one after the other in their order."""
    if processes.count() == 1:
        return parts
    found: list[Any] = [None] * processes.count()
    dist.all_gather_object(found, parts)
    return [part for each in found for part in each]


def means(values: Tensor) -> Tensor:
    """The mean of each process's values (V,)."""
    return values if processes.count() == 1 else processes.total(values) / processes.count()


def alike(module: nn.Module) -> None:
    """Give all processes the first one's buffers: each has the batch norms' statistics of its own images."""
    if processes.count() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
