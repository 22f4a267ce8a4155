"""A run's folder: the lock, the checkpoints, the logs and the weights that it leaves."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdtoolkit.engine.checkpoint import Checkpoint, Checkpoints, to_bytes
from kdtoolkit.engine.identity import compare
from kdtoolkit.engine.log import Log, Row, Trackers
from kdtoolkit.engine.memory import peak_memory_mb
from kdtoolkit.engine.state import RunState
from kdtoolkit.errors import KDError, UnwritableError
from kdtoolkit.files import write_atomic
from kdtoolkit.lock import hold

TEACHER_CACHE = "teacher_cache"
_MENDED_BY = {
    errno.ENOSPC: "Free space",
    errno.EDQUOT: "Free space, or raise your quota",
    errno.EFBIG: "Allow larger files (ulimit -f)",
    errno.EACCES: "Allow this user to write there",
    errno.EROFS: "Mount it writable",
}
_SPEED_SECONDS = 10.0  # between two lines of speed.jsonl
_TOLD = logging.getLogger("kdtoolkit")


@dataclass(frozen=True)
class RunFolder:
    """Where a run is saved, and how often. A run that was stopped continues from there.

    It holds `checkpoints/`, `log.jsonl` (a line a step: each loss term and metric, `lr`, `gradient_norm`, and
    evaluations), `speed.jsonl` (images a second, memory), `best.safetensors` and `student.safetensors` (the detector's
    weights).

    Args:
        path: the folder; it is made if it is missing.
        save_seconds: time between two checkpoints, in seconds.
        save_steps: steps between two checkpoints, instead of a time.
        keep: how many of the last checkpoints are kept.
        trackers: names of Accelerate's trackers to log to as well, such as `tensorboard`, `wandb` or `mlflow`.
        tracked_in: where trackers write that write files. Its name is the run's name there. None: a folder of the
            run's name within `path`.
        teacher_cache: where a teacher cache on disk lies, if the run has one; several runs may share it. None: a folder
            `teacher_cache` within `path`.
    """

    path: Path
    save_seconds: float = 300.0
    save_steps: int | None = None
    keep: int = 2
    trackers: tuple[str, ...] = ()
    tracked_in: Path | None = None
    teacher_cache: Path | None = None

    @property
    def cache_folder(self) -> Path:
        """Where a teacher cache on disk lies."""
        return self.path / TEACHER_CACHE if self.teacher_cache is None else self.teacher_cache

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if self.keep < 1 or (self.save_steps is not None and self.save_steps < 1):
            raise KDError(f"keep ({self.keep}) and save_steps ({self.save_steps}) are whole numbers from 1")


class Keeper:
    """Keeps nothing. Runs without a folder use it, and all processes except the first."""

    notices: tuple[str, ...] = ()

    def log(self, step: int, row: Row) -> None:
        """Note the values of a step, or of an evaluation."""

    def speed(self, step: int, busy: float, waited: float, images: int, device: torch.device) -> None:
        """Note that a step of `images` took `busy` seconds, after `waited` seconds for its images."""

    def save(self, state: RunState, *, last: bool = False) -> None:
        """Store a checkpoint if it is time for one, or if this step is the `last` for now."""

    def evaluated(self, ap: float | None, student: nn.Module) -> None:
        """Store the weights that were evaluated, if none were better so far."""

    def finish(self, student: nn.Module) -> None:
        """Store the weights at the end. Raises UnwritableError if that does not work."""


@contextmanager
def opened(folder: RunFolder, made_of: Mapping[str, Any]) -> Iterator[tuple[Keeper, Checkpoint | None]]:
    """Hold the folder of the run with the identity `made_of`.

    Gives the Keeper of the run, and the checkpoint to continue from, if there is one.

    Raises KDError if another process uses the folder or if it holds a different run, and UnwritableError if it cannot
    be written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(hold(folder.path))
            keeper = _FolderKeeper(folder, made_of)
        except OSError as error:
            raise UnwritableError(
                f"{_unwritable(error, folder.path)}: correct that, or choose another folder"
            ) from error
        held.callback(keeper.trackers.finish)
        held.callback(keeper.flush)  # an error or Ctrl-C leaves rows since the last checkpoint
        yield keeper, keeper.found


