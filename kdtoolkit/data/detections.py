"""Files of detections: what a detector found on images at an earlier time. They are read and checked here.

A file is JSON in the format of COCO's results: a list of detections, or an object with that list under `annotations`,
and with `images` and `categories` as data sets in COCO's format have them. docs/detections.md describes it.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdtoolkit.data.coco import categories_in
from kdtoolkit.data.records import BadEntryError, few_of, is_finite, is_text, shown, whole
from kdtoolkit.errors import KDError

ENDING = ".json"
_SHAPE = '{"image_id": 1, "category_id": 2, "bbox": [x, y, width, height], "score": 0.9}'

Key = int | str
"""How a file names an image: by its id, or by its file name."""


def is_detection_file(name: object) -> bool:
    """Whether a model is given by a file of detections."""
    return isinstance(name, str | Path) and Path(name).suffix.lower() == ENDING and not Path(name).is_dir()


@dataclass(frozen=True, eq=False)
class DetectionFile:
    """The detections of a file, checked as far as this can be done without the images.

    Attributes:
        path: the file.
        class_names: the detector's classes, label 0 first.
        keys: the images, as the file names them.
        listed: the images that the file says were looked at, in the same form; None if it does not say.
        images: (E,) for each detection its place in `keys`.
        labels: (E,) its class.
        boxes: (E, 4) float64, x, y, width and height in pixels of the original image.
        scores: (E,) float64 in [0, 1].
        probabilities: (E, K) float32, the scores of all classes; None if the file has only those of the best class.
        digest: of the file's content.
    """

    path: Path
    class_names: tuple[str, ...]
    keys: tuple[Key, ...]
    listed: frozenset[Key] | None
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    probabilities: NDArray[np.float32] | None
    digest: str


def read_detections(path: str | Path, categories: Mapping[int, str] | None = None) -> DetectionFile:
    """Read a file of detections.

    Args:
        path: the file.
        categories: the data's classes by their ids (`categories_of`), for a file that does not name its classes.

    Raises KDError that names the first entry that is wrong, what is wrong with it, and how it must be.
    """
    path = Path(path)
    content, document = _parsed(path)
    entries = document
    classes: dict[int, str] | None = None
    file_names: dict[int, str] | None = None
    if isinstance(document, dict):
        entries = document.get("annotations")
        if "categories" in document:
            classes = {each.id: each.name for each in categories_in(_listed(document, "categories", path), path)}
        if "images" in document:
            file_names = _file_names(_listed(document, "images", path), path)
    if not isinstance(entries, list):
        raise KDError(
            f"{path} holds no list of detections: it must be a list of entries such as {_SHAPE}, or an object with "
            "that list under `annotations`"
        )
    if not entries:
        raise KDError(f"{path} has no detections: run the detector on the images, and write what it finds")
    classes = classes or _named_in(entries, path) or (None if categories is None else dict(categories))
    if classes is None:
        raise KDError(
            f"{path} does not say which classes its category ids are. Name data in COCO's format that has these ids "
            "(--classes-as-in, or --data if that is left out), where the command takes it; or add the classes to the "
            'file, {"categories": [{"id": 1, "name": "owl"}, ...], "annotations": [...]}; or add a name to '
            'each entry, "category": "owl"'
        )
    reader = _Reader(path, classes, file_names)
    for index, entry in enumerate(entries):
        reader.add(index, entry)
    return reader.finish(hashlib.sha256(content).hexdigest()[:32])


class _Reader:
    """Collects the entries of a file."""

    def __init__(self, path: Path, classes: Mapping[int, str], file_names: Mapping[int, str] | None) -> None:
        self._path = path
        self._labels = {number: label for label, number in enumerate(sorted(classes))}
        self._class_names = tuple(classes[number] for number in sorted(classes))
        self._file_names = file_names
        self._keys: dict[Key, int] = {}
        self._rows: list[tuple[int, int, float]] = []
        self._boxes: list[list[float]] = []
        self._scores: dict[int, list[float]] = {}

    def add(self, index: int, entry: Any) -> None:
        """Check an entry and keep it. Raises KDError that names it."""
        try:
            key = self._key(entry)
            row = self._label(entry), _score(entry.get("score"))
            self._boxes.append(_box(entry.get("bbox")))
            if entry.get("scores") is not None:
                self._scores[len(self._rows)] = self._all_scores(entry["scores"])
        except BadEntryError as error:
            about = entry.get("file_name", entry.get("image_id")) if isinstance(entry, dict) else None
            image = "" if about is None else f", image {shown(about)}"
            raise KDError(f"{self._path}: detection {index} (counted from 0){image}: {error}") from None
        self._rows.append((self._keys.setdefault(key, len(self._keys)), *row))

    def finish(self, digest: str) -> DetectionFile:
        images, labels, scores = zip(*self._rows, strict=True)
        found = DetectionFile(
            path=self._path,
            class_names=self._class_names,
            keys=tuple(self._keys),
            listed=None if self._file_names is None else frozenset(self._file_names.values()),
            images=np.array(images, np.int64),
            labels=np.array(labels, np.int64),
            boxes=np.array(self._boxes, np.float64),
            scores=np.array(scores, np.float64),
            probabilities=self._probabilities(labels, scores),
            digest=digest,
        )
        if (found.boxes[:, :2] + found.boxes[:, 2:]).max() <= 1:
            raise KDError(
                f"{self._path}: all boxes lie within 0..1, and bbox must be [x, y, width, height] in pixels of the "
                "original image: multiply them by the image's width and height"
            )
        return found

    def _key(self, entry: Any) -> Key:
        if not isinstance(entry, dict):
            raise BadEntryError(f"must be an object such as {_SHAPE}, not {shown(entry)}")
        name = entry.get("file_name")
        if name is not None:
            if not isinstance(name, str) or not is_text(name):
                raise BadEntryError(f"file_name must be text, not {shown(name)}; or leave it out and give an image_id")
            return _plain(name)
        number = entry.get("image_id")
        if self._file_names is not None:
            if (known := whole(number)) is None or known not in self._file_names:
                raise BadEntryError(
                    f"no image under `images` has the id {shown(number)}: add the image there, or correct image_id"
                )
            return self._file_names[known]
        if isinstance(number, str) and is_text(number):
            return _plain(number)
        if (known := whole(number)) is None:
            raise BadEntryError(
                f"image_id must be the id of an image, or its file name, not {shown(number)}; or give a file_name"
            )
        return known

    def _label(self, entry: Mapping[str, Any]) -> int:
        number = whole(entry.get("category_id"))
        if number is None or number not in self._labels:
            raise BadEntryError(
                f"no class has the category_id {shown(entry.get('category_id'))}, only {few_of(self._labels)}: correct "
                "it, or list the detector's classes in the file, under `categories`"
            )
        return self._labels[number]

    def _all_scores(self, scores: object) -> list[float]:
        count = len(self._labels)
        if not isinstance(scores, list) or len(scores) != count:
            what = f"{len(scores)} numbers" if isinstance(scores, list) else shown(scores)
            raise BadEntryError(
                f"scores must be a list of {count} numbers, one for each class in the order of the category ids "
                f"and none for background, not {what}. If the detector has more classes, list all of them under "
                "`categories`"
            )
        return [_score(score, f"scores[{place}]") for place, score in enumerate(scores)]

    def _probabilities(self, labels: Sequence[int], scores: Sequence[float]) -> NDArray[np.float32] | None:
        """The scores of all classes. Entries without them have that of their class alone."""
        if not self._scores:
            return None
        found = np.zeros((len(labels), len(self._labels)), np.float32)
        found[np.arange(len(labels)), labels] = scores
        rows = list(self._scores)
        found[rows] = np.array(list(self._scores.values()), np.float32)
        return found


def _parsed(path: Path) -> tuple[bytes, Any]:
    """The file's bytes, and what they hold. Raises KDError."""
    try:
        content = path.read_bytes()
        return content, json.loads(content)
    except FileNotFoundError:
        raise KDError(f"there is no file {path}; correct the path") from None
    except json.JSONDecodeError as error:
        raise KDError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Export the file again"
        ) from None
    except UnicodeDecodeError as error:
        raise KDError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, RecursionError, ValueError) as error:  # no permission; nested too deep; an integer too long
        raise KDError(f"{path} cannot be read: {error}") from None


