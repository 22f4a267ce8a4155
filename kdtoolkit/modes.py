"""in_eval_mode: a block in which a module is in eval mode. modes_kept: a block after which modes are as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a block. Afterwards each of its modules has the mode that it had."""
    with modes_kept(module):
        module.eval()
        yield


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """After the block, each module of `modules` has the mode that it had, also after an error.

    `train(training)` would not do: it gives all modules one mode, and a Distiller leaves batch norms in eval mode that
    have no trainable parameter.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
