"""One training of a run or of a search: the run's images and settings, a checkpoint each minute."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.config import Validation
from kdtoolkit.engine.folder import TEACHER_CACHE, RunFolder
from kdtoolkit.engine.result import Progress, TrainResult
from kdtoolkit.engine.train import train
from kdtoolkit.workflow.prepare import Prepared

SAVE_SECONDS = 60.0  # between two checkpoints


def train_in(
    folder: Path,
    prepared: Prepared,
    distiller: Distiller,
    device: torch.device,
    *,
    evaluations: int,
    keep: int = 2,
    until: int | None = None,
    report: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train the distiller's student as a run does, in a folder from which it goes on if it was stopped.

    All trainings of the run share its teacher cache. `evaluations`: how many there are in a whole training. `keep`:
    how many of the last checkpoints are kept. `until`, `report`: as in `train`. Raises the errors of `train`.
    """
    config, images, out = prepared.config, prepared.images, prepared.options.out
    assert out is not None  # a run has chosen it by now
    return train(
        distiller,
        images.train,
        config,
        seed=prepared.options.seed,
        device=device,
        folder=RunFolder(folder, save_seconds=SAVE_SECONDS, keep=keep, teacher_cache=out / TEACHER_CACHE),
        unlabelled=images.unlabelled if distiller.methods else None,
        validation=Validation(
            images.val, every_steps=math.ceil(config.steps / evaluations), batch_size=config.batch_size
        ),
        report=report,
        until=until,
    )
