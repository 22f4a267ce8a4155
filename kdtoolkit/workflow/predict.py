"""`kd predict`: a detector's detections on images, as files and as pictures with drawn boxes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdtoolkit.data.drawing import draw_boxes
from kdtoolkit.data.image_files import image_files
from kdtoolkit.data.pictures import PictureError, check_whole, decode, seen_size
from kdtoolkit.data.recorded import found_on_files
from kdtoolkit.data.records import Progress
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.engine.evaluate import recorded
from kdtoolkit.engine.scoring import Floats, Found, Ints
from kdtoolkit.errors import KDError
from kdtoolkit.files import write_atomic
from kdtoolkit.models import Detector
from kdtoolkit.workflow.detecting import Ready, make_ready

PICTURE_SIZE = 1600  # longest side of drawn pictures in pixels


@dataclass(frozen=True)
class ImageDetections:
    """The detections on one image, best first.

    Attributes:
        path: the image file.
        size: (width, height) of the image as one sees it, in pixels.
        boxes: (D, 4) xyxy in pixels of the image, cut at its edges.
        scores: (D,) in [0, 1].
        labels: (D,) from 0, in the order of `class_names` of the detector.
    """

    path: Path
    size: tuple[int, int]
    boxes: Floats
    scores: Floats
    labels: Ints


@dataclass(frozen=True)
class Predicted:
    """The detections on all images.

    Attributes:
        images: the images with their detections.
        class_names: of the detector, label 0 first.
        skipped: files that could not be read, with the reason.
        notes: what the user should know, one sentence each.
        written: the files that hold the detections, and the folder of the pictures.
    """

    images: tuple[ImageDetections, ...]
    class_names: tuple[str, ...]
    skipped: Mapping[Path, str]
    notes: tuple[str, ...]
    written: tuple[Path, ...]

    @property
    def detections(self) -> int:
        """The number of all detections."""
        return sum(len(image.scores) for image in self.images)


def predict(
    model: str | Path | Detector,
    images: str | Path,
    *,
    out: str | Path | None = None,
    score: float = 0.3,
    format: Literal["coco", "yolo"] = "coco",
    pictures: bool = True,
    weights: str | Path | None = None,
    classes_as_in: str | Path | None = None,
    image_size: int | None = None,
    batch_size: int = 1,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> Predicted:
    """Run a detector on an image or on the images in a folder, and write its detections and pictures of them.

    Args:
        model: what `open_detector` takes, or a detector that it opened.
        images: an image file, or a folder whose images are taken with those of its subfolders, but for `out`.
        out: the folder to write into, a new one or one without detections; None writes nothing.
        score: detections with a lower score are left out.
        format: "coco" writes `predictions.json` in the format of COCO's results, with the name of each image file and
            class beside it. "yolo" writes a text file for each image into `labels`, with lines `class cx cy w h score`,
            and the names into `classes.txt`.
        pictures: whether to write each image with its detections drawn, into `pictures`.
        weights: a file of weights, or "pretrained" for the library's own; None takes those that belong to `model`.
        classes_as_in: a data set with the detector's classes, if nobody else knows their names.
        image_size: longest side of images in pixels; None takes the one that the detector was trained at. No image is
            enlarged, except by preprocessing of the detector's own; a note tells of that.
        batch_size: images at a time. With more than one, images of different sizes are padded to one size, which can
            change detections a little.
        device: "auto", "cpu", "cuda" or "cuda:1".
        progress: called with the number of images done, and the number of all images.

    Files that cannot be read are left out and listed in `skipped`. Raises KDError if no image can be read, if the
    detector cannot be used, or if the folder cannot be written or has detections already.
    """
    if not 0 <= score <= 1:
        raise KDError(f"score is {score}; scores lie between 0 and 1, so it must too")
    if format not in ("coco", "yolo"):
        raise KDError(f"format is {format!r}; write 'coco' or 'yolo'")
    if batch_size < 1:
        raise KDError(f"batch_size is {batch_size}; it must be at least 1")
    folder = None if out is None else Path(out)
    if folder is not None:
        _check_new(folder)
    files = image_files(Path(images), without=folder)
    root = Path(images) if Path(images).is_dir() else Path(images).parent
    names = names_without_clash([file.relative_to(root) for file in files])
    ready = make_ready(
        model,
        weights=weights,
        classes_as_in=None if classes_as_in is None else Path(classes_as_in),
        image_size=image_size,
        device=device,
    )
    found: list[ImageDetections] = []
    skipped: dict[Path, str] = {}
    try:
        for image in detect_on(files, ready, score, batch_size, skipped, progress):
            found.append(image)
            if folder is not None and pictures:
                write_picture(
                    image, ready.class_names, folder / "pictures" / f"{names[image.path.relative_to(root)]}.jpg"
                )
        if not found:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
            raise KDError(f"none of the {len(files)} images in {images} can be read ({reasons})")
        written: list[Path] = []
        if folder is not None:
            writer = _write_coco if format == "coco" else _write_yolo
            written = [*writer(folder, found, ready.class_names, root, names), *([folder / "pictures"] * pictures)]
    except OSError as error:
        raise KDError(f"cannot write to {folder}: {error.strerror or error}") from error
    return Predicted(tuple(found), ready.class_names, skipped, ready.notes, tuple(written))


def _check_new(folder: Path) -> None:
    """Raise KDError if the folder has what would be written already: of an earlier call, or of a data set."""
    names = ("pictures", "labels", "predictions.json", "classes.txt")
    try:
        there = [name for name in names if (folder / name).exists()]
    except OSError as error:
        raise KDError(f"cannot write to {folder}: {error.strerror or error}") from None
    if there:
        raise KDError(
            f"{folder} has {' and '.join(there)} already, perhaps of an earlier call: choose a new folder by --out, or "
            "delete them"
        )


def detect_on(
    files: Sequence[Path],
    ready: Ready,
    score: float | Floats,
    batch_size: int,
    skipped: dict[Path, str],
    progress: Progress | None = None,
) -> Iterator[ImageDetections]:
    """The detections on each image file that can be read; the others are added to `skipped`.

    `score`: the lowest score, or (K,) one for each class.
    """
    if isinstance(ready.detector.model, RecordedDetector):
        yield from _recorded_on(files, ready.detector.model, score, skipped, progress)
        return
    with ready.runner.in_eval_mode():
        for start in range(0, len(files), batch_size):
            batch = []
            for file in files[start : start + batch_size]:
                try:
                    batch.append((file, *_read(file, ready.image_size)))
                except PictureError as error:
                    skipped[file] = str(error)
            if batch:
                paths, pixels, sizes = zip(*batch, strict=True)
                found = ready.runner(pixels, [(height, width) for width, height in sizes], paths)
                for place, (path, size) in enumerate(zip(paths, sizes, strict=True)):
                    yield _of_image(found.where(found.images == place), path, size, score)
            if progress is not None:
                progress(min(start + batch_size, len(files)), len(files))


def _recorded_on(
    files: Sequence[Path],
    detector: RecordedDetector,
    score: float | Floats,
    skipped: dict[Path, str],
    progress: Progress | None,
) -> Iterator[ImageDetections]:
    """The detections that a file has on each image file."""
    sizes: dict[Path, tuple[int, int]] = {}
    for done, path in enumerate(files, 1):
        try:
            size = seen_size(path)[:2]
            check_whole(path)  # what cannot be decoded can neither be drawn nor learnt from
            sizes[path] = size
        except PictureError as error:
            skipped[path] = str(error)
        if progress is not None:
            progress(done, len(files))
    rows, places = found_on_files(detector.file, sizes, str(files[0].parent))
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(sizes) + 1))
    for place, (path, size) in enumerate(sizes.items()):
        own = order[starts[place] : starts[place + 1]]
        yield _of_image(recorded(detector, rows[own], places[own]), path, size, score)


def _read(file: Path, image_size: int) -> tuple[Tensor, tuple[int, int]]:
    """The pixels of an image, scaled down to `image_size`, and its (width, height). Raises PictureError."""
    width, height, _ = seen_size(file)
    factor = min(1.0, image_size / max(width, height))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return decode(file, size), (width, height)


def _of_image(found: Found, path: Path, size: tuple[int, int], score: float | Floats) -> ImageDetections:
    """The detections of an image that score enough, and of which something lies in the image."""
    corners = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]], 1)
    boxes = corners.clip(0, np.array([*size, *size], np.float64))
    least = score if isinstance(score, float | int) else score[found.classes]
    kept = np.flatnonzero((found.scores >= least) & (boxes[:, 2:] > boxes[:, :2]).all(1))
    kept = kept[np.argsort(-found.scores[kept], kind="stable")]
    return ImageDetections(path, size, boxes[kept], found.scores[kept], found.classes[kept])


def names_without_clash(paths: Sequence[PurePath]) -> dict[PurePath, str]:
    """For each file a name without its ending; if two files would have one name, all names keep their endings."""
    short = [path.with_suffix("").as_posix() for path in paths]
    whole = [path.as_posix() for path in paths]
    return dict(zip(paths, short if len({*short}) == len(short) else whole, strict=True))


def write_picture(image: ImageDetections, class_names: Sequence[str], path: Path) -> None:
    """Write an image with its detections drawn. Raises OSError."""
    factor = min(1.0, PICTURE_SIZE / max(image.size))
    size = max(1, round(image.size[1] * factor)), max(1, round(image.size[0] * factor))
    picture = Image.fromarray(decode(image.path, size).permute(1, 2, 0).numpy())
    labels, scores = (values[::-1].tolist() for values in (image.labels, image.scores))  # the best are drawn last
    captions = [f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    drawn = draw_boxes(picture, (image.boxes[::-1] * factor).tolist(), labels, captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(path, quality=90)


def _write_coco(
    folder: Path,
    images: Sequence[ImageDetections],
    class_names: Sequence[str],
    root: Path,
    names: Mapping[PurePath, str],
) -> list[Path]:
    """Write COCO's results: images are numbered from 1 in their order, categories are labels plus 1."""
    results: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        for (x1, y1, x2, y2), score, label in zip(
            image.boxes.tolist(), image.scores.tolist(), image.labels.tolist(), strict=True
        ):
            results.append(
                {
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(score, 5),
                    "file_name": image.path.relative_to(root).as_posix(),
                    "category": class_names[label],
                }
            )
    path = folder / "predictions.json"
    write_atomic(path, (json.dumps(results, indent=1) + "\n").encode())
    return [path]


def _write_yolo(
    folder: Path,
    images: Sequence[ImageDetections],
    class_names: Sequence[str],
    root: Path,
    names: Mapping[PurePath, str],
) -> list[Path]:
    for image in images:
        width, height = image.size
        lines = []
        for (x1, y1, x2, y2), score, label in zip(
            image.boxes.tolist(), image.scores.tolist(), image.labels.tolist(), strict=True
        ):
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.5f}\n")
        write_atomic(folder / "labels" / f"{names[image.path.relative_to(root)]}.txt", "".join(lines).encode())
    write_atomic(folder / "classes.txt", "".join(f"{name}\n" for name in class_names).encode())
    return [folder / "labels", folder / "classes.txt"]
