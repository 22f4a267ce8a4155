"""COCO average precision of a detector on a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.classes import ClassMap
from kdtoolkit.contract import Capability, DetectorAdapter
from kdtoolkit.data import DetectionDataset, InputSize, Sample
from kdtoolkit.data.dataset import checked_item
from kdtoolkit.data.recorded import found_on, why_not_seen
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.engine import group
from kdtoolkit.engine.detect import Precision, Runner
from kdtoolkit.engine.inputs import check_dataset
from kdtoolkit.engine.scoring import IOU_THRESHOLDS, MAX_DETECTIONS, Found, Ints, by_class, mean_precision, precisions
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Evaluation:
    """Average precisions in percent, [0, 100]. A value is None if the ground truth has no object of that kind.

    `ap` is the mean over the IoU thresholds 0.50, 0.55 ... 0.95. `ap_small`, `ap_medium` and `ap_large` are for
    objects of less than 32^2, 32^2 to 96^2, and more than 96^2 pixels of the original image. `images` and `detections`
    are counts. `max_detections`: how many detections of an image and class counted at most.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: dict[str, float | None]
    images: int
    detections: int
    max_detections: int = MAX_DETECTIONS


def evaluate(
    model: nn.Module | DetectorAdapter,
    dataset: DetectionDataset,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
    class_map: ClassMap | None = None,
    labels_from: Literal[0, 1] | None = None,
    input_size: InputSize | None = None,
    like: DetectorAdapter | None = None,
    together: bool = False,
    max_detections: int = MAX_DETECTIONS,
    progress: Callable[[int, int], None] | None = None,
    keep: Callable[[Found], None] | None = None,
) -> Evaluation:
    """Run a detector on all images and score it against the ground truth at original sizes.

    Args:
        model: a detector or an adapter of one. It runs in eval mode; the modes of its modules are restored.
        dataset: the images and their ground truth.
        batch_size: images at a time.
        device: the device of `model`; None takes it from the model itself.
        precision: `bfloat16` or `float16` for autocast; `auto` for bfloat16 where the hardware has it.
        class_map: for a detector with different classes: those that the data set (`student`) and the detector
            (`teacher`) share. Detections of further classes do not count, and AP is the mean over the shared classes.
        labels_from: for a plain module, which is called as torchvision's detectors are: with a list of images (3, H, W)
            float32 in [0, 1]; it returns a list of Detections. 0 if the first class has label 0; 1 if label 0 is
            background. None runs the detector through the adapter that knows it. If no adapter does, labels count
            from 0.
        input_size: images are first resized to the largest size of its range.
        like: a student's adapter. The detector is then shown the images as it is when it teaches this student: at the
            student's sizes, instead of those that its own preprocessing gives them.
        together: in a run of several processes, each process evaluates a part of the images, and all get the whole
            result. Then every process must call `evaluate`.
        max_detections: how many detections of an image and class count, the best first. COCO counts 100, LVIS 300. Most
            detectors give at most 100 of an image in all, unless they are built for more.
        progress: called with the number of images done and the number of all images.
        keep: called with the detections that are scored. Their classes are places in the data set's list of categories,
            with `class_map` too.

    Raises KDError before anything runs if the model's adapter refuses it, if its number of classes differs from the
    data set's, or if it lies on another device. Raises KDError later if a detection is not finite, or has a label that
    the data set does not have (without `class_map`).
    """
    if batch_size < 1:
        raise KDError(f"batch_size must be at least 1, not {batch_size}")
    if max_detections < 1:
        raise KDError(f"max_detections must be at least 1, not {max_detections}")
    runner = Runner.of(model, labels_from=labels_from, device=device, precision=precision, like=like)
    check_dataset(dataset, runner.spec if class_map is None else None)
    dataset = dataset.in_memory()
    truth = dataset.coco()
    if class_map is None:
        runner = replace(runner, num_classes=len(truth["categories"]))
    found = find(runner, dataset, batch_size=batch_size, input_size=input_size, together=together, progress=progress)
    kept = found
    if class_map is not None:
        truth, found = of_shared_classes(truth, found, class_map)
        kept = replace(found, classes=np.array(sorted(class_map.student), np.int64)[found.classes])
    if keep is not None:
        keep(kept)
    return _score(truth, found, max_detections)


