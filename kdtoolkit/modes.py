"""in_eval_mode: a block in which a module is in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a block. Afterwards each of its modules has the mode that it had.

    `train(training)` would not do: it gives all modules one mode, and a Distiller leaves batch norms in eval mode that
    have no trainable parameter.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
