"""Sums over the processes that train one model together; with one process nothing is sent and nothing changes.

Each process has its part of the batch, and DistributedDataParallel averages the gradients of all. If each process
divided its sum over positives by its own number of positives, that average would not be the loss of the whole batch.
So each divides by its share of the number of all: the loss does not depend on how many processes the batch is divided
among.

Every process must come to these functions equally often, which is so where each takes the same steps. As with
DistributedDataParallel itself, a step that one process takes alone waits for the others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many processes train together: those of torch.distributed's default group, else 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """The sum of a float tensor over all processes, with gradient to each process's own part; `x` itself in one."""
    return x if count() == 1 else _Total.apply(x)


def share(x: Tensor, at_least: float = 0.0) -> Tensor:
    """What each process divides by: the sum over all of `x`, a tensor of numbers of at least 0, divided by their count.

    In one process it is `x`. The sum is at least `at_least`. Float32, without gradient.
    """
    with torch.no_grad():
        return total(x.detach().float()).clamp(min=at_least) / count()


class _Total(torch.autograd.Function):
    """Every process gets the sum, so each part's gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result)
    return result


def reach(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """The loss, in whose graph all `parameters` take part, those that it does not depend on too.

    DistributedDataParallel waits in `backward` for a gradient of each parameter. It gets one of zeros for those of a
    method that has stopped, whose weight is 0, or of a part of the student that no loss trains.
    """
    result: Tensor = _Reach.apply(loss, *parameters)
    return result


class _Reach(torch.autograd.Function):
    """No gradient is computed for the parameters: their hooks are called all the same, and that is what counts."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *(None,) * ctx.parameters)