def _listed(document: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    if not isinstance(found := document[key], list):
        raise KDError(f"{path}: `{key}` must be a list, not {shown(found)}")
    return found


def _file_names(entries: Sequence[Any], path: Path) -> dict[int, str]:
    """The files of the images under `images`, by their ids."""
    found: dict[int, str] = {}
    for index, entry in enumerate(entries):
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if number is None or not isinstance(name, str) or not is_text(name):
            raise KDError(f"{path}: images[{index}] must be an object with an integer id and a file_name")
        if number in found:
            raise KDError(f"{path}: images[{index}]: the id {number} is there already; give each image its own")
        found[number] = _plain(name)
    return found


def _named_in(entries: Sequence[Any], path: Path) -> dict[int, str] | None:
    """The classes by their ids, if each entry has the name of its class under `category`; else None."""
    found: dict[int, str] = {}
    for index, entry in enumerate(entries):
        name = entry.get("category") if isinstance(entry, dict) else None
        number = whole(entry.get("category_id")) if isinstance(entry, dict) else None
        if not isinstance(name, str) or not is_text(name) or number is None:
            return None
        if (known := found.setdefault(number, name)) != name:
            raise KDError(
                f"{path}: detection {index} (counted from 0): the category_id {number} is {name!r} here and {known!r} "
                "in an earlier entry: give each class its own id"
            )
    return found


def _score(score: object, name: str = "score") -> float:
    if not isinstance(score, int | float) or not is_finite(score) or not 0 <= score <= 1:
        raise BadEntryError(f"{name} must be a number from 0 to 1, not {shown(score)}")
    return float(score)


def _box(box: object) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
        raise BadEntryError(f"bbox must be four finite numbers [x, y, width, height], not {shown(box)}")
    if box[2] < 0 or box[3] < 0:
        raise BadEntryError(
            f"bbox is {shown(box)}, and its width and height must not be negative: it must be [x, y, width, height] in "
            "pixels of the original image"
        )
    return box


def _plain(name: str) -> str:
    """A file name in one form: with slashes, without "./" before it, with composed accents."""
    return PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/"))).as_posix()
