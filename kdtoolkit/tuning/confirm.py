"""The confirmation: whole trainings on all training images with seeds that the search has not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kdtoolkit.data import PhotoDataset, check_same_classes, open_dataset
from kdtoolkit.data.opening import name_of, splits_of
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.errors import KDError
from kdtoolkit.tuning.report import Confirmation
from kdtoolkit.tuning.space import BASELINE, Uses
from kdtoolkit.tuning.study import Trial, ranked
from kdtoolkit.tuning.trainer import CannotTrainError, forget, train_whole
from kdtoolkit.workflow.display import Display
from kdtoolkit.workflow.options import TuneOptions
from kdtoolkit.workflow.prepare import Images, Prepared, prepare

BEST, NEXT = "best", "runner-up"


def begin_confirmation(trials: list[Trial], seed: int, seeds: int) -> Confirmation | None:
    """What is to be confirmed: the best trial, the next one, and no teacher; None if no trial could be trained."""
    found = ranked(trials)[:2]
    if not found:
        return None
    rows: dict[str, Uses] = {name: trial.methods for name, trial in zip((BEST, NEXT), found, strict=False)}
    return Confirmation(rows={**rows, BASELINE: ()}, seeds=tuple(range(seed + 1, seed + 1 + seeds)))


def further_data(
    options: TuneOptions, images: Images, size: int, progress: Callable[[str], Callable[[int, int], None]]
) -> dict[str, PhotoDataset]:
    """The data sets of `confirm_data` by name: their test split, or their validation split. Raises KDError."""
    found: dict[str, PhotoDataset] = {}
    for path in options.confirm_data:
        splits = splits_of(path)
        split = next((each for each in ("test", "val") if each in splits), None)
        if split is None:
            raise KDError(f"{path} has neither a test nor a val split, so nothing can be confirmed on it: name another")
        name = f"{name_of(path)}, {split}"
        if name in found or (split == "val" and path == options.data):
            raise KDError(
                f"confirm_data: {name} is evaluated on already. Leave it out, or give its folder another name"
            )
        dataset = open_dataset(
            path,
            split,
            on_bad="skip" if options.skip_bad else "error",
            progress=progress(f"checking {split} images"),
        )
        check_same_classes(images.train, dataset)
        found[name] = dataset.resized(size)
    return found


@dataclass(frozen=True, eq=False)
class Confirming:
    """A confirmation and what it needs.

    `options`: those of the search, with nothing left open. `base`: the run on all its training images. `further`: data
    sets to evaluate on as well. `told`: called after each training with the confirmation so far, the row and the seed.
    """

    options: TuneOptions
    base: Prepared
    further: dict[str, PhotoDataset]
    folder: Path
    device: torch.device
    display: Display
    told: Callable[[Confirmation, str, int], None]

    def run(self, found: Confirmation) -> None:
        """Train all rows with all seeds that are missing. Raises KDError."""
        for seed in found.seeds:
            missing = [
                row for row in found.rows if not all(seed in found.ap.get(d, {}).get(row, {}) for d in self._data)
            ]
            if not missing:
                continue
            options = self.options.model_copy(update={"seed": seed})
            prepared = prepare(options, self.device, self.display.counting, self.base.images)
            for row in missing:
                folder = self.folder / "confirm" / f"{row.replace(' ', '-')}-seed{seed}"
                found = self._row(prepared, found, row, folder)
                self.told(found, row, seed)
                forget(folder)

    @property
    def _data(self) -> tuple[str, ...]:
        return (self._own, *self.further)

    @property
    def _own(self) -> str:
        return f"{name_of(self.options.data)}, val"

    def _row(self, prepared: Prepared, found: Confirmation, row: str, folder: Path) -> Confirmation:
        seed = prepared.options.seed
        show = self.display.part(f"{row}, seed {seed}", prepared.config.steps)
        try:
            student, ap = train_whole(prepared, found.rows[row], folder, self.device, show)
        except CannotTrainError as error:
            raise KDError(f"{row}, seed {seed}: {error}") from error
        found = found.with_ap(self._own, row, seed, ap)
        for name, dataset in self.further.items():
            evaluated = evaluate(
                student.model,
                dataset,
                batch_size=prepared.config.batch_size,
                device=self.device,
                progress=self.display.counting(f"evaluating on {name}"),
            )
            found = found.with_ap(name, row, seed, evaluated.ap or 0.0)
        return found
