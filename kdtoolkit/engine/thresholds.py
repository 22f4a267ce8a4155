"""Which score a detection needs, chosen so that precision and recall on labelled images are good together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtoolkit.engine.matching import Flags, Objects, match
from kdtoolkit.engine.scoring import Floats, Found

LEAST_PRECISION = 0.5


@dataclass(frozen=True)
class Threshold:
    """The lowest score at which detections of a class are kept, and how good they are then, on labelled images.

    `precision`: the share of kept detections that are right; None if none is kept. `recall`: the share of objects that
    they find. Both lie in [0, 1]. `objects`: how many there are. `score` is None if at the best score more detections
    are wrong than right: then none is worth keeping. If the labelled images have no object of the class, `score` is the
    best for all classes together, and precision and recall are None.
    """

    score: float | None
    precision: float | None
    recall: float | None
    objects: int


def best_thresholds(truth: Mapping[str, Any], found: Found) -> list[Threshold]:
    """For each class of `truth` the score at which F1, the harmonic mean of precision and recall, is largest.

    `truth` is in COCO's format; `images` and `classes` of `found` are places in its lists. Detections and objects are
    matched at an IoU of 0.5 or more, best scores first. Detections of crowds and difficult objects do not count.
    """
    matched = _matched(truth, found)
    scores = np.concatenate([each[0] for each in matched])
    right = np.concatenate([each[1] for each in matched])
    overall = _best(scores, right, sum(each[2] for each in matched))
    return [_best(*each) if each[2] else Threshold(overall.score, None, None, 0) for each in matched]


def at_score(truth: Mapping[str, Any], found: Found, score: float) -> list[Threshold]:
    """For each class the precision and recall at a given score. The arguments are those of `best_thresholds`."""
    result = []
    for scores, right, objects in _matched(truth, found):
        kept = scores >= score
        hits = int(right[kept].sum())
        precision = hits / int(kept.sum()) if kept.any() else None
        result.append(Threshold(score, precision, hits / objects if objects else None, objects))
    return result


def _best(scores: Floats, right: Flags, objects: int) -> Threshold:
    """The threshold with the largest F1. The arguments are what `_matched` returns."""
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    hits = np.cumsum(right)
    kept = np.arange(1, len(scores) + 1)
    last_of_score = np.append(scores[1:] < scores[:-1], True)[: len(scores)]  # equal scores are kept together
    f1 = np.where(last_of_score, 2 * hits / (kept + objects), -1)
    if not len(scores) or f1.max() <= 0:
        return Threshold(None, None, 0.0, objects)
    best = int(f1.argmax())
    following = scores[best + 1] if best + 1 < len(scores) else 0.0
    score = float((scores[best] + following) / 2)  # the middle holds best on images that are only similar
    precision = float(hits[best] / kept[best])
    return Threshold(score if precision >= LEAST_PRECISION else None, precision, float(hits[best] / objects), objects)


def _matched(truth: Mapping[str, Any], found: Found) -> list[tuple[Floats, Flags, int]]:
    """For each class the scores (D,) of its detections, which of them are right (D,), and the number of its objects.

    Detections that lie on a crowd are left out.
    """
    objects = Objects.of(truth)
    right, ignored = np.zeros((2, len(found.scores)), bool)
    for _, image in match(objects, found, max_detections=len(found.scores)):
        right[image.detections] = image.right
        ignored[image.detections] = image.ignored
    counts = np.bincount(objects.classes[~objects.crowds], minlength=len(truth["categories"]))
    own = [(found.classes == label) & ~ignored for label in range(len(counts))]
    return [(found.scores[kept], right[kept], int(count)) for kept, count in zip(own, counts, strict=True)]
