"""Schedule: the factor of a method's weights over training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdtoolkit.errors import KDError
from kdtoolkit.options import check_options

_PLACES = ("start", "warmup", "decay", "stop")


@dataclass(frozen=True)
class Schedule:
    """The factor by which a method's weights are multiplied, as a function of the training step.

    The factor is 0 before step `start`, and the method is not run. It rises linearly from 0 to 1 over the `warmup`
    steps after `start`. It falls linearly to 0 over the last `decay` steps before step `stop`. From `stop` on it is 0,
    and the method is no longer run. If `stop` is None, the method runs to the end. With `every=4` the method is run
    only in every fourth step, from `start` on. In a step without any method the teacher is not run either.

    Whole numbers are steps. A number between 0 and 1 is a share of the run: `stop=0.9` leaves the method out in the
    last tenth. A share is rounded to whole steps. A `stop` that is a share leaves out the last step at least.

    Raises KDError if a number is negative, or neither whole nor a share, if `every` or `stop` is 0, if `decay` has no
    `stop`, or if `stop` comes before `start`, warm-up and decay are over.
    """

    warmup: int | float = 0
    decay: int | float = 0
    stop: int | float | None = None
    start: int | float = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_options("scheduled", Schedule, vars(self))
        if self.stop == 0:
            raise KDError("stop=0 ends the method before its first step: leave the method out, or name a later step")
        if min(self.warmup, self.decay, self.start) < 0:
            raise KDError(
                f"start ({self.start}), warmup ({self.warmup}) and decay ({self.decay}) are numbers of steps or shares "
                "of the run, and must be 0 or more"
            )
        for name in _PLACES:
            value = getattr(self, name)
            if name == "stop" and isinstance(value, float) and value == 1:
                raise KDError("scheduled(stop=1.0): leave stop out, since without it the method runs to the end")
            if isinstance(value, float) and value and not 0 < value < 1:
                example = f", as in {name}={round(value)}," if value > 1 else ""
                raise KDError(
                    f"scheduled({name}={value!r}): must be a whole number of steps{example} or a share of the run "
                    "between 0 and 1"
                )
        if self.every < 1:
            raise KDError(f"every={self.every}: it must be 1 or more; every=2 runs the method in every second step")
        if self.stop is None and self.decay:
            raise KDError(
                f"decay ({self.decay}) needs stop, the step at which the weights have fallen to 0: add stop=STEP"
            )
        given = [value for name in _PLACES if (value := getattr(self, name))]
        alike = not self.has_shares or all(isinstance(value, float) for value in given)
        # Steps and shares together can be compared when the length of the run is known: then in_run checks again.
        if alike and self.stop is not None and self.stop < (least := self.start + self.warmup + self.decay):
            raise KDError(
                f"stop ({self.stop}) comes before start ({self.start}), warmup ({self.warmup}) and decay "
                f"({self.decay}) are over: it must be {least:g} or more"
            )

    @property
    def has_shares(self) -> bool:
        """Whether a number of it is a share of the run."""
        return any(isinstance(value, float) and value > 0 for value in (getattr(self, name) for name in _PLACES))

    def in_run(self, steps: int) -> Schedule:
        """The schedule in steps, for a run of `steps` steps. Raises KDError if it cannot be."""
        values = {name: getattr(self, name) for name in _PLACES}
        found = {name: round(value * steps) for name, value in values.items() if isinstance(value, float)}
        if "stop" in found:
            found["stop"] = min(found["stop"], steps - 1)
        return replace(self, **found)

    def why_too_long(self, steps: int) -> str | None:
        """Why start and warm-up leave no step at full weight in a run of `steps` steps; None if they leave one."""
        try:
            found = self.in_run(steps)
        except KDError as error:
            return f"in a run of {steps} steps {error}"
        if found.start + found.warmup < steps:
            return None
        return (
            f"start ({self.start}) and warmup ({self.warmup}) leave no step of the run ({steps} steps) at full weight: "
            "shorten them, or train longer"
        )

    def factor(self, step: int, steps: int | None = None) -> float:
        """The factor at a step; steps count from 0. `steps`: the length of the run, which shares need.

        Raises KDError if a share needs the length of the run, and it is None.
        """
        if self.has_shares:
            if steps is None:
                raise KDError(
                    f"{self} has shares of the run, and its number of steps is not known: assign it, as in "
                    "distiller.run_steps = 1000, or give the schedule in steps"
                )
            return self.in_run(steps).factor(step)
        if step < self.start or (step - self.start) % self.every or (self.stop is not None and step >= self.stop):
            return 0.0
        rise = min(1.0, (step - self.start + 1) / (self.warmup + 1))
        return min(rise, (self.stop - step) / (self.decay + 1)) if self.stop is not None else rise
