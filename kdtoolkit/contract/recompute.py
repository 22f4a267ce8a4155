"""Recompute a part of a step in its backward pass, instead of keeping what it computed: less memory, equal values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from kdtoolkit.uncompiled import uncompiled

T = TypeVar("T")


@uncompiled  # torch.compile knows no checkpoint with contexts of its own
def recomputed(run: Callable[[], T], model: nn.Module) -> T:
    """The result of `run`, whose intermediate tensors are computed again in the backward pass.

    Values and gradients are those of `run()`. Random numbers repeat, and buffers of `model`, such as the statistics of
    batch norms, change once. Contexts such as `FastConvolutions` are entered again, since the backward pass runs
    outside of them.
    """
    if not torch.is_grad_enabled():
        return run()
    buffers = [buffer for buffer in model.buffers() if model.training]
    # A private name, which torch.get_default_device relies on too; there is no public one.
    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]

    def contexts() -> tuple[AbstractContextManager[None], _AsBefore]:
        return nullcontext(), _AsBefore(modes, buffers)

    return checkpoint(run, use_reentrant=False, context_fn=contexts)


class _AsBefore:
    """A block in `modes`, after which buffers have the values that they had before it. Each backward pass enters it."""

    def __init__(self, modes: Sequence[TorchFunctionMode], buffers: Sequence[Tensor]) -> None:
        self._modes, self._buffers = modes, buffers
        self._entered = ExitStack()
        self._values: list[Tensor] = []

    def __enter__(self) -> None:
        self._values = [buffer.clone() for buffer in self._buffers]
        for mode in self._modes:
            self._entered.enter_context(mode)

    def __exit__(self, *error: object) -> None:
        self._entered.close()
        for buffer, value in zip(self._buffers, self._values, strict=True):
            # To autograd a change would be an error. But no gradient depends on statistics that a forward pass updates.
            buffer.data.copy_(value)
        self._values = []
