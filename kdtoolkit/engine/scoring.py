"""COCO's average precision, computed on arrays: pycocotools' numbers to the last bit, in a tenth of its time.

The rule, for one class, one range of object areas and one IoU threshold:

- The detections of an image are taken by falling score. Each takes the free object that it overlaps most, if the
  overlap reaches the threshold.
- Crowds, and objects whose area is out of the range, are taken only where no other object can be. A detection that
  takes one does not count. Neither does a detection that takes none and whose own area is out of the range.
- Over all images, precision is read off at 101 recalls.

Source: cocoeval.py of pycocotools 2.0.11, which tests/engine/test_scoring.py compares with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0, 1, 101)
AREAS: Floats = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, small, medium, large
MAX_DETECTIONS = 100  # of an image and class


@dataclass(frozen=True)
class Found:
    """Detections of all images: `images` (D,) and `classes` (D,) are places in the ground truth's lists.

    `boxes` (D, 4) are x, y, width, height in pixels of the original image, `scores` (D,) as the detector gives them.
    """

    images: Ints
    classes: Ints
    boxes: Floats
    scores: Floats

    @staticmethod
    def concatenated(parts: Sequence[Found]) -> Found:
        """The detections of several parts, one after the other."""
        return Found(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Found)))


def precisions(truth: Mapping[str, Any], found: Found) -> Floats:
    """Precisions (10 IoU thresholds, 101 recalls, K classes, 4 ranges of areas) in [0, 1]; -1 where nothing is to find.

    `truth` is in COCO's format. Classes are in the order of their ids, as pycocotools has them.
    """
    images, classes = (_ranks([entry["id"] for entry in truth[name]]) for name in ("images", "categories"))
    count = len(classes)
    objects = _Objects.of(truth, images, classes)
    # By image and class, then by falling score; equal scores stay as they come.
    group = np.array(list(images.values()), np.int64)[found.images] * count
    group += np.array(list(classes.values()), np.int64)[found.classes]
    order = np.lexsort((-found.scores, group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    order = order[place < MAX_DETECTIONS]
    group, boxes, scores = group[order], found.boxes[order], found.scores[order]
    taken, ignored = _match(boxes, group, objects)
    areas = boxes[:, 2] * boxes[:, 3]
    ignored |= ~taken & _outside(areas)[:, None]

    result = np.full((len(IOU_THRESHOLDS), len(RECALLS), count, len(AREAS)), -1.0)
    for each in range(count):
        chosen = np.flatnonzero(group % count == each)
        chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
        to_find = (~objects.ignored[:, objects.group % count == each]).sum(1)
        for area in np.flatnonzero(to_find):
            counts = ~ignored[area][:, chosen]
            hits, misses = (counts & taken[area][:, chosen]), (counts & ~taken[area][:, chosen])
            result[:, :, each, area] = _curve(hits, misses, to_find[area])
    return result


@dataclass(frozen=True)
class _Objects:
    """The annotations, sorted by `group` (G,): image and class. `ignored` (4, G): crowds, and areas out of range."""

    group: Ints
    boxes: Floats
    crowd: Bools
    ignored: Bools

    @staticmethod
    def of(truth: Mapping[str, Any], images: Mapping[Any, int], classes: Mapping[Any, int]) -> _Objects:
        annotations = truth["annotations"]
        group = np.array([images[a["image_id"]] * len(classes) + classes[a["category_id"]] for a in annotations], int)
        order = np.argsort(group, kind="stable")
        crowd = np.array([bool(a.get("iscrowd")) for a in annotations], bool)[order]
        areas = np.array([a["area"] for a in annotations], float)[order]
        boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)[order]
        return _Objects(group[order], boxes, crowd, crowd | _outside(areas))


def _ranks(ids: list[Any]) -> dict[Any, int]:
    """The rank of each id, in the order of the list."""
    sorted_ids = {each: rank for rank, each in enumerate(sorted(ids))}
    return {each: sorted_ids[each] for each in ids}


def _outside(areas: Floats) -> Bools:
    """(4, N): which areas lie out of each range; its bounds are in it."""
    bools: Bools = (areas < AREAS[:, :1]) | (areas > AREAS[:, 1:])
    return bools


def _match(boxes: Floats, group: Ints, objects: _Objects) -> tuple[Bools, Bools]:
    """Which detections take an object, and which of them one that is ignored: both (4 ranges, 10 thresholds, D)."""
    taken, ignored = np.zeros((2, len(AREAS), len(IOU_THRESHOLDS), len(boxes)), bool)
    free = np.ones((len(AREAS), len(IOU_THRESHOLDS), len(objects.group)), bool)
    # All pairs of a detection and an object of its image and class, detection by detection. The last object comes
    # first: of several that overlap equally it is the one to be taken.
    first, last = (np.searchsorted(objects.group, group, side) for side in ("left", "right"))
    detection = np.repeat(np.arange(len(boxes)), last - first)
    nth = np.arange(len(detection)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
    pair = last[detection] - 1 - nth
    overlap = _overlaps(boxes[detection], objects.boxes[pair], objects.crowd[pair])
    near = overlap >= IOU_THRESHOLDS[0]
    detection, pair, overlap = detection[near], pair[near], overlap[near]
    reached = overlap >= IOU_THRESHOLDS[:, None]
    areas, thresholds = np.ix_(range(len(AREAS)), range(len(IOU_THRESHOLDS)))
    detections, starts = np.unique(detection, return_index=True)
    for each, start, stop in zip(detections, starts, np.append(starts, len(detection))[1:], strict=True):
        candidates = pair[start:stop]
        open_ = reached[:, start:stop] & (free[:, :, candidates] | objects.crowd[candidates])
        regular = open_ & ~objects.ignored[:, None, candidates]
        open_ = np.where(regular.any(-1, keepdims=True), regular, open_)
        best = candidates[np.where(open_, overlap[start:stop], -1.0).argmax(-1)]
        takes = open_.any(-1)
        taken[..., each] = takes
        ignored[..., each] = takes & objects.ignored[areas, best]
        free[areas, thresholds, best] &= ~takes
    return taken, ignored


def _overlaps(boxes: Floats, others: Floats, crowd: Bools) -> Floats:
    """IoU (N,) of boxes (N, 4) as x, y, width, height; with a crowd the share of the first box that lies in it."""
    far = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    sides = far - np.maximum(boxes[:, :2], others[:, :2])
    common = np.where((sides > 0).all(1), sides[:, 0] * sides[:, 1], 0.0)
    area, other = boxes[:, 2] * boxes[:, 3], others[:, 2] * others[:, 3]
    union = np.where(crowd, area, area + other - common)
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


def _curve(hits: Bools, misses: Bools, to_find: int) -> Floats:
    """Precision (T, 101) at each recall, of detections by falling score: `hits` and `misses` are (T, D)."""
    right, wrong = (np.cumsum(each, 1, dtype=float) for each in (hits, misses))
    precision = right / (wrong + right + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    # Where a recall is never reached its precision is 0.
    precision = np.concatenate([precision, np.zeros((len(precision), 1))], 1)
    at = [np.searchsorted(recall, RECALLS) for recall in right / to_find]
    return np.take_along_axis(precision, np.array(at), 1)