class _FolderKeeper(Keeper):
    def __init__(self, folder: RunFolder, made_of: Mapping[str, Any]) -> None:
        self._folder = folder
        self._made_of = dict(made_of)
        self._checkpoints = Checkpoints(folder.path / "checkpoints", folder.keep)
        self._checkpoints.folder.mkdir(exist_ok=True)
        self.found, notices = self._checkpoints.latest()
        self.notices = ()
        facts: Mapping[str, Any] = {"log": 0, "speed": 0, "best": None}
        step = 0
        if self.found is not None:
            facts, step = self.found.facts, self.found.step
            notices += compare(facts["made_of"], self._made_of, folder.path)
        self._log = Log(folder.path / "log.jsonl", facts["log"])
        self._speed = Log(folder.path / "speed.jsonl", facts["speed"])
        if self._log.missing:
            notices.append(f"{folder.path / 'log.jsonl'} was cut or changed meanwhile: lines are missing in it")
        for notice in notices:
            self._notice(notice)
        self._best: float | None = facts["best"]
        self._best_path = folder.path / "best.safetensors"
        self._unwritten: bytes | None = None  # the best weights, while they cannot be written
        place = folder.tracked_in or folder.path / folder.path.name
        self.trackers = Trackers(folder.trackers, place, self._made_of["config"], step=step)
        self._saved_step = step
        self._saved = self._measured = time.monotonic()
        self._images, self._busy, self._waited = 0, 0.0, 0.0

    def log(self, step: int, row: Row) -> None:
        self._log.add({"step": step, **row})
        self.trackers.log(row, step)

    def speed(self, step: int, busy: float, waited: float, images: int, device: torch.device) -> None:
        self._images += images
        self._busy += busy
        self._waited += waited
        if time.monotonic() - self._measured < _SPEED_SECONDS:
            return
        seconds = self._busy + self._waited
        row = {
            "images_per_second": self._images / seconds,
            "waiting_for_images": self._waited / seconds,
            "memory_mb": peak_memory_mb(device),
        }
        self._speed.add({"step": step, **row})
        self.trackers.log(row, step)
        self._measured, self._images, self._busy, self._waited = time.monotonic(), 0, 0.0, 0.0
        self.flush()

    def save(self, state: RunState, *, last: bool = False) -> None:
        every = self._folder.save_steps
        due = state.step % every == 0 if every else time.monotonic() - self._saved >= self._folder.save_seconds
        if not (due or last):
            return
        place = self._best_path
        try:
            self._write_best()  # before the checkpoint, so that each whole checkpoint has its best weights beside it
            place = self._checkpoints.folder
            self._log.flush()
            self._speed.flush()
            self._checkpoints.write(
                state.checkpoint(
                    {
                        "log": self._log.position,
                        "speed": self._speed.position,
                        "best": self._best,
                        "made_of": self._made_of,
                    }
                )
            )
            self._saved_step = state.step
        except OSError as error:
            self._failed(error, place, last=last)
        self._saved = time.monotonic()

    def evaluated(self, ap: float | None, student: nn.Module) -> None:
        # Of equal ones the last counts: it has learnt the most. At first all may have an AP of 0.
        if ap is None or (self._best is not None and ap < self._best):
            return
        self._best, self._unwritten = ap, to_bytes(student.state_dict())
        try:
            self._write_best()
        except OSError as error:
            self._failed(error, self._best_path, last=False)

    def _write_best(self) -> None:
        if self._unwritten is not None:
            write_atomic(self._best_path, self._unwritten)
            self._unwritten = None

    def finish(self, student: nn.Module) -> None:
        path = self._folder.path / "student.safetensors"
        try:
            write_atomic(path, to_bytes(student.state_dict()))
        except OSError as error:
            self._failed(error, path, last=True)

    def flush(self) -> None:
        """Write the logs' waiting rows. If they cannot be written, a notice says so."""
        try:
            self._log.flush()
            self._speed.flush()
        except OSError as error:
            self._notice(f"{_unwritable(error, self._folder.path)}. The log's lines wait until it can be")

    def _failed(self, error: OSError, path: Path, *, last: bool) -> None:
        """Say that something could not be written. Raises UnwritableError if the run ends here."""
        kept = f"the last whole checkpoint is of step {self._saved_step}" if self._saved_step else "there is none yet"
        if last:
            mended_by = _MENDED_BY.get(error.errno or 0, "Correct that")
            raise UnwritableError(
                f"{_unwritable(error, path)}; {kept}. {mended_by}, and start the run again: it goes on from there"
            ) from error
        self._notice(f"{_unwritable(error, path)}; {kept}. Training goes on, and it is tried again later")

    def _notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices += (text,)
            _TOLD.warning(text)


def _unwritable(error: OSError, path: Path) -> str:
    return f"cannot write {error.filename or path}: {error.strerror or error}"