def find(
    runner: Runner,
    dataset: DetectionDataset,
    *,
    batch_size: int,
    input_size: InputSize | None = None,
    together: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """All detections on a data set: `images` are places in `dataset.coco()`, `classes` are the detector's from 0.

    The arguments and errors are those of `evaluate`.
    """
    if isinstance(runner.module, RecordedDetector):
        return recorded(runner.module, *found_on(runner.module.file, dataset))
    places = {image["id"]: place for place, image in enumerate(dataset.coco()["images"])}
    rank, count = (group.rank(), processes.count()) if together else (0, 1)
    first, end = (len(dataset) * place // count for place in (rank, rank + 1))
    found: list[Found] = []
    with runner.in_eval_mode():
        for start in range(first, end, batch_size):
            items = [_item(dataset, i, input_size) for i in range(start, min(start + batch_size, end))]
            samples = [sample for _, sample in items]
            ids = [sample["image_id"] for sample in samples]
            batch = runner([image for image, _ in items], [sample["original_size"] for sample in samples], ids)
            found.append(replace(batch, images=np.array([places[number] for number in ids])[batch.images]))
            if progress is not None:
                progress(start + len(items) - first, end - first)
    return Found.concatenated(group.gathered(found) if together else found)


def recorded(detector: RecordedDetector, rows: Ints, places: Ints) -> Found:
    """The detections of a file in these rows, on the images at these places."""
    file = detector.file
    return Found(places, file.labels[rows], file.boxes[rows], file.scores[rows])


def why_not_measured(model: nn.Module | DetectorAdapter, dataset: DetectionDataset) -> str | None:
    """Why the AP of a teacher cannot be measured on a data set, as a part of a sentence; None if it can."""
    module = model.model if isinstance(model, DetectorAdapter) else model
    if isinstance(module, RecordedDetector):
        return why_not_seen(module.file, dataset)
    if Capability.PREDICTIONS not in (spec := adapt(model).spec).capabilities:
        return f"{spec.name} shows features alone and detects nothing"
    return None


def of_shared_classes(truth: dict[str, Any], found: Found, class_map: ClassMap) -> tuple[dict[str, Any], Found]:
    """Ground truth and detections of the classes that the data set (`student`) shares with the detector (`teacher`)."""
    labels = sorted(class_map.student)
    categories = [truth["categories"][label] for label in labels]
    ids = {category["id"] for category in categories}
    annotations = [each for each in truth["annotations"] if each["category_id"] in ids]
    places = {theirs: labels.index(ours) for ours, theirs in zip(class_map.student, class_map.teacher, strict=True)}
    classes = np.array([places.get(label, -1) for label in found.classes.tolist()], np.int64)
    kept = replace(found, classes=classes).where(classes >= 0)
    return {**truth, "categories": categories, "annotations": annotations}, kept


def _item(dataset: DetectionDataset, index: int, input_size: InputSize | None) -> tuple[Tensor, Sample]:
    image, sample = checked_item(dataset, index)
    return (image if input_size is None else input_size.apply(image)), sample


def _score(truth: dict[str, Any], found: Found, max_detections: int) -> Evaluation:
    precision = precisions(truth, found, max_detections)
    thresholds = IOU_THRESHOLDS.round(2).tolist()
    all_areas, small, medium, large = range(4)
    return Evaluation(
        ap=mean_precision(precision[..., all_areas]),
        ap50=mean_precision(precision[thresholds.index(0.5), ..., all_areas]),
        ap75=mean_precision(precision[thresholds.index(0.75), ..., all_areas]),
        ap_small=mean_precision(precision[..., small]),
        ap_medium=mean_precision(precision[..., medium]),
        ap_large=mean_precision(precision[..., large]),
        per_class=by_class(truth, precision),
        images=len(truth["images"]),
        detections=len(found.scores),
        max_detections=max_detections,
    )
