"""Where a detector's average precision comes from, and what costs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from kdtoolkit.engine.matching import MATCHING_IOU, Flags, Matched, Objects, match
from kdtoolkit.engine.scoring import (
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    Floats,
    Found,
    Ints,
    by_class,
    mean_precision,
    precisions,
)

ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")
TOTALS = ("false positive", "false negative")
SIZES = ("small", "medium", "large")
BINS = 10
BACKGROUND_IOU = 0.1  # below it, TIDE takes a detection for one of background

_RECALLS: Floats = np.arange(101) / 100


class Bin(BaseModel):
    """The detections whose score lies in (low, high]; those with a score of 0 are in the first bin.

    `confidence` is their mean score, and `precision` the share of them that are right; both lie in [0, 1] and are None
    if there are no detections. `count` says how many there are (a mean over several detectors need not be whole).
    """

    model_config = ConfigDict(frozen=True)

    low: float
    high: float
    confidence: float | None
    precision: float | None
    count: float


class Breakdown(BaseModel):
    """Where a detector's AP comes from.

    Attributes:
        errors: by how many points AP50 would rise without a kind of error: for each of `ERRORS`, and of `TOTALS`, which
            are all false positives and all false negatives. The values do not add up to 100.
        by_class: AP in percent by the name of the class; None for a class without objects.
        by_size: AP in percent of "small", "medium" and "large" objects; None if there are none.
        by_iou: AP in percent by the IoU that a detection needs, "0.50", "0.55" ... "0.95"; None without objects.
        calibration: ten bins of scores from 0 to 1.
        calibration_error: the mean distance between scores and precision, in [0, 1]; None without detections.
        max_detections: how many detections of an image and class count.
    """

    model_config = ConfigDict(frozen=True)

    errors: dict[str, float]
    by_class: dict[str, float | None]
    by_size: dict[str, float | None]
    by_iou: dict[str, float | None]
    calibration: tuple[Bin, ...]
    calibration_error: float | None
    max_detections: int = MAX_DETECTIONS


def breakdown(truth: Mapping[str, Any], found: Found, *, max_detections: int = MAX_DETECTIONS) -> Breakdown:
    """Where the AP of these detections comes from.

    `truth` is in COCO's format; `images` and `classes` of `found` are places in its lists.

    Errors are TIDE's at an IoU of 0.5 (Bolya et al. 2020, arXiv 2008.08115). A wrong detection has one kind, the first
    that fits:

    - `localisation`: an object of its class overlaps by 0.1 to 0.5.
    - `classification`: an object of a different class overlaps by 0.5 or more.
    - `duplicate`: it overlaps an object of its class by 0.5 or more, and a better detection has found that object.
    - `background`: no object overlaps by more than 0.1.
    - `both`: all others. Class and place are wrong.

    `missed` are the objects that no corrected detection would find. Two things differ from TIDE: classes without
    objects do not count, as in COCO's AP, and `max_detections` of each class count; TIDE takes the best of all classes.

    The calibration error is the detection ECE of Kueppers et al. 2020 (arXiv 2004.13546), by score alone: the distance
    between mean score and precision at an IoU of 0.5 in ten bins, weighted by the number of detections. Detectors give
    many detections of a low score, and these weigh most.
    """
    precision = precisions(truth, found, max_detections)
    judged = _judged(truth, found, max_detections)
    calibration = _calibration(judged)
    return Breakdown(
        errors=_errors(judged),
        by_class=by_class(truth, precision),
        by_size={name: mean_precision(precision[..., place]) for place, name in enumerate(SIZES, 1)},
        by_iou={f"{iou:.2f}": mean_precision(precision[place, ..., 0]) for place, iou in enumerate(IOU_THRESHOLDS)},
        calibration=calibration,
        calibration_error=_calibration_error(calibration),
        max_detections=max_detections,
    )


def mean_breakdown(parts: Sequence[Breakdown]) -> Breakdown:
    """The mean of several detectors' breakdowns on the same images: of values that are not None.

    In each bin of scores, confidence and precision are those of all their detections together.
    """

    def means(name: str) -> dict[str, float | None]:
        return {key: _mean(getattr(part, name).get(key) for part in parts) for key in getattr(parts[0], name)}

    return Breakdown(
        errors={name: value or 0.0 for name, value in means("errors").items()},
        by_class=means("by_class"),
        by_size=means("by_size"),
        by_iou=means("by_iou"),
        calibration=tuple(map(_mean_bin, zip(*(part.calibration for part in parts), strict=True))),
        calibration_error=_mean(part.calibration_error for part in parts),
        max_detections=parts[0].max_detections,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _mean_bin(bins: tuple[Bin, ...]) -> Bin:
    filled = [each for each in bins if each.count]

    def together(name: Literal["confidence", "precision"]) -> float | None:
        if not filled:
            return None
        weighted: float = sum(each.count * getattr(each, name) for each in filled)
        return weighted / sum(each.count for each in filled)

    return bins[0].model_copy(
        update={
            "confidence": together("confidence"),
            "precision": together("precision"),
            "count": fmean(each.count for each in bins),
        }
    )


@dataclass(frozen=True)
class _Judged:
    """Detections (D,), and how many objects of each class (K,) there are.

    `counting`: whether a detection is among those that count, and lies on no crowd. `kinds`: the place of its error in
    `ERRORS`, or one of `_RIGHT` and `_BEYOND`. `corrected`: the class of the object that it would find without its
    error; -1 if there is none. `missed`: objects that no corrected detection would find.
    """

    scores: Floats
    classes: Ints
    counting: Flags
    kinds: Ints
    corrected: Ints
    objects: Ints
    not_found: Ints
    missed: Ints


_RIGHT, _BEYOND = -1, -2  # beyond the detections that count


def _judged(truth: Mapping[str, Any], found: Found, max_detections: int) -> _Judged:
    objects = Objects.of(truth)
    kinds, corrected = np.full(len(found.scores), _BEYOND), np.full(len(found.scores), -1)
    ignored = np.zeros(len(found.scores), bool)
    is_found, is_reachable = np.zeros((2, len(objects.images)), bool)
    for _, image in match(objects, found, max_detections):
        kind, target = _kinds(image)
        aiming = target >= 0
        kinds[image.detections] = kind
        ignored[image.detections] = image.ignored
        corrected[image.detections[aiming]] = objects.classes[image.objects[target[aiming]]]
        is_found[image.objects] = image.found
        is_reachable[image.objects[target[aiming]]] = True

    def count(which: Flags) -> Ints:
        return np.bincount(objects.classes[which & ~objects.crowds], minlength=len(truth["categories"]))

    return _Judged(
        found.scores,
        found.classes,
        (kinds != _BEYOND) & ~ignored,
        kinds,
        corrected,
        count(~objects.crowds),
        count(~is_found),
        count(~is_found & ~is_reachable),
    )


def _kinds(image: Matched) -> tuple[Ints, Ints]:
    """The kind of error of each detection (D,), and the column of the object that it would find without it (D,)."""
    classification, localisation, both, duplicate, background, _ = range(len(ERRORS))
    nothing = np.full(len(image.detections), -1)
    if not len(image.objects):
        return np.full(len(image.detections), background), nothing
    same, different = np.where(image.same, image.overlaps, 0.0), np.where(image.same, 0.0, image.overlaps)
    own = same.max(1)
    kinds = np.select(
        [
            image.right,
            (own >= BACKGROUND_IOU) & (own <= MATCHING_IOU),
            different.max(1) >= MATCHING_IOU,
            np.where(image.found, same, 0.0).max(1) >= MATCHING_IOU,
            image.overlaps.max(1) <= BACKGROUND_IOU,
        ],
        [_RIGHT, localisation, classification, duplicate, background],
        both,
    )
    target = np.select([kinds == localisation, kinds == classification], [same.argmax(1), different.argmax(1)], -1)
    aiming = np.flatnonzero((target >= 0) & ~image.found[target])
    columns, first = np.unique(target[aiming], return_index=True)  # of several, the one with the highest score
    nothing[aiming[first]] = columns
    return kinds, nothing


def _errors(judged: _Judged) -> dict[str, float]:
    right = judged.kinds == _RIGHT

    def ap50(scores: Floats, classes: Ints, right: Flags, counting: Flags, objects: Ints) -> float:
        return _ap50(scores[counting], classes[counting], right[counting], objects, judged.objects > 0)

    now = ap50(judged.scores, judged.classes, right, judged.counting, judged.objects)
    errors = {}
    for kind, name in enumerate(ERRORS):
        corrected = (judged.kinds == kind) & (judged.corrected >= 0)
        without = ap50(
            judged.scores,
            np.where(corrected, judged.corrected, judged.classes),
            right | corrected,
            corrected | (judged.counting & (judged.kinds != kind)),
            judged.objects - judged.missed if name == "missed" else judged.objects,
        )
        errors[name] = max(0.0, without - now)  # steps of recall may lower it by a little
    perfect = right.astype(np.float64)
    totals = (
        ap50(perfect, judged.classes, right, judged.counting, judged.objects),
        ap50(judged.scores, judged.classes, right, judged.counting, judged.objects - judged.not_found),
    )
    return errors | {name: value - now for name, value in zip(TOTALS, totals, strict=True)}


def _ap50(scores: Floats, classes: Ints, right: Flags, objects: Ints, known: Flags) -> float:
    """The mean AP of the `known` classes in percent. One that has neither objects nor detections left is left out."""
    order = np.lexsort((-scores, classes))
    ends = np.searchsorted(classes[order], np.arange(len(objects) + 1))
    aps = [
        _ap(right[order[ends[label] : ends[label + 1]]], int(objects[label]))
        for label in np.flatnonzero(known & ((objects > 0) | (np.diff(ends) > 0))).tolist()
    ]
    return 100 * float(np.mean(aps)) if aps else 100.0  # nothing is left that could be wrong


def _ap(right: Flags, objects: int) -> float:
    """The mean precision at 101 recalls, of a class's detections (D,) from the highest score on."""
    if not objects or not len(right):
        return 0.0
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
    places = np.searchsorted(hits / objects, _RECALLS)
    return float(np.append(precision, 0.0)[places].sum() / len(_RECALLS))


def _calibration(judged: _Judged) -> tuple[Bin, ...]:
    edges = np.arange(BINS + 1) / BINS
    scores, right = judged.scores[judged.counting], (judged.kinds == _RIGHT)[judged.counting]
    places = np.searchsorted(edges[1:-1], scores)

    def bin_of(place: int) -> Bin:
        own = places == place
        confidence, precision = (float(x[own].mean()) for x in (scores, right)) if own.any() else (None, None)
        return Bin(
            low=edges[place], high=edges[place + 1], confidence=confidence, precision=precision, count=int(own.sum())
        )

    return tuple(bin_of(place) for place in range(BINS))


def _calibration_error(bins: tuple[Bin, ...]) -> float | None:
    distances = [
        each.count * abs(each.confidence - each.precision)
        for each in bins
        if each.confidence is not None and each.precision is not None
    ]
    return sum(distances) / sum(each.count for each in bins) if distances else None
