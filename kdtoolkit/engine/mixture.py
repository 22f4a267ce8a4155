"""Steps with labels and steps without: which step of a run is which, the batches of both, and how many views they show.

All depend only on the run's settings and the step, so a run that was stopped goes on with the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

from torch import Tensor

from kdtoolkit import processes
from kdtoolkit.contract import RecordedAlone, Target
from kdtoolkit.data import LoadedBatch
from kdtoolkit.data.views import Sizes, Views, count_views
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.errors import KDError

LARGEST_SHARE = 0.5  # of the steps, if the config names none


def share_without_labels(given: float | None, labelled: int, unlabelled: int) -> float:
    """The share of a run's steps that show images without labels.

    `given`: the config's `unlabelled_share`; if it is None, the number of images with and without labels decides.
    """
    return min(unlabelled / (labelled + unlabelled), LARGEST_SHARE) if given is None else given


def unlabelled_steps(
    distiller: Distiller, config: TrainConfig, labelled: Sized, unlabelled: Sized | None
) -> list[bool]:
    """For each step of a run, whether its images have no labels. These steps are spread evenly over the run.

    Steps in which no method can teach without labels always have labels.

    Raises KDError if none of the steps would be without labels.
    """
    if unlabelled is None:
        return [False] * config.steps
    share = share_without_labels(config.unlabelled_share, len(labelled), len(unlabelled))
    found, due = [], 0.0
    for step in range(config.steps):
        due += share
        if without := due >= 1 and bool(distiller.active(step, labelled=False)):
            due -= 1
        due = min(due, 1.0)  # steps that no method could use are not made up for all at once
        found.append(without)
    if not any(found):
        raise KDError(
            f"none of the {config.steps} steps would have images without labels, with a share of {share:.3g} of the "
            "steps: train longer, or name a larger unlabelled_share in the config"
        )
    return found


def views_of_run(
    distiller: Distiller,
    config: TrainConfig,
    labelled: Sizes,
    unlabelled: Sizes | None,
    *,
    seed: int,
    most: int | None = None,
) -> Views:
    """Count the views of a run by the sizes of its images. No option may be on that never repeats a view.

    `most`: how many of the images shown are counted; a longer run is counted in its first steps. None counts all.
    Raises the errors of `unlabelled_steps`.
    """
    steps = None if most is None else max(1, most // config.batch_size)
    without = unlabelled_steps(distiller, config, labelled, unlabelled)[:steps]
    found = [
        count_views(
            sizes,
            batch_size=config.batch_size,
            steps=without.count(chosen),
            seed=seed,
            augment=config.augmentation,
            input_size=config.input_size,
            parts=config.accumulation * processes.count(),
        )
        for sizes, chosen in ((labelled, False), (unlabelled or [], True))
    ]
    return Views(sum(views.shown for views in found), sum(views.different for views in found))


def alternate(
    without: Iterable[bool], labelled: Iterator[LoadedBatch], unlabelled: Iterator[LoadedBatch]
) -> Iterator[tuple[list[Tensor], list[Target] | list[RecordedAlone] | None, list[str] | None]]:
    """Yield a batch for each step: in the steps `without` labels one of `unlabelled`, without labels in its targets."""
    for none in without:
        images, targets, keys = next(unlabelled if none else labelled)
        yield images, _without_labels(targets) if none else targets, keys


def _without_labels(targets: list[Target]) -> list[RecordedAlone] | None:
    """What the targets hold beside labels: a teacher's recorded detections; None if there is nothing."""
    found: list[RecordedAlone] = [{"recorded": each["recorded"]} for each in targets if "recorded" in each]
    return found or None
