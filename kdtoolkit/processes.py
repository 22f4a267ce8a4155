"""Sums over all processes that train one model together. In a single process these functions change and send nothing.

Each process has a part of the batch, and DistributedDataParallel averages the gradients of all processes. If each
process divided its sum over positives by its own number of positives, the average would not be the loss of the whole
batch. So each divides by the number of positives in all processes, divided by the number of processes (`share`). Then
the loss does not depend on the number of processes.

All processes must call these functions equally often. They do if each takes the same steps. A step that one process
takes alone waits for the others, as in DistributedDataParallel itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many processes train together: the size of torch.distributed's default group, or 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """The sum of a float tensor over all processes. Gradient flows to each process's own part."""
    return x if count() == 1 else _Total.apply(x)


def share(x: Tensor, at_least: float = 0.0) -> Tensor:
    """What each process divides by: the sum of `x` over all processes, divided by the number of processes.

    Values of `x` must not be negative, and the sum is raised to `at_least`. The result is float32, without gradient.
    """
    with torch.no_grad():
        return total(x.detach().float()).clamp(min=at_least) / count()


class _Total(torch.autograd.Function):
    """Sums over processes. Each gets the sum, so the gradient of its part is the sum of all processes' gradients."""

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
    """The same loss, with all `parameters` in its graph, even if it does not depend on them.

    In `backward`, DistributedDataParallel waits for a gradient of each parameter. This function gives it a gradient of
    zeros for parameters that no loss trains: of a method that has stopped or has weight 0, or of a part of the
    student.
    """
    result: Tensor = _Reach.apply(loss, *parameters)
    return result


class _Reach(torch.autograd.Function):
    """Gives the parameters no gradient, but their hooks are called. DistributedDataParallel waits for the hooks."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return loss.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *(None,) * ctx.parameters)
