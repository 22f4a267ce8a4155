"""The trials of a search: Optuna chooses what to try next, and keeps all trials in a file on disk.

Only this file imports Optuna. Its pruners can end a trial and not let it wait, so which trials go on is decided in
`search.py`.
"""

from __future__ import annotations

import importlib
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kdtoolkit.errors import KDError
from kdtoolkit.tuning.space import Params, Space, Uses, in_words

State = Literal["running", "out", "finished", "failed"]
_STATES: dict[str, State] = {"RUNNING": "running", "PRUNED": "out", "COMPLETE": "finished", "FAIL": "failed"}
_DROPPED = "dropped"  # Optuna proposed what was tried before, or a process was killed: such a trial is never trained
_STARTUP = 5  # finished trials before Optuna's model of them is used instead of chance


class Trial(BaseModel):
    """A setting that was tried.

    `scores`: AP after steps, on the images that were held out. `seconds`: of training. `state`: "out" if others of its
    bracket were better, "failed" if it could not be trained; `reason` says why.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    methods: Uses
    scores: dict[int, float]
    seconds: float
    state: State
    reason: str = ""

    @property
    def name(self) -> str:
        """Its methods in words."""
        return in_words(self.methods)

    @property
    def step(self) -> int:
        """The step up to which it was trained and evaluated."""
        return max(self.scores, default=0)

    @property
    def ap(self) -> float | None:
        """Its last AP."""
        return self.scores[self.step] if self.scores else None


def ranked(trials: list[Trial]) -> list[Trial]:
    """The trials that were not given up, the best first: those that came furthest, then by AP."""
    known = [trial for trial in trials if trial.scores and trial.state != "failed"]
    return sorted(known, key=lambda trial: (-trial.step, -trial.scores[trial.step], trial.number))


class Study:
    """The trials in a file. A search that was stopped goes on with the trials that it would have made.

    Raises KDError if Optuna is missing, or if the file cannot be read. All of it raises KDError if the file cannot be
    written.
    """

    def __init__(self, path: Path, space: Space, seed: int) -> None:
        self._optuna = imported()
        self._space = space
        self._seed = seed
        self._uses = {tuple(params.values()): space.uses(params) for params in space.settings()}
        with _disk(path):
            _mend(path)
            journal = _Journal(self._optuna.storages.journal.JournalFileBackend(str(path)), path)
        verbosity = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        try:
            storage = self._optuna.storages.JournalStorage(journal)
            self._study = self._optuna.create_study(
                storage=storage, study_name="kd tune", direction="maximize", load_if_exists=True
            )
        except (ValueError, KeyError) as error:
            raise KDError(
                f"the trials in {path} cannot be read ({error}): put a copy of it back, or choose a new folder by --out"
            ) from error
        finally:
            self._optuna.logging.set_verbosity(verbosity)
        self._drop_half_made()

    def trials(self) -> list[Trial]:
        """All trials so far, in their order."""
        return [self._read(frozen) for frozen in self._frozen() if _DROPPED not in frozen.user_attrs]

    def ask(self) -> Trial | None:
        """A new trial; None if everything was tried. It depends only on the seed and on the trials before."""
        before = self.trials()
        tried = {trial.name for trial in before}
        untried = [p for p in self._space.settings() if in_words(self._uses[tuple(p.values())]) not in tried]
        if not untried:
            return None
        first, count = self._space.first(), len(before)
        if count < len(first) and first[count] in untried:
            return self._given(first[count])
        found = self._proposed(count)
        if found.name not in tried:
            return found
        self._drop(found.number)
        return self._given(random.Random(f"{self._seed} {count}").choice(untried))

    def report(self, trial: Trial, step: int, ap: float, seconds: float) -> Trial:
        """Note the AP of a trial after a step, and the seconds of its training so far."""
        handle = self._handle(trial.number)
        handle.report(ap, step)
        handle.set_user_attr("seconds", seconds)
        return trial.model_copy(update={"scores": trial.scores | {step: ap}, "seconds": seconds})

    def out(self, trial: Trial) -> None:
        """End a trial, because others of its bracket were better."""
        self._tell(trial.number, "PRUNED")

    def finish(self, trial: Trial) -> None:
        """End a trial that was trained to the last step."""
        self._study.tell(trial.number, trial.ap)

    def fail(self, trial: Trial, reason: str) -> None:
        """End a trial that cannot be trained."""
        self._handle(trial.number).set_user_attr("reason", reason)
        self._tell(trial.number, "FAIL")

    def _given(self, params: Params) -> Trial:
        self._study.enqueue_trial(params)
        return self._asked()

    def _proposed(self, count: int) -> Trial:
        number = random.Random(f"{self._seed} {count}").getrandbits(31)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._study.sampler = self._optuna.samplers.TPESampler(
                seed=number, n_startup_trials=_STARTUP, constant_liar=True
            )
        return self._asked()

    def _asked(self) -> Trial:
        categorical = self._optuna.distributions.CategoricalDistribution
        asked = self._study.ask({name: categorical(values) for name, values in self._space.choices.items()})
        return self._read(self._frozen()[asked.number])

    def _tell(self, number: int, state: str) -> None:
        self._study.tell(number, state=self._optuna.trial.TrialState[state])

    def _drop(self, number: int) -> None:
        self._handle(number).set_user_attr(_DROPPED, True)
        self._tell(number, "FAIL")

    def _drop_half_made(self) -> None:
        """Drop trials that a killed process has announced and not made, or proposed although they were tried before."""
        waiting, running = self._optuna.trial.TrialState.WAITING, self._optuna.trial.TrialState.RUNNING
        for _ in [frozen for frozen in self._frozen() if frozen.state == waiting]:
            self._study.ask()  # it runs then, without values
        for frozen in self._frozen():
            half_made = _DROPPED in frozen.user_attrs or frozen.params.keys() != self._space.choices.keys()
            if frozen.state == running and half_made:
                self._drop(frozen.number)
        tried: set[str] = set()
        for trial in self.trials():
            if trial.name in tried:
                self._drop(trial.number)
            tried.add(trial.name)

    def _handle(self, number: int) -> Any:
        """Optuna's object for a trial that has begun, perhaps in an earlier process."""
        # A private name: nothing public leads from a stored trial back to one that can be reported to.
        return self._optuna.trial.Trial(self._study, self._frozen()[number]._trial_id)

    def _read(self, frozen: Any) -> Trial:
        return Trial(
            number=frozen.number,
            methods=self._uses[tuple(frozen.params[name] for name in self._space.choices)],
            scores=dict(frozen.intermediate_values),
            seconds=frozen.user_attrs.get("seconds", 0.0),
            state=_STATES[frozen.state.name],
            reason=frozen.user_attrs.get("reason", ""),
        )

    def _frozen(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False))


class _Journal:
    """Optuna's file of trials. What Optuna wants of such a file are these two methods."""

    def __init__(self, backend: Any, path: Path) -> None:
        self._backend = backend
        self._path = path

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        with _disk(self._path):
            return list(self._backend.read_logs(log_number_from))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with _disk(self._path):
            self._backend.append_logs(logs)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """A context in which errors of the disk become a KDError that names the file of trials."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            _mend(path)  # nothing may be appended to half a line
        raise KDError(
            f"the trials in {path} cannot be read or written ({error.strerror or error}): mend that, and start the "
            "search again: it goes on from there"
        ) from error


def imported() -> Any:
    """Optuna. Raises KDError that says how to install it."""
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise KDError(f"a search needs Optuna: pip install 'kdtoolkit[tune]' (importing it failed: {error})") from error


def _mend(path: Path) -> None:
    """Cut a last line that a killed process left half written. Optuna refuses a file with such a line in its middle."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)  # to write the rest anew would lose it if that fails
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # the run's folder is held by this process
