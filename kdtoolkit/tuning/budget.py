"""How a time is spent: how many steps a training of the search has, so that all of it fits. Pure numbers."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from kdtoolkit.errors import KDError
from kdtoolkit.tuning.halving import Halving
from kdtoolkit.words import counted, duration

FEWEST_STEPS = 90  # of a training in a search: its first round, a ninth of it, then has 10
FEWEST_TRIALS = 3
SEARCH = 1 / 3  # of the budget of `kd distill`


@dataclass(frozen=True)
class Costs:
    """What was measured before the search, in seconds: a step, and the evaluation of an image."""

    step: float
    image: float

    def search(self, plan: Halving, images: int) -> float:
        """Seconds of a search that evaluates on so many images."""
        return plan.cost * self.step + plan.evaluations * images * self.image

    def training(self, steps: int, images: int) -> float:
        """Seconds of a training that evaluates so many images in all."""
        return steps * self.step + images * self.image


@dataclass(frozen=True)
class Wanted:
    """What a time is for.

    `trials`: how many trials a search would have. `most_trials`: all settings that there are. `most_steps`: of a
    training that nothing bounds. `held_out`: the images that the search evaluates on. `whole`: trainings that follow
    the search. `evaluated`: the images that each of them evaluates in all.
    """

    trials: int
    most_trials: int
    most_steps: int
    reduction: int
    held_out: int
    whole: int = 0
    evaluated: int = 0

    def seconds(self, costs: Costs, steps: int, trials: int) -> float:
        """What a search and the trainings after it take."""
        search = costs.search(Halving(steps, trials, self.reduction), self.held_out)
        return search + self.whole * costs.training(steps, self.evaluated)


def fit(seconds: float, costs: Costs, wanted: Wanted) -> Halving:
    """The search that fits a time, with what follows it.

    A training has as many steps as fit. If that is more than are useful, there are more trials; if it is too few, there
    are fewer. Raises KDError if the time is too short.
    """
    trials, most = min(wanted.trials, wanted.most_trials), wanted.most_steps

    def fits(steps: int, count: int) -> bool:
        return wanted.seconds(costs, steps, count) <= seconds

    if fits(most, trials):
        while trials < wanted.most_trials and fits(most, trials + 1):
            trials += 1
        return Halving(most, trials, wanted.reduction)
    fewest = min(FEWEST_STEPS, most)
    while trials > FEWEST_TRIALS and not fits(fewest, trials):
        trials -= 1
    if not fits(fewest, trials):
        least = wanted.seconds(costs, fewest, trials)
        raise KDError(
            f"the budget is too short: {counted(trials, 'trial')} of {fewest} steps"
            f"{' and their confirmation' if wanted.whole else ''} take about {duration(least)} here, and have "
            f"{duration(seconds)}. Give more time, take a smaller --image-size, or leave budget out"
        )
    steps = bisect.bisect_right(range(most), False, lo=fewest, key=lambda steps: not fits(steps, trials)) - 1
    return Halving(steps, trials, wanted.reduction)


def rest(seconds: float, step: float, evaluating: float, trainings: int) -> int:
    """How many steps each of `trainings` trainings has in a time.

    `step`: seconds of a step. `evaluating`: seconds of all evaluations of a training. If the time is too short even for
    the evaluations, it is 0.
    """
    return max(0, int((seconds / trainings - evaluating) / step))
