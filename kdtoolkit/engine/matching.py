"""Which detections are right: each image's detections and objects, matched at an IoU of 0.5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdtoolkit.engine.scoring import MAX_DETECTIONS, Floats, Found, Ints

MATCHING_IOU = 0.5

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Objects:
    """The objects of a ground truth in COCO's format (G of them). `crowds` says which are groups of objects.

    `images` (G,) and `classes` (G,) are places in its lists of images and categories. `boxes` (G, 4) are xywh in
    pixels.
    """

    images: Ints
    classes: Ints
    boxes: Floats
    crowds: Flags

    @staticmethod
    def of(truth: Mapping[str, Any]) -> Objects:
        """The objects of a ground truth, in its order."""
        images, classes = (
            {entry["id"]: place for place, entry in enumerate(truth[name])} for name in ("images", "categories")
        )
        annotations = truth["annotations"]
        return Objects(
            np.array([images[each["image_id"]] for each in annotations], np.int64),
            np.array([classes[each["category_id"]] for each in annotations], np.int64),
            np.array([each["bbox"] for each in annotations], np.float64).reshape(-1, 4),
            np.array([each.get("iscrowd", 0) for each in annotations], bool),
        )


@dataclass(frozen=True)
class Matched:
    """One image's detections and objects.

    Attributes:
        detections: (D,) places of the detections, highest score first. At most `max_detections` of a class are here.
        objects: (G,) places of the objects that are no crowd.
        overlaps: (D, G) their IoU.
        same: (D, G) whether they have the same class.
        partner: (D,) the column of the object that a detection has found; -1 for none.
        ignored: (D,) whether a detection without partner lies on a crowd of its class: it is neither right nor wrong.
    """

    detections: Ints
    objects: Ints
    overlaps: Floats
    same: Flags
    partner: Ints
    ignored: Flags

    @property
    def right(self) -> Flags:
        """(D,) whether a detection has found an object."""
        return self.partner >= 0

    @property
    def found(self) -> Flags:
        """(G,) whether an object was found."""
        result = np.zeros(len(self.objects), bool)
        result[self.partner[self.right]] = True
        return result


def match(objects: Objects, found: Found, max_detections: int = MAX_DETECTIONS) -> Iterator[tuple[int, Matched]]:
    """The place and the matches of each image that has an object or a detection.

    As in COCO's evaluation at an IoU of 0.5, the detections of a class choose among its objects, the highest score
    first. Each takes the object with the largest overlap that no better detection has taken.
    """
    order = _best(found, max_detections)
    places = np.unique(np.concatenate([objects.images, found.images[order]]))
    by_image = np.argsort(objects.images, kind="stable")
    detected = (
        np.searchsorted(found.images[order], places, "left"),
        np.searchsorted(found.images[order], places, "right"),
    )
    present = (np.searchsorted(objects.images[by_image], places, side) for side in ("left", "right"))
    for place, first, end, start, stop in zip(places.tolist(), *detected, *present, strict=True):
        yield place, _matched(objects, found, order[first:end], by_image[start:stop])


def _best(found: Found, max_detections: int) -> Ints:
    """The places of the detections that count, by image, highest score first."""
    order = np.lexsort((-found.scores, found.classes, found.images))
    group = np.column_stack([found.images, found.classes])[order]
    begins = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]).any(1)][: len(order)])
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.r_[begins, len(order)]))
    counting = np.sort(order[rank < max_detections])
    return counting[np.lexsort((-found.scores[counting], found.images[counting]))]


def _matched(objects: Objects, found: Found, detections: Ints, present: Ints) -> Matched:
    crowds, single = present[objects.crowds[present]], present[~objects.crowds[present]]
    boxes, classes = found.boxes[detections], found.classes[detections]
    common = _common(boxes, objects.boxes[single])
    union = _areas(boxes)[:, None] + _areas(objects.boxes[single]) - common
    overlaps = _ratio(common, union)
    same = classes[:, None] == objects.classes[single]
    free = np.where(same & (overlaps >= MATCHING_IOU), overlaps, 0.0)
    partner = np.full(len(detections), -1)
    for row in np.flatnonzero(free.any(1)).tolist():
        column = int(free[row].argmax())
        if free[row, column] > 0:
            partner[row] = column
            free[:, column] = 0.0
    on_crowd = _ratio(_common(boxes, objects.boxes[crowds]), _areas(boxes)[:, None]) >= MATCHING_IOU
    ignored = (on_crowd & (classes[:, None] == objects.classes[crowds])).any(1) & (partner < 0)
    return Matched(detections, single, overlaps, same, partner, ignored)


def _common(a: Floats, b: Floats) -> Floats:
    """The areas (P, Q) that boxes (P, 4) and (Q, 4) xywh share."""
    first = np.maximum(a[:, None, :2], b[None, :, :2])
    end = np.minimum((a[:, :2] + a[:, 2:])[:, None], (b[:, :2] + b[:, 2:])[None])
    sides: Floats = (end - first).clip(min=0)
    return sides[..., 0] * sides[..., 1]


def _areas(boxes: Floats) -> Floats:
    return boxes[:, 2] * boxes[:, 3]


def _ratio(part: Floats, whole: Floats) -> Floats:
    """0 where both are 0."""
    return part / np.maximum(whole, np.finfo(np.float64).tiny)
