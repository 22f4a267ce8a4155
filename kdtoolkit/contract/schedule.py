"""Schedule: the factor of a method's weights over training."""

from __future__ import annotations

from dataclasses import dataclass

from kdtoolkit.errors import KDError
from kdtoolkit.options import check_options


@dataclass(frozen=True)
class Schedule:
    """The factor of a method's weights over training, by the number of steps done before.

    It rises linearly from 0 over the first `warmup` steps; is 1; falls linearly to 0 over the last `decay` steps before
    `stop`; and is 0 from `stop` on, where there is one: then the method is not run any more.

    Raises KDError for numbers of steps that are negative or not whole, a `stop` of 0, a `decay` without `stop`, or a
    `stop` before warm-up and decay are over.
    """

    warmup: int = 0
    decay: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        check_options("scheduled", Schedule, vars(self))
        if self.stop == 0:
            raise KDError("stop is the step at which the method ends: with stop=0 it never runs. Leave the method out")
        if min(self.warmup, self.decay) < 0:
            raise KDError("warmup and decay are numbers of steps, from 0")
        if self.stop is None and self.decay:
            raise KDError("decay needs stop: the step at which it has come down to 0")
        if self.stop is not None and self.stop < self.warmup + self.decay:
            raise KDError(f"stop ({self.stop}) comes before warmup ({self.warmup}) and decay ({self.decay}) are over")

    def factor(self, step: int) -> float:
        """The factor at a step, counted from 0."""
        if self.stop is not None and step >= self.stop:
            return 0.0
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        return min(rise, (self.stop - step) / (self.decay + 1)) if self.stop is not None else rise
