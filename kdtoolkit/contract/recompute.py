"""Recompute a part of a step in its backward pass, instead of keeping what it computed: less memory, equal values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(run: Callable[[], T], model: nn.Module) -> T:
    """The result of `run`, whose intermediate tensors are computed again in the backward pass.

    Values and gradients are those of `run()`. Random numbers repeat, and buffers of `model`, such as the statistics of
    batch norms, change once.
    """
    if not torch.is_grad_enabled():
        return run()
    buffers = [buffer for buffer in model.buffers() if model.training]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _unchanged(buffers)

    return checkpoint(run, use_reentrant=False, context_fn=contexts)


@contextmanager
def _unchanged(buffers: Sequence[Tensor]) -> Iterator[None]:
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            # To autograd a change would be an error. But no gradient depends on statistics that a forward pass updates.
            buffer.data.copy_(value)
