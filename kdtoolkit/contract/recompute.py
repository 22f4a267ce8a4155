"""Recompute a part of a step in its backward pass, instead of keeping what it computed: less memory, equal values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdtoolkit.uncompiled import uncompiled

T = TypeVar("T")

entered_again: ContextVar[tuple[AbstractContextManager[object], ...]] = ContextVar("entered_again", default=())
"""The contexts of this thread in which a pass must also run when it is computed again."""


@uncompiled  # torch.compile knows no checkpoint with contexts of its own
def recomputed(run: Callable[[], T], model: nn.Module) -> T:
    """The result of `run`, whose intermediate tensors are computed again in the backward pass.

    Values and gradients are those of `run()`. Random numbers repeat, and buffers of `model`, such as the statistics of
    batch norms, change once. The contexts in `entered_again` are entered, since the backward pass runs outside of
    them.
    """
    if not torch.is_grad_enabled():
        return run()
    buffers = [buffer for buffer in model.buffers() if model.training]
    around = entered_again.get()

    def contexts() -> tuple[AbstractContextManager[None], _AsBefore]:
        return nullcontext(), _AsBefore(around, buffers)

    return checkpoint(run, use_reentrant=False, context_fn=contexts)


class _AsBefore:
    """A block in contexts, after which buffers have the values of before. Each backward pass enters it."""

    def __init__(self, around: Sequence[AbstractContextManager[object]], buffers: Sequence[Tensor]) -> None:
        self._around, self._buffers = around, buffers
        self._entered = ExitStack()
        self._values: list[Tensor] = []

    def __enter__(self) -> None:
        self._values = [buffer.clone() for buffer in self._buffers]
        for context in self._around:
            self._entered.enter_context(context)

    def __exit__(self, *error: object) -> None:
        self._entered.close()
        for buffer, value in zip(self._buffers, self._values, strict=True):
            # To autograd a change would be an error. But no gradient depends on statistics that a forward pass updates.
            buffer.data.copy_(value)
        self._values = []
