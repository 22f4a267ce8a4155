"""HeldShare: keeps a method's share of the gradient by a factor of its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdtoolkit.errors import KDError
from kdtoolkit.options import check_options

EVERY = 10  # steps between two measurements, after the first ones
SMOOTHING = 0.5  # the part of the way to the measured factor that each measurement goes, in logarithms
LOWEST, HIGHEST = 1e-6, 1e3  # of the factor
MISSES = 3  # measurements in a row without a result, after which a run warns
HELD_METRICS = ("factor", "share")


class HeldShare(nn.Module):
    """The factor of a method's weights that keeps its share of the gradient.

    The share is |g| / (|g| + |t|). Here g is the gradient of the method's loss and t the gradient of the student's own
    loss, at the student's parameters that both train. The method's schedule is left out of g.

    The first measurement sets the factor. Each later one moves it by a part of the way, because one batch says little.
    It is measured in the first step with labels, after 1, 2, 4 and 8 further steps, and then every 10 steps. The factor
    is at most 1000, so that a method whose gradient vanishes does not grow without end.

    Attributes:
        share: what is held, between 0 and 1.
        factor: what the method's losses are multiplied by; 1 before the first measurement.
        measured: the share that the last measurement found, before it changed the factor; NaN before the first one.

    Raises KDError if the share is not between 0 and 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        check_options("held_at", HeldShare, {"share": share})
        if not 0 < share < 1:
            raise KDError(
                f"share={share:g}: it must be above 0 and below 1; share=0.1 holds the method's gradient at 10 % of "
                "its sum with the task's"
            )
        self.share = share
        self.restart()

    def restart(self) -> None:
        """Forget all measurements, for a run that begins."""
        self.factor, self.measured = 1.0, math.nan
        self._tries, self._due, self._missed = 0, 0, 0

    @property
    def warning(self) -> str | None:
        """Why the share is not held, as the end of a sentence; None if it is, or if little was tried so far."""
        if self._missed < MISSES:
            return None
        return (
            f"its share is not held: in the last {self._missed} measurements its gradient or the task's was 0 or not "
            "finite. If the run computes in float16, lower the method's weights or set precision to float32"
        )

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged: the factor, and the share as the last measurement found it."""
        measured = {} if math.isnan(self.measured) else {"share": self.measured}
        return {"factor": self.factor, **measured}

    def is_due(self, step: int) -> bool:
        """Whether the factor is to be set anew in this step."""
        return step >= self._due

    def set(self, step: int, own: float, task: float) -> None:
        """Set the factor anew from the norms of both gradients; `own` is the norm without the factor.

        Norms that are 0 or not finite leave the factor as it is.
        """
        self._due = step + min(EVERY, 2**self._tries)
        self._tries += 1
        if not (0 < own < math.inf and 0 < task < math.inf):
            self._missed += 1
            return
        self._missed = 0
        wanted = math.log(self.share / (1 - self.share) * task / own)
        first = math.isnan(self.measured)
        self.measured = self.factor * own / (self.factor * own + task)
        now = math.log(self.factor)
        moved = math.exp(wanted if first else now + SMOOTHING * (wanted - now))
        self.factor = min(max(moved, LOWEST), HIGHEST)

    def get_extra_state(self) -> Tensor:
        """The state as a tensor on the CPU, so that every kind of checkpoint can hold it."""
        return torch.tensor([self.factor, self.measured, self._tries, self._due, self._missed], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a state."""
        self.factor, self.measured, *counts = state.tolist()
        self._tries, self._due, self._missed = map(int, counts)
