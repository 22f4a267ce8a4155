"""The confirmation: whole trainings on all training images with seeds that the search has not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kdtoolkit.data import PhotoDataset, check_same_classes, open_dataset
from kdtoolkit.data.opening import locate, name_of, splits_of
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.errors import KDError
from kdtoolkit.tuning.report import FIRST, NEXT, Confirmation
from kdtoolkit.tuning.space import BASELINE, Uses
from kdtoolkit.tuning.study import Trial, ranked
from kdtoolkit.tuning.trainer import CannotTrainError, forget, train_whole
from kdtoolkit.workflow.display import Display
from kdtoolkit.workflow.options import TuneOptions
from kdtoolkit.workflow.prepare import Images, Prepared, prepare


def begin_confirmation(trials: list[Trial], seed: int, seeds: int) -> Confirmation | None:
    """What is to be confirmed: the best trial, the next one, and no teacher; None if no trial could be trained."""
    found = ranked(trials)[:2]
    if not found:
        return None
    rows: dict[str, Uses] = {name: trial.methods for name, trial in zip((FIRST, NEXT), found, strict=False)}
    return Confirmation(rows={**rows, BASELINE: ()}, seeds=tuple(range(seed + 1, seed + 1 + seeds)))


def further_data(
    options: TuneOptions, images: Images, size: int, progress: Callable[[str], Callable[[int, int], None]]
) -> dict[str, PhotoDataset]:
    """The data sets of `confirm_data` by name: their test split, or their validation split. Raises KDError."""
    found: dict[str, PhotoDataset] = {}
    names, places = {own_images(options.data)}, {_place(options.data, "val")}
    for path in options.confirm_data:
        splits = splits_of(path)
        split = next((each for each in ("test", "val") if each in splits), None)
        if split is None:
            raise KDError(f"{path} has neither a test nor a val split, so nothing can be confirmed on it: name another")
        name = f"{name_of(path)}, {split}"
        if _place(path, split) in places:
            raise KDError(f"confirm_data: the {split} images of {path} are evaluated on already: leave it out")
        if name in names:
            raise KDError(
                f"confirm_data: {path} and a different data set are both called {name}, so their results cannot be "
                "told apart: give its folder a different name"
            )
        names.add(name)
        places.add(_place(path, split))
        dataset = open_dataset(
            path,
            split,
            on_bad="skip" if options.skip_bad else "error",
            progress=progress(f"checking {split} images"),
        )
        check_same_classes(images.train, dataset)
        found[name] = dataset.resized(size)
    return found


def own_images(data: Path) -> str:
    """What the validation images of the search's own data set are called. Raises KDError."""
    return f"{name_of(data)}, val"


def _place(path: Path, split: str) -> tuple[Path, str]:
    """Where images are read from, whichever way their data set was written."""
    return locate(path)[1].resolve(), split


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
        """Train all rows with all seeds that are missing.

        A training that fails is noted, and the others go on. Raises KDError.
        """
        for seed in found.seeds:
            missing = [row for row in found.rows if not found.ended(row, seed)]
            if not missing:
                continue
            options = self.options.model_copy(update={"seed": seed})
            prepared = prepare(options, self.device, self.display.counting, self.base.images)
            for row in missing:
                folder = self.folder / "confirm" / f"{row.replace(' ', '-')}-seed{seed}"
                found = self._row(prepared, found, row, folder)
                self.told(found, row, seed)
                forget(folder)

    def _row(self, prepared: Prepared, found: Confirmation, row: str, folder: Path) -> Confirmation:
        seed = prepared.options.seed
        show = self.display.part(f"{row}, seed {seed}", prepared.config.steps)
        try:
            student, ap, seconds = train_whole(prepared, found.rows[row], folder, self.device, show)
        except CannotTrainError as error:
            return found.with_failure(row, seed, str(error))
        scores = {own_images(self.options.data): ap}
        for name, dataset in self.further.items():
            evaluated = evaluate(
                student.model,
                dataset,
                batch_size=prepared.config.batch_size,
                device=self.device,
                progress=self.display.counting(f"evaluating on {name}"),
            )
            scores[name] = evaluated.ap or 0.0
        return found.with_result(row, seed, scores, seconds)
