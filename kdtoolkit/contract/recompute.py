"""Recompute a part of a step in its backward pass, instead of keeping what it computed: less memory, equal values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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

    def contexts() -> tuple[AbstractContextManager[None], _Unchanged]:
        return nullcontext(), _Unchanged(buffers)

    return checkpoint(run, use_reentrant=False, context_fn=contexts)


class _Unchanged:
    """A block after which buffers have the values that they had before it. Each backward pass enters it once."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = buffers
        self._before: list[Tensor] = []

    def __enter__(self) -> None:
        self._before = [buffer.clone() for buffer in self._buffers]

    def __exit__(self, *error: object) -> None:
        for buffer, value in zip(self._buffers, self._before, strict=True):
            # To autograd a change would be an error. But no gradient depends on statistics that a forward pass updates.
            buffer.data.copy_(value)
        self._before = []
