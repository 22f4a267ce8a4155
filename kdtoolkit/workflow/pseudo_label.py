"""`kd pseudo-label`: a teacher's detections as the labels of images that have none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kdtoolkit.classes import ClassMap
from kdtoolkit.data import DetectionDataset, open_dataset
from kdtoolkit.data.image_files import image_files
from kdtoolkit.data.records import Box, Category, Photo, Progress, Reading
from kdtoolkit.data.tools.convert import check_names, check_new, with_slashes, write
from kdtoolkit.engine.evaluate import find, of_shared_classes
from kdtoolkit.engine.scoring import Floats
from kdtoolkit.engine.thresholds import Threshold, at_score, best_thresholds
from kdtoolkit.errors import KDError, printable
from kdtoolkit.models import Detector
from kdtoolkit.workflow.detecting import check_recorded, make_ready
from kdtoolkit.workflow.predict import ImageDetections, detect_on

LEAST_SIDE = 1.0  # pixels of a box that is worth a label


@dataclass(frozen=True)
class PseudoLabels:
    """A data set whose labels are a detector's detections.

    Attributes:
        folder: where it lies.
        images: the number of its images.
        empty: how many of them have no label.
        thresholds: for each class the lowest score that becomes a label, with precision and recall on labelled images.
        boxes: for each class the number of labels.
        skipped: files that could not be read, with the reason.
        notes: what the user should know, one sentence each.
    """

    folder: Path
    images: int
    empty: int
    thresholds: Mapping[str, Threshold]
    boxes: Mapping[str, int]
    skipped: Mapping[Path, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        skipped = {str(path): reason for path, reason in self.skipped.items()}
        return asdict(self) | {"folder": str(self.folder), "skipped": skipped}

    def to_markdown(self) -> str:
        """The report for people."""
        lines = [
            f"# Labels by a detector: {self.images} images",
            "",
            f"{sum(self.boxes.values())} detections became labels. {self.empty} images have none.",
            "",
            "A detection becomes a label if it has at least the score of its class. Precision and recall at this",
            "score were measured on labelled images, at an IoU of 0.5 or more. A class without a score gets no labels,",
            "because most of its detections were wrong. Its objects in these images will count as background.",
            "",
            "| class | score | precision | recall | objects | labels |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, found in self.thresholds.items():
            precision, recall = ("-" if value is None else f"{value:.2f}" for value in (found.precision, found.recall))
            score = "none" if found.score is None else f"{found.score:.3f}"
            cells = (name.replace("|", r"\|"), score, precision, recall, str(found.objects))
            lines.append(f"| {' | '.join(cells)} | {self.boxes[name]} |")
        lines += ["", *(f"{note}\n" for note in self.notes)]
        lines += [printable(f"- left out: {path}: {reason}") for path, reason in self.skipped.items()]
        return "\n".join(lines).rstrip() + "\n"


def pseudo_label(
    model: str | Path | Detector,
    images: str | Path,
    data: str | Path,
    *,
    out: str | Path,
    score: float | None = None,
    format: Literal["coco", "yolo"] = "coco",
    split: str = "val",
    weights: str | Path | None = None,
    class_map: Mapping[str, str] | None = None,
    classes_as_in: str | Path | None = None,
    image_size: int | None = None,
    batch_size: int = 1,
    device: str | torch.device = "auto",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> PseudoLabels:
    """Write a data set of images whose labels are the detections of a teacher.

    The score that a detection needs is chosen for each class: the one at which F1, the harmonic mean of precision and
    recall, is largest on the labelled images of `data`. The new data set has the classes of `data`, in the same order,
    and all its images in the split "train". A report lies in it: `report.md` and `report.json`.

    Args:
        model: the teacher: what `open_detector` takes, or a detector that it opened. A file of detections needs those
            on `images` and on the labelled images.
        images: a folder of images, which are taken with those of its subfolders.
        data: a data set with labelled images, whose classes the labels get.
        out: a new folder.
        score: the lowest score of all classes, instead of chosen ones.
        format: "coco" or "yolo".
        split: which images of `data` the scores are chosen on.
        weights: a file of weights, or "pretrained" for the library's own; None takes those that belong to `model`.
        class_map: the detector's name for a class of the data, where the names differ.
        classes_as_in: a data set with the detector's classes, if nobody else knows their names.
        image_size: longest side of images in pixels; None takes the one that the detector was trained at.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda" or "cuda:1".
        skip_bad: leave bad images and annotations of `data` out, instead of stopping.
        progress: called with the number of images done, and the number of all images.

    Raises KDError if the detector, the images or the data cannot be used, if no detection scores enough, or if the
    folder cannot be written.
    """
    if score is not None and not 0 <= score <= 1:
        raise KDError(f"score is {score}; scores lie between 0 and 1, so it must too")
    if format not in ("coco", "yolo"):
        raise KDError(f"format is {format!r}; write 'coco' or 'yolo'")
    if batch_size < 1:
        raise KDError(f"batch_size is {batch_size}; it must be at least 1")
    folder = Path(out)
    check_new(folder)
    files = image_files(Path(images))
    root = Path(images) if Path(images).is_dir() else Path(images).parent
    names = [_name(file, root) for file in files]
    check_names(((name, f"image {name}") for name in names), Path(images), format)
    ready = make_ready(
        model,
        weights=weights,
        classes_as_in=None if classes_as_in is None else Path(classes_as_in),
        image_size=image_size,
        device=device,
        data=Path(data),
    )
    labelled = open_dataset(data, split, max_size=ready.image_size, on_bad="skip" if skip_bad else "error").in_memory()
    parts: dict[str, DetectionDataset | Sequence[Path]] = {split: labelled, f"the images of {images}": files}
    about_images = check_recorded(ready.detector.model, parts, Path(data))
    class_names = tuple(labelled.class_names)
    shared, about_classes = ready.shared_with(class_names, str(data), class_map)
    same = tuple(range(len(class_names)))
    class_map_used = shared or ClassMap(same, same)
    truth, found = of_shared_classes(
        labelled.coco(), find(ready.runner, labelled, batch_size=batch_size, progress=progress), class_map_used
    )
    chosen = best_thresholds(truth, found) if score is None else at_score(truth, found, score)
    ours = sorted(class_map_used.student)
    labels = dict(zip(class_map_used.teacher, class_map_used.student, strict=True))
    least: Floats = np.full(len(ready.class_names), np.inf)  # of classes that the data lacks nothing becomes a label
    for theirs, label in labels.items():
        if (lowest := chosen[ours.index(label)].score) is not None:
            least[theirs] = lowest
    skipped: dict[Path, str] = {}
    photos = [
        _photo(number, image, labels, root)
        for number, image in enumerate(detect_on(files, ready, least, batch_size, skipped, progress), 1)
    ]
    counts = np.bincount([box.label for photo in photos for box in photo.boxes], minlength=len(class_names)).tolist()
    if not sum(counts):
        raise KDError(
            f"{ready.detector.name} finds nothing in {images} that scores enough, so there is nothing to label; choose "
            "a lower --score, or a better teacher"
        )
    result = PseudoLabels(
        folder,
        images=len(photos),
        empty=sum(not photo.boxes for photo in photos),
        thresholds={class_names[label]: each for label, each in zip(ours, chosen, strict=True)},
        boxes=dict(zip(class_names, counts, strict=True)),
        skipped=skipped,
        notes=(*ready.notes, *about_images, *about_classes, *_about_unlabelled(class_names, ours, chosen)),
    )
    categories = [Category(number, name) for number, name in enumerate(class_names, 1)]
    reports = {"report.md": result.to_markdown(), "report.json": json.dumps(result.to_json(), indent=2) + "\n"}
    write({"train": Reading(Path(images), root, categories, photos)}, folder, format, reports)
    return result


def _about_unlabelled(class_names: Sequence[str], labels: Sequence[int], chosen: Sequence[Threshold]) -> Iterator[str]:
    """Which classes get no labels, in a sentence."""
    if poor := [class_names[label] for label, each in zip(labels, chosen, strict=True) if each.score is None]:
        yield (
            f"{', '.join(poor)}: no labels, because most detections were wrong on the labelled images. A student that "
            "learns from these labels takes such objects for background: use a better teacher, or other images."
        )


def _name(file: Path, root: Path) -> str:
    """The name of an image in the new data set."""
    return with_slashes(file.relative_to(root).as_posix())


def _photo(number: int, image: ImageDetections, labels: Mapping[int, int], root: Path) -> Photo:
    """An image with its detections as boxes."""
    name = _name(image.path, root)
    boxes = []
    for (x1, y1, x2, y2), label in zip(image.boxes.tolist(), image.labels.tolist(), strict=True):
        width, height = x2 - x1, y2 - y1
        if min(width, height) >= LEAST_SIDE:
            boxes.append(Box(labels[label], (x1, y1, width, height), width * height))
    return Photo(number, name, f"image {name}", image.path, *image.size, tuple(boxes))
