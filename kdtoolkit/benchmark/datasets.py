"""The images of a suite: for the teacher, for the student and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdtoolkit.benchmark.suite import DataSection
from kdtoolkit.data import DetectionDataset, ProceduralShapes, check_same_classes, open_dataset, open_images
from kdtoolkit.data.opening import name_of
from kdtoolkit.errors import KDError


@dataclass(frozen=True)
class DataSets:
    """Images for the teacher, for the student and for evaluation; images without labels for the student, or None.

    `splits`: the whole data sets for training and evaluation, which these are parts of. `description` says in words
    what they are. `notices`: what the user should know about them, one sentence each.
    """

    teacher: DetectionDataset
    student: DetectionDataset
    val: DetectionDataset
    unlabelled: DetectionDataset | None
    splits: tuple[DetectionDataset, ...]
    description: str
    notices: tuple[str, ...]


def load_data(data: DataSection, pictures: Path | None = None) -> DataSets:
    """Open the data sets of a suite; nothing is drawn or decoded yet. The student's images are some of the teacher's.

    `pictures`: a folder for drawn pictures and decoded photos, which all cells share.

    Raises KDError if a data set cannot be read, if training and evaluation have different classes, or if none of the
    chosen images has a box.
    """
    train: DetectionDataset
    val: DetectionDataset
    notices: list[str] = []
    if data.root is None:
        assert data.teacher_images is not None  # DataSection has checked all three
        assert data.student_images is not None
        assert data.val_images is not None
        count = max(data.teacher_images, data.student_images)
        # The two seeds lie far apart: a suite with another seed must not evaluate on images that this one trains on.
        train = ProceduralShapes(count, image_size=data.image_size, seed=data.seed, folder=pictures)
        val = ProceduralShapes(data.val_images, image_size=data.image_size, seed=data.seed + 1_000_000, folder=pictures)
        source = f"procedural shapes, {data.image_size} px, seed {data.seed}"
    else:
        cache = None if pictures is None else pictures / "photos"
        photos = [
            open_dataset(data.root, split, max_size=data.image_size, on_bad=data.on_bad, cache=cache)
            for split in ("train", "val")
        ]
        train, val = photos
        if photos[1].held_out:
            notices.append(f"evaluation takes {photos[1].held_out}")
        check_same_classes(train, val)
        source = f"{name_of(data.root)}, at most {data.image_size} px, {len(train.class_names)} classes"

    def take(dataset: DetectionDataset, count: int | None, role: str) -> DetectionDataset:
        if count is not None and count > len(dataset):
            notices.append(
                f"the suite asks for {count} images for {role}, but the data has {len(dataset)}: all of them are used"
            )
        if count is None or count >= len(dataset):
            return dataset
        try:
            return dataset.subset(count, data.seed)
        except KDError as error:
            raise KDError(f"data for {role}: {error}") from error

    splits = (train, val)
    teacher = take(train, data.teacher_images, "the teacher")
    student = take(train, data.student_images, "the student")
    val = take(val, data.val_images, "evaluation")
    counts = f"{len(teacher)} images for the teacher, {len(student)} for the student, {len(val)} for evaluation"
    unlabelled = None
    if data.unlabelled is not None:
        cache = None if pictures is None else pictures / "photos"
        unlabelled = open_images(data.unlabelled, max_size=data.image_size, on_bad=data.on_bad, cache=cache)
        counts += f", {len(unlabelled)} without labels"
    return DataSets(teacher, student, val, unlabelled, splits, f"{source}: {counts}", tuple(notices))
