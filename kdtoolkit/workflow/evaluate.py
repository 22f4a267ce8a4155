"""`kd eval`: how good and how fast a detector is on a data set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.data import DetectionDataset, open_dataset
from kdtoolkit.data.records import Progress
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.engine.detect import Runner
from kdtoolkit.engine.evaluate import METRICS, Evaluation
from kdtoolkit.engine.evaluate import evaluate as score
from kdtoolkit.engine.scoring import MAX_DETECTIONS
from kdtoolkit.errors import printable
from kdtoolkit.models import Detector
from kdtoolkit.workflow.detecting import check_recorded, make_ready

TIMED_IMAGES = 20
FIRST_IMAGES = 3  # of those not counted: memory is allocated, kernels are chosen
HEADS = ("AP", "AP50", "AP75", "small", "medium", "large")


@dataclass(frozen=True)
class Evaluated:
    """How good and how fast a detector is.

    Attributes:
        model: the detector's name.
        weights: where its weights come from, in words.
        data: what it was evaluated on.
        scores: its average precisions.
        milliseconds: for one image alone, from its pixels to its detections: the median of up to 20 images. None for a
            file of detections.
        device: where it ran.
        image_size: the longest side of the images in pixels; larger images were scaled down to it.
        notes: what the user should know, one sentence each.
    """

    model: str
    weights: str
    data: str
    scores: Evaluation
    milliseconds: float | None
    device: str
    image_size: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def evaluate(
    model: str | Path | Detector,
    data: str | Path,
    *,
    split: str = "val",
    weights: str | Path | None = None,
    class_map: Mapping[str, str] | None = None,
    classes_as_in: str | Path | None = None,
    image_size: int | None = None,
    batch_size: int = 8,
    max_detections: int = MAX_DETECTIONS,
    device: str | torch.device = "auto",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Evaluated:
    """Evaluate a detector on a split of a data set, and measure its speed.

    Args:
        model: what `open_detector` takes, or a detector that it opened. A file of detections is scored as it is.
        data: a folder in COCO, YOLO or Pascal VOC format, also as a tool exports it; or a YOLO YAML or COCO JSON file.
        split: "train", "val" or "test"; "all", if the data come in one part.
        weights: a file of weights, or "pretrained" for the library's own; None takes those that belong to `model`.
        class_map: the detector's name for a class of the data, where the names differ: {"owl": "bird"}. Classes of
            equal names need none. Detections of classes that the data lacks are left out. AP is the mean over the
            classes that both have.
        classes_as_in: a data set with the detector's classes, if nobody else knows their names.
        image_size: longest side of images in pixels; None takes the one that the detector was trained at. No image is
            enlarged, except by preprocessing of the detector's own; a note tells of that.
        batch_size: images at a time.
        max_detections: how many detections of an image and class count, the best first: 100 as COCO, 300 as LVIS.
        device: "auto", "cpu", "cuda" or "cuda:1".
        skip_bad: leave bad images and annotations out, instead of stopping.
        progress: called with the number of images done, and the number of all images.

    Raises KDError if the detector or the data cannot be used, or if they share no class.
    """
    ready = make_ready(
        model,
        weights=weights,
        classes_as_in=None if classes_as_in is None else Path(classes_as_in),
        image_size=image_size,
        device=device,
        data=Path(data),
    )
    dataset = open_dataset(data, split, max_size=ready.image_size, on_bad="skip" if skip_bad else "error")
    about_images = check_recorded(ready.detector.model, {split: dataset}, Path(data))
    shared, about_classes = ready.shared_with(dataset.class_names, str(data), class_map)
    scores = score(
        ready.detector.model,
        dataset,
        batch_size=batch_size,
        class_map=shared,
        max_detections=max_detections,
        progress=progress,
    )
    detector = ready.detector
    milliseconds = None
    if not isinstance(detector.model, RecordedDetector):
        milliseconds = 1000 * seconds_per_image(ready.runner, dataset.in_memory())
    place = str(ready.runner.device)
    notes = (*ready.notes, *about_images, *about_classes)
    return Evaluated(
        detector.name, detector.weights, str(dataset), scores, milliseconds, place, ready.image_size, notes
    )


def seconds_per_image(runner: Runner, dataset: DetectionDataset) -> float:
    """How long the detector takes for one image alone: the median of up to 20 images, after three to warm up."""
    taken = []
    count = min(len(dataset), TIMED_IMAGES)
    with runner.in_eval_mode():
        for index in [*(place % count for place in range(FIRST_IMAGES)), *range(count)]:
            image, sample = dataset[index]
            start = time.perf_counter()
            runner([image], [sample["original_size"]], [sample["image_id"]])  # it waits for the detections
            taken.append(time.perf_counter() - start)
    return median(taken[FIRST_IMAGES:])


def print_evaluated(found: Evaluated, console: Console) -> None:
    """Print the result for people."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style), soft_wrap=True)

    line(f"{found.model} on {found.data}: {found.scores.images} images")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("class", overflow="fold")
    for head in HEADS:
        table.add_column(head, justify="right")
    table.add_row("all", *(_percent(getattr(found.scores, metric)) for metric in METRICS))
    for name, ap in found.scores.per_class.items():
        table.add_row(Text(printable(name)), _percent(ap))
    console.print(table)
    if (limit := found.scores.max_detections) != MAX_DETECTIONS:
        line(f"in each image the best {limit} detections of a class count (COCO counts {MAX_DETECTIONS})")
    if found.milliseconds is not None:
        line(
            f"speed: {found.milliseconds:.1f} ms an image, one at a time, on {found.device}, longest side at most "
            f"{found.image_size} px"
        )
    for note in found.notes:
        line(f"note: {note}", "yellow")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
