"""COCO's average precision, by hotcoco, or by pycocotools where hotcoco has no build.

Their numbers are equal to the last bit, which the tests check; hotcoco takes less than a tenth of the time.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from hotcoco import COCO, COCOeval
except ImportError:
    from pycocotools.coco import COCO  # type: ignore[assignment]
    from pycocotools.cocoeval import COCOeval  # type: ignore[assignment]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100  # of an image and class, as COCO counts; LVIS, whose images have more objects, counts 300


@dataclass(frozen=True)
class Found:
    """The detections of several images.

    `images` (D,) and `classes` (D,) are places in the ground truth's lists of images and categories. `boxes` (D, 4) are
    x, y, width and height in pixels of the original image. `scores` (D,) are the detector's.
    """

    images: Ints
    classes: Ints
    boxes: Floats
    scores: Floats

    def where(self, kept: NDArray[np.bool_]) -> Found:
        """The detections for which `kept` (D,) is true."""
        return Found(*(getattr(self, field.name)[kept] for field in fields(Found)))

    @staticmethod
    def concatenated(parts: Sequence[Found]) -> Found:
        """The detections of several parts, one after the other."""
        return Found(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Found)))


def precisions(truth: Mapping[str, Any], found: Found, max_detections: int = MAX_DETECTIONS) -> Floats:
    """Precisions (10 IoU thresholds, 101 recalls, K classes, 4 ranges of areas) in [0, 1]; -1 if there is no object.

    `truth` is in COCO's format. Classes are in the order of their ids. In each image the `max_detections` best
    detections of a class count.
    """
    scoring = matched(truth, found, max_detections)
    with _silence():
        scoring.accumulate()
    precision: Floats = scoring.eval["precision"][..., -1]  # type: ignore[index]
    return precision


def matched(truth: Mapping[str, Any], found: Found, max_detections: int, *, by_area: bool = True) -> COCOeval:
    """COCO's evaluation after its first part: detections and objects are matched in each image, for each class.

    `by_area`: whether also for small, medium and large objects alone.

    Images and categories are numbered anew in it, by the order of their ids: `ranks`.
    """
    images, classes = ranks(truth["images"]), ranks(truth["categories"])
    image_ranks, class_ranks = (np.array([*each.values()], np.int64) for each in (images, classes))
    # These are floats, which cannot hold every id.
    rows = np.column_stack([image_ranks[found.images], found.boxes, found.scores, class_ranks[found.classes]])
    # Numbered anew too: pycocotools takes a match with an annotation of id 0 for none.
    annotations = [
        {**each, "id": number, "image_id": images[each["image_id"]], "category_id": classes[each["category_id"]]}
        for number, each in enumerate(truth["annotations"], 1)
        if each["image_id"] in images and each["category_id"] in classes
    ]
    numbered = {
        "images": [{**image, "id": images[image["id"]]} for image in truth["images"]],
        "categories": [{**category, "id": classes[category["id"]]} for category in truth["categories"]],
    }
    with _silence():
        expected = _index({**truth, **numbered, "annotations": annotations})
        detections = expected.loadRes(rows) if len(rows) else _index({**truth, **numbered, "annotations": []})
        scoring = COCOeval(expected, detections, "bbox")
        scoring.params.maxDets = [max_detections]
        if not by_area:
            scoring.params.areaRng, scoring.params.areaRngLbl = (
                scoring.params.areaRng[:1],
                scoring.params.areaRngLbl[:1],
            )
        scoring.evaluate()
    return scoring


def ranks(entries: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The place of each entry's id among all ids in ascending order, for the entries of a list in COCO's format."""
    rank = {each: place for place, each in enumerate(sorted(entry["id"] for entry in entries))}
    return {entry["id"]: rank[entry["id"]] for entry in entries}


def mean_precision(precision: Floats) -> float | None:
    """The mean of some of the `precisions` in percent: an AP. None where there is nothing to find."""
    found = precision[precision > -1]
    return 100 * float(found.mean()) if found.size else None


def by_class(truth: Mapping[str, Any], precision: Floats) -> dict[str, float | None]:
    """AP in percent by the name of the class, from what `precisions` returns; None for a class without objects."""
    ids = sorted(category["id"] for category in truth["categories"])
    return {
        category["name"]: mean_precision(precision[:, :, ids.index(category["id"]), 0])
        for category in truth["categories"]
    }


def _silence() -> contextlib.AbstractContextManager[Any]:
    """A context in which nothing is printed: pycocotools tells what it does."""
    return contextlib.redirect_stdout(io.StringIO())


def _index(document: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = document
    coco.createIndex()
    return coco
