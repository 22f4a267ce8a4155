"""Schedule: the factor of a method's weights over training."""

from __future__ import annotations

from dataclasses import dataclass

from kdtoolkit.errors import KDError
from kdtoolkit.options import check_options


@dataclass(frozen=True)
class Schedule:
    """The factor by which a method's weights are multiplied, as a function of the training step.

    The factor is 0 before step `start`, and the method is not run. It rises linearly from 0 to 1 over the `warmup`
    steps after `start`. It falls linearly to 0 over the last `decay` steps before step `stop`. From `stop` on it is 0,
    and the method is no longer run. If `stop` is None, the method runs to the end. With `every=4` the method is run
    only in every fourth step, from `start` on. In a step without any method the teacher is not run either.

    Raises KDError if a number of steps is negative or not whole, if `every` or `stop` is 0, if `decay` has no `stop`,
    or if `stop` comes before `start`, warm-up and decay are over.
    """

    warmup: int = 0
    decay: int = 0
    stop: int | None = None
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_options("scheduled", Schedule, vars(self))
        if self.stop == 0:
            raise KDError("stop=0 ends the method before its first step: leave the method out, or name a later step")
        if min(self.warmup, self.decay, self.start) < 0:
            raise KDError(
                f"start ({self.start}), warmup ({self.warmup}) and decay ({self.decay}) are numbers of steps, and must "
                "be 0 or more"
            )
        if self.every < 1:
            raise KDError(f"every={self.every}: it must be 1 or more; every=2 runs the method in every second step")
        if self.stop is None and self.decay:
            raise KDError(
                f"decay ({self.decay}) needs stop, the step at which the weights have fallen to 0: add stop=STEP"
            )
        if self.stop is not None and self.stop < (least := self.start + self.warmup + self.decay):
            raise KDError(
                f"stop ({self.stop}) comes before start ({self.start}), warmup ({self.warmup}) and decay "
                f"({self.decay}) are over: it must be {least} or more"
            )

    def why_too_long(self, steps: int) -> str | None:
        """Why the weights do not reach their full size in a run of `steps` steps; None if they do."""
        if self.start + self.warmup <= steps:
            return None
        return (
            f"start ({self.start}) and warmup ({self.warmup}) take longer than the run ({steps} steps), so its weights "
            "would never be reached: shorten them, or train longer"
        )

    def factor(self, step: int) -> float:
        """The factor at a step; steps count from 0."""
        if step < self.start or (step - self.start) % self.every or (self.stop is not None and step >= self.stop):
            return 0.0
        rise = min(1.0, (step - self.start + 1) / (self.warmup + 1))
        return min(rise, (self.stop - step) / (self.decay + 1)) if self.stop is not None else rise
