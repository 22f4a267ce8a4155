"""The search: brackets of trials, of which the best go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdtoolkit.tuning.budget import FEWEST_TRIALS
from kdtoolkit.tuning.halving import Halving
from kdtoolkit.tuning.study import Study, Trial, ranked
from kdtoolkit.tuning.trainer import CannotTrainError, forget, train_to
from kdtoolkit.workflow.display import Display
from kdtoolkit.workflow.prepare import Images, Prepared

SPLIT_SEED = 0  # which images are held out: the same for all seeds of a run


def split(images: Images, share: float) -> Images:
    """The training images alone: a part of them stands in for the validation images.

    Raises KDError if one of the parts has no box.
    """
    rest, part = images.train.split(share, SPLIT_SEED)
    return replace(images, train=rest, val=part)


@dataclass(frozen=True, eq=False)
class Search:
    """A search and what it needs.

    `prepared`: the run, on the images of the search. `over`: whether its time is used up. `told`: called after each
    training of a trial, with the steps that it took.
    """

    prepared: Prepared
    study: Study
    halving: Halving
    folder: Path
    device: torch.device
    display: Display
    over: Callable[[], bool]
    told: Callable[[Trial, int], None]

    def run(self) -> None:
        """Run all brackets. Trials of an earlier start stay, and those that had begun go on. Raises KDError."""
        begun = 0
        for count in self.halving.brackets:
            if begun and self.over():
                break
            members = self.study.trials()[begun : begun + count]
            begun += count
            self._bracket(members, count)

    def _bracket(self, members: list[Trial], count: int) -> None:
        first = self.halving.rungs[0]
        alive = [self._trained(trial, first) for trial in members]
        while len(alive) < count and (len(alive) < FEWEST_TRIALS or not self.over()):
            if (asked := self.study.ask()) is None:
                break
            alive.append(self._trained(asked, first))
        for rung in self.halving.rungs[1:]:
            alive = [self._trained(trial, rung) for trial in self._best(alive, rung)]
        for trial in alive:
            if trial.state == "running":
                self.study.finish(trial)
                forget(self._folder(trial))

    def _best(self, members: list[Trial], rung: int) -> list[Trial]:
        """Those that go on to a rung; all others end."""
        if self.over() and not any(trial.step >= rung for trial in members):
            kept = []
        else:
            kept = ranked(members)[: self.halving.kept(len(members))]
        for trial in members:
            if trial not in kept and trial.state == "running":
                self.study.out(trial)
                forget(self._folder(trial))
        return kept

    def _trained(self, trial: Trial, rung: int) -> Trial:
        """The trial after a rung. It is not trained if it was there already, or has ended."""
        if trial.state != "running" or trial.step >= rung:
            return trial
        number = f"trial {trial.number + 1}"
        try:
            found = train_to(
                self.prepared,
                trial.methods,
                self._folder(trial),
                self.device,
                until=rung,
                show=self.display.part(number, rung),
            )
        except CannotTrainError as error:
            self.study.fail(trial, str(error))
            forget(self._folder(trial))
            failed = trial.model_copy(update={"state": "failed", "reason": str(error)})
            self.told(failed, rung - trial.step)
            return failed
        after = self.study.report(trial, rung, found.evaluations[rung], found.seconds)
        self.told(after, rung - trial.step)
        return after

    def _folder(self, trial: Trial) -> Path:
        return self.folder / "trials" / f"{trial.number:03}"
