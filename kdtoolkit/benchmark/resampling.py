"""AP on other samples of the same images: how much it depends on which images were taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdtoolkit.engine.scoring import MAX_DETECTIONS, Floats, Found, Ints, matched, ranks

_RECALLS: Floats = np.linspace(0, 1, 101)
_AT_ONCE = 50  # samples that a table of samples and detections holds at a time


def resamples(images: int, count: int, seed: int = 0) -> Ints:
    """How often each image is in each of `count` samples of as many images, drawn with replacement: (count, images)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=count)


def resampled_aps(truth: Mapping[str, Any], found: Found, counts: Ints, max_detections: int = MAX_DETECTIONS) -> Floats:
    """COCO's AP in percent on each of several samples of the images (R,); nan on a sample without objects.

    `truth` is in COCO's format. `counts` (R, I): how often each image is in a sample. The AP is that of a data set in
    which the images are that often. Detections and objects are matched once, because the matches in an image do not
    depend on the images beside it.
    """
    total, classes = np.zeros((2, len(counts)))
    for each in _classes(truth, found, max_detections):
        objects = counts @ each.objects
        for start in range(0, len(counts), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            total[part] += _ap(each, counts[part], objects[part])
        classes += objects > 0
    aps: Floats = 100 * np.divide(total, classes, out=np.full(len(counts), np.nan), where=classes > 0)
    return aps


@dataclass(frozen=True)
class _Class:
    """The D detections of a class, highest score first, and its objects.

    `images` (D,): the place of each detection's image. `right`, `ignored` (T, D): whether it has found an object, and
    whether it does not count, at each of T IoU thresholds. `objects` (I,): how many objects that count an image has.
    """

    images: Ints
    right: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: Ints


def _classes(truth: Mapping[str, Any], found: Found, max_detections: int) -> Iterator[_Class]:
    """The matches of each class that has objects."""
    places = {rank: place for place, rank in enumerate(ranks(truth["images"]).values())}
    scoring = matched(truth, found, max_detections, by_area=False)
    by_class: dict[int, list[dict[str, Any]]] = {}
    for each in scoring.evalImgs:
        if each is not None:  # it has neither objects nor detections
            by_class.setdefault(each["category_id"], []).append(each)
    for images in by_class.values():
        objects = np.zeros(len(places), np.int64)
        for each in images:
            objects[places[each["image_id"]]] = np.count_nonzero(np.logical_not(each["gtIgnore"]))
        if objects.any():
            order = np.argsort(-np.concatenate([each["dtScores"] for each in images]), kind="stable")
            image_of = [np.full(len(each["dtScores"]), places[each["image_id"]]) for each in images]
            right, ignored = (
                np.concatenate([np.asarray(each[name], bool) for each in images], axis=1)[:, order]
                for name in ("dtMatches", "dtIgnore")
            )
            yield _Class(np.concatenate(image_of)[order], right & ~ignored, ignored, objects)


def _ap(each: _Class, counts: Ints, objects: Ints) -> Floats:
    """The AP of a class on each sample, in [0, 1]; 0 on a sample without its objects.

    Precision falls between two right detections, so that the largest from a recall on is that of a right one.
    """
    often = counts[:, each.images]  # (R, D)
    until = np.cumsum(often, axis=1)
    aps = np.zeros(len(counts))
    for right, ignored in zip(each.right, each.ignored, strict=True):
        hits, skipped = np.flatnonzero(right), np.flatnonzero(ignored)
        skipped_until = np.cumsum(np.insert(often[:, skipped], 0, 0, axis=1), axis=1)
        right_until = np.cumsum(often[:, hits], axis=1)
        precision = right_until / np.maximum(until[:, hits] - skipped_until[:, np.searchsorted(skipped, hits)], 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for sample in np.flatnonzero(objects).tolist():
            places = np.searchsorted(right_until[sample] / objects[sample], _RECALLS)
            aps[sample] += np.append(precision[sample], 0.0)[places].mean()
    return aps / len(each.right)
