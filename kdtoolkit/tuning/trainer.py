"""One training of a search: from its checkpoint to a step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kdtoolkit.engine.result import Progress
from kdtoolkit.errors import NonFiniteLossError
from kdtoolkit.models import Detector
from kdtoolkit.tuning.space import Uses
from kdtoolkit.workflow.folder import TRAINING, load_best
from kdtoolkit.workflow.prepare import Prepared, with_methods
from kdtoolkit.workflow.training import train_in


class CannotTrainError(Exception):
    """These methods cannot train this student here: a loss is not finite, or the memory is too small."""


@dataclass(frozen=True)
class Trained:
    """A student after a step: the AP of each evaluation by step, and the seconds of training over all starts."""

    student: Detector
    evaluations: dict[int, float]
    seconds: float


def train_to(
    prepared: Prepared,
    methods: Uses,
    folder: Path,
    device: torch.device,
    *,
    until: int,
    evaluations: int = 1,
    show: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train the run's student by methods up to a step, from the folder's checkpoint if there is one.

    It is evaluated at the step, and `evaluations` times in a whole training if that is more than 1. Raises
    CannotTrainError, and KDError.
    """
    student, distiller = with_methods(prepared, methods)
    try:
        result = train_in(
            folder / TRAINING, prepared, distiller, device, evaluations=evaluations, keep=1, until=until, report=show
        )
    except NonFiniteLossError as error:
        raise CannotTrainError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CannotTrainError("the GPU is out of memory") from error
    scores = {int(row["step"] or 0): row["eval/ap"] or 0.0 for row in result.evaluations}
    return Trained(student, scores, result.seconds)


def train_whole(
    prepared: Prepared,
    methods: Uses,
    folder: Path,
    device: torch.device,
    show: Callable[[Progress], None] | None = None,
) -> tuple[Detector, float, float]:
    """Train as `kd distill` does: the student with the weights of its best evaluation, their AP, and the seconds.

    Raises CannotTrainError, and KDError.
    """
    found = train_to(
        prepared,
        methods,
        folder,
        device,
        until=prepared.config.steps,
        evaluations=prepared.evaluations,
        show=show,
    )
    load_best(found.student, folder / TRAINING)
    return found.student, max(found.evaluations.values()), found.seconds


def forget(folder: Path) -> None:
    """Delete the checkpoints and weights of a training that does not go on; its log stays."""
    shutil.rmtree(folder / TRAINING / "checkpoints", ignore_errors=True)
    for path in (folder / TRAINING).glob("*.safetensors"):
        path.unlink(missing_ok=True)


class Pace:
    """Estimates how long the rest takes, from the steps of this start."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._steps = 0

    def add(self, steps: int) -> None:
        """Note that so many steps were trained, and their evaluations made."""
        self._steps += steps

    def left(self, steps: float) -> float | None:
        """Seconds for so many more steps; None before the first ones."""
        return (time.monotonic() - self._begun) / self._steps * steps if self._steps else None
